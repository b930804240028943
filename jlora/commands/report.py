"""What a run leaves to look at: report.json and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jlora.io.beside import beside, put

BLUE, GREY = "#2a6f97", "#adb5bd"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write beside, then rename."""
    put(path, (json.dumps(report, indent=1) + "\n").encode())


def picture(records: list[dict[str, Any]], report: dict[str, Any], path: Path) -> Path:
    """Loss by step, and exact answers (or right labels) before and after where they were counted, as a PNG.

    Raises ImportError without matplotlib.
    """
    try:
        import matplotlib.figure as mpl
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'jlora[plot]'") from None
    share = next((name for name in ("exact", "accuracy") if name in report.get("after", {})), None)
    judged = share is not None
    figure = mpl.Figure(figsize=(9 if judged else 5.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    steps = [r for r in records if r["kind"] == "train"]
    held = [r for r in records if r["kind"] == "eval"]
    axes[0].plot([r["step"] for r in steps], [r["loss"] for r in steps], color=BLUE, label="training")
    if held:
        axes[0].plot([r["step"] for r in held], [r["loss"] for r in held], "o-", color="#bc6c25", label="held out")
        axes[0].legend(frameon=False)
    axes[0].set(xlabel="step", ylabel="loss on the answer (nats a token)", yscale="log", title="training")
    if judged:
        values = [100 * report[when][share] for when in ("before", "after")]
        bars = axes[1].bar(["before", "after"], values, color=[GREY, BLUE])
        axes[1].bar_label(bars, fmt="%.1f %%")
        count = report["after"].get("examples")
        title = f"{count:.0f} held-out examples" if count else "held-out examples"
        axes[1].set(ylim=(0, 105), ylabel="exact answers, %" if share == "exact" else "right, %", title=title)
    with beside(path) as (part,):
        figure.savefig(part, dpi=120, format="png")
    return path
