"""report.html: one self-contained page about a job, for people who will never open a terminal.

It can be written at any stage: a section whose stage has not run is not there yet. What comes from data
sets, models and graders is untrusted: the template escapes all of it and marks nothing as safe, and its
content security policy forbids scripts and requests. Charts are geometry, that is numbers, made here and
drawn by the template.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from tasks.billing import RateCard
from tasks.errors import StageFailed
from tasks.results import (
    CalibrationReport,
    DatasetReport,
    Deployment,
    EvaluationReport,
    Interval,
    ModelVersion,
    TrainingResult,
    WarmStartResult,
)
from tasks.run import Run
from tasks.store import write_atomically

EXAMPLES = 10
LONGEST_TEXT = 1500
MOST_POINTS = 400  # of the training curve; beyond it, points are means of neighbouring steps
STAGES = {
    "validate": "Validate the data",
    "warm_start": "Warm start",
    "calibrate": "Calibrate the grader",
    "train": "Train",
    "evaluate": "Evaluate",
    "register": "Register",
    "deploy": "Deploy",
}
GATES = ("validate", "calibrate", "evaluate")
PANELS = {
    "reward": "Reward, sampled answers",
    "greedy_reward": "Reward, greedy answer",
    "pass_rate": "Pass rate, sampled answers",
    "greedy_pass_rate": "Pass rate, greedy answer",
}
M = TypeVar("M", bound=BaseModel)


def write_report(run: Run) -> Path:
    """Write the page as the job stands now, and publish it."""
    target = run.path("report.html")
    # A lone surrogate, which JSON allows in a model's answer, must not keep the page from being written.
    write_atomically(target, render(run).encode("utf-8", "replace"))
    run.publish("report.html")
    return target


def render(run: Run) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "percent": percent,
        "duration": duration,
        "utc": lambda t: datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "yaml": as_yaml,
    }
    return environment.get_template("report.html.j2").render(context(run))


def context(run: Run) -> dict[str, Any]:
    """All that the template reads."""
    record = run.record
    validation = _stage(run, "validate", DatasetReport)
    calibration = _stage(run, "calibrate", CalibrationReport)
    training = _stage(run, "train", TrainingResult)
    evaluation = _stage(run, "evaluate", EvaluationReport)
    history = curves(read_lines(_local(run, "events.jsonl")))
    answers = read_lines(_local(run, "evaluation/answers.jsonl"))
    deltas = [_delta(answer) for answer in answers]
    return {
        "run": run,
        "record": record,
        "job": record.job,
        "verdict": verdict(run),
        "stages": stage_states(run),
        "validation": validation,
        # What is only for information stands in the data checks' own page.
        "findings": [f for f in validation.findings if f.severity != "info"] if validation else [],
        "docs": _relative(run, validation.docs) if validation else None,
        "warm_start": _stage(run, "warm_start", WarmStartResult),
        "calibration": calibration,
        "best_of": best_of_chart(calibration.best_of) if calibration else None,
        "histogram": histogram(_calibration_rewards(run)) if calibration else None,
        "training": training,
        "history": history,
        "curve": curve_plot(history, training, validation.resolved.steps if validation else 0),
        "curve_rows": curve_rows(history),
        "evaluation": evaluation,
        "panels": [whiskers(evaluation, name, PANELS[name]) for name in PANELS] if evaluation else [],
        "examples": choose_examples(answers),
        "answers": {
            "all": len(deltas),
            "better": sum(d > 0 for d in deltas),
            "worse": sum(d < 0 for d in deltas),
        },
        "bill": bill(record.rate_card, training, history) | {"open": _is_open(run, training)},
        "version": _stage(run, "register", ModelVersion),
        "deployment": _stage(run, "deploy", Deployment),
    }


# ---- what happened ----------------------------------------------------------------------------------


@dataclass
class Curves:
    """A job's course, as its events tell it. A step that a resumed run repeated stands here once."""

    train: dict[int, float] = field(default_factory=dict)
    valid: dict[int, dict[str, float]] = field(default_factory=dict)
    checkpoints: dict[int, float] = field(default_factory=dict)  # step → billed seconds in its ledger
    restarts: list[int] = field(default_factory=list)  # the step that each restart went on from
    warnings: list[str] = field(default_factory=list)


