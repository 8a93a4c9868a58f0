"""Checks of a grader against dataset rows, before a single answer is sampled.

Templates: every `item.…` path is looked up in every row. Python sources: keys read as `item["key"]` are
looked up too, but only reported when no row at all has them, since code may well ask first; and a
`grade(item, sample)` with its arguments the wrong way round, a trap that other documents set, is named.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from graders.errors import Problem, Ungradable, nearest
from graders.python_code import find_grade
from graders.templates import Path, Template


def check_templates(
    templates: Sequence[tuple[str, Template]], items: Sequence[dict[str, Any]]
) -> list[Problem]:
    """One problem per missing key and row; a key that no row has is one problem at row 0."""
    problems: list[Problem] = []
    for where, template in templates:
        for path in dict.fromkeys(template.paths):
            if path.namespace == "item" and path.steps:
                problems += _check_path(where, template.source, path, items)
    return problems


def _check_path(where: str, source: str, path: Path, items: Sequence[dict[str, Any]]) -> list[Problem]:
    found: list[Problem] = []
    for row, item in enumerate(items):
        try:
            path.find(item, None)
        except Ungradable as error:
            key = error.message.removesuffix(" does not exist")
            found.append(Problem(row, source, where, key, f"row {row}: {key} does not exist"))
    if found and len(found) == len(items):
        key = found[0].key
        hint = _hint(path, items)
        return [Problem(0, source, where, key, f"no row has {key}{hint}", every_row=True)]
    return found


def _hint(path: Path, items: Sequence[dict[str, Any]]) -> str:
    """The nearest key that exists where the path first leaves the rows, over the first rows."""
    names: dict[str, None] = {}
    missing = ""
    for item in items[:100]:
        value: Any = item
        for depth in range(len(path.steps)):
            try:
                value = Path("item", path.steps[: depth + 1]).find(item, None)
            except Ungradable:
                missing = str(path.steps[depth])
                if isinstance(value, dict):
                    names.update(dict.fromkeys(map(str, value)))
                break
    hint = nearest(missing, names)
    return hint or (f"; rows have {', '.join(list(names)[:12])}" if names else "")


def check_sources(sources: Sequence[tuple[str, str]], items: Sequence[dict[str, Any]]) -> list[Problem]:
    """Findings in python sources, at row 0: swapped arguments, and constant keys that no row has."""
    problems: list[Problem] = []
    keys = {key for item in items for key in item}
    for where, source in sources:
        function = find_grade(ast.parse(source))
        if function is None:
            continue
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        if names[:2] == ["item", "sample"]:
            message = (
                "grade(item, sample) has its arguments the wrong way round: grade(sample, item) is called"
            )
            problems.append(Problem(0, "grade(item, sample)", where, "item", message, every_row=True))
        elif len(names) >= 2 and items:
            problems += _read_keys(function, names[1], where, keys)
    return problems


def _read_keys(function: ast.AST, item: str, where: str, keys: set[str]) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name)
            and node.value.id == item
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
            and node.slice.value not in keys
        ):
            key = node.slice.value
            message = f"line {node.lineno}: no row has item.{key}{nearest(key, keys)}"
            problems.setdefault(key, Problem(0, ast.unparse(node), where, f"item.{key}", message))
    return list(problems.values())
