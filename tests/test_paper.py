"""The experiments' machinery: cells are kept and gone on from, a fit is `jlora train`'s, figures are what they say."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments.all import NAMES, experiment
from experiments.paper import nlg, spectra
from experiments.paper.cells import Budget, Cell, Experiment, Kept, duration, run
from experiments.paper.chosen import beyond, of, tuned
from experiments.paper.e2e import grouped, some
from experiments.paper.fits import Work
from experiments.paper.tables import Shown, Table, cell, mean
from jlora.analysis import amplification, similarity
from jlora.commands.settings import TrainConfig
from jlora.commands.train import train
from jlora.data import Row
from jlora.data.tokens import prompt_ids, text_ids
from jlora.io import load
from jlora.io.adapters import load_adapter
from tests.small import rows, small_model


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 3


def counting(ran):
    def make(config):
        one = lambda n: lambda done: ran.append(n) or {"n": n, "before": len(done)}
        return [Cell(f"cell {n}", one(n)) for n in range(config.count)]

    return Experiment("counted", "", Config(), Config(1), make, lambda config, done: Shown())


def test_cells_are_kept_and_gone_on_from(tmp_path):
    ran = []
    one = counting(ran)
    assert run(one, Config(), tmp_path, Budget(None), only="[01]") == 0 and ran == [0, 1]
    assert run(one, Config(), tmp_path, Budget(None)) == 0 and ran == [0, 1, 2]
    held = json.loads((tmp_path / "counted.json").read_text())
    assert held["settings"] == {"count": 3} and held["cells"]["cell 2"]["before"] == 2
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match=r"count.*3.*4"):
        Kept(tmp_path, "counted", {"count": 4})


def test_a_budget_ends_before_a_cell_that_would_outlast_it(tmp_path):
    ran = []
    one = counting(ran)
    Kept(tmp_path, "counted", {"count": 3}).put("cell 0", {"seconds": 1e6})
    assert run(one, Config(), tmp_path, Budget(60)) == 2 and ran == []
    assert [duration(text) for text in ("8h", "90m", "1h30m", "5s")] == [28800, 5400, 5400, 5]
    for wrong in ("", "8", "h"):
        with pytest.raises(ValueError, match="budget"):
            duration(wrong)


def test_what_is_not_here_is_said_and_left_out(tmp_path, capsys):
    def absent(done):
        raise FileNotFoundError("no folder glue")

    one = dataclasses.replace(counting([]), cells=lambda config: [Cell("a", absent), Cell("b", absent)])
    assert run(one, Config(), tmp_path, Budget(None)) == 2
    assert "left out: no folder glue" in capsys.readouterr().err


def test_the_rate_is_chosen_on_the_split_and_judged_on_dev(tmp_path):
    seen = []

    def fit(rate, seed, test):
        seen.append((rate, seed, test))
        return {"score": -abs(rate - 0.1)}

    one = dataclasses.replace(counting([]), cells=lambda config: tuned("task/lora", (0.01, 0.1, 1.0), 2, fit))
    run(one, Config(), tmp_path, Budget(None))
    assert {test for _, seed, test in seen if seed == 100} == {"split"}
    assert [(rate, test) for rate, seed, test in seen if seed != 100] == [(0.1, "dev")] * 2
    done = json.loads((tmp_path / "counted.json").read_text())["cells"]
    assert of(done, "task/lora") == [0.0, 0.0] and of(done, "task/lora", "rate") == [0.1, 0.1]

    assert "score" not in done["task/lora/one further"], "the best is within the grid"

    seen.clear()
    more = dataclasses.replace(one, cells=lambda config: tuned("other/lora", (0.01, 0.1), 1, fit, like="task/lora"))
    run(more, Config(), tmp_path, Budget(None))
    assert seen == [(0.1, 0, "dev")], "no search of its own"


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [(10.0, [1.0, 3.0, 9.0], 9.0), (0.01, [1.0, 3.0, 0.3], 0.3), (3.2, [1.0, 3.0, 9.0], 3.0)],
)
def test_a_search_goes_one_step_beyond_an_end_that_is_best(tmp_path, best, tried, chosen):
    seen = []

    def fit(rate, seed, test):
        seen.append(rate)
        return {"score": -abs(rate - best)}

    one = dataclasses.replace(counting([]), cells=lambda config: tuned("task/lora", (1.0, 3.0), 1, fit))
    run(one, Config(), tmp_path, Budget(None))
    assert seen == [*tried, chosen]
    assert beyond((0.3, 1.0, 3.0), 1.0) is None and beyond((1.0,), 1.0) is None


def test_rows_are_drawn_from_all_of_a_sorted_file():
    drawn = some(list(range(100)), 10)
    assert drawn == some(list(range(100)), 10) == sorted(drawn) and len(drawn) == 10 and max(drawn) > 50
    assert some([1, 2], 10) == [1, 2]


def test_a_fit_is_what_train_does(tmp_path):
    source, data = small_model(tmp_path / "model"), rows(tmp_path)
    same = {"batch": 4, "rank": 3, "targets": ("q_proj", "v_proj"), "max_length": 32, "remat": "none"}
    config = TrainConfig(source, data, held_out=12, steps=6, learning_rate=3e-3, seed=2, **same)
    report = train(dataclasses.replace(config, output=str(tmp_path / "run"), samples=0))
    want = load_adapter(load(source), tmp_path / "run" / "adapter")[1]

    from jlora.commands.train import rows_to_use

    training, held = rows_to_use(config)
    work = Work(TrainConfig(source, data, **same), training, {"held out": held})
    steps = []
    work.fit({}, rate=1e-2, steps=2)  # another rate before it: the compiled step is one for all
    fitted = work.fit({}, rate=3e-3, steps=6, seed=2, after=lambda n, now: steps.append((n, len(now.losses))))
    assert len(work.programs) == 1 and steps == [(n, n) for n in range(7)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fitted.trained, want)
    assert fitted.judge("held out")["loss"] == pytest.approx(report["after"]["loss"], abs=1e-4)
    assert fitted.count == sum(leaf.size for leaf in jax.tree.leaves(want))


def test_overlaps_and_amplification():
    a, b, w = (np.random.default_rng(n).standard_normal(s) for n, s in enumerate([(20, 4), (20, 6), (20, 12)]))
    phi = spectra.overlaps(spectra.basis(a), spectra.basis(b))
    for i, j in ((1, 1), (1, 6), (4, 2), (4, 6)):
        assert phi[i - 1, j - 1] == pytest.approx(float(similarity(a, b, i, j)), abs=1e-5)
    assert spectra.overlaps(spectra.basis(a), spectra.basis(a))[-1, -1] == pytest.approx(1)
    right = np.random.default_rng(9).standard_normal((4, 12))
    change = spectra.svd_of_product(2.0 * a, right)
    np.testing.assert_allclose((change[0] * change[1]) @ change[2], 2.0 * a @ right, atol=1e-9)
    found, want = spectra.amplified(w, spectra.svd(w), change, 3), amplification(w, a, right, 2.0, 3)
    named = {"of change": "task", "change": "delta", "factor": "factor", "W": "weight"}
    assert all(found[ours] == pytest.approx(float(want[theirs]), rel=1e-3) for ours, theirs in named.items())
    assert found["of W"] == pytest.approx(np.linalg.norm(np.linalg.svd(w, compute_uv=False)[:3]))
    s = np.array([2.0, 1.0, 1.0])
    assert spectra.effective_rank(s) == pytest.approx(16 / 6) and spectra.energy(s, 1) == pytest.approx(4 / 6)


def test_maps_keep_some_directions_and_what_is_told_is_of_all():
    from experiments.paper import maps, why
    from experiments.paper.told import shared

    assert spectra.kept(2) == [1, 2] and spectra.kept(64)[6:11] == [7, 8, 12, 16, 20] and spectra.kept(64)[-1] == 64
    assert spectra.doubled(192) == [1, 2, 4, 8, 16, 32, 64, 128]
    phi = np.arange(1, 65)[:, None] + np.arange(1, 65) / 100
    assert spectra.thinned(phi, [1, 12], [8, 64]) == [[1.08, 1.64], [12.08, 12.64]]

    draw = lambda r, seed: [np.linalg.qr(spectra.gaussian((20, r), 10 * seed + n))[0] for n in range(6)]
    few, many, again, of_w = draw(2, 1), draw(12, 2), draw(12, 3), draw(10, 4)
    found = why.overlap_maps([0, 5], {"A": [few, many, again], "AB": [few, many, again]}, of_w)
    shape = lambda key: np.shape(found[key])
    assert shape("ranks") == (2, 2, 9) and shape("seeds") == (2, 9, 9) and shape("random") == (9, 9)
    assert shape("own, small") == (2, 4, 2) and shape("own, large") == (2, 4, 9) and shape("own, random") == (4, 9)
    want = spectra.overlaps(many[5], again[5])
    assert found["seeds"][1][8][2] == pytest.approx(want[11, 2], abs=1e-3)
    one = {"value": {"d": 20, "layers": [0, 5], **found}}
    figures = maps.overlaps({"Model, task": one}, (2, 12), {"Model, task": "model"})
    assert [figure.name for figure in figures] == ["overlap-ranks", "overlap-seeds", "overlap-own-model"]
    assert not maps.overlaps({"Model, task": {}}, (2, 12), {})

    by = {"A": {f"phi(1, 1) of {of}, by layer": [0.0, 0.1, 0.2, 0.3, 0.4, 0.6] for of in ("ranks", "seeds")}, "d": 20}
    assert "0.05 in the first third of the layers, 0.50 in the last, 0.60 (v, layer 5)" in shared({"v": by}, (2, 12))


def test_means_and_tables():
    assert mean([1, 2, 3]) == (2, pytest.approx(4.30265 / math.sqrt(3), rel=1e-4))
    assert cell([0.5, 0.6]) == "55.0 ± 63.5 (2)" and cell([0.5]) == "50.0 (1)" and cell([]) == ""
    assert Table(["a", "b"], [["1", "2"]], "Note.").markdown() == "Note.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_nist_and_bleu():
    pytest.importorskip("nltk")
    # words all different: a unigram tells log2(5) bits, a longer one nothing more
    assert nlg.nist(["One two three four five"], [["one two three four five"]]) == pytest.approx(math.log2(5))
    assert nlg.nist(["x y"], [["one two three"]]) == 0


def test_captions():
    pytest.importorskip("pycocoevalcap")
    import shutil

    if not shutil.which("java"):
        pytest.skip("METEOR needs Java")
    found = nlg.scores(["The cat sat.", "A dog ran home."], [["the cat sat on the mat"], ["a dog ran home", "x"]])
    half = 2.44 * 0.5 / (0.5 + 1.44)  # the first: precision 1, recall 1/2, beta 1.2
    assert found["rouge"] == pytest.approx(100 * (half + 1) / 2)
    assert 0 < found["meteor"] < 100 and found["cider"] > 1 and 0 < found["bleu"] < 100
    assert nlg.captions(["a dog ran home"], [["A dog ran home."]])["meteor"] == pytest.approx(1)


def test_rows_of_one_prompt_stay_together():
    many = [Row(f"p {n // 3}", f" {n}") for n in range(60)]
    rest, held = grouped(many, 5)
    assert len(held) == 12 and not {row.prompt for row in rest} & {row.prompt for row in held}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_names_its_cells_and_shows_nothing(name):
    one = experiment(name)
    for config in (one.config, one.small):
        names = [cell.name for cell in one.cells(config)]
        assert names and len(set(names)) == len(names)
        assert all(table.head for table in one.show(config, {}).tables)
    json.dumps(dataclasses.asdict(one.config))


def test_glue_columns(tmp_path, monkeypatch):
    from experiments.paper.works import glue_rows

    place = tmp_path / "data" / "glue" / "CoLA"
    place.mkdir(parents=True)
    (place / "train.tsv").write_text('gj04\t1\t\tWe "won.\ngj04\t0\t*\tWon we.\n')
    monkeypatch.setenv("JLORA_SHARED", str(tmp_path))
    assert [(row.text, str(row.label)) for row in glue_rows("CoLA", "train")] == [('We "won.', "1"), ("Won we.", "0")]
    with pytest.raises(FileNotFoundError, match="JLORA_SHARED"):
        glue_rows("RTE", "train")


def test_text_experiments_on_a_tiny_model(tmp_path, monkeypatch):
    """Every line of those that need a decoder: rows read, rate chosen, beams, curves, pairs; tables made."""
    from experiments.paper import e2e, forgetting, preference

    source = small_model(tmp_path / "model")
    for name in ("e2e", "glue/QNLI"):
        (tmp_path / "data" / name).mkdir(parents=True)
    lines = "".join(f'"name[x{n}], area[film]",good film awful film\n' * 2 for n in range(24))
    for name in ("devset.csv", "testset_w_refs.csv"):
        (tmp_path / "data" / "e2e" / name).write_text("mr,ref\n" + lines)
    text = "".join(f"{n}\tq\tA film of number {n} {'good ' * 12}\tentailment\n" for n in range(12))
    (tmp_path / "data" / "glue" / "QNLI" / "dev.tsv").write_text(f"index\tquestion\tsentence\tlabel\n{text}")
    monkeypatch.setenv("JLORA_SHARED", str(tmp_path))
    monkeypatch.setattr(nlg, "captions", lambda written, references: dict.fromkeys(("meteor", "rouge", "cider"), 0.5))
    moods = [
        Row(f"Review: good film {n} Sentiment:", f" {mood}") for n in range(40) for mood in ("positive", "negative")
    ]
    monkeypatch.setattr(forgetting, "read_rows", lambda source: moods)
    rated = [(3.0 - 6 * (n % 2), f"good film {n}") for n in range(40)]
    monkeypatch.setattr(preference, "parse_snippets", lambda path: rated)
    monkeypatch.setattr(preference, "pip_file", lambda file: None)

    few = dataclasses.replace(e2e.SMALL, sets=(("e2e", 2, 0.9),), prompts=2, max_new_tokens=4)
    for module, config in ((e2e, few), (forgetting, forgetting.SMALL), (preference, preference.SMALL)):
        config = dataclasses.replace(config, model=source)
        assert run(module.EXPERIMENT, config, tmp_path / "out", Budget(None)) == 0
        done = Kept(tmp_path / "out", module.EXPERIMENT.name, dataclasses.asdict(config)).results
        shown = module.show(config, done)
        assert all(any(cell for cell in row[1:]) for table in shown.tables for row in table.rows)
    held = json.loads((tmp_path / "out" / "forgetting.json").read_text())["cells"]
    assert len(held["lora/seed 0"]["general text, perplexity"]) == 2
    assert held["lora/seed 0"]["seen, loss"][0] == pytest.approx(held["full/seed 0"]["seen, loss"][0], abs=1e-3)


def test_the_readme_says_what_the_results_say():
    from experiments.all import RESULTS
    from experiments.report import README, markdown, page, parts

    found, results = parts(RESULTS)
    assert markdown(found, results) == README.read_text(encoding="utf-8"), "run python -m experiments.report"
    assert all(f"results/{figure.name}.png" in README.read_text() for part in found for figure in part.shown.figures)
    assert all((README.parent / "results" / f"{f.name}.png").is_file() for part in found for f in part.shown.figures)
    html = page(found, results)
    assert html.count("<table>") == 1 + sum(len(part.shown.tables) for part in found if part.done)
    assert all(f"<code>python -m experiments.all {part.about.name}</code>" in html for part in found if part.done)
    assert "<pre>pip install" in html and "sorts the table" in html


def test_every_claim_names_what_finds_it():
    from pathlib import Path

    from experiments.paper.claims import CLAIMS
    from experiments.recipes import RECIPES
    from jlora.cli import main

    root = Path(__file__).parent.parent
    for claim in CLAIMS:
        words = claim.how.split()
        scripts = [word for word in words if word.endswith(".py")]
        assert all((root / script).is_file() for script in scripts), claim.how
        if "experiments.all" in words:
            assert words[-1] in NAMES, claim.how
        if "show" in words:
            assert words[-1] in RECIPES, claim.how
        if words[:2] == ["jlora", "plan"]:
            main(words[1:])  # raises for what does not fit


def test_a_method_is_above_another_where_seeds_tell():
    from scipy import stats

    from experiments.paper import gaps

    ours, theirs = [0.80, 0.82, 0.84], [0.78, 0.79, 0.80]
    difference, half = gaps.gap(ours, theirs)
    want = stats.ttest_ind(ours, theirs).confidence_interval()
    assert (difference - half, difference + half) == pytest.approx((want.low, want.high))
    assert gaps.above(ours, theirs) is None and gaps.above(ours, [0.7, 0.71, 0.72]) is True
    assert gaps.below(ours, [0.7, 0.71, 0.72]) is False
    assert gaps.above(ours, [0.795], by=-0.2) is True and gaps.above(ours, [0.795]) is None
    assert gaps.above([0.9], [0.1]) is None, "one against one tells nothing"

    told = {(True, True): "agrees", (True, None): "agrees as far as it can be told", (True, False): "in part"}
    told |= {(False, None): "does not agree", (None, None): "cannot be told apart", (): "open"}
    assert all(gaps.how_far(parts) == said for parts, said in told.items())
    assert gaps.how_far([True, False, None], whole=False) == "in part so far"


def test_verdicts_weigh_every_part_of_a_claim():
    from experiments.paper import glue, holds

    def results(name, scores, seeds=3):
        figures = lambda score: dict.fromkeys(("score", *nlg.NAMES), score)
        found = {f"{key}/seed {n}": figures(score) for key, score in scores.items() for n in range(seeds)}
        return {**{one: {} for one in (*NAMES, "methods")}, name: found}

    hundred = {"100/lora": 0.7, "100/full": 0.6, "100/prompt": 0.5}
    later = {"1000/lora": 0.8, "1000/full": 0.805}
    assert holds.few_holds(results("few", hundred | later)) == "agrees"
    assert holds.few_holds(results("few", hundred | later | {"1000/full": 0.83})) == "in part"
    assert holds.few_holds(results("few", later)) == "open"

    best = dict.fromkeys((f"e2e/{method}" for method in ("full", "lin", "houlsby", "top", "prefix")), 50.0)
    assert holds.e2e_holds(results("e2e", {"e2e/lora": 51.0, "e2e/full": 50.0})) == "agrees so far"
    assert holds.e2e_holds(results("e2e", {"e2e/lora": 51.0, **best})) == "agrees"
    assert holds.e2e_holds(results("e2e", {"e2e/lora": 51.0, **best, "e2e/lin": 52.0})) == "in part"
    assert holds.sets_hold(results("e2e", {"e2e/lora": 51.0, **best})) == "open"

    alone = {f"{task}/{m}": 0.8 for task in ("SST-2", "MRPC") for m in ("lora", "prompt", "prefix")}
    sums = {"SST-2/lora+prompt": 0.82, "MRPC/lora+prompt": 0.79, "SST-2/lora+prefix": 0.7, "MRPC/lora+prefix": 0.7}
    assert holds.combined_holds(results("combined", alone | sums)) == "agrees"
    assert holds.combined_holds(results("combined", alone | sums | {"SST-2/prompt": 0.83})) == "in part"

    told = {f"{count} examples": {"of two": 0.7} for count in (0, 4, 16)}
    tuned = {"lora/seed 0": {"of two": 0.85}}
    nothing = {one: {} for one in (*NAMES, "methods")}
    assert holds.shots_hold(nothing | {"shots": told | tuned}) == "agrees"
    assert holds.shots_hold(nothing | {"shots": told | tuned | {"16 examples": {"of two": 0.8}}}) == "in part"
    assert holds.shots_hold(nothing | {"shots": {"0 examples": {"of two": 0.7}} | tuned}) == "agrees so far"
    assert holds.shots_hold(nothing | {"shots": told}) == "open"

    once = {"CoLA/lora": 0.1, "CoLA/full": 0.3}
    more = {"CoLA, 3600 steps/lora": 0.3, "CoLA, 3600 steps/full": 0.3}
    (longer,) = glue.patience(glue.Config(), results("glue", once | more)["glue"])
    assert [row[1:3] for row in longer.rows] == [["1200", "10.0 ± 0.0 (3)"], ["3600", "30.0 ± 0.0 (3)"]]
    assert not glue.patience(glue.Config(), results("glue", once)["glue"])

    ranks = {"q r=1": 0.68, "q r=8": 0.7, "qkvo r=1": 0.74, "qkvo r=8": 0.74}
    assert holds.ranks_hold(results("which", ranks)) == "agrees"
    assert holds.ranks_hold(results("which", ranks | {"q r=1": 0.7, "qkvo r=1": 0.6})) == "does not agree"

    few = {f"{task}/lora": 0.8 for task in ("SST-2", "MRPC")} | {"SST-2/bitfit": 0.7, "MRPC/houlsby": 0.9}
    assert holds.others_hold(results("glue", few)) == "open", "of methods of one seed there are three here"
    one = results("glue", few)["glue"] | {"SST-2/pfeiffer/seed 0": {"score": 0.7}}
    assert holds.others_hold({**results("glue", {}), "glue": one}) == "agrees so far"
    one["MRPC/pfeiffer/seed 0"] = {"score": 0.95}
    assert holds.others_hold({**results("glue", {}), "glue": one}) == "does not agree so far"
    assert holds.glue_holds(results("glue", few | {"SST-2/full": 0.805, "MRPC/full": 0.8})) == "agrees so far"


def test_a_merged_model_is_the_base_s_own_program():
    from experiments.paper import latency

    done = {cell.name: cell.run({}) for cell in latency.cells(latency.SMALL)}
    assert all(held["merged is base's program"] for held in done.values())
    ways = done["1x8"]["ways"]
    assert list(ways) == list(latency.NAMES) and all(len(one["more CPU"]) == 3 for one in ways.values())
    assert ways["merged"]["operations"] == ways["base"]["operations"] < ways["adapter L"]["operations"]
    (table,) = latency.show(latency.SMALL, done).tables
    assert {len(row) for row in table.rows} == {len(table.head)} and len(table.rows) == 4 + 6
    assert table.rows[1][:3] == ["2 x 16", "LoRA merged, the same program", ""], "compared, not timed"

    model, made = latency.trees(latency.SMALL)
    tokens = np.ones((1, 8), np.int32)
    base, other = (
        latency.instructions(latency.compiled(model, way, made[way], tokens)) for way in ("base", "factored")
    )
    assert len(base) > 100 and base != other
    assert latency.middle([0.3, 0.1, 0.2]) == (0.2, 0.1, 0.3)
    assert latency.middle(list(range(41))) == (20, 13, 27), "the 14th of either end"


def test_memory_by_plan_at_every_size():
    from experiments.paper import cost

    full, lora = (cost.memory("smollm2-135m", 8, "all-linear", "v5e:1", method, {}) for method in ("full", "lora"))
    assert full["trained"] == full["parameters"] == lora["parameters"] == 134_515_008
    assert lora["checkpoint, MB at 16 bits"] == pytest.approx(2 * lora["trained"] / 1e6, rel=0.02)
    assert full["states, GB"] > 3 * lora["states, GB"] and lora["step, GB"] > lora["states, GB"]


def test_verdicts_on_latency():
    from experiments.paper import latency

    def point(layers, same=True):
        ways = {way: {"more CPU": [layers, layers + 0.01]} for way in latency.ADAPTERS}
        return {"merged is base's program": same, "ways": ways}

    def holds(long, middle, short, **how):
        return latency.holds(
            {"latency": {"32x512": point(long), "16x256": point(middle), "1x128": point(short, **how)}}
        )

    assert holds(0.02, 0.05, 0.2) == "agrees for merging, agrees for adapter layers"
    assert holds(0.02, 0.05, 0.025).endswith("agrees as far as it can be told for adapter layers"), "intervals meet"
    assert holds(0.05, 0.05, 0.02).endswith("in part for adapter layers")
    assert holds(-0.005, -0.005, -0.005).endswith("cannot be told apart for adapter layers")
    assert holds(0.02, 0.05, 0.2, same=False).startswith("in part for merging")
    assert (
        latency.holds({"latency": {"1x128": point(0.2)}}).endswith("so far")
        and latency.holds({"latency": {}}) == "open"
    )
    assert "+2.5 % (+2.0 to +3.0) at 32x512" in latency.here({"latency": {"32x512": point(0.02)}})


def test_quantised_bases_on_a_tiny_model(tmp_path, monkeypatch):
    from experiments.paper import quantised

    many = [Row(f"good film {n}", f" {mood}", where="") for n in range(20) for mood in ("bad", "good")]
    monkeypatch.setattr(quantised, "read_rows", lambda source: many)
    config = dataclasses.replace(quantised.SMALL, model=small_model(tmp_path / "model"))
    assert run(quantised.EXPERIMENT, config, tmp_path / "out", Budget(None)) == 0
    done = Kept(tmp_path / "out", "quantised", dataclasses.asdict(config)).results
    assert done["none/base"]["bits"] == 32 and done["none/base"]["error"] == 0
    assert 4 < done["nf4/base"]["bits"] < 8 and 0.01 < done["nf4/base"]["error"] < 0.2
    (table,) = quantised.show(config, done).tables
    assert {len(row) for row in table.rows} == {len(table.head)} and table.rows[1][0] == "NF4"


def test_verdicts_on_quantised_bases():
    from experiments.paper import quantised

    floats = (0.85, 0.87, 0.86, 0.84, 0.88)

    def results(**apart):
        found = {s: [x + by for x in floats] for s, by in {"none": 0.0, **apart}.items()}
        return {"quantised": {f"{s}/seed {n}": {"score": x} for s, every in found.items() for n, x in enumerate(every)}}

    holds = lambda **apart: quantised.holds(results(**apart))
    assert quantised.holds({"quantised": {}}) == "open" and holds(nf4=0) == "cannot be told apart so far"
    assert holds(int8=0, nf4=0.01, int4=-0.02) == "cannot be told apart"
    assert holds(int8=0.05, nf4=-0.05, int4=0) == "in part"
    assert holds(int8=0.02, nf4=0.02, int4=0.02) == "agrees"
    assert holds(int8=-0.05, nf4=-0.05, int4=-0.05) == "does not agree"
    said = "float32 86.0 ± 2.0 (5); NF4 81.0 ± 2.0 (5), -5.0 ± 2.3 more than float32"
    assert said in quantised.here(results(nf4=-0.05)), "by 2.306 s (2 / 5)^1/2, s = 1.58"


def test_examples_in_the_prompt(tmp_path):
    import random

    from experiments.paper import shots

    many = [Row(f"film {n}:", f" {mood}", where="") for n in range(20) for mood in ("bad", "good")]
    text = shots.with_shots("film x:", many, 4, random.Random(0))
    told = text.split("\n\n")
    assert len(told) == 5 and told[-1] == "film x:" and sum(one.endswith(" good") for one in told) == 2
    assert shots.with_shots("film x:", many, 0, random.Random(0)) == "film x:"

    base = load(small_model(tmp_path / "model"))
    prompts = ["a good film", "a", "a film that nobody will see twice or once"]
    logits = []
    for prompt in prompts:  # one by one, unpadded
        tokens = np.asarray([prompt_ids(base.tokenizer, prompt)])
        hidden = base.model.apply({"params": base.params}, tokens, method="hidden")
        logits.append(base.model.apply({"params": base.params}, hidden[0, -1], method="head"))
    best = [base.tokenizer.decode([int(one.argmax())]) for one in logits]
    first = [text_ids(base.tokenizer, answer)[0] for answer in best]
    assert first == [int(one.argmax()) for one in logits]
    assert shots.judged(base, base.params, prompts, best, 2)["word"] == 1
    turned = [*best[1:], best[0]]
    found = shots.judged(base, base.params, prompts, turned, 2)
    want = sum(
        int(one.argmax()) == text_ids(base.tokenizer, answer)[0] for one, answer in zip(logits, turned, strict=True)
    )
    assert found["word"] == want / 3
