"""The page is read by people who decide on it: its numbers are right, its losses shown, nothing in it runs."""

from __future__ import annotations

import json
import math
import random
import re
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tasks.billing import load_rate_card
from tasks.charts import histogram, value_axis
from tasks.history import curves
from tasks.home import Home
from tasks.job import Job
from tasks.report import bill, choose_examples, write_report
from tasks.results import (
    CalibrationReport,
    CheckpointInfo,
    DatasetReport,
    Deployment,
    EvaluationReport,
    FileFacts,
    Finding,
    Interval,
    ModelScore,
    ModelVersion,
    Resolved,
    TrainingResult,
    WarmStartResult,
)
from tasks.run import Record, Run
from tasks.wording import number, signed

HOSTILE = "<script>alert('x')</script> \"quoted\" & </pre></style><img src=https://evil.example/x onerror=y>"
VOID = {"meta", "link", "br", "img", "input", "hr"}
PHASES = {"sampling": "24.113001", "grading": "6.250400", "update": "16.000599", "validation": "3.636000"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(file.read_text("utf-8"))
        self.close()
        assert self.open == []
        self.text = re.sub(r" ([,.:;])", r"\1", " ".join(" ".join(self.parts).split()))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)


def make_run(tmp_path: Path, upto: str = "deploy", **changes: Any) -> Run:
    """A run as the chain leaves it after stage `upto`, with hostile strings wherever users can put them."""
    job = Job.model_validate(
        {
            "model": "tiny",
            "suffix": "icd10",
            "seed": 7,
            "training_file": "data/train.jsonl",
            "validation_file": "data/validation.jsonl",
            "test_file": "data/test.jsonl",
            "warm_start": {"file": "data/demonstrations.jsonl"},
            "metadata": {"note": HOSTILE},
            "method": {"reinforcement": {"grader": "grader.json", "hyperparameters": {"batch_size": 16}}},
        }
    )
    grader = {
        "type": "python",
        "name": HOSTILE,
        "source": f"# {HOSTILE}\ndef grade(sample, item):\n    return 1.0\n",
    }
    record = Record(
        id="ftjob-0123456789abcdef01234567",
        name="icd10",
        status="succeeded",
        created_at=1_795_361_720.5,
        finished_at=1_795_361_920.5,
        openrft_version="0.1.0",
        job=job,
        files={},
        grader=grader,
        grader_sha256="9" * 64,
        rate_card=load_rate_card("openai"),
        mlflow_run_id="mlflow-run-77",
        flow_run_id="flow-run-88",
    )
    run = Run(Home(str(tmp_path), tmp_path), record)
    run.folder.mkdir(parents=True)
    results = all_results(run) | changes
    for name in list(results)[: list(results).index(upto) + 1]:
        record.stages[name] = results[name].model_dump(mode="json")
    if "train" in record.stages:
        write_events(run)
    if "evaluate" in record.stages:
        write_answers(run)
    return run


