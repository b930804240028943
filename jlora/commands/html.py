"""report.html: one page with everything in it (no script, no network): curves, figures, samples, data, settings."""

from __future__ import annotations

import math
import platform
from collections import Counter
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jlora.io.beside import put

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff; --a: #2a6f97;
  --b: #b5541c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #3b434c; --back: #0f1318;
  --a: #6cb6dd; --b: #f0a35e } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .3rem .6rem
  .3rem 0; border-bottom: 1px solid var(--line) } th { font-weight: 600; color: var(--soft);
  white-space: nowrap }
pre { white-space: pre-wrap; margin: 0; font-size: .9rem } svg { width: 100%; height: auto }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif } .key { color: var(--soft) }
.a { color: var(--a) } .b { color: var(--b) } .narrow { max-width: 26rem }
"""


def page(report: dict[str, Any], records: list[dict[str, Any]], settings: dict[str, Any], data: dict[str, Any]) -> str:
    """The page of one run. `records` as `Metrics.read` gives them."""
    steps, held = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    ends = [{"step": at, **report[name]} for name, at in (("before", 0), ("after", report["step"])) if name in report]
    held = sorted({r["step"]: r for r in [*held, *ends]}.values(), key=lambda r: r["step"])
    parts = [f"<h1>{escape(str(settings.get('output', 'run')))}</h1>"]
    parts.append(f"<p>{escape(str(settings['model']))} on {escape(str(settings['data']))}, {report['step']} steps</p>")
    lines = [(r["step"], r["loss"]) for r in steps if r["step"]]
    parts.append("<h2>Loss</h2>")
    parts.append('<p class="key"><span class="a">&#9632; training</span> <span class="b">&#9632; held out</span></p>')
    parts.append(chart(lines, [(r["step"], r["loss"]) for r in held]))
    if len(ends) == 2:
        names = [name for name in ends[0] if name in ends[1] and name not in ("step", "tokens")]
        rows = [[name, *(f"{end[name]:.4g}" for end in ends)] for name in names]
        parts += ["<h2>Held-out rows</h2>", grid(["", "before", "after"], rows)]
    if report.get("samples"):
        parts.append("<h2>Samples</h2>")
        for sample in report["samples"]:
            during = {f"step {step}": text for step, text in sample.get("during", {}).items()}
            told = {**{name: sample[name] for name in ("prompt", "want", "before")}, **during, "after": sample["after"]}
            parts.append(grid(None, [[name, f"<pre>{escape(str(x))}</pre>"] for name, x in told.items()], safe=True))
    here = {name: version(name) for name in ("jlora", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")}
    devices = Counter(f"{d.platform} {d.device_kind}" for d in jax.devices())
    here |= {"python": platform.python_version(), "system": platform.platform(terse=True)}
    here |= {"devices": ", ".join(f"{count} x {name}" for name, count in devices.items())}
    pace = {**report.get("pace", {}), "skipped_steps": report.get("skipped", 0)}
    for title, held_in in (("Data", data), ("Pace", pace), ("Settings", settings), ("Environment", here)):
        parts += [f"<h2>{title}</h2>", grid(None, [[str(k), plain(v)] for k, v in held_in.items()])]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    icon = '<link rel="icon" href="data:,">'
    return f'<!doctype html><html lang="en"><head>{head}{icon}<title>jlora run</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'  # noqa: E501


def plain(value: Any) -> str:
    """A figure as people write it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(x)}" for name, x in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)


def grid(head: list[str] | None, rows: list[list[str]], safe: bool = False) -> str:
    """A table; cells are escaped, but for those of `safe` rows after the first."""
    out = ["<table>"]
    if head:
        out.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    for name, *cells in rows:
        rest = "".join(f"<td>{cell if safe else escape(cell)}</td>" for cell in cells)
        out.append(f'<tr><th scope="row">{escape(name)}</th>{rest}</tr>')
    return "".join([*out, "</table>"])


def chart(lines: list[tuple[int, float]], dots: list[tuple[int, float]]) -> str:
    """An SVG of loss by step: a line for `lines`, joined dots for `dots`; what is not finite has no place in it."""
    lines, dots = ([(x, y) for x, y in points if math.isfinite(y)] for points in (lines, dots))
    points = [*lines, *dots]
    if not points:
        return "<p>no step was taken</p>"
    wide, high, left, low = 640, 260, 48, 24
    far = max(x for x, _ in points) or 1
    least, most = min(y for _, y in points), max(y for _, y in points)
    least, most = (least, most) if most > least else (least - 1, most + 1)
    at = lambda x, y: (left + (wide - left - 8) * x / far, 8 + (high - low - 8) * (most - y) / (most - least))
    path = lambda pts: " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*p) for p in pts))
    out = [f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="loss by step">']
    for n in range(5):
        value = least + (most - least) * n / 4
        y = at(0, value)[1]
        out.append(f'<path d="M{left} {y:.1f}H{wide}" stroke="var(--line)"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for n in range(0, 5):
        x = far * n / 4
        anchor = "end" if n == 4 else "middle"
        out.append(f'<text x="{at(x, 0)[0]:.1f}" y="{high - 6}" text-anchor="{anchor}">{x:.0f}</text>')
    for points, colour in ((lines, "--a"), (dots, "--b")):
        out.append(f'<polyline points="{path(points)}" fill="none" stroke="var({colour})" stroke-width="2"/>')
    out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="var(--b)"/>' for a, b in (at(*p) for p in dots)]
    return "".join([*out, "</svg>"])


def write_page(path: Path, *parts: Any) -> Path:
    """`page(*parts)`, written beside and renamed."""
    put(path, page(*parts).encode())
    return path
