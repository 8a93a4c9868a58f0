"""Grader JSON, validated and normalised: one spelling for everything the documents spell in two ways.

What is normalised (reference, section 2): `neq` to `ne`; `sampling_parameters` to `sampling_params`, and
in it `max_completion_tokens` and `max_tokens` to `max_completions_tokens`; `graders` given as a list
to an object keyed by name; a missing `range` to [0, 1]; a missing `name` to the key or the type. The
result is pure JSON, and two spellings of one grader have the same result.

Written as tables and plain functions, not as pydantic models, so that `import graders` stays fast and a
message can say which place, what was found, and which name was probably meant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graders.errors import GraderError, nearest, shown

OPERATIONS = ("eq", "ne", "like", "ilike")
LOCAL_METRICS = (
    "fuzzy_match", "bleu", "gleu", "meteor",
    "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
)  # fmt: skip
METRICS = (*LOCAL_METRICS, "cosine")
ROLES = ("user", "assistant", "system", "developer")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_SOURCE = 256 * 1024  # bytes
SPELLINGS = {"sampling_parameters": "sampling_params"}
SAMPLING_SPELLINGS = {
    "max_completion_tokens": "max_completions_tokens",
    "max_tokens": "max_completions_tokens",
}
Check = Callable[[Any, str], Any]


def read_spec(spec: object) -> dict[str, Any]:
    """The normalised form of a grader: dict, JSON text, or path of a JSON file. Raises `GraderError`."""
    if isinstance(spec, Path):
        try:
            spec = spec.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GraderError(f"cannot read the grader file {spec}: {error}") from None
    if isinstance(spec, str | bytes):
        try:
            spec = json.loads(spec)
        except (ValueError, RecursionError) as error:
            raise GraderError(f"the grader is not JSON: {error}") from None
    return _grader(spec, "grader", None)


def _grader(spec: object, where: str, key: str | None) -> dict[str, Any]:
    spec = _object(spec, where)
    kind = spec.get("type")
    if kind is None:
        raise GraderError(f"{where}.type: missing, expected one of {', '.join(FIELDS)}")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise _unexpected(f"{where}.type", kind, FIELDS)
    if kind == "multi" and key is not None:
        raise GraderError(f"{where}.type: found 'multi', expected any other type: no multi inside multi")
    given = {
        "name": key or kind,
        **DEFAULTS.get(kind, {}),
        **{SPELLINGS.get(field, field): value for field, value in spec.items()},
    }
    return _fields(given, where, {"type": _text, "name": _text, **FIELDS[kind][0]}, FIELDS[kind][1])


def _fields(
    given: dict[str, Any], where: str, required: dict[str, Check], optional: dict[str, Check]
) -> dict[str, Any]:
    known = {**required, **optional}
    for field in given:
        if field not in known:
            hint = nearest(field, known)
            raise GraderError(f"{where}.{field}: unknown field, expected one of {', '.join(known)}{hint}")
    for field in required:
        if field not in given:
            raise GraderError(f"{where}.{field}: missing")
    return {
        field: check(given[field], f"{where}.{field}")
        for field, check in known.items()
        if field in required or given.get(field) is not None  # SDKs send null for what was left out
    }


def _unexpected(where: str, value: object, expected: Any) -> GraderError:
    names = [str(name) for name in expected]
    return GraderError(
        f"{where}: found {shown(value)}, expected one of {', '.join(names)}{nearest(str(value), names)}"
    )


# ---- checks of one value: each returns the normalised value or raises ----------------------------


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise GraderError(f"{where}: found {shown(value)}, expected an object")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise GraderError(f"{where}: found {shown(value)}, expected a list that is not empty")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise GraderError(f"{where}: found {shown(value)}, expected a string")
    return value


def _named(value: object, where: str) -> str:
    if not _text(value, where):
        raise GraderError(f"{where}: found '', expected a string that is not empty")
    return str(value)


def _number(value: object, where: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise GraderError(f"{where}: found {shown(value)}, expected a finite number")
    return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _number_above(low: float, *, whole: bool = False, equal: bool = False) -> Check:
    def check(value: object, where: str) -> float | int:
        number = _number(value, where)
        if (whole and not isinstance(number, int)) or number < low or (number == low and not equal):
            kind = "a whole number" if whole else "a number"
            raise GraderError(
                f"{where}: found {shown(value)}, expected {kind} {'from' if equal else 'above'} {low:g}"
            )
        return number

    return check


def _one_of(*names: str, **spellings: str) -> Check:
    def check(value: object, where: str) -> str:
        if isinstance(value, str) and spellings.get(value, value) in names:
            return spellings.get(value, value)
        raise _unexpected(where, value, names)

    return check


def _range(value: object, where: str) -> list[float | int]:
    bounds = [_number(bound, f"{where}[{i}]") for i, bound in enumerate(_list(value, where))]
    if len(bounds) != 2 or bounds[0] >= bounds[1]:
        raise GraderError(f"{where}: found {shown(value)}, expected two numbers, the smaller first")
    return bounds


def _names(value: object, where: str) -> list[str]:
    names = [_named(name, f"{where}[{i}]") for i, name in enumerate(_list(value, where))]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise GraderError(f"{where}: {twice!r} stands in it twice")
    return names


def _source(value: object, where: str) -> str:
    source = _named(value, where)
    size = len(source.encode("utf-8", "surrogatepass"))
    if size >= MAX_SOURCE:
        raise GraderError(f"{where}: {size} bytes of source, expected less than {MAX_SOURCE}")
    return source


def _headers(value: object, where: str) -> dict[str, str]:
    return {name: _text(text, f"{where}.{name}") for name, text in _object(value, where).items()}


def _url(value: object, where: str) -> str:
    url = _named(value, where)
    if not url.startswith(("http://", "https://")):
        raise GraderError(f"{where}: found {shown(url)}, expected an http:// or https:// address")
    return url


def _sampling(value: object, where: str) -> dict[str, Any]:
    given = {SAMPLING_SPELLINGS.get(k, k): v for k, v in _object(value, where).items()}
    return _fields(given, where, {}, SAMPLING)


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(_list(value, where))]


def _message(value: object, where: str) -> dict[str, Any]:
    return _fields(
        _object(value, where),
        where,
        {"role": _one_of(*ROLES), "content": _content},
        {"type": _one_of("message")},
    )


def _content(value: object, where: str) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_block(block, f"{where}[{i}]") for i, block in enumerate(_list(value, where))]
    return _block(value, where)


def _block(value: object, where: str) -> Any:
    if isinstance(value, str):
        return value
    block = _object(value, where)
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise _unexpected(f"{where}.type", kind, BLOCKS)
    required, optional = BLOCKS[kind]
    return _fields(block, where, {"type": _text, **required}, optional)


def _audio(value: object, where: str) -> dict[str, Any]:
    return _fields(_object(value, where), where, {"data": _text, "format": _text}, {})


def _graders(value: object, where: str) -> dict[str, dict[str, Any]]:
    if isinstance(value, list):
        return _graders(_by_name(value, where), where)
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] in FIELDS:
        # The SDK types this field as one grader. Its name then is the only possible key.
        return _graders(_by_name([value], where), where)
    graders = _object(value, where)
    if not graders:
        raise GraderError(f"{where}: found {{}}, expected at least one grader")
    return {key: _grader(spec, f"{where}.{key}", key) for key, spec in graders.items()}


def _by_name(specs: list[Any], where: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for index, spec in enumerate(specs):
        name = _named(_object(spec, f"{where}[{index}]").get("name", ""), f"{where}[{index}].name")
        if name in named:
            raise GraderError(f"{where}[{index}].name: {name!r} stands in the list twice")
        named[name] = spec
    return named


# ---- the tables: (required, optional) per type ---------------------------------------------------

SAMPLING: dict[str, Check] = {
    "seed": lambda value, where: int(_number_above(-math.inf, whole=True)(value, where)),
    "top_p": _number_above(0),
    "temperature": _number_above(0, equal=True),
    "max_completions_tokens": _number_above(1, whole=True, equal=True),
    "reasoning_effort": _one_of(*EFFORTS),
}
BLOCKS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "input_text": ({"text": _text}, {}),
    "output_text": ({"text": _text}, {}),
    "input_image": ({"image_url": _text}, {"detail": _one_of("auto", "low", "high")}),
    "input_audio": ({"input_audio": _audio}, {}),
}
DEFAULTS: dict[str, dict[str, Any]] = {"score_model": {"range": [0, 1]}}
THRESHOLD: dict[str, Check] = {"pass_threshold": _number}
FIELDS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "string_check": (
        {"input": _text, "reference": _text, "operation": _one_of(*OPERATIONS, neq="ne")},
        THRESHOLD,
    ),
    "text_similarity": (
        {"input": _text, "reference": _text, "evaluation_metric": _one_of(*METRICS)},
        {**THRESHOLD, "model": _named},
    ),
    "python": ({"source": _source}, {"image_tag": _named, **THRESHOLD}),
    "score_model": (
        {"input": _messages, "model": _named},
        {"range": _range, "sampling_params": _sampling, **THRESHOLD},
    ),
    "label_model": (
        {"input": _messages, "model": _named, "labels": _names, "passing_labels": _names},
        {"sampling_params": _sampling},
    ),
    "endpoint": (
        {"url": _url},
        {
            "headers": _headers,
            "rate_limit": _number_above(0),
            "timeout": _number_above(0),
            "max_retries": _number_above(0, whole=True, equal=True),
            **THRESHOLD,
        },
    ),
    "multi": ({"graders": _graders, "calculate_output": _named}, {"invalid_grade": _number, **THRESHOLD}),
}