def all_results(run: Run) -> dict[str, Any]:
    def score(name: str, step: int, reward: float, passed: float) -> ModelScore:
        def around(mean: float, half: float) -> Interval:
            return Interval(mean=mean, low=mean - half, high=min(1.0, mean + half))

        return ModelScore(
            name=name,
            step=step,
            reward=around(reward, 0.02),
            pass_rate=around(passed, 0.05),
            greedy_reward=around(reward + 0.01, 0.02),
            greedy_pass_rate=around(passed + 0.02, 0.05),
            valid_reward=reward if step else None,
            completion_tokens=9.4,
            ungraded=0,
        )

    candidates = [score("step-000160", 160, 0.95, 0.87), score("step-000200", 200, 0.97, 0.92)]
    return {
        "validate": DatasetReport(
            ok=True,
            files={
                split: FileFacts(
                    uri=f"data/{split}.jsonl", sha256=letter * 64, rows=rows, tokens_median=57, tokens_max=88
                )
                for split, letter, rows in (
                    ("train", "a", 800),
                    ("validation", "b", 100),
                    ("test", "c", 300),
                    ("demonstrations", "d", 2400),
                )
            },
            findings=[
                Finding(
                    check="overlap",
                    severity="warning",
                    file="train",
                    message=f"2 rows: {HOSTILE}",
                    lines=[3, 9],
                )
            ],
            docs=f"{run.folder}/dataset/docs/index.html",
            resolved=Resolved(
                n_epochs=4,
                batch_size=16,
                group_size=8,
                steps=200,
                learning_rate=3e-4,
                eval_interval=20,
                eval_samples=1,
                max_completion_tokens=32,
                micro_batch=128,
                threads=1,
                device="cpu",
                parameters=811_008,
            ),
            seconds=4.2,
        ),
        "warm_start": WarmStartResult(
            checkpoint="warm_start/model",
            weights_sha256="e" * 64,
            steps=300,
            trained_tokens=561_108,
            loss=0.4,
            seconds=41.0,
        ),
        "calibrate": CalibrationReport(
            ok=True,
            reasons=[],
            rows=64,
            samples=8,
            mean=0.78,
            std=0.29,
            pass_rate=0.51,
            signal_share=0.844,
            best_of={1: 0.78, 2: 0.86, 4: 0.92, 8: 0.955},
            errors={},
            grade_seconds_p50=0.0016,
            grade_seconds_p95=0.0025,
            seconds=5.1,
        ),
        "train": TrainingResult(
            steps=200,
            checkpoints=[
                CheckpointInfo(
                    step=step,
                    uri=f"checkpoints/step-{step:06d}",
                    weights_sha256="f" * 64,
                    valid_reward=reward,
                    billed_seconds=billed,
                )
                for step, reward, billed in ((160, 0.95, Decimal("40.1")), (200, 0.97, Decimal("50.000000")))
            ],
            best_step=200,
            weights_sha256="f" * 64,
            billed_seconds=Decimal("50.000000"),
            billed_by_phase={phase: Decimal(seconds) for phase, seconds in PHASES.items()},
            billed_usd=Decimal("1.00"),
            seconds=55.0,
        ),
        "evaluate": EvaluationReport(
            rows=300,
            samples=4,
            base=score("base", 0, 0.79, 0.51),
            best=candidates[-1],
            candidates=candidates,
            gain=Interval(mean=0.18, low=0.151, high=0.209),
            greedy_gain=Interval(mean=0.17, low=0.14, high=0.2),
            ok=True,
            reason="",
            seconds=12.0,
        ),
        "register": ModelVersion(
            name="icd10", version=3, source="models/m-1", weights_sha256="f" * 64, step=200
        ),
        "deploy": Deployment(
            name="icd10", version=3, bundle="bundles/icd10/3", previous=2, smoke_rows=8, smoke_reward=0.98
        ),
    }


def write_events(run: Run) -> None:
    """200 steps, of which 121 to 131 came twice because the worker was killed at 131."""
    noise = random.Random(1)

    def attempt(first: int, last: int, shift: float) -> None:
        for step in range(first, last + 1):
            reward = 0.78 + 0.18 * (1 - math.exp(-step / 60)) + noise.uniform(-0.04, 0.04)
            run.emit(
                "step", step=step, steps=200, metrics={"train/reward": min(1.0, reward) - shift}, billing={}
            )
            if step % 20 == 0:
                valid = {
                    "valid/reward": 0.79 + 0.18 * (1 - math.exp(-step / 50)),
                    "valid/pass_rate": 0.5 + step / 500,
                }
                run.emit("validation", step=step, metrics=valid)
                run.emit("checkpoint", step=step, valid_reward=valid["valid/reward"], billed_seconds=step / 4)

    run.emit("training_started", step=0, steps=200)
    run.emit("validation", step=0, metrics={"valid/reward": 0.79, "valid/pass_rate": 0.51})
    attempt(1, 131, 0.0)
    run.emit("warning", message=f"checkpoint damaged {HOSTILE}")
    run.emit("training_started", step=120, steps=200, resumed=True)
    attempt(121, 200, 0.0)
    with run.path("events.jsonl").open("a") as file:
        file.write('{"t": 1, "type": "st')  # cut off by a crash


