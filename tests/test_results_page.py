"""The results page in a real Chromium: it fits, wide tables scroll in themselves, figures are drawn, columns sort."""

import pytest

from experiments.all import RESULTS
from experiments.report import page, parts
from tests.serve.chromium import BINARY, Chromium

pytestmark = pytest.mark.skipif(BINARY is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "results.html").write_text(page(*parts(RESULTS)))
    tab = Chromium(tmp_path_factory.mktemp("profile"))
    tab.url = f"file://{folder}/results.html"
    yield tab
    tab.close()
    assert not tab.errors


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_shows_its_figures(tab, width, dark):
    tab.open(tab.url, width, 900, dark)
    assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.run("document.images.length") and tab.run("[...document.images].every(one => one.naturalWidth > 300)")
    broken = "[...document.querySelectorAll('.wide td, .wide th')].filter(one => one.scrollWidth > one.clientWidth)"
    assert tab.run(f"{broken}.length") == 0
    ink, back = (tab.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = lambda colour: sum(int(part) for part in colour.strip("rgb()").split(",")[:3]) / 3
    assert abs(light(ink) - light(back)) > 150 and (light(back) < 60) == dark


def test_its_words_stay_whole_on_a_phone(tab):
    tab.open(tab.url, 400, 900)
    lines = "(() => { const range = document.createRange(), td = document.querySelector('td')"
    lines += "; range.setStart(td.firstChild, 0); range.setEnd(td.firstChild, td.innerText.indexOf(' '))"
    lines += "; return range.getClientRects().length })()"
    assert tab.run(lines) == 1, "the first word of the first claim is on one line"


def test_a_click_or_enter_on_a_head_sorts(tab):
    tab.open(tab.url)
    find = "[...document.querySelectorAll('th')].filter(one => one.innerText.trim().startsWith('step 150'))[0]"
    column = f"[...{find}.closest('table').rows].slice(1).map(row => row.children[{find}.cellIndex].innerText)"
    before = tab.run(column)
    tab.run(f"{find}.click()")
    numbers = [float(one) for one in tab.run(column)]
    assert numbers == sorted(numbers) and len(numbers) == len(before) > 5 and tab.run(column) != before
    tab.run(f"{find}.focus()")
    tab.press("Enter", 13)
    assert [float(one) for one in tab.run(column)] == sorted(numbers, reverse=True)
    assert tab.run(f"{find}.ariaSort") == "descending"


def test_empty_cells_stay_last(tab):
    tab.open(tab.url)
    tab.run("document.body.insertAdjacentHTML('beforeend', '<table id=t><tr><th>n</th></tr></table>')")
    for text in ("2", "", "1,000", "30.5 ± 1"):
        tab.run(f"t.insertAdjacentHTML('beforeend', '<tr><td>{text}</td></tr>')")
    tab.run("document.querySelectorAll('script').forEach(one => eval(one.innerText))")
    column = "[...t.rows].slice(1).map(row => row.innerText)"
    for want in (["2", "30.5 ± 1", "1,000", ""], ["1,000", "30.5 ± 1", "2", ""]):
        tab.run("t.querySelector('th').click()")
        assert tab.run(column) == want
