"""The graders that are a function of two texts: `string_check`, and the local metrics of `text_similarity`.

Each becomes one closure `score(item, sample) -> float`. It raises `Ungradable` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graders.templates import Template, parse_template

Score = Callable[[dict[str, Any], dict[str, Any]], float]


def string_check(spec: dict[str, Any], where: str) -> tuple[Score, list[tuple[str, Template]]]:
    """1.0 where the operation holds, else 0.0; no trimming. `like` asks whether `input` contains `reference`."""
    left = parse_template(spec["input"], f"{where}.input")
    right = parse_template(spec["reference"], f"{where}.reference")
    one, two, operation = left.render, right.render, spec["operation"]
    scores: dict[str, Score] = {
        "eq": lambda item, sample: 1.0 if one(item, sample) == two(item, sample) else 0.0,
        "ne": lambda item, sample: 1.0 if one(item, sample) != two(item, sample) else 0.0,
        "like": lambda item, sample: 1.0 if two(item, sample) in one(item, sample) else 0.0,
        "ilike": lambda item, sample: (
            1.0 if two(item, sample).casefold() in one(item, sample).casefold() else 0.0
        ),
    }
    return scores[operation], [(f"{where}.input", left), (f"{where}.reference", right)]


def text_similarity(spec: dict[str, Any], where: str) -> tuple[Score, list[tuple[str, Template]]]:
    """The metric of `input` against `reference`, from 0 to 1."""
    from graders.similarity import metric

    left = parse_template(spec["input"], f"{where}.input")
    right = parse_template(spec["reference"], f"{where}.reference")
    measure = metric(spec["evaluation_metric"])

    def score(item: dict[str, Any], sample: dict[str, Any]) -> float:
        return measure(left.render(item, sample), right.render(item, sample))

    return score, [(f"{where}.input", left), (f"{where}.reference", right)]
