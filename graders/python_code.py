"""The `python` grader: source checked without running it, calls sent to the sandbox pool."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Sequence
from typing import Any

from graders.errors import GraderError
from graders.grader import OnGrade, Pair
from graders.result import Grade
from graders.sandbox.command import image
from graders.sandbox.pool import Outcome, Pool
from graders.sandbox.process import Limits


class PythonGrader:
    """One source and its pool. `run` sends the whole batch and waits."""

    def __init__(self, spec: dict[str, Any], where: str, options: dict[str, Any]) -> None:
        self.spec, self.options = spec, options
        check_source(spec["source"], f"{where}.source")
        self.pool: Pool | None = None
        self.lock = threading.Lock()

    def run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        """Grade every pair. Raises `GraderError` where no sandbox can be had."""
        left = len(pairs)
        finished = threading.Event()
        lines = []
        for index, (item, sample) in enumerate(pairs):
            try:
                # ASCII, so that half surrogates and odd line ends in a model's text cannot break the line.
                lines.append((index, json.dumps([sample, item], separators=(",", ":")).encode() + b"\n"))
            except (TypeError, ValueError, RecursionError) as error:
                report(index, Grade.failed("other_error", f"the pair cannot be written as JSON: {error}"))
                left -= 1

        def done(index: int, outcome: Outcome) -> None:
            nonlocal left
            report(index, to_grade(outcome))
            left -= 1
            if left == 0:
                finished.set()

        if not left:
            return
        pool = self._pool()
        pool.submit(lines, done)
        while not finished.wait(1.0):
            if pool.closing:
                return
        if isinstance(pool.broken, GraderError):
            raise pool.broken

    def _pool(self) -> Pool:
        with self.lock:
            if self.pool is None:
                self.pool = Pool(
                    self.spec["source"],
                    image(self.spec.get("image_tag")),
                    workers=self.options["workers"],
                    isolation=self.options["isolation"],
                    limits=Limits(timeout=self.options["timeout"]),
                    unsafe=self.options["unsafe"],
                )
            return self.pool

    def close(self) -> None:
        """Kill the pool's workers."""
        with self.lock:
            pool, self.pool = self.pool, None
        if pool is not None:
            pool.close()


def to_grade(outcome: Outcome) -> Grade:
    """A pool's outcome as a grade: faults of the sandbox and of the grader are different classes."""
    if outcome.error is None:
        return Grade(outcome.score, seconds=outcome.seconds, logs=outcome.logs)
    kind = "python_grader_server_error" if outcome.server else "python_grader_runtime_error"
    return Grade.failed(kind, outcome.error, seconds=outcome.seconds, logs=outcome.logs)


def check_source(source: str, where: str) -> None:
    """Raises `GraderError` where the source cannot be a grader: syntax, no `grade`, not two arguments.

    The source is parsed, never run. A `grade` that is not written as a plain top-level function (imported,
    assigned, defined under an `if`) is left to the sandbox to judge.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise GraderError(f"{where}: line {error.lineno}, column {error.offset}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise GraderError(f"{where}: cannot be parsed: {error}") from None
    function = find_grade(tree)
    if isinstance(function, ast.AsyncFunctionDef):
        raise GraderError(f"{where}: line {function.lineno}: grade is async, expected a plain function")
    if function is not None:
        count = len(function.args.posonlyargs) + len(function.args.args)
        least = count - len(function.args.defaults)
        required = sum(default is None for default in function.args.kw_defaults)
        fits = least <= 2 <= count or (function.args.vararg is not None and least <= 2)
        if not fits or required:
            raise GraderError(
                f"{where}: line {function.lineno}: grade takes {ast.unparse(function.args) or 'nothing'}, "
                "expected two positional arguments (sample, item)"
            )
    elif not any(
        isinstance(node, ast.Name | ast.alias | ast.FunctionDef) and _name(node) == "grade"
        for node in ast.walk(tree)
    ):
        raise GraderError(f"{where}: defines no function grade(sample, item)")


def find_grade(tree: ast.Module) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The last top-level definition of `grade`, which is the one that counts."""
    found = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "grade":
            found = node
    return found


def _name(node: ast.Name | ast.alias | ast.FunctionDef) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.alias):
        return node.asname or node.name
    return node.name