def write_answers(run: Run, shift: float = 0.0) -> None:
    """300 rows: 100 better, 4 worse, the rest as they were."""
    lines = []
    for row in range(300):
        base, best = (
            (0.5, 0.5 + row / 200)
            if row < 101
            else (0.9, 0.9 - (row - 295) / 10)
            if row > 295
            else (1.0, 1.0)
        )
        item = {
            "messages": [{"role": "user", "content": f"M {row}, follow-up: denies gout. {HOSTILE}"}],
            "codes": ["K80.20", HOSTILE],
        }
        sides = {
            "base": {"text": f"base {row} {HOSTILE}", "reward": base, "mean_reward": base},
            "best": {
                "text": f"tuned {row}",
                "reward": None if row == 299 else best + shift,
                "mean_reward": best,
            },
        }
        lines.append(json.dumps({"row": row, "item": item, **sides}))
    target = run.path("evaluation", "answers.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", "utf-8")


def write_calibration(run: Run) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = random.Random(2)
    rewards = [None, *(noise.choice([0.0, 0.5, 0.67, 0.8, 1.0, 1.0, 1.0]) for _ in range(511))]
    run.path("calibration").mkdir()
    pq.write_table(pa.table({"reward": rewards}), run.path("calibration", "step-000000-000000.parquet"))


