"""What can go wrong, by name: the documented error classes, and the one exception for a bad grader.

Two things are kept apart. A grader that is *written* wrongly raises `GraderError` from `load`: somebody
must edit it. A *sample* that cannot be graded never raises; it gets a `Grade` whose reward is None and
whose `errors` name the class, so that one odd answer cannot stop a batch of thousands.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

# The keys of `metadata.errors` in the `graders.run` response, in its order. Three of the fourteen carry
# text about the flag that stands before them; the other eleven are the flags.
ERROR_KEYS = (
    "formula_parse_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
    "invalid_variable_error",
    "other_error",
    "python_grader_server_error",
    "python_grader_server_error_type",
    "python_grader_runtime_error",
    "python_grader_runtime_error_details",
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
    "model_grader_server_error_details",
)
DETAIL_KEYS = tuple(k for k in ERROR_KEYS if k.endswith(("_type", "_details")))
ERROR_CLASSES = tuple(k for k in ERROR_KEYS if k not in DETAIL_KEYS)


class GraderError(ValueError):
    """The grader itself is wrong (or cannot run on this machine). One line: where, what, what instead.

    `error_class` is the documented class that stands for this in a `graders.run` response:
    `formula_parse_error` for a formula, `invalid_variable_error` for a template, else `other_error`.
    """

    def __init__(self, message: str, *, error_class: str = "other_error") -> None:
        super().__init__(" ".join(message.split()))
        self.error_class = error_class


class Ungradable(Exception):
    """This one sample cannot be graded. Never leaves the library: it becomes `Grade.errors`."""

    def __init__(self, error_class: str, message: str = "") -> None:
        super().__init__(message)
        self.error_class = error_class
        self.message = message


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of `Grader.check`: a place in the grader that does not fit a row of the dataset."""

    row: int  # 0-based; the first row when every row is affected
    template: str  # as written, or the python expression that reads the key
    path: str  # where in the grader, e.g. "graders.a.input"
    key: str  # the part that was not found, e.g. "item.refrence"
    message: str
    every_row: bool = False  # no row will do, so nothing can be graded


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (nearest: x)' for an error message, or '' when nothing is close enough to help."""
    found = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (nearest: {found[0]!r})" if found else ""


def shown(value: object, limit: int = 80) -> str:
    """A value for an error message: short, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
