"""Grade saved rollouts again, offline: the work behind `openrft grade`.

A row of the samples file (JSONL, or parquet with the same columns) is {"item": {...}, "sample": {...}}; a
row of the grades file is `Grade.to_dict()`, in the same order, one per row. The grades file is also the
progress: an interrupted run goes on after the last whole line, and a first line with the hashes of grader
and samples in a file beside it keeps it from going on with a different grader.

Memory does not grow with the file: rows are read and graded in batches, and only the numbers needed for the
tables are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graders.errors import GraderError
from graders.grader import Grader
from graders.result import Grade, merge_usage
from graders.samples import complete

BATCH = 512
KEPT = 10  # rows shown of the slowest and of those that two graders disagree on most
Progress = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass(slots=True)
class Column:
    """The numbers of one grader (or sub-grader): of its scores, and how often it gave none.

    count: rows with a score; failed: rows without; spread: standard deviation, population form.
    """

    count: int = 0
    failed: int = 0
    mean: float | None = None
    spread: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(slots=True)
class Against:
    """How two graders agree on the rows that both could grade.

    spearman, kendall: rank correlations (ties averaged; tau-b), None where one of them gives all the same
    most_apart: [{row, reward, other, rank_gap}], widest first: rank_gap is the difference of the two ranks,
    each as a share from 0 to 1, so that graders on different scales can be compared
    """

    rows: int
    spearman: float | None
    kendall: float | None
    most_apart: list[dict[str, Any]]


@dataclass(slots=True)
class Summary:
    """What a regrade found, as plain data; `to_dict` is JSON.

    graders: "reward" for the whole, then one column per sub-grader
    errors: documented class -> rows; slowest: [{row, seconds}]
    resumed: rows that an earlier, interrupted run had graded already
    """

    rows: int
    resumed: int
    graders: dict[str, Column]
    errors: dict[str, int]
    seconds_mean: float
    slowest: list[dict[str, Any]]
    token_usage: dict[str, dict[str, int]]
    against: Against | None = None
    grades_path: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


@dataclass(slots=True)
class _Tally:
    rewards: list[float | None] = field(default_factory=list)
    subs: dict[str, list[float | None]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    usage: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.rewards.append(row["reward"])
        self.seconds.append(row["seconds"])
        self.errors.update(row["errors"])
        for key, value in row["sub_rewards"].items():
            self.subs.setdefault(key, []).append(value)
        if row["token_usage"]:
            self.usage = merge_usage([self.usage, row["token_usage"]])


def regrade(
    grader: Grader,
    samples_path: str | Path,
    out_path: str | Path | None = None,
    against: Grader | str | Path | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Grade every row of `samples_path`, write grades to `out_path`, and sum up.

    against: another grader, or a file of grades of the same rows; adds rank correlation and disagreements.
    progress: called as (done, total) after each grade.

    Raises `GraderError` for a row that is no {item, sample}, naming its line, and for an `out_path` begun
    with another grader or other samples.
    """
    samples = Path(samples_path)
    total = sum(1 for _ in read_rows(samples))  # every row is read once before anything is written
    if not total:
        raise GraderError(f"{samples.name}: holds no rows")
    if out_path is not None and not Path(out_path).absolute().parent.is_dir():
        raise GraderError(f"no folder {Path(out_path).absolute().parent} to write grades in")
    with _Output(out_path, grader, samples) as output:
        tally, done = _Tally(), len(output.earlier)
        for row in output.earlier:
            tally.add(row)
        other = _Tally()
        rival = against if isinstance(against, Grader) else None
        report = progress or (lambda done, total: None)
        report(done, total)
        for first, batch in _batches(read_rows(samples), done):
            finished = first

            def one(index: int, grade: Grade) -> None:
                nonlocal finished
                finished += 1
                report(finished, total)

            grades = [grade.to_dict() for grade in grader.grade(batch, one)]
            output.write(grades)
            for row in grades:
                tally.add(row)
        if rival is not None:
            for _, batch in _batches(read_rows(samples), 0):
                for grade in rival.grade(batch):
                    other.add(grade.to_dict())
        elif against is not None:
            for row in read_grades(Path(against)):  # type: ignore[arg-type]
                other.add(row)
    summary = _sum_up(tally, done)
    summary.grades_path = None if out_path is None else str(out_path)
    if against is not None:
        if len(other.rewards) != len(tally.rewards):
            raise GraderError(
                f"against: {len(other.rewards)} grades, expected {len(tally.rewards)}, one per row"
            )
        summary.against = compare(tally.rewards, other.rewards)
    return summary


# ---- reading and writing --------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(item, sample) of every row, `output_json` filled in where the text is JSON."""
    for number, row in enumerate(_raw_rows(path), start=1):
        item, sample = (row.get("item"), row.get("sample")) if isinstance(row, dict) else (None, None)
        if not isinstance(item, dict) or not isinstance(sample, dict):
            raise GraderError(f"{path.name}: row {number}: expected {{'item': {{…}}, 'sample': {{…}}}}")
        if not isinstance(sample.get("output_text"), str):
            raise GraderError(f"{path.name}: row {number}: sample.output_text: expected a string")
        yield item, complete(sample)