def curves(events: Iterable[dict[str, Any]]) -> Curves:
    """Rewards by step. When training starts again at step s, what an earlier attempt did after s is void."""
    result, started = Curves(), False
    for event in events:
        kind, step, metrics = event.get("type"), int(event.get("step") or 0), event.get("metrics") or {}
        if kind == "training_started":
            if started:
                result.restarts.append(step)
            started = True
            for series in (result.train, result.valid, result.checkpoints):
                for late in [s for s in series if s > step]:
                    del series[late]
        elif kind == "step" and _finite(metrics.get("train/reward")):
            result.train[step] = metrics["train/reward"]
        elif kind == "validation":
            result.valid[step] = {name: value for name, value in metrics.items() if _finite(value)}
        elif kind == "checkpoint":
            result.checkpoints[step] = float(event.get("billed_seconds") or 0.0)
        elif kind == "warning" and (message := str(event.get("message", ""))) not in result.warnings:
            result.warnings.append(message)
    return result


@dataclass(frozen=True)
class Verdict:
    tone: str  # good, bad or open
    word: str
    sentence: str
    more: list[str]


def verdict(run: Run) -> Verdict:
    """The page's headline: what came out, in one sentence, and what has to be known beside it."""
    record = run.record
    failure = (record.error or {}).get("message", "") if record.status == "failed" else ""
    validation = _stage(run, "validate", DatasetReport)
    calibration = _stage(run, "calibrate", CalibrationReport)
    evaluation = _stage(run, "evaluate", EvaluationReport)
    if validation and not validation.ok:
        found = [f"{f.file}: {f.message}" for f in validation.findings if f.severity == "critical"]
        return Verdict("bad", "Stopped", "Stopped before training: the data did not pass validation.", found)
    if calibration and not calibration.ok:
        first, *others = calibration.reasons or ["calibration found the grader unfit to train on."]
        return Verdict("bad", "Stopped", f"Stopped before training: {first}", others)
    if evaluation:
        gain, base, best = evaluation.gain, evaluation.base.reward, evaluation.best.reward
        digits = 2 if abs(gain.mean) >= 0.05 else 3
        moved = "rose" if evaluation.ok else "went"
        facts = (
            f"eward on {evaluation.rows} held-out rows {moved} from {number(base.mean, digits)} to "
            f"{number(best.mean, digits)} ({signed(gain.mean, digits)}, 95 % interval "
            f"{signed(gain.low, digits)} to {signed(gain.high, digits)})."
        )
        more = [f"After that the job stopped: {failure}"] if failure and evaluation.ok else []
        if evaluation.ok and evaluation.greedy_gain.low <= 0:
            low, high = evaluation.greedy_gain.low, evaluation.greedy_gain.high
            more.append(
                "This holds for sampled answers. For the greedy answer no improvement was shown "
                f"({signed(evaluation.greedy_gain.mean, 3)}, 95 % interval {signed(low, 3)} to {signed(high, 3)})."
            )
        if evaluation.ok:
            return Verdict("good", "Better", f"R{facts}", more)
        worse = gain.high < 0
        opening = "The trained model is worse than the base" if worse else "No improvement was shown"
        return Verdict("bad", "Worse" if worse else "No gain", f"{opening}: r{facts}", more)
    if record.status == "failed":
        stage = next((name for name, state in stage_states(run).items() if state["state"] == "failed"), "")
        where = f" in the stage “{STAGES[stage]}”" if stage else ""
        return Verdict("bad", "Failed", f"The job failed{where}: {failure or 'no reason was recorded'}", [])
    if record.status in ("cancelled", "paused"):
        return Verdict("open", record.status.capitalize(), f"The job was {record.status}.", [])
    if training := _stage(run, "train", TrainingResult):
        sentence = f"Trained for {training.steps} steps; the evidence on held-out rows is still to come."
    elif calibration:
        sentence = "The grader is fit to train on; nothing has been trained by reinforcement yet."
    elif validation:
        sentence = "The data is valid; nothing has been trained by reinforcement yet."
    else:
        sentence = "The job has only begun."
    return Verdict("open", "Unfinished", sentence, [])


