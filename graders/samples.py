"""`sample`: what a grader sees of the model's answer.

Always `output_text`; `output_json` where that text is JSON; `output_tools` (Chat Completions
`tool_calls`), `choices` and `output_audio` where the caller has them. Absent means absent: a template
that names an absent part is an error, not an empty string.
"""

from __future__ import annotations

import json
from typing import Any

SAMPLE_KEYS = ("output_text", "output_json", "output_tools", "choices", "output_audio")
MISSING: Any = object()


def parse_json(text: object) -> Any:
    """The JSON value of a text, or `MISSING`. Python's NaN and Infinity are not JSON and count as missing."""
    if not isinstance(text, str) or not text:
        return MISSING
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return MISSING


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def sample_from_text(text: str, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A `sample` for one answer: `output_text`, plus `output_json` where the text parses as JSON.

    `tools` are Chat Completions tool calls; they also stand in `choices`, as they do in a real response.
    """
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tools:
        message["tool_calls"] = tools
    sample: dict[str, Any] = {
        "output_text": text,
        "choices": [
            {"index": 0, "message": message, "finish_reason": "tool_calls" if tools else "stop"},
        ],
    }
    value = parse_json(text)
    if value is not MISSING:
        sample["output_json"] = value
    if tools is not None:
        sample["output_tools"] = tools
    return sample


def complete(sample: dict[str, Any]) -> dict[str, Any]:
    """The same sample with `output_json` filled in, where it is absent and the text is JSON."""
    if "output_json" in sample:
        return sample
    value = parse_json(sample.get("output_text"))
    return sample if value is MISSING else {**sample, "output_json": value}
