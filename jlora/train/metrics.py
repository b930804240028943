"""Figures for answers and labels: by scikit-learn, SciPy, sacreBLEU and rouge-score, or a function of the user's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Texts = Sequence[str]
Metric = Callable[[Texts, Sequence[Texts]], float]
"""f(what was written, the references of each) -> figure."""


def exact(written: Texts, references: Sequence[Texts]) -> float:
    """Share of answers that equal one of their references, but for space at the ends."""
    return float(
        np.mean([text.strip() in {r.strip() for r in refs} for text, refs in zip(written, references, strict=True)])
    )


def needs(module: str, package: str, what: str = "this metric") -> Any:
    """The module, or an ImportError that names the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{what} needs {package}: pip install {package}") from None


def by_reference(references: Sequence[Texts]) -> list[list[str | None]]:
    """sacreBLEU's order: the first reference of every answer, then the second, None where there are fewer."""
    return [[refs[n] if n < len(refs) else None for refs in references] for n in range(max(map(len, references)))]


def bleu(written: Texts, references: Sequence[Texts]) -> float:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018)."""
    return needs("sacrebleu", "sacrebleu").corpus_bleu(list(written), by_reference(references)).score


def chrf(written: Texts, references: Sequence[Texts]) -> float:
    """Corpus chrF2, 0 to 100 (Popovic 2015)."""
    return needs("sacrebleu", "sacrebleu").corpus_chrf(list(written), by_reference(references)).score


def rouge(written: Texts, references: Sequence[Texts]) -> float:
    """Mean ROUGE-L F, 0 to 100, against the best of the references (Lin 2004)."""
    scorer = needs("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(list(refs), text)["rougeL"].fmeasure for text, refs in zip(written, references, strict=True)
    ]
    return 100 * float(np.mean(best))


TEXT: dict[str, Metric] = {"exact": exact, "bleu": bleu, "chrf": chrf, "rouge": rouge}


def label_metric(name: str, predicted: Any, wanted: Any, classes: int = 2) -> float:
    """accuracy, f1, matthews, pearson or spearman.

    predicted, wanted: [n], classes (i32) or numbers. classes: how many there are, though a sample may lack some: f1 is
    that of class 1 of two, of more the mean over those that occur. Raises ValueError for another name.
    """
    if name in ("pearson", "spearman"):
        stats = needs("scipy.stats", "scipy")
        return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(predicted, wanted).statistic)
    if name not in ("accuracy", "f1", "matthews"):
        raise ValueError(f"metric {name!r} is not known for labels: accuracy, f1, matthews, pearson, spearman are")
    sk = needs("sklearn.metrics", "scikit-learn")
    if name == "f1":
        average = "binary" if classes == 2 else "macro"
        return float(sk.f1_score(wanted, predicted, average=average, zero_division=0.0))
    return float((sk.accuracy_score if name == "accuracy" else sk.matthews_corrcoef)(wanted, predicted))


def text_metric(name: str) -> Metric:
    """A metric by its name, or the user's: "FILE.py:function" or "module:function". Raises ValueError naming it."""
    if name in TEXT:
        return TEXT[name]
    where, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"metric {name!r} is not known: {', '.join(TEXT)}, or FILE.py:function")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"metric {name!r}: there is no file {where}")
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = needs(where, where)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"metric {name!r}: {where} has no function {function}")
    return getattr(module, function)