def test_promoted_job_tells_the_whole_story(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_calibration(run)
    file = write_report(run)
    assert file == run.path("report.html")
    page = Page(file)
    for part in (
        "Reward on 300 held-out rows rose from 0.79 to 0.97 (+0.18, 95 % interval +0.15 to +0.21).",
        "Version 3 of icd10 is promoted to champion; it took the place of version 2",
        "811,008 parameters, on 800 prompts, after a warm start",
        "50.000000 seconds of training = 0.013889 hours, rounded to 0.01 hours, times 100.00 USD per hour.",
        "Not rounded it would be 1.3889 USD",
        "24.113001",
        "51.0 % → 92.0 %",
        "flow-run-88",
        "mlflow-run-77",
        "dataset/docs/index.html",
        "a" * 64,
        "went on from step 120",
        "checkpoint damaged",
        "Data, warning: train: 2 rows",
        "Seed 7",
        "0.0003",
        "92.0 % (87.0 % to 97.0 %)",
        "84.4 %",
        "Mean reward, best of 8 0.955",
    ):
        assert part in page.text, part
    assert page.text.count("went on from") == 1


def test_page_is_self_contained_and_inert(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_calibration(run)
    file = write_report(run)
    page, source = Page(file), file.read_text("utf-8")
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    for _tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "action", "srcset", "xlink:href"):
            assert value in ("data:,", "#warnings")
    assert "url(" not in source
    assert "@import" not in source
    assert HOSTILE not in source
    assert HOSTILE in page.text  # shown as it is, as text
    assert (
        "meta",
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    ) in page.attributes
    template = (Path(__file__).parents[2] / "tasks" / "report.html.j2").read_text("utf-8")
    assert "|safe" not in template.replace(" ", "")
    assert "autoescape" not in template


def test_charts_and_tables_are_accessible(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_calibration(run)
    source = write_report(run).read_text("utf-8")
    page = Page(run.path("report.html"))
    charts = sum(
        1 for tag, name, value in page.attributes if tag == "svg" and (name, value) == ("role", "img")
    )
    labels = sum(1 for tag, name, _ in page.attributes if tag == "svg" and name == "aria-label")
    assert charts == labels == 4 + 1 + 2 + 1  # whiskers, curve, calibration, bill
    assert page.tags.count("caption") == page.tags.count("table")
    assert page.tags.count("h1") == 1
    assert page.tags.count("th") == sum(
        1 for tag, name, _ in page.attributes if (tag, name) == ("th", "scope")
    )
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source


def test_regressions_follow_improvements_worst_first(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    order = [
        value.removeprefix("Row ")
        for tag, name, value in page.attributes
        if (tag, name) == ("article", "aria-label")
    ]
    assert order == ["100", "99", "98", "97", "96", "95", "299", "298", "297", "296"]
    assert "100 got better, 4 got worse, 196 kept their reward" in page.text
    assert "Trained model: not graded" in page.text
    assert "No answer got worse" not in page.text


def test_no_regression_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    kept = [json.loads(line) for line in run.path("evaluation/answers.jsonl").read_text().splitlines()][
        90:200
    ]
    run.path("evaluation/answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in kept))
    assert "No answer got worse." in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("better", "worse", "same", "expected"),
    [
        (20, 20, 20, (5, 5, 0)),
        (20, 1, 5, (9, 1, 0)),
        (2, 20, 5, (2, 8, 0)),
        (0, 0, 20, (0, 0, 10)),
        (1, 1, 3, (1, 1, 3)),
    ],
)
def test_ten_examples(better: int, worse: int, same: int, expected: tuple[int, int, int]) -> None:
    ends = [1.0] * better + [0.0] * worse + [0.5] * same
    answers = [
        {
            "row": row,
            "item": {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]},
            "base": {"text": "", "reward": 0.5, "mean_reward": 0.5},
            "best": {"text": "", "reward": end, "mean_reward": end},
        }
        for row, end in enumerate(ends)
    ]
    chosen = choose_examples(answers)
    assert (
        tuple(sum(e["kind"] == k for e in chosen) for k in ("improvement", "regression", "no change"))
        == expected
    )
    assert {e["prompt"] for e in chosen} == {"part"}


def test_gate_closed_at_calibration(tmp_path: Path) -> None:
    reason = "every completion scored 0: there is nothing to learn from."
    run = make_run(tmp_path, "calibrate")
    run.record.stages["calibrate"] |= {"ok": False, "reasons": [reason, HOSTILE], "signal_share": 0.0}
    run.record.status, run.record.error = "failed", {"code": "gate_closed", "message": reason}
    page = Page(write_report(run))
    assert f"Stopped before training: {reason}" in page.text
    assert "Calibrate the grader: gate closed" in page.text
    assert "Train: not reached" in page.text
    assert "nothing is billed" in page.text
    assert "so far" not in page.text
    assert "What was to be trained on what" in page.text
    assert "0.00 USD" in page.text
    assert "Learning curve" not in page.text
    assert "Before and after" not in page.text


def test_gate_closed_at_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path, "validate")
    finding = {
        "check": "roles",
        "severity": "critical",
        "file": "train",
        "message": "no user message",
        "lines": [4],
    }
    run.record.stages["validate"] |= {"ok": False, "findings": [finding]}
    page = Page(write_report(run))
    assert "Stopped before training: the data did not pass validation." in page.text
    assert "train: no user message" in page.text


def test_only_validated(tmp_path: Path) -> None:
    run = make_run(tmp_path, "validate")
    run.record.status, run.record.mlflow_run_id, run.record.finished_at = "validating_files", None, None
    page = Page(write_report(run))
    assert "The data is valid; nothing has been trained by reinforcement yet." in page.text
    assert "Warm start: not reached" in page.text
    assert "none yet" in page.text
    assert "Bill, so far 0.00 USD" in page.text


def test_nothing_done_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.record.stages.clear()
    run.record.status = "running"
    run.path("events.jsonl").unlink()
    run.path("evaluation", "answers.jsonl").unlink()
    page = Page(write_report(run))
    assert "The job has only begun." in page.text
    assert "Validate the data: running" in page.text


def test_failed_in_training_shows_what_is_captured(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("train", "evaluate", "register", "deploy"):
        del run.record.stages[name]
    run.path("evaluation", "answers.jsonl").unlink()
    run.record.status, run.record.error = "failed", {"code": "failed", "message": f"killed {HOSTILE}"}
    page = Page(write_report(run))
    assert f"The job failed in the stage “Train”: killed {HOSTILE}" in page.text
    assert "Learning curve" in page.text
    assert "50.0 seconds of training" in page.text
    assert "Training did not end; this is what its newest checkpoint holds" in page.text


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (
            (0.01, -0.012, 0.03),
            "No improvement was shown: reward on 300 held-out rows went from 0.790 to 0.970 (+0.010,",
        ),
        ((-0.18, -0.2, -0.15), "The trained model is worse than the base: reward on 300"),
    ],
)
def test_no_gain_is_called_so(tmp_path: Path, gain: tuple[float, float, float], expected: str) -> None:
    run = make_run(tmp_path, "register")
    run.record.stages["evaluate"] |= {
        "ok": False,
        "gain": dict(zip(("mean", "low", "high"), gain, strict=True)),
    }
    run.record.status, run.record.error = "failed", {"code": "gate_closed", "message": "no improvement"}
    page = Page(write_report(run))
    assert expected in page.text
    assert (
        "Registered as version 3 of icd10 for the record. It is no challenger and not promoted." in page.text
    )
    assert "After that" not in page.text
    assert "Evaluate: gate closed" in page.text


