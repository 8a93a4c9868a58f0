"""`{{ item.x }}` templates: parsed once at load, rendered per sample, checked against rows beforehand.

Grammar, inside double braces with optional spaces:

    path    = ("item" | "sample") step*
    step    = "." name | "[" integer "]" | "[" quoted string "]"

Names are letters, digits, `_` and `-`; any other key is written `item["odd key"]`. A negative index
counts from the end. `{{ "…" }}`, a quoted string alone, gives that string, which is how to write braces.
Strings are inserted as they are; everything else as JSON (reference 2.7 leaves the rule open).

Nothing is evaluated: a path is a list of keys. A key that is absent raises `invalid_variable_error`;
`sample.output_json` of a text that is not JSON raises `sample_parse_error`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graders.errors import GraderError, Ungradable, nearest, shown
from graders.samples import MISSING, SAMPLE_KEYS, parse_json

_OPEN = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_NAMESPACE = re.compile(r"[A-Za-z_]\w*")
_STEP = re.compile(
    r"""\s*(?: \.\s*(?P<name>[\w-]+) | \[\s*(?P<index>-?\d{1,9})\s*\]
        | \[\s*(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*\] )""",
    re.VERBOSE,
)
_QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*""", re.DOTALL)
Step = str | int


@dataclass(frozen=True, slots=True)
class Path:
    """A reference into the item or the sample, e.g. sample.output_tools[0].function.arguments."""

    namespace: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.namespace + "".join(_step_text(step) for step in self.steps)

    def find(self, item: Any, sample: Any) -> Any:
        """The value there. Raises `Ungradable` naming the first part that is missing."""
        value = item if self.namespace == "item" else sample
        for step in self.steps:  # the plain case: objects all the way, everything present
            if type(value) is not dict or step not in value:
                return self._search(item, sample)
            value = value[step]
        return value if value is not None else self._search(item, sample)

    def _search(self, item: Any, sample: Any) -> Any:
        value = item if self.namespace == "item" else sample
        for depth, step in enumerate(self.steps):
            found = _descend(value, step)
            if depth == 0 and self.is_output_json and (found is MISSING or found is None):
                found = self._output_json(sample)
            if found is MISSING:
                missing = Path(self.namespace, self.steps[: depth + 1])
                raise Ungradable("invalid_variable_error", f"{missing} does not exist")
            value = found
        return value

    @property
    def is_output_json(self) -> bool:
        """Whether this reads the parsed answer, which exists only where the answer is JSON."""
        return self.namespace == "sample" and self.steps[:1] == ("output_json",)

    def _output_json(self, sample: Any) -> Any:
        text = sample.get("output_text") if isinstance(sample, dict) else None
        value = parse_json(text)
        if value is MISSING:
            raise Ungradable("sample_parse_error", f"the answer is not JSON: {shown(text)}")
        return value


def _step_text(step: Step) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch(r"[\w-]+", step) else f"[{json.dumps(step)}]"


def _descend(value: Any, step: Step) -> Any:
    if isinstance(value, dict):
        # `item.rows.0` and `item[0]` on an object with the key "0" are both plain by intent.
        return value.get(step if isinstance(step, str) else str(step), MISSING)
    if isinstance(value, list):
        if isinstance(step, str):
            if not (step.isascii() and step.isdigit() and len(step) < 10):
                return MISSING
            step = int(step)
        return value[step] if -len(value) <= step < len(value) else MISSING
    return MISSING


class Template:
    """A parsed template. `source` is the text as written, `paths` the references in it."""

    __slots__ = ("_only", "parts", "paths", "source")

    def __init__(self, source: str, parts: tuple[str | Path, ...]) -> None:
        self.source = source
        self.parts = parts
        self.paths = tuple(part for part in parts if isinstance(part, Path))
        # Most templates are one reference and nothing else; that case is worth a short cut.
        self._only = parts[0] if len(parts) == 1 and isinstance(parts[0], Path) else None

    def render(self, item: Any, sample: Any) -> str:
        """The text with every reference filled in. Raises `Ungradable` where one is missing."""
        if self._only is not None:
            value = self._only.find(item, sample)
            return value if type(value) is str else to_text(value)
        return "".join(
            part if isinstance(part, str) else to_text(part.find(item, sample)) for part in self.parts
        )


def to_text(value: Any) -> str:
    """A string as it is; anything else as JSON, keys in their own order, non-ASCII characters kept."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Ungradable("other_error", f"cannot write {shown(value)} as JSON: {error}") from None


def parse_template(source: str, where: str) -> Template:
    """Parse one template. Raises `GraderError` naming `where` (the JSON path) and the bad reference."""
    parts: list[str | Path] = []
    end = 0
    for match in _OPEN.finditer(source):
        if match.start() > end:
            parts.append(source[end : match.start()])
        parts.append(_reference(match.group(1), where))
        end = match.end()
    if source.find("{{", end) >= 0:
        raise _bad(where, f"'{{{{' without '}}}}' in {shown(source[end:])}")
    if end < len(source) or not parts:
        parts.append(source[end:])
    return Template(source, tuple(parts))


def _reference(text: str, where: str) -> str | Path:
    quoted = _QUOTED.fullmatch(text)
    if quoted:
        return _unquote(quoted.group(1))
    body = text.strip()
    namespace = _NAMESPACE.match(body)
    if not namespace:
        raise _bad(where, f"found {{{{{shown(text)}}}}}, expected a path such as {{{{item.answer}}}}")
    name = namespace.group()
    if name not in ("item", "sample"):
        hint = nearest(name, ("item", "sample"))
        raise _bad(where, f"unknown namespace {name!r} in {{{{{body}}}}}, expected item or sample{hint}")
    steps, at = list[Step](), namespace.end()
    while at < len(body):
        step = _STEP.match(body, at)
        if not step:
            raise _bad(where, f"cannot read {shown(body[at:])} in {{{{{body}}}}}, expected .name or [index]")
        if step["index"] is not None:
            steps.append(int(step["index"]))
        else:
            steps.append(step["name"] if step["name"] is not None else _unquote(step["quoted"]))
        at = step.end()
    if name == "sample" and steps and steps[0] not in SAMPLE_KEYS:
        known = ", ".join(SAMPLE_KEYS)
        raise _bad(where, f"sample has no {steps[0]!r}{nearest(str(steps[0]), SAMPLE_KEYS)}; it has {known}")
    return Path(name, tuple(steps))


def _unquote(literal: str) -> str:
    return re.sub(r"\\(.)", r"\1", literal[1:-1], flags=re.DOTALL)


def _bad(where: str, message: str) -> GraderError:
    return GraderError(f"{where}: {message}", error_class="invalid_variable_error")


def templates_in(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every string inside a JSON value, with its JSON path: the places where a template may stand."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from templates_in(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from templates_in(inner, f"{where}[{index}]")
