"""What the command line shows: progress while a flow runs, tables at the end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tasks.results import CalibrationReport, DatasetReport, EvaluationReport
    from tasks.run import Run

# A pipe or a log file has no width: do not fold lines there.
out = Console(highlight=False)
if not out.is_terminal:
    out = Console(highlight=False, width=200)
ROUNDING = {"hundredth_hour": ", time rounded to hundredths of an hour", "cents": ""}
LABELS = {
    "validate": "checking the data",
    "warm_start": "warm start",
    "calibrate": "calibrating the grader",
    "train": "training",
    "evaluate": "evaluating",
    "register": "registering",
    "compare": "comparing with the champion",
    "smoke": "trying the served model",
}


def say(text: str) -> None:
    out.print(text, markup=False)


@contextlib.contextmanager
def working(what: str, quiet: bool = False) -> Iterator[None]:
    """A spinner while something of unknown length runs."""
    if quiet:
        yield
    else:
        with out.status(what):
            yield


@contextlib.contextmanager
def progress(run: Run, quiet: bool = False) -> Iterator[Any]:
    """A bar per stage. Yields the listener of stage events: (run, event)."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if quiet:
        yield lambda run, event: None
        return
    say(f"{run.record.name}  {run.id}")
    if not out.is_terminal:  # a log file wants lines, not bars
        yield _line
        return
    bars = Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<28}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=out,
    )
    current: dict[str, Any] = {"bar": bars.add_task("starting", total=None, note=""), "stage": None}

    def listener(run: Run, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "stage_started":
            _close(bars, current)
            current["stage"] = event["stage"]
            current["bar"] = bars.add_task(LABELS.get(event["stage"], event["stage"]), total=None, note="")
        elif kind == "warning":
            bars.console.print(f"! {event['message']}", markup=False)
        elif kind == "training_started" and event.get("resumed"):
            bars.console.print(f"  resuming from the checkpoint of step {event['step']}", markup=False)
        if event.get("steps"):
            bars.update(current["bar"], total=event["steps"], completed=event["step"], note=_note(event))
        elif kind in ("validation", "checkpoint"):
            note = _note(event)
            if note:
                bars.update(current["bar"], note=note)

    with bars:
        try:
            yield listener
            _close(bars, current)
        finally:
            bars.stop()


def _line(run: Run, event: dict[str, Any]) -> None:
    """One line per stage, validation and warning."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["t"]))
    if event["type"] == "stage_started":
        say(f"{clock}  {LABELS.get(event['stage'], event['stage'])}")
    elif event["type"] == "validation":
        say(f"{clock}    step {event['step']:>5}  {_note(event)}")
    elif event["type"] == "warning":
        say(f"{clock}  ! {event['message']}")
    elif event["type"] == "training_started" and event.get("resumed"):
        say(f"{clock}    resuming from the checkpoint of step {event['step']}")


def _close(bars: Any, current: dict[str, Any]) -> None:
    task = bars.tasks[bars.task_ids.index(current["bar"])]
    bars.update(current["bar"], total=task.total or 1, completed=task.total or 1)


def _note(event: dict[str, Any]) -> str:
    metrics = event.get("metrics") or {}
    parts = []
    if "train/reward" in metrics:
        parts.append(f"reward {metrics['train/reward']:.3f}")
    if "valid/reward" in metrics:
        parts.append(f"validation {metrics['valid/reward']:.3f}")
    if "warm_start/loss" in metrics:
        parts.append(f"loss {metrics['warm_start/loss']:.3f}")
    if event.get("billing"):
        parts.append(f"billed {event['billing']['seconds']:.1f} s, ${event['billing']['usd']:.2f}")
    return "  ".join(parts)


def show_summary(document: dict[str, Any]) -> None:
    """The end of `openrft run` and all of `openrft show`."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("job", f"{document['name']}  {document['id']}")
    status = document["status"] + (f": {document['error']['message']}" if document["error"] else "")
    if document.get("unchanged"):
        status += " (unchanged since it finished: nothing was run, nothing was billed)"
    table.add_row("status", status)
    evaluation = document["evaluation"]
    if evaluation:
        base, best = evaluation["base"], evaluation["best"]
        table.add_row(
            f"test reward, {evaluation['rows']} rows",
            f"{base['reward']['mean']:.3f} → {best['reward']['mean']:.3f}   gain {_interval(evaluation['gain'])}",
        )
        table.add_row(
            "greedy answers",
            f"{base['greedy_reward']['mean']:.3f} → {best['greedy_reward']['mean']:.3f}   "
            f"gain {_interval(evaluation['greedy_gain'])}",
        )
        table.add_row(
            "passed, greedy",
            f"{base['greedy_pass_rate']['mean']:.1%} → {best['greedy_pass_rate']['mean']:.1%}",
        )
    if document["steps"]:
        billing = document["billing"]
        table.add_row(
            "billed",
            f"{billing['seconds']:.1f} s of training, {document['steps']} steps   "
            f"{billing['usd']:.2f} USD (rate card {billing['rate_card']}{ROUNDING[billing['rounding']]})",
        )
    if document["model_version"]:
        version = document["model_version"]
        names = ", ".join(document["aliases"]) or "no alias"
        table.add_row("model", f"{version['name']} version {version['version']}  ({names})")
    if document["report"]:
        table.add_row("report", document["report"])
    out.print(table)
    if "champion" in document["aliases"]:
        say(f'\nServe it:  openrft serve     then ask for model "{document["model_version"]["name"]}"')
    say("Look at it:  openrft ui")


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.3f} (95 % {interval['low']:+.3f} to {interval['high']:+.3f})"