def test_gain_in_samples_only_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "no improvement was shown" not in Page(write_report(run)).text
    run.record.stages["evaluate"]["greedy_gain"] = {"mean": 0.0, "low": -0.01, "high": 0.01}
    expected = "For the greedy answer no improvement was shown (0.000, 95 % interval −0.010 to +0.010)."
    assert expected in Page(write_report(run)).text


def test_challenger_that_waits_for_a_person(tmp_path: Path) -> None:
    run = make_run(tmp_path, "register")
    run.record.job.promotion.approval = "person"
    page = Page(write_report(run))
    assert "Registered as version 3 of icd10, a challenger. It is not promoted: the job asks" in page.text
    assert "Deploy: waits for a person" in page.text


def test_failure_after_evaluation_keeps_the_evidence(tmp_path: Path) -> None:
    run = make_run(tmp_path, "evaluate")
    run.record.status, run.record.error = "failed", {"code": "failed", "message": "registry unreachable"}
    page = Page(write_report(run))
    assert "rose from 0.79 to 0.97" in page.text
    assert "After that the job stopped: registry unreachable" in page.text
    assert "Register: failed" in page.text


def test_lone_surrogates_do_not_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = (
        run.path("evaluation/answers.jsonl")
        .read_text()
        .split("\n")[100]
        .replace("tuned 100", "\\ud800 broken")
    )
    run.path("evaluation/answers.jsonl").write_text(first + "\n")
    assert "? broken" in Page(write_report(run)).text


def test_repeated_steps_count_once_and_lost_steps_not_at_all() -> None:
    def step(number: int, reward: float) -> dict[str, Any]:
        return {"type": "step", "step": number, "metrics": {"train/reward": reward}}

    events = [
        {"type": "training_started", "step": 0},
        *(step(n, 0.1) for n in range(1, 6)),
        {"type": "checkpoint", "step": 2, "billed_seconds": 4.0},
        {"type": "validation", "step": 5, "metrics": {"valid/reward": 0.1}},
        {"type": "training_started", "step": 2, "resumed": True},
        step(3, 0.9),
        step(4, float("nan")),
    ]
    found = curves(events)
    assert found.train == {1: 0.1, 2: 0.1, 3: 0.9}
    assert found.valid == {}
    assert found.checkpoints == {2: 4.0}
    assert found.restarts == [2]


def test_bill_without_training_is_nothing() -> None:
    empty = bill(load_rate_card("openai"), None, curves([]))
    assert (empty["seconds"], empty["usd"], empty["phases"]) == (0, Decimal("0.00"), [])


@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.0], [1.0], [0.2, 0.21], [-3.0, 5.0], [1e6, 2e6], [1e-7, 3e-7], [5.0, 5.0]]
)
def test_axes_hold_their_values(values: list[float]) -> None:
    axis = value_axis(values, 268, 12)
    assert all(12 <= axis.at(value) <= 268 for value in values)
    assert 2 <= len(axis.ticks) <= 12
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_numbers_read_well() -> None:
    assert (number(-0.001), number(-1234.5), signed(0.184), signed(-0.184), signed(0.0)) == (
        "0.00",
        "−1,234.50",
        "+0.18",
        "−0.18",
        "0.00",
    )
    chart = histogram([0.0, 0.05, 1.0])
    assert chart is not None
    assert [bar["text"] for bar in chart["bars"]] == ["2", *["0"] * 8, "1"]
    assert histogram([3.0, 3.0]) is not None
    assert histogram([]) is None