def stage_states(run: Run) -> dict[str, dict[str, str]]:
    """For each stage in order: its title and its state, in the words of the page."""
    record, result, reached = run.record, {}, True
    for name, title in STAGES.items():
        found = record.stages.get(name)
        if name == "warm_start" and record.job.warm_start is None:
            state = "skipped"
        elif found is not None:
            closed = name in GATES and not found.get("ok", True)
            state, reached = ("gate closed", False) if closed else ("done", reached)
        elif name == "deploy" and reached and record.job.promotion.approval == "person":
            state = "waits for a person"
        else:
            words = {"failed": "failed", "running": "running", "succeeded": "not promoted"}
            live = words.get(record.status, "not reached")
            state, reached = (live if reached else "not reached"), False
        result[name] = {"title": title, "state": state}
    return result


def choose_examples(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five biggest improvements, then the worst regressions; topped up to ten with further improvements and
    then with rows that stayed as bad as they were. A reader must never see a gain without its losses."""
    ranked = sorted(answers, key=lambda a: (-_delta(a), -_delta(a, "mean_reward"), a["row"]))
    better = [a for a in ranked if _delta(a) > 0]
    worse = [a for a in reversed(ranked) if _delta(a) < 0][: EXAMPLES - min(5, len(better))]
    better = better[: EXAMPLES - len(worse)]
    same = sorted((a for a in ranked if _delta(a) == 0), key=lambda a: (_reward(a["best"]), a["row"]))
    same = same[: EXAMPLES - len(better) - len(worse)]
    kinds = (("improvement", better), ("regression", worse), ("no change", same))
    return [_example(kind, answer) for kind, group in kinds for answer in group]


def _example(kind: str, answer: dict[str, Any]) -> dict[str, Any]:
    item = answer["item"]
    last = (item.get("messages") or [{}])[-1].get("content")
    if isinstance(last, list):  # content parts, as the API allows
        last = "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in last)
    known = {name: value for name, value in item.items() if name not in ("messages", "tools")}
    return {
        "kind": kind,
        "row": answer["row"],
        "prompt": shorten(_text(last)),
        "reference": [(name, shorten(_text(value))) for name, value in known.items()],
        "delta": _delta(answer),
        "answers": [
            {"who": who, "text": shorten(answer[key]["text"]), "reward": answer[key]["reward"]}
            for who, key in (("Base model", "base"), ("Trained model", "best"))
        ],
    }


def bill(card: RateCard, training: TrainingResult | None, history: Curves) -> dict[str, Any]:
    """Exact seconds, how the charge follows from them, and the stacked bar. Before training has ended: what
    the newest checkpoint holds."""
    captured = history.checkpoints[max(history.checkpoints)] if history.checkpoints else 0.0
    seconds = training.billed_seconds if training else Decimal(str(captured))
    hours, phases, at = seconds / 3600, [], 0.0
    for name, part in (training.billed_by_phase if training else {}).items():
        share = float(part / seconds) if seconds else 0.0
        phases.append({"name": name, "seconds": part, "share": share, "x": at, "width": 640 * share})
        at += 640 * share
    return {
        "seconds": seconds,
        "hours": f"{hours:.6f}",
        "rounded_hours": hours.quantize(Decimal("0.01"), ROUND_HALF_UP),
        "exact_usd": f"{card.exact(seconds):.4f}",
        "usd": training.billed_usd if training else card.charge(seconds),
        "phases": phases,
    }


# ---- charts: numbers only ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Maps values onto pixels. `ticks` are (pixel, label)."""

    low: float
    high: float
    start: float
    stop: float
    step: float
    share: bool = False  # label as percentages

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        scale, unit = (100, "\N{NO-BREAK SPACE}%") if self.share else (1, "")
        digits = max(0, -math.floor(math.log10(scale * self.step) + 1e-9))
        if scale * self.step * 10**digits % 1 > 1e-6:  # a step such as 0.25 needs one digit more
            digits += 1
        first, last = math.ceil(self.low / self.step - 1e-6), math.floor(self.high / self.step + 1e-6)
        marks = [i * self.step for i in range(first, last + 1)]
        return [(self.at(m), number(scale * m, digits) + unit if m else "0") for m in marks]


def value_axis(
    values: Iterable[float], start: float, stop: float, most: int = 5, share: bool = False
) -> Axis:
    """An axis with round ticks around all `values`. It leaves neither 0 to 1 nor the positive numbers unless
    a value does."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    floor, ceiling = (0.0 if low >= 0 else -math.inf), (1.0 if low >= 0 and high <= 1 else math.inf)
    room = max(0.04 * (high - low), 0.05 * max(1.0, abs(high)) if high - low < 0.1 else 0.0)
    low, high = max(floor, low - room), min(ceiling, high + room)
    step = _round_step((high - low) / most)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high, start, stop, step, share)


def _round_step(least: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * (1 - 1e-9))


def curve_plot(history: Curves, training: TrainingResult | None, steps: int) -> dict[str, Any] | None:
    """Geometry of the learning curve: training reward, validation reward, kept checkpoints, the chosen one."""
    valid = {step: m["valid/reward"] for step, m in sorted(history.valid.items()) if "valid/reward" in m}
    if not valid and not history.train:
        return None
    train = sorted(history.train.items())
    block = -(-len(train) // MOST_POINTS) or 1
    means = [
        (statistics.fmean(s for s, _ in part), statistics.fmean(r for _, r in part))
        for part in (train[i : i + block] for i in range(0, len(train), block))
    ]
    last = max([steps, 1, *valid, *history.train])
    x = Axis(0, last, 56, 604, max(1.0, _round_step(last / 6)))
    y = value_axis([*valid.values(), *(reward for _, reward in means)], 268, 12)
    kept = {info.step for info in training.checkpoints} if training else set(history.checkpoints)
    best = training.best_step if training else None
    return {
        "x": x,
        "y": y,
        "block": block,
        "train": " ".join(f"{x.at(s)},{y.at(r)}" for s, r in means),
        "valid": " ".join(f"{x.at(s)},{y.at(r)}" for s, r in valid.items()),
        "points": [
            {"step": s, "reward": r, "x": x.at(s), "y": y.at(r), "kept": s in kept, "chosen": s == best}
            for s, r in valid.items()
        ],
    }


def curve_rows(history: Curves) -> list[dict[str, Any]]:
    """The curve as a table: one line per validation, with the mean training reward since the one before."""
    rows, before = [], -1
    for step, metrics in sorted(history.valid.items()):
        since = [reward for s, reward in history.train.items() if before < s <= step]
        rows.append(
            {
                "step": step,
                "train": statistics.fmean(since) if since else None,
                "valid": metrics.get("valid/reward"),
                "pass_rate": metrics.get("valid/pass_rate"),
            }
        )
        before = step
    return rows


def whiskers(report: EvaluationReport, name: str, title: str) -> dict[str, Any]:
    """One dot-and-whisker panel. Sampled and greedy share an axis, so that they can be compared."""
    models, share = [report.base, *report.candidates], "pass_rate" in name
    pair = (name.removeprefix("greedy_"), f"greedy_{name.removeprefix('greedy_')}")
    spans: list[Interval] = [getattr(model, key) for model in models for key in pair]
    axis = value_axis(
        [edge for span in spans for edge in (span.low, span.high, span.mean)], 92, 272, 4, share
    )
    rows = []
    for index, model in enumerate(models):
        span: Interval = getattr(model, name)
        rows.append(
            {
                "name": model.name,
                "span": span,
                "y": 22 + 28 * index,
                "x": axis.at(span.mean),
                "low": axis.at(span.low),
                "high": axis.at(span.high),
                "chosen": model.step == report.best.step,
            }
        )
    return {"title": title, "share": share, "axis": axis, "rows": rows, "height": 22 + 28 * len(rows) + 22}


def best_of_chart(values: dict[int, float]) -> dict[str, Any] | None:
    """Bars of the mean best of k; None where a reward is below zero, which bars cannot show."""
    if not values or min(values.values()) < 0:
        return None
    chart = _bars({f"best of {k}": value for k, value in values.items()}, 3)
    return chart | {
        "ticks": [(b["x"] + b["width"] / 2, f"{k}") for b, k in zip(chart["bars"], values, strict=True)]
    }


def histogram(rewards: list[float]) -> dict[str, Any] | None:
    """How many completions scored what, in ten equal classes; the last one holds its upper end."""
    if not rewards:
        return None
    low, high = min(rewards), max(rewards)
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
    counts = [0] * 10
    for reward in rewards:
        counts[min(9, int((reward - low) / (high - low) * 10))] += 1
    edges = [number(low + (high - low) * i / 10, 1 if high - low == 1 else 2) for i in range(11)]
    chart = _bars({f"{edges[i]} to {edges[i + 1]}": float(n) for i, n in enumerate(counts)}, 0)
    return chart | {"ticks": [(48 + 28 * i, edges[i]) for i in range(0, 11, 2)]}


def _bars(values: dict[str, float], digits: int) -> dict[str, Any]:
    y, width = value_axis([0.0, *values.values()], 150, 14, 3), 280 / len(values)
    chart = [
        {
            "label": label,
            "text": number(value, digits),
            "x": round(48 + width * (i + 0.1), 1),
            "width": round(width * 0.8, 1),
            "y": y.at(value),
            "height": round(150 - y.at(value), 1),
        }
        for i, (label, value) in enumerate(values.items())
    ]
    return {"y": y, "bars": chart, "summary": ", ".join(f"{b['label']}: {b['text']}" for b in chart)}


# ---- words and files --------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    """Fixed decimals with a real minus sign; never "−0.00"."""
    if value is None or not math.isfinite(value):
        return "not graded"
    text = f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 2) -> str:
    return number(value, digits) if round(value, digits) <= 0 else f"+{number(value, digits)}"


def percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float | Decimal) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def shorten(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]}… ({more:,} more characters)"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """YAML with source code as blocks, so that it reads as its author wrote it."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, string: str) -> yaml.ScalarNode:
        style = "|" if "\n" in string else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", string, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file. A line cut off by a crash is left out."""
    rows = []
    for line in file.read_text("utf-8", "replace").split("\n") if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _local(run: Run, name: str) -> Path:
    """The file of the run folder. Not made yet or out of reach: the page does without."""
    with contextlib.suppress(FileNotFoundError, StageFailed):
        run.fetch(name)
    return run.path(name)


def _calibration_rewards(run: Run) -> list[float]:
    """Rewards of calibration's completions, which its report only sums up."""
    file = _local(run, "calibration/step-000000-000000.parquet")
    if not file.is_file():
        return []
    import pyarrow.parquet as pq

    return [r for r in pq.read_table(file, columns=["reward"])["reward"].to_pylist() if _finite(r)]


def _stage(run: Run, name: str, model: type[M]) -> M | None:
    found = run.record.stages.get(name)
    return model.model_validate(found) if found is not None else None


def _is_open(run: Run, training: TrainingResult | None) -> bool:
    """May the bill still grow?"""
    ended = run.record.status in ("failed", "cancelled", "succeeded")
    closed = any(state["state"] == "gate closed" for state in stage_states(run).values())
    return not (training or ended or closed)


def _relative(run: Run, path: str) -> str:
    return path.removeprefix(f"{run.folder}/").removeprefix(f"{run.uri()}/")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _reward(side: dict[str, Any], name: str = "reward") -> float:
    """A reward as evaluation counts it: what could not be graded is worth nothing to whoever asked."""
    value: Any = side.get(name)
    return float(value) if _finite(value) else 0.0


def _delta(answer: dict[str, Any], name: str = "reward") -> float:
    return _reward(answer["best"], name) - _reward(answer["base"], name)
