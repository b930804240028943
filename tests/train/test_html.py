"""The report in a real Chromium: nothing wider than the screen, nothing fetched, both colour schemes legible."""

import json
import re
import shutil
import subprocess

import pytest

from jlora.commands.html import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = {"loss": 2.0, "token_accuracy": 0.1, "exact": 0.0, "first": 0.2}
REPORT = {
    "step": 20,
    "before": FIGURES,
    "after": {**FIGURES, "loss": 0.5},
    "samples": [{"prompt": "<script>alert(1)</script>" + "x" * 300, "want": "a", "before": "b", "after": "c"}],
}
RECORDS = [{"kind": "train", "step": n, "loss": 2 / n} for n in range(1, 21)] + [
    {"kind": "eval", "step": 10, "loss": 1}
]


def text():
    return page(REPORT, RECORDS, {"model": "m", "data": "d.jsonl", "output": "run"}, {"rows": 9})


def test_it_holds_everything_and_escapes_text():
    html = text()
    assert "<script" not in html and "&lt;script&gt;" in html and "http" not in html
    assert len(re.search(r'<polyline points="([^"]*)"', html)[1].split()) == 20
    assert html.count("<circle") == 3 and "0.5" in html


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_others_in_the_chart(loss):
    report = {**REPORT, "after": {**FIGURES, "loss": loss}}
    more = [{"kind": kind, "step": 15, "loss": loss} for kind in ("train", "eval")]
    chart = re.search("<svg.*</svg>", page(report, RECORDS + more, {"model": "m", "data": "d"}, {}), re.DOTALL)[0]
    assert "nan" not in chart and "inf" not in chart
    assert len(re.search(r'<polyline points="([^"]*)"', chart)[1].split()) == 20 and chart.count("<circle") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_has_contrast_in_chromium(tmp_path, width, dark):
    # a frame of the wanted width (a window of less than 500 px is not to be had), measured by a script beside the page
    (tmp_path / "report.html").write_text(text())
    probe = """<body style="margin:0"><iframe id=f style="border:0;width:%dpx;height:900px" src=report.html></iframe>
    <pre id=out></pre><script>window.onload = () => { const d = f.contentDocument, e = d.documentElement
    const s = f.contentWindow.getComputedStyle(d.body)
    out.textContent = JSON.stringify([e.scrollWidth, e.clientWidth, s.color, s.backgroundColor]) }</script>"""
    (tmp_path / "probe.html").write_text(probe % width)
    args = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    args += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    if dark:
        args.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run(
        [*args, "--dump-dom", f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=60
    )
    found = re.search(r'<pre id="out">(\[.*?\])</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    scroll, client, ink, back = json.loads(found[1])
    assert width - 20 <= client <= width and scroll <= client  # less a scroll bar
    light = lambda colour: sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert abs(light(ink) - light(back)) > 150 and (light(back) < 60) == dark
    assert "CONSOLE" not in done.stderr