def show_validation(report: DatasetReport) -> None:
    table = Table("file", "rows", "tokens, median", "tokens, max")
    for name, facts in report.files.items():
        table.add_row(name, f"{facts.rows:,}", str(facts.tokens_median), str(facts.tokens_max))
    out.print(table)
    for finding in report.findings:
        say(f"{finding.severity:8}  {finding.file}: {finding.message}")
    if not report.findings:
        say("Nothing found.")
    say(f"Data docs: {report.docs}")


def show_calibration(report: CalibrationReport) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("verdict", "fit to train on" if report.ok else "not fit to train on")
    for reason in report.reasons:
        table.add_row("because", reason)
    table.add_row("completions", f"{report.rows} rows × {report.samples} samples")
    if report.mean is not None and report.std is not None and report.pass_rate is not None:
        table.add_row(
            "reward", f"mean {report.mean:.3f}, spread {report.std:.3f}, passed {report.pass_rate:.1%}"
        )
    table.add_row("rows with signal", f"{report.signal_share:.1%} have completions that differ in reward")
    table.add_row("best of k", ", ".join(f"{k}: {value:.3f}" for k, value in report.best_of.items()))
    table.add_row(
        "errors", ", ".join(f"{name} {share:.1%}" for name, share in report.errors.items()) or "none"
    )
    table.add_row(
        "grading",
        f"p50 {report.grade_seconds_p50 * 1000:.1f} ms, p95 {report.grade_seconds_p95 * 1000:.1f} ms",
    )
    out.print(table)


def show_evaluation(report: EvaluationReport) -> None:
    table = Table("model", "validation", "reward (95 %)", "greedy (95 %)", "passed, greedy", "tokens")
    for model in [report.base, *report.candidates]:
        mark = " *" if model.step == report.best.step and model.step else ""
        valid = "" if model.valid_reward is None else f"{model.valid_reward:.3f}"
        table.add_row(
            model.name + mark,
            valid,
            f"{model.reward.mean:.3f} ({model.reward.low:.3f} to {model.reward.high:.3f})",
            f"{model.greedy_reward.mean:.3f} ({model.greedy_reward.low:.3f} to {model.greedy_reward.high:.3f})",
            f"{model.greedy_pass_rate.mean:.1%}",
            f"{model.completion_tokens:.1f}",
        )
    out.print(table)
    say(f"* best by validation. {report.reason}.")


def show_jobs(rows: list[dict[str, Any]]) -> None:
    if not rows:
        say("No jobs yet. Start one with `openrft run PATH`.")
        return
    table = Table("id", "name", "status", "model", "started", "steps", "billed", "gain")
    for row in rows:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created_at"]))
        gain = "" if row["gain"] is None else f"{row['gain']:+.3f}"
        seconds = f"{row['billed_seconds']:.1f} s"
        table.add_row(
            row["id"], row["name"], row["status"], row["model"], started, str(row["steps"]), seconds, gain
        )
    out.print(table)


def grade(
    grader: Path, samples: Path, target: Path | None, against: Path | None, unsafe: bool, as_json: bool
) -> None:
    """`openrft grade`: regrade saved samples."""
    from rich.progress import Progress

    import graders
    from graders.regrade import regrade
    from tasks.errors import BadInput

    for file in (grader, samples, *([against] if against else [])):
        if not file.is_file():
            raise BadInput(f"no file {file}")
    try:
        with graders.load(grader, unsafe=unsafe) as loaded, Progress(console=out, disable=as_json) as bars:
            bar = bars.add_task("grading", total=None)
            other = graders.load(against, unsafe=unsafe) if against else None

            def on_grade(done: int, total: int) -> None:
                bars.update(bar, completed=done, total=total)

            found = regrade(loaded, samples, target, other, on_grade)
    except graders.GraderError as error:
        raise BadInput(str(error)) from None
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    show_grades(found)


def show_grades(found: Any) -> None:
    table = Table("grader", "mean", "spread", "lowest", "highest", "ungraded")
    for name, column in found.graders.items():
        values = [column.mean, column.spread, column.low, column.high]
        table.add_row(name, *("" if v is None else f"{v:.3f}" for v in values), str(column.failed))
    out.print(table)
    say(
        f"{found.rows} rows"
        + (f", {found.resumed} of them graded by an earlier run" if found.resumed else "")
    )
    say("errors: " + (", ".join(f"{name} {count}" for name, count in found.errors.items()) or "none"))
    slowest = ", ".join(f"row {s['row']} {s['seconds'] * 1000:.1f} ms" for s in found.slowest[:5])
    say(f"seconds per grade: mean {found.seconds_mean:.4f}; slowest {slowest}")
    if found.against is not None:
        for key, value in asdict(found.against).items():
            say(f"{key}: {value}")
    if found.grades_path:
        say(f"grades: {found.grades_path}")
