"""`Grade`: what grading one sample gives, and its two forms on the wire.

A grade with any error class has reward None, never 0: a number would hide in a mean. What an ungraded
sample counts as is for the caller to say. The `graders.run` response has no null there, so `to_openai`
puts the documented value (0) in its place, or the `invalid_grade` that the grader itself states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graders.errors import DETAIL_KEYS, ERROR_CLASSES, ERROR_KEYS

TOKEN_KEYS = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")


@dataclass(slots=True)
class Grade:
    """The outcome for one (item, sample) pair.

    reward: the score, or None when `errors` is not empty
    sub_rewards: of a multi grader: key -> score (None where that sub-grader failed); else empty
    errors: names of the documented error classes, in the documented order
    details: text for the errors, e.g. {"python_grader_runtime_error_details": traceback}
    seconds: wall-clock spent on this sample (of a multi grader: its slowest part, as parts run together)
    token_usage: model -> {prompt_tokens, completion_tokens, total_tokens, cached_tokens}
    logs: what a python grader printed, or a judge's reasoning steps
    parts: of a multi grader: key -> that sub-grader's own Grade; empty where every part is a function of
        two texts and none failed, since `sub_rewards` then says it all
    invalid_grade: the number that stands for a missing reward in the `graders.run` response
    """

    reward: float | None
    sub_rewards: dict[str, float | None] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    token_usage: dict[str, dict[str, int]] = field(default_factory=dict)
    logs: str = ""
    parts: dict[str, Grade] = field(default_factory=dict)
    invalid_grade: float = 0.0

    @classmethod
    def failed(cls, error_class: str, message: str = "", **fields: Any) -> Grade:
        """A grade without reward. `error_class` must be one of `ERROR_CLASSES`."""
        if error_class not in ERROR_CLASSES:
            raise ValueError(f"unknown error class {error_class!r}")
        details = {_detail_key(error_class): message} if message else {}
        return cls(None, errors=[error_class], details=details, **fields)

    def to_dict(self) -> dict[str, Any]:
        """One line of a grades file: reward, sub_rewards, errors, seconds, token_usage, logs, details."""
        return {
            "reward": self.reward,
            "sub_rewards": self.sub_rewards,
            "errors": self.errors,
            "seconds": self.seconds,
            "token_usage": self.token_usage,
            "logs": self.logs,
            "details": self.details,
        }

    def to_openai(self, name: str, type: str) -> dict[str, Any]:
        """The body of `POST /v1/fine_tuning/alpha/graders/run`, every documented key present.

        `token_usage` is an object where a model was called, as in the documented response (the schema
        says integer), and null otherwise. `python_grader_server_error_type` and the two `_details`
        keys carry text only while their flag is set.
        """
        errors: dict[str, bool | str | None] = {}
        for key in ERROR_KEYS:
            if key in DETAIL_KEYS:
                flag = key.removesuffix("_type").removesuffix("_details")
                errors[key] = self.details.get(key) if flag in self.errors else None
            else:
                errors[key] = key in self.errors
        scores = {
            key: self.parts[key].invalid_grade if value is None and key in self.parts else value or 0.0
            for key, value in self.sub_rewards.items()
        }
        return {
            "reward": self.invalid_grade if self.reward is None else self.reward,
            "metadata": {
                "name": name,
                "type": type,
                "errors": errors,
                "execution_time": self.seconds,
                "scores": dict(scores),
                "token_usage": add_tokens(list(self.token_usage.values())) if self.token_usage else None,
                "sampled_model_name": next(iter(self.token_usage), None),
            },
            "sub_rewards": dict(scores),
            "model_grader_token_usage_per_model": self.token_usage,
        }


def _detail_key(error_class: str) -> str:
    for key in DETAIL_KEYS:
        if key.startswith(error_class):
            return key
    return error_class


def add_tokens(usages: list[dict[str, int]]) -> dict[str, int]:
    """The sum of token counts, key by key."""
    return {key: sum(usage.get(key, 0) for usage in usages) for key in TOKEN_KEYS}


def merge_usage(usages: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The sum of per-model token counts."""
    models = dict.fromkeys(model for usage in usages for model in usage)
    return {model: add_tokens([usage[model] for usage in usages if model in usage]) for model in models}
