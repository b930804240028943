"""Results as tables in Markdown and one plot. Every sentence about a target is computed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.bench.figures import ratio, step_flops


def page(results: dict[str, Any]) -> str:
    made = [machine(results["machine"])] if "machine" in results else []
    for name, title in (("step", "All linear layers"), ("more", "The same, other peers"), ("qv", "q and v alone")):
        if name in results:
            made.append(step_table(results[name], title))
    if "growth" in results:
        made.append(growth_table(results["growth"]))
    if "movies" in results:
        made.append(movies_table(results["movies"]))
    if "starts" in results:
        made.append(
            "| paid once | seconds |\n|---|---|\n"
            + "\n".join(f"| {n} | {s:.2f} |" for n, s in results["starts"].items())
        )
    return "\n\n".join(made) + "\n"


def machine(found: dict[str, Any]) -> str:
    return f"{found['processor']}, {found['cores']} cores, JAX {found['jax']}, Python {found['python']}."


def least_seconds(found: dict[str, Any]) -> float:
    """Of the matrix products alone, at the faster of the two peaks measured beside the run."""
    case = found["case"]
    flops = step_flops(case["batch"] * case["seq"], case["rank"], case["targets"])
    return flops / max(found["matmul_peak_gflops"]) / 1e9


def step_table(found: dict[str, Any], title: str) -> str:
    case, runs = found["case"], found["contestants"]
    ours = runs["jlora"]
    floor = least_seconds(found)
    lines = [
        f"**{title}**: SmolLM2-135M, {case['batch']} x {case['seq']} tokens, float32, rank {case['rank']}, every token "
        f"a label, {len(ours['wall'])} rounds in turn. The machine's matrix products peak at "
        f"{max(found['matmul_peak_gflops']):.0f} GFLOP/s; at that rate the step's take {floor:.2f} s, and jlora's "
        f"fastest step is {min(ours['wall']) / floor:.2f} x that{own_of(found)}.",
        "",
        "| | median s | least s | x jlora's time (95 %) | CPU s | temporaries MB | peak resident MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        if "refused" in run:
            lines.append(f"| {name} | did not run: {run['refused'][:120]} | | | | | |")
            continue
        times, low, high = ratio(run["wall"], ours["wall"])
        temporaries = f"{run['temporaries'] / 1e6:.0f}" if "temporaries" in run else ""
        lines.append(
            f"| {name} | {statistics.median(run['wall']):.2f} | {min(run['wall']):.2f} "
            f"| {times:.2f} ({low:.2f}-{high:.2f}) | {statistics.median(run['cpu']):.2f} | {temporaries} "
            f"| {run['peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def own_of(found: dict[str, Any]) -> str:
    if "own_products" not in found:
        return ""
    own = found["own_products"]
    return (
        f"; at their own shapes, by themselves, they take {own:.2f} s, and the step is "
        f"{min(found['contestants']['jlora']['wall']) / own:.2f} x that"
    )


def growth_table(found: dict[str, Any]) -> str:
    lines = ["| tokens a step | least s | temporaries MB |", "|---|---|---|"]
    lines += [f"| {n} | {min(r['wall']):.2f} | {r['temporaries'] / 1e6:.0f} |" for n, r in found["tokens"].items()]
    lines += ["", "| vocabulary (64 labels at a time) | least s | temporaries MB |", "|---|---|---|"]
    lines += [f"| {n} | {min(r['wall']):.2f} | {r['temporaries'] / 1e6:.0f} |" for n, r in found["vocabulary"].items()]
    return "\n".join(lines)


def movies_table(found: dict[str, Any]) -> str:
    lines = [
        "**End to end** on movie-review snippets (q and v, batches of 16, training and evaluation):",
        "",
        "| | useful tokens/s | whole process s | right answers |",
        "|---|---|---|---|",
    ]
    for name, run in found.items():
        if isinstance(run, dict):
            rate, whole, right = (statistics.median(run[k]) for k in ("tokens_per_second", "whole_process", "right"))
            lines.append(f"| {name} | {rate:.0f} | {whole:.0f} | {right:.1%} |")
    times, low, high = found["ratio"]
    lines += ["", f"jlora's rate is {times:.2f} x ({low:.2f}-{high:.2f}) PEFT's; of the whole process, "]
    lines[-1] += f"start-up and compilation included, {found['ratio_whole'][0]:.2f} x."
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Seconds a step of each contestant: a dot a round, a bar at the median, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(n, t) for n, t in (("step", "all linear layers"), ("qv", "q and v")) if n in results]
    runs = {n: {k: r for k, r in results[n]["contestants"].items() if "refused" not in r} for n, _ in panels}
    sizes = [len(runs[n]) for n, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7, 1.2 + 0.36 * sum(sizes)), height_ratios=sizes, squeeze=False, sharex=True
    )
    for ax, (name, title) in zip(axes[:, 0], panels, strict=True):
        for row, (who, run) in enumerate(runs[name].items()):
            colour = "#c44e52" if who.startswith("jlora") else "#4c72b0"
            ax.barh(row, statistics.median(run["wall"]), color=colour, alpha=0.35)
            ax.plot(run["wall"], [row] * len(run["wall"]), ".", color=colour, markersize=4)
        ax.axvline(least_seconds(results[name]), color="0.3", linestyle=":", linewidth=1)
        ax.set_yticks(range(len(runs[name])), runs[name])
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds a step (bar: median; dots: rounds; dotted: products alone)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
