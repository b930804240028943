"""Tables, figures and pages of the results that are there.

    python -m experiments.report            # experiments/README.md, experiments/results/*.png, build/results.html

README.md and the page say the same: the claims, then a section an experiment. Nothing is run.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import json
import re
import textwrap
from html import escape
from pathlib import Path
from typing import Any

from experiments.all import NAMES, RESULTS, experiment
from experiments.paper.cells import Experiment, Kept
from experiments.paper.claims import CLAIMS, KEY, summary
from experiments.paper.tables import Shown, Table
from jlora.commands.html import STYLE

README = Path(__file__).parent / "README.md"
PAGE = Path("build/results.html")
INTRO = """The paper is [Hu et al. 2021](https://arxiv.org/abs/2106.09685), version 2. What is here was run on two
CPU cores with two small models, MiniLM (22M parameters, in RoBERTa's place) and SmolLM2 (135M, in GPT-2's), few
steps, and the seeds that each table states. No rate is chosen on the rows that count: those of glue, few,
combined, e2e and dimension are searched on rows held out of train (WebNLG and DART take E2E's), those of which,
why, shots, quantised, forgetting, preference, domains and methods.py are one guess each. GLUE's steps were raised
once with those rows in sight, as is said there. Cells were run while the library grew, and run anew they differ
as another seed would: its batches of several padded lengths are cut otherwise since. All of it shows that the
methods do what they should and whether the paper's findings hold at this size; the paper's own figures need its
models, whose recipes are in `experiments/recipes.py`."""
COMMANDS = """    pip install -e ".[demo,eval]" nltk pycocoevalcap      # and Java, for METEOR
    python -m experiments.all --budget 8h       # goes on from experiments/results, cell by cell
    python -m experiments.all --small --output build/small
    python -m experiments.report                # this file, the figures, build/results.html
    python -m experiments.recipes               # the paper's own models: settings and figures to hold them against"""
FILES = """Files of GLUE, E2E, WebNLG and DART lie below `$JLORA_SHARED/data` (`experiments/paper/works.py`); models and
snippets come by pip."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One experiment as it stands: how many of its cells are there, and what they show."""

    about: Experiment
    done: int
    of: int
    shown: Shown

    @property
    def state(self) -> str:
        return "complete" if self.done == self.of else f"{self.done} of {self.of} cells"

    @property
    def command(self) -> str:
        return f"`python -m experiments.all {self.about.name}`: {self.state}."


def parts(folder: Path, small: bool = False) -> tuple[list[Part], dict[str, Any]]:
    """(every experiment's part, results by experiment)."""
    out, results = [], {}
    for name in NAMES:
        one = experiment(name)
        config = one.small if small else one.config
        done = Kept(folder, name, dataclasses.asdict(config)).results
        names = [cell.name for cell in one.cells(config)]
        out.append(Part(one, sum(name in done for name in names), len(names), one.show(config, done)))
        results[name] = done
    beside = folder / "methods.json"  # of experiments/methods.py
    results["methods"] = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    return out, results


def key(results: dict[str, Any]) -> str:
    return f"{KEY} Of {len(CLAIMS)} claims: {summary(results)}."


def claims(results: dict[str, Any]) -> Table:
    rows = []
    for claim in CLAIMS:
        here = claim.here(results)
        rows.append([claim.claim, claim.paper, here or "not run yet", claim.holds(results) or ("" if here else "open")])
        rows[-1].append(f"`{claim.how}`")
    return Table(["claim", "the paper", "here", "holds", "run"], rows)


def markdown(found: list[Part], results: dict[str, Any]) -> str:
    """README.md."""
    out = ["# The paper, run here", INTRO, COMMANDS, FILES, "## Claims", key(results), claims(results).markdown()]
    for part in found:
        if not part.done:
            continue
        out += [f"## {part.about.title}", part.command]
        out += [part.shown.text] if part.shown.text else []
        out += [table.markdown() for table in part.shown.tables]
        out += [f"![{figure.caption}](results/{figure.name}.png)" for figure in part.shown.figures]
    out += not_run(found)
    return "\n\n".join(out) + "\n"


def not_run(found: list[Part]) -> list[str]:
    left = [f"{part.about.name} ({part.about.title})" for part in found if not part.done]
    return [f"Not run yet: {'; '.join(left)}."] if left else []


SORT = """document.querySelectorAll('th').forEach(th => {
  th.tabIndex = 0
  th.onkeydown = event => { if (event.key === 'Enter') th.click() }
  th.onclick = () => {
    const table = th.closest('table'), heads = [...th.parentNode.children], at = heads.indexOf(th)
    const up = th.ariaSort !== 'ascending'
    heads.forEach(head => head.ariaSort = null)
    th.ariaSort = up ? 'ascending' : 'descending'
    const key = row => { const text = row.children[at].innerText, x = parseFloat(text.replace(/,/g, ''))
      return isNaN(x) ? text : x }
    const order = (x, y) => typeof x === typeof y ? (x > y) - (x < y) : typeof x === 'number' ? -1 : 1
    const rows = [...table.rows].slice(1), held = rows.filter(row => key(row) !== '')
    held.sort((a, b) => order(key(a), key(b)) * (up ? 1 : -1))
    table.append(...held, ...rows.filter(row => key(row) === '')) } })"""
SORTS = "A click on the head of a column sorts the table by it, another one the other way."
MORE = """body { max-width: 76rem } img { max-width: 100%; background: #fff }
.wide, pre { overflow-x: auto } pre { white-space: pre }
.wide td, .wide th { overflow-wrap: normal; min-width: 5rem }
th { cursor: pointer; white-space: normal } th[aria-sort=ascending]::after { content: " \\2191" }
th[aria-sort=descending]::after { content: " \\2193" }"""


def page(found: list[Part], results: dict[str, Any]) -> str:
    """The same in one HTML file; a click on a column's head sorts by it."""
    commands = escape(textwrap.dedent(COMMANDS))
    out = ["<h1>The paper, run here</h1>", paragraphs(INTRO), f"<pre>{commands}</pre>", paragraphs(FILES)]
    out += [f'<p class="key">{SORTS}</p>', "<h2>Claims</h2>", paragraphs(key(results)), html(claims(results))]
    for part in found:
        if not part.done:
            continue
        out += [f"<h2>{escape(part.about.title)}</h2>", paragraphs(part.command), paragraphs(part.shown.text)]
        out += [html(table) for table in part.shown.tables]
        for figure in part.shown.figures:
            data = base64.b64encode(png(figure.drawn)).decode()
            caption = escape(figure.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            out.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    out += [paragraphs(text) for text in not_run(found)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    body = "\n".join(out)
    head += f"<title>The paper, run here</title><style>{STYLE}{MORE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n<script>{SORT}</script></body></html>\n'


def paragraphs(text: str) -> str:
    return "\n".join(f"<p>{marked(part)}</p>" for part in text.split("\n\n") if part)


def marked(text: str) -> str:
    """Links, emphasis and code of Markdown as HTML."""
    linked = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', escape(text))
    linked = re.sub(r"\*(\w[^*]*\w)\*", r"<em>\1</em>", linked)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", linked)


def html(table: Table) -> str:
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{marked(cell)}</{tag}>" for cell in cells) + "</tr>"
    lines = [row(table.head, "th"), *(row(cells, "td") for cells in table.rows)]
    return f'{paragraphs(table.note)}<div class="wide"><table>{"".join(lines)}</table></div>'


def png(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def put(path: Path, data: bytes) -> None:
    """Written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    beside.replace(path)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--results", type=Path, default=RESULTS)
    words.add_argument("--readme", type=Path, default=README)
    words.add_argument("--page", type=Path, default=PAGE)
    words.add_argument("--small", action="store_true", help="the results are those of `all --small`")
    given = words.parse_args()
    found, results = parts(given.results, given.small)
    for part in found:
        for figure in part.shown.figures:
            put(given.readme.parent / "results" / f"{figure.name}.png", png(figure.drawn))
    put(given.page, page(found, results).encode())
    put(given.readme, markdown(found, results).encode())
    print(f"{given.readme}, {given.page}: {sum(part.done for part in found)} of {sum(part.of for part in found)} cells")


if __name__ == "__main__":
    main()
