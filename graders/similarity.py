"""The metrics of `text_similarity`, each a function (candidate, reference) -> 0..1.

The numbers come from the libraries that the documents name; what they leave open (reference 2.2) is
chosen here once. BLEU, GLEU and METEOR see `words` of lower-cased text; one reference per sample.

fuzzy_match  rapidfuzz WRatio with its default_process (lower case, punctuation trimmed), / 100
bleu         nltk sentence_bleu up to 4-grams, smoothing method 1 (Chen and Cherry 2014), so that a short
             answer without a common 4-gram is not flattened to 0; for texts shorter than 4 words
             the n-gram order is that of the shorter text, so that equal texts always score 1
gleu         nltk sentence_gleu (Wu et al. 2016)
meteor       nltk meteor_score: exact words and Porter stems, and synonyms where WordNet's data is installed
rouge_n, _l  rouge-score F-measure, Porter stemmer off (Lin 2004)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

Metric = Callable[[str, str], float]
_ROUGE_WORD = re.compile(r"[^\W_]+")
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks, in every script that Unicode calls a word."""
    return _WORD.findall(text.lower())


@functools.cache
def metric(name: str) -> Metric:
    """The function for one `evaluation_metric` (all but cosine, which needs an embeddings endpoint)."""
    if name == "fuzzy_match":
        return _fuzzy()
    if name == "bleu":
        return _bleu()
    if name == "gleu":
        return _gleu()
    if name == "meteor":
        return _meteor()
    if name.startswith("rouge_"):
        return _rouge(name.removeprefix("rouge_"))
    raise KeyError(name)


def _fuzzy() -> Metric:
    from rapidfuzz import fuzz, utils

    def score(candidate: str, reference: str) -> float:
        # Texts of punctuation alone are empty after default_process, which rapidfuzz scores 0 even when equal.
        if candidate == reference:
            return 1.0
        return float(fuzz.WRatio(candidate, reference, processor=utils.default_process)) / 100

    return score


def _bleu() -> Metric:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method1

    def score(candidate: str, reference: str) -> float:
        left, right = words(candidate), words(reference)
        if not left or not right:
            return float(left == right)
        order = min(4, len(left), len(right))
        value: Any = sentence_bleu([right], left, weights=(1 / order,) * order, smoothing_function=smooth)
        return _unit(value)

    return score


def _gleu() -> Metric:
    from nltk.translate.gleu_score import sentence_gleu

    def score(candidate: str, reference: str) -> float:
        left, right = words(candidate), words(reference)
        if not left or not right:
            return float(left == right)
        return _unit(sentence_gleu([right], left))

    return score


@functools.cache
def wordnet() -> Any | None:
    """nltk's WordNet where its data is installed on this machine, else None. Nothing is downloaded."""
    try:
        from nltk.corpus import wordnet as corpus

        corpus.synsets("good")
    except (LookupError, OSError):
        return None
    return corpus


class _NoWordNet:
    """Stands in for WordNet: no word has synonyms, so METEOR matches words and stems only."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor_note() -> str:
    """What METEOR matched here; goes into the grade, because two machines may differ in it."""
    return (
        "meteor: words, stems and WordNet synonyms"
        if wordnet()
        else "meteor: words and stems (no WordNet data)"
    )


def _meteor() -> Metric:
    from nltk.translate.meteor_score import meteor_score

    synonyms: Any = wordnet() or _NoWordNet()

    def score(candidate: str, reference: str) -> float:
        left, right = words(candidate), words(reference)
        if not left or not right:
            return float(left == right)
        return _unit(meteor_score([right], left, wordnet=synonyms))

    return score


class _RougeWords:
    """rouge-score's own tokens (lower case, letters and digits), in every script instead of ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        return _ROUGE_WORD.findall(text.lower())


def _rouge(kind: str) -> Metric:
    from rouge_score import rouge_scorer

    name = "rougeL" if kind == "l" else f"rouge{kind}"
    scorer = rouge_scorer.RougeScorer([name], tokenizer=_RougeWords())

    def score(candidate: str, reference: str) -> float:
        return _unit(scorer.score(reference, candidate)[name].fmeasure)

    return score


def _unit(value: Any) -> float:
    return min(1.0, max(0.0, float(value)))
