"""The five figures of the E2E challenge (Dusek et al. 2020) by well-kept packages.

    pip install sacrebleu nltk pycocoevalcap        # the last needs Java for METEOR 1.5 and the PTB tokenizer

BLEU is sacreBLEU's without regard to case, NIST NLTK's with n = 5; METEOR, ROUGE-L and CIDEr are those of the COCO
captions, after its tokenizer, which lowers case and drops punctuation, as in the challenge's own script.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from jlora.train.metrics import Texts, bleu, needs

NAMES = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge": "ROUGE-L", "cider": "CIDEr"}


def nist(written: Texts, references: Sequence[Texts]) -> float:
    """Corpus NIST-5, without regard to case; 0 where no word is right."""
    corpus_nist = needs("nltk.translate.nist_score", "nltk").corpus_nist
    split = needs("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu").Tokenizer13a()
    words = lambda text: split(text.lower()).split()
    try:
        return float(corpus_nist([[words(r) for r in refs] for refs in references], [words(t) for t in written], n=5))
    except ZeroDivisionError:
        return 0.0


def captions(written: Texts, references: Sequence[Texts]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr, as fractions. Raises ImportError without the package, OSError without Java."""
    needs("pycocoevalcap", "pycocoevalcap", "METEOR, ROUGE-L and CIDEr")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    asked = {n: [{"caption": text} for text in refs] for n, refs in enumerate(references)}
    given = {n: [{"caption": text}] for n, text in enumerate(written)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        asked, given = PTBTokenizer().tokenize(asked), PTBTokenizer().tokenize(given)
        found = {"rouge": Rouge().compute_score(asked, given)[0], "cider": Cider().compute_score(asked, given)[0]}
        meteor = Meteor()
        found["meteor"] = meteor.compute_score(asked, given)[0]
        for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):  # it closes the other itself
            pipe.close()
    return {name: float(value) for name, value in found.items()}


def scores(written: Texts, references: Sequence[Texts]) -> dict[str, float]:
    """{bleu, nist, meteor, rouge, cider} in the paper's units: all but NIST and CIDEr out of 100."""
    held = captions(written, references)
    percent = {name: 100 * held[name] for name in ("meteor", "rouge")}
    lower = lambda texts: [text.lower() for text in texts]
    words = bleu(lower(written), [lower(refs) for refs in references])
    return {"bleu": words, "nist": nist(written, references), **percent, "cider": held["cider"]}