def _raw_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH, columns=["item", "sample"]):
                for row in batch.to_pylist():
                    yield {key: _from_parquet(value) for key, value in row.items()}
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise GraderError(f"{path.name}: line {number}: not JSON: {error}") from None


def _from_parquet(value: Any) -> Any:
    """A column holds either JSON text or a struct; a struct has every row's keys, null where a row lacks one."""
    if isinstance(value, str):
        return json.loads(value)
    return (
        {key: inner for key, inner in value.items() if inner is not None}
        if isinstance(value, dict)
        else value
    )


def read_grades(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a grades file."""
    with open(path, "rb") as lines:
        for line in lines:
            yield json.loads(line)


def _batches(rows: Iterator[Any], skip: int) -> Iterator[tuple[int, list[Any]]]:
    batch: list[Any] = []
    first = skip
    for number, row in enumerate(rows):
        if number < skip:
            continue
        batch.append(row)
        if len(batch) == BATCH:
            yield first, batch
            first, batch = first + BATCH, []
    if batch:
        yield first, batch


class _Output:
    """The grades file: whole lines from an earlier run are kept, a torn last line is cut off."""

    def __init__(self, path: str | Path | None, grader: Grader, samples: Path) -> None:
        self.path = None if path is None else Path(path)
        self.earlier: list[dict[str, Any]] = []
        self.file: Any = None
        self.identity = {"grader": grader.sha256, "samples": _digest(samples) if path is not None else ""}

    def __enter__(self) -> _Output:
        if self.path is None:
            return self
        note = self.path.with_name(self.path.name + ".part")
        if self.path.exists() and note.exists():
            if json.loads(note.read_text()) != self.identity:
                raise GraderError(
                    f"{self.path}: begun with another grader or other samples; remove it to start afresh"
                )
            self._keep_whole_lines()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(self.identity))
        self.file = open(self.path, "ab" if self.earlier else "wb")
        return self

    def _keep_whole_lines(self) -> None:
        assert self.path is not None
        whole = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if row is None:
                    break
                self.earlier.append(row)
                whole += len(line)
        os.truncate(self.path, whole)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append a batch and hand it to the system, so that only a batch is ever lost."""
        if self.file is not None:
            self.file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            self.file.flush()

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.file is not None and self.path is not None:
            self.file.close()
            if kind is None:  # finished: the note that allows going on is no longer needed
                self.path.with_name(self.path.name + ".part").unlink()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- tables ---------------------------------------------------------------------------------------


def _sum_up(tally: _Tally, resumed: int) -> Summary:
    slowest = sorted(range(len(tally.seconds)), key=lambda row: -tally.seconds[row])[:KEPT]
    return Summary(
        rows=len(tally.rewards),
        resumed=resumed,
        graders={
            "reward": column(tally.rewards),
            **{key: column(found) for key, found in tally.subs.items()},
        },
        errors=dict(tally.errors.most_common()),
        seconds_mean=math.fsum(tally.seconds) / len(tally.seconds) if tally.seconds else 0.0,
        slowest=[{"row": row, "seconds": tally.seconds[row]} for row in slowest],
        token_usage=tally.usage,
    )


def column(scores: list[float | None]) -> Column:
    """Count, mean, spread and bounds of the scores that are there."""
    found = [score for score in scores if score is not None]
    if not found:
        return Column(failed=len(scores))
    mean = math.fsum(found) / len(found)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in found) / len(found))
    return Column(len(found), len(scores) - len(found), mean, spread, min(found), max(found))


def compare(one: list[float | None], two: list[float | None]) -> Against:
    """Rank agreement of two lists of rewards over the same rows; see `Against`."""
    from scipy.stats import kendalltau, rankdata

    rows = [row for row in range(len(one)) if one[row] is not None and two[row] is not None]
    a, b = [one[row] for row in rows], [two[row] for row in rows]
    if len(rows) < 2:
        return Against(len(rows), None, None, [])
    ranks_a, ranks_b = (rankdata(scores) for scores in (a, b))
    gaps = (ranks_a - ranks_b) / (len(rows) - 1)
    widest = sorted(range(len(rows)), key=lambda i: -abs(gaps[i]))[:KEPT]
    varied = len(set(a)) > 1 and len(set(b)) > 1
    return Against(
        rows=len(rows),
        spearman=_pearson(ranks_a.tolist(), ranks_b.tolist()) if varied else None,
        kendall=float(kendalltau(a, b).statistic) if varied else None,
        most_apart=[
            {"row": rows[i], "reward": a[i], "other": b[i], "rank_gap": float(gaps[i])}
            for i in widest
            if gaps[i]
        ],
    )


def _pearson(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    covariance = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(
        math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b)
    )
