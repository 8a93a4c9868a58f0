"""report.html: one self-contained page about a job, for people who will never open a terminal.

It can be written at any stage: a section whose stage has not run is not there yet. What comes from data
sets, models and graders is untrusted: the template escapes all of it and marks nothing as safe, and its
content security policy forbids scripts and requests. Charts are geometry, that is numbers, made here and
drawn by the template.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from tasks.billing import RateCard
from tasks.charts import best_of_chart, curve_plot, curve_rows, histogram, whiskers
from tasks.errors import StageFailed
from tasks.history import Curves, curves
from tasks.results import (
    CalibrationReport,
    DatasetReport,
    Deployment,
    EvaluationReport,
    ModelVersion,
    TrainingResult,
    WarmStartResult,
)
from tasks.run import Run
from tasks.store import write_atomically
from tasks.wording import duration, finite, number, percent, shorten, signed

EXAMPLES = 10
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


# ---- words and files --------------------------------------------------------------------------------


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

    return [r for r in pq.read_table(file, columns=["reward"])["reward"].to_pylist() if finite(r)]


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


def _reward(side: dict[str, Any], name: str = "reward") -> float:
    """A reward as evaluation counts it: what could not be graded is worth nothing to whoever asked."""
    value: Any = side.get(name)
    return float(value) if finite(value) else 0.0


def _delta(answer: dict[str, Any], name: str = "reward") -> float:
    return _reward(answer["best"], name) - _reward(answer["base"], name)
