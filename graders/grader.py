"""`Grader`: a loaded grader with its worker pools, and `load`, which makes one.

A multi grader is flattened into leaves. Leaves that are plain functions of two texts run right in the
calling thread; the others (python, model, endpoint, cosine) each take the whole batch at once and report
results as they come, so that a slow judge and a sandbox work side by side.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from graders import local
from graders.errors import ERROR_CLASSES, GraderError, Problem, Ungradable
from graders.formula import Formula, parse_formula
from graders.result import Grade, merge_usage
from graders.spec import read_spec
from graders.templates import Template

PROGRESS = 0.05  # seconds between looks at what has finished
Pair = tuple[dict[str, Any], dict[str, Any]]  # (item, sample)
OnGrade = Callable[[int, Grade], None]


class Leaf(Protocol):
    """A grader that takes a batch at a time. `run` returns when every index was reported."""

    def run(self, pairs: Sequence[Pair], report: OnGrade) -> None: ...
    def close(self) -> None: ...


class _Local:
    """A leaf that is a function of one pair."""

    def __init__(self, score: local.Score, note: str = "") -> None:
        self.score, self.note = score, note

    def grade(self, item: dict[str, Any], sample: dict[str, Any]) -> Grade:
        start = time.perf_counter()
        try:
            reward = self.score(item, sample)
        except Ungradable as error:
            return Grade.failed(error.error_class, error.message, seconds=time.perf_counter() - start)
        return Grade(reward, seconds=time.perf_counter() - start, logs=self.note)


class Grader:
    """A loaded grader. `spec` is its normalised JSON, `sha256` the hash of that in canonical form.

    Use as a context manager, or call `close`; both kill all workers. An open grader is closed at exit.
    """

    def __init__(self, spec: dict[str, Any], **options: Any) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.type: str = spec["type"]
        canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self.sha256 = hashlib.sha256(canonical.encode()).hexdigest()
        self.templates: list[tuple[str, Template]] = []
        self.sources: list[tuple[str, str]] = []
        self._formula: Formula | None = None
        self._local: dict[str, _Local] = {}
        self._batched: dict[str, Leaf] = {}
        if self.type == "multi":
            self._keys = tuple(spec["graders"])
            self._formula = parse_formula(spec["calculate_output"], self._keys, "grader.calculate_output")
            for key in self._keys:
                self._add(key, spec["graders"][key], f"graders.{key}", options)
        else:
            self._keys = (self.name,)
            self._add(self.name, spec, "grader", options)
        self._scores = [(key, leaf.score) for key, leaf in self._local.items()]
        self._notes = "\n".join(f"{key}: {leaf.note}" for key, leaf in self._local.items() if leaf.note)
        self._invalid = float(spec.get("invalid_grade", 0.0))
        _open.add(self)

    def _add(self, key: str, spec: dict[str, Any], where: str, options: dict[str, Any]) -> None:
        kind = spec["type"]
        if kind == "string_check":
            score, templates = local.string_check(spec, where)
            self._local[key] = _Local(score)
        elif kind == "text_similarity" and spec["evaluation_metric"] != "cosine":
            score, templates = local.text_similarity(spec, where)
            note = ""
            if spec["evaluation_metric"] == "meteor":
                from graders.similarity import meteor_note

                note = meteor_note()
            self._local[key] = _Local(score, note)
        else:
            leaf, templates = _batched(kind, spec, where, options)
            self._batched[key] = leaf
            if kind == "python":
                self.sources.append((f"{where}.source", spec["source"]))
        self.templates += templates

    # ---- grading ----------------------------------------------------------------------------------

    def grade(self, pairs: Sequence[Pair], on_grade: OnGrade | None = None) -> list[Grade]:
        """One grade per (item, sample) pair, in the same order.

        `on_grade(index, grade)` is called in this thread as grades finish, in any order. Raises
        `GraderError` only where the grader cannot run on this machine at all (no sandbox).
        """
        grades: list[Grade | None] = [None] * len(pairs)
        if self._batched and pairs:
            self._grade_batched(pairs, grades, on_grade)
        else:
            self._grade_local(pairs, grades, on_grade)
        return grades  # type: ignore[return-value]

    def _grade_local(
        self, pairs: Sequence[Pair], grades: list[Grade | None], on_grade: OnGrade | None
    ) -> None:
        one = self._local[self._keys[0]].grade if self._formula is None else self._grade_quickly
        for index, (item, sample) in enumerate(pairs):
            grade = grades[index] = one(item, sample)
            if on_grade is not None:
                on_grade(index, grade)

    def _grade_quickly(self, item: dict[str, Any], sample: dict[str, Any]) -> Grade:
        """A multi grader whose parts are all plain functions: no Grade per part unless one of them fails."""
        assert self._formula is not None
        start = time.perf_counter()
        scores: dict[str, float | None] = {}
        try:
            for key, score in self._scores:
                scores[key] = score(item, sample)
            reward = self._formula.evaluate(scores)  # type: ignore[arg-type]
        except Ungradable:
            return self._combine({key: leaf.grade(item, sample) for key, leaf in self._local.items()})
        return Grade(
            reward, scores, seconds=time.perf_counter() - start, logs=self._notes, invalid_grade=self._invalid
        )

    def _grade_batched(
        self, pairs: Sequence[Pair], grades: list[Grade | None], on_grade: OnGrade | None
    ) -> None:
        # Results are collected without waking this thread for each: at a thousand a second and more, the
        # wake-ups would cost as much as the grading.
        done: deque[tuple[str, int, Grade]] = deque()
        errors: list[BaseException] = []
        running = [threading.Thread(target=self._run_leaf, args=(key, leaf, pairs, done, errors), daemon=True)
                   for key, leaf in self._batched.items()]  # fmt: skip
        try:
            for thread in running:
                thread.start()
            parts = [
                {key: leaf.grade(item, sample) for key, leaf in self._local.items()} for item, sample in pairs
            ]
            while running:
                running[0].join(PROGRESS)
                running = [thread for thread in running if thread.is_alive()]
                if errors:
                    raise errors[0]
                while done:
                    key, index, grade = done.popleft()
                    part = parts[index]
                    part[key] = grade
                    if len(part) < len(self._keys):
                        continue
                    whole = grade if self._formula is None else self._combine(part)
                    grades[index] = whole
                    parts[index] = {}
                    if on_grade is not None:
                        on_grade(index, whole)
            if None in grades:
                raise GraderError("the grader was closed while it graded")
        except BaseException:
            # An interrupt or a caller's error: nothing may go on grading behind its back.
            self.close()
            raise

    @staticmethod
    def _run_leaf(
        key: str,
        leaf: Leaf,
        pairs: Sequence[Pair],
        done: deque[tuple[str, int, Grade]],
        errors: list[BaseException],
    ) -> None:
        try:
            leaf.run(pairs, lambda index, grade: done.append((key, index, grade)))
        except BaseException as error:
            errors.append(error)

    def _combine(self, found: dict[str, Grade]) -> Grade:
        parts = {key: found[key] for key in self._keys}
        scores = {key: part.reward for key, part in parts.items()}
        whole = Grade(None, sub_rewards=scores, parts=parts, invalid_grade=self._invalid)
        whole.seconds = max([part.seconds for part in parts.values()])
        failed = usage = False
        for part in parts.values():
            failed = failed or part.reward is None
            usage = usage or bool(part.token_usage)
            if part.logs:
                whole.logs = _labelled(parts, "logs")
        if usage:
            whole.token_usage = merge_usage([part.token_usage for part in parts.values()])
        if failed:
            classes = {error for part in parts.values() for error in part.errors}
            whole.errors = [name for name in ERROR_CLASSES if name in classes]
            for detail in dict.fromkeys(name for part in parts.values() for name in part.details):
                whole.details[detail] = _labelled(parts, detail)
            return whole
        assert self._formula is not None
        try:
            whole.reward = self._formula.evaluate(scores)  # type: ignore[arg-type]
        except Ungradable as error:
            whole.errors, whole.details = [error.error_class], {error.error_class: error.message}
        return whole

    # ---- the rest ---------------------------------------------------------------------------------

    def check(self, items: Sequence[dict[str, Any]]) -> list[Problem]:
        """What in this grader does not fit these dataset rows, found without a sample and without running
        anything: template keys that rows lack, and python sources that read such keys or look mistaken."""
        from graders.static import check_sources, check_templates

        return check_templates(self.templates, items) + check_sources(self.sources, items)

    def close(self) -> None:
        """Kill every worker and its process tree. A closed grader grades again by starting new ones."""
        for leaf in self._batched.values():
            leaf.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _labelled(parts: dict[str, Grade], what: str) -> str:
    texts = {key: part.logs if what == "logs" else part.details.get(what, "") for key, part in parts.items()}
    return "\n".join(f"{key}: {text}" for key, text in texts.items() if text)


def _batched(
    kind: str, spec: dict[str, Any], where: str, options: dict[str, Any]
) -> tuple[Leaf, list[tuple[str, Template]]]:
    if kind == "python":
        from graders.python_code import PythonGrader

        return PythonGrader(spec, where, options), []
    if kind == "endpoint":
        from graders.endpoint import EndpointGrader

        return EndpointGrader(spec, where, options), []
    if kind == "text_similarity":
        from graders.embedding import CosineGrader

        cosine = CosineGrader(spec, where, options)
        return cosine, cosine.templates
    from graders.judge import ModelGrader

    judge = ModelGrader(spec, where, options)
    return judge, judge.templates


_open: weakref.WeakSet[Grader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for grader in list(_open):
        grader.close()


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(
    spec: dict[str, Any] | str | Path,
    *,
    unsafe: bool = False,
    workers: int | None = None,
    isolation: str = "call",
    timeout: float = 120.0,
    endpoints: dict[str, dict[str, Any]] | None = None,
    concurrency: int = 64,
    cache_dir: str | Path | None = None,
) -> Grader:
    """A grader from OpenAI's grader JSON: a dict, JSON text, or the path of a file.

    unsafe: run python graders without a sandbox (only where the kernel allows none)
    workers: sandboxed processes per python grader; default one per core
    isolation: "call" runs each call in a fresh fork; "worker" keeps one process, faster, for trusted samples
    timeout: seconds per python call
    endpoints: model -> {"base_url", "api_key_env", ...}; the key "*" stands for every other model
    concurrency: model or endpoint requests in flight at once
    cache_dir: where answers of judges and embeddings are kept, by the full request; default: nowhere

    Raises `GraderError`, one line: which field, what was found, what was expected.
    """
    if isolation not in ("call", "worker"):
        raise GraderError(f"isolation: found {isolation!r}, expected 'call' or 'worker'")
    return Grader(
        read_spec(spec),
        unsafe=unsafe,
        workers=workers or cores(),
        isolation=isolation,
        timeout=timeout,
        endpoints=endpoints or {},
        concurrency=concurrency,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )


def grade(grader: Grader | dict[str, Any] | str | Path, pairs: Sequence[Pair]) -> list[Grade]:
    """Grade once: `load`, `Grader.grade`, `close`. A `Grader` that is handed in stays open."""
    if isinstance(grader, Grader):
        return grader.grade(pairs)
    with load(grader) as loaded:
        return loaded.grade(pairs)
