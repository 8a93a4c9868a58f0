"""Prefect tasks around the stages: results kept by run and stage, retries where they can help.

A run's id is a hash of everything that its stages depend on, so "run id + stage" is the key of a
stage's result: after a crash, what was done is read back and the stage that was cut off goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.filesystems import WritableFileSystem
from prefect.runtime import flow_run
from prefect.states import Crashed
from prefect.utilities.asyncutils import sync_compatible

from tasks import dataset, deploy, lifecycle, registry, tracking
from tasks.errors import GateClosed, StoreUnreachable
from tasks.home import open_home
from tasks.results import (
    CalibrationReport,
    Comparison,
    DatasetReport,
    Deployment,
    EvaluationReport,
    ModelVersion,
    Result,
    TrainingResult,
    WarmStartResult,
)
from tasks.run import Run, open_run
from tasks.train import process

# Called with each event of a stage, as (run, event); the command line draws its progress from them.
listeners: list[Callable[[Run, dict[str, Any]], None]] = []
ARTIFACT_SECONDS = 2.0


class StageResults(WritableFileSystem):
    """Task results in the store, beside the run that they belong to."""

    _block_type_name = "OpenRFT stage results"
    _block_type_slug = "openrft-stage-results"

    # Without sync_compatible Prefect's write fails, is only logged, and the run completes without results.
    @sync_compatible
    async def read_path(self, path: str) -> bytes:
        try:
            return open_home().store.read(path)
        except FileNotFoundError:
            raise ValueError(f"no result at {path}") from None  # what Prefect takes for "not cached"

    @sync_compatible
    async def write_path(self, path: str, content: bytes) -> str:
        open_home().store.write(path, content)
        return path


def _key(context: Any, parameters: dict[str, Any]) -> str:
    return f"jobs/{parameters['run_id']}/results/{context.task.name}.json"


def _retry_helps(task: Any, task_run: Any, state: Any) -> bool:
    """The store may answer next time, and a killed worker goes on from its checkpoint; bad data stays bad."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, (StoreUnreachable, process.Killed))


@contextlib.contextmanager
def under_prefect(run: Run) -> Iterator[None]:
    """Tie the job to the current flow run and keep its stages' results in the store.

    Enter it with the job's lock held. The block must be known to the server that is in use, and an earlier
    flow run of the job that never ended was killed: nobody else will say so.
    """
    block = StageResults()
    block.save("stages", overwrite=True)
    before = {stage: stage.result_storage for stage in KEPT}
    for stage in KEPT:
        stage.result_storage = block
    _crash_stale(run.record.flow_run_id)
    run.record.flow_run_id = str(flow_run.id)
    run.save()
    try:
        yield
    finally:
        for stage, storage in before.items():
            stage.result_storage = storage
        process.dismiss()


def _crash_stale(flow_run_id: str | None) -> None:
    if flow_run_id is None:
        return
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
        state = client.read_flow_run(UUID(flow_run_id)).state
        if state is not None and not state.is_final():
            message = "The process of this run was killed; a later run of the job went on from there."
            client.set_flow_run_state(UUID(flow_run_id), Crashed(message=message), force=True)


kept: dict[str, Any] = {"cache_key_fn": _key, "persist_result": True, "result_serializer": "json"}
patient: dict[str, Any] = {"retries": 2, "retry_delay_seconds": 2, "retry_condition_fn": _retry_helps}


def _finish(run: Run, stage: str, result: Result) -> None:
    run.record.stages[stage] = result.model_dump(mode="json")
    run.save()
    run.emit("stage_finished", stage=stage)


@contextlib.contextmanager
def _started(run: Run, stage: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Announces a stage; yields the handler of its events: MLflow metrics, Prefect progress, listeners."""
    mlflow = tracking.client(run.home)
    progress: dict[str, Any] = {"id": None, "at": 0.0}

    def on_event(event: dict[str, Any]) -> None:
        tracking.log_event(run, event, mlflow)
        for listener in listeners:
            listener(run, event)
        if event.get("steps") and time.monotonic() - progress["at"] > ARTIFACT_SECONDS:
            progress["at"], share = time.monotonic(), 100.0 * event["step"] / event["steps"]
            if progress["id"] is None:
                progress["id"] = create_progress_artifact(
                    share, key=stage.replace("_", "-"), description=stage
                )
            else:
                update_progress_artifact(progress["id"], share)

    start = {"t": time.time(), "type": "stage_started", "stage": stage}
    for listener in listeners:
        listener(run, start)
    run.emit("stage_started", stage=stage)
    try:
        yield on_event
    finally:
        if progress["id"] is not None:
            update_progress_artifact(progress["id"], 100.0)


def _in_worker(run_id: str, stage: str, *arguments: str) -> tuple[Run, dict[str, Any]]:
    run = open_run(run_id)
    with _started(run, stage) as on_event:

        def and_prepare(event: dict[str, Any]) -> None:
            on_event(event)
            # The two stages that follow a long one are short: their workers load while it still runs.
            if stage in ("warm_start", "train") and 2 * event.get("step", 0) >= event.get("steps", 0) > 0:
                process.standby(2)

        try:
            return run, process.run_stage(run, stage, and_prepare, *arguments)
        except process.Killed as error:  # tried again where that helps; either way it should be seen
            event = {"t": time.time(), "type": "warning", "message": str(error)}
            run.emit("warning", message=str(error))
            on_event(event)
            raise


@task(name="validate", **kept, **patient)
def validate(run_id: str) -> DatasetReport:
    run = open_run(run_id)
    process.standby()
    with _started(run, "validate"):
        report = dataset.validate(run)
    _finish(run, "validate", report)
    tracking.log_setup(run)
    tracking.log_report(run, "dataset/report.json", "dataset/docs")
    rows = [
        f"| {name} | {f.rows:,} | {f.tokens_median} | {f.tokens_max} | `{f.sha256[:12]}` |"
        for name, f in report.files.items()
    ]
    found = [f"- **{f.severity}** {f.file}: {f.message}" for f in report.findings] or ["Nothing found."]
    _markdown(
        "validate",
        [
            "| file | rows | tokens (median) | tokens (max) | sha256 |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *found,
        ],
    )
    return report


@task(name="warm_start", **kept, **patient)
def warm_start(run_id: str) -> WarmStartResult:
    run, found = _in_worker(run_id, "warm_start")
    result = WarmStartResult.model_validate(found)
    _finish(run, "warm_start", result)
    return result


@task(name="calibrate", **kept, **patient)
def calibrate(run_id: str) -> CalibrationReport:
    run, found = _in_worker(run_id, "calibrate")
    report = CalibrationReport.model_validate(found)
    _finish(run, "calibrate", report)
    tracking.log_report(run, "calibration/report.json")
    ladder = ", ".join(f"best of {k}: {v:.3f}" for k, v in report.best_of.items())
    _markdown(
        "calibrate",
        [
            f"**{'Fit to train on' if report.ok else 'Not fit to train on'}**",
            *[f"- {reason}" for reason in report.reasons],
            f"- mean {report.mean}, standard deviation {report.std}, rows with signal {report.signal_share:.0%}",
            f"- {ladder}",
        ],
    )
    return report


@task(name="train", **kept, retry_condition_fn=_retry_helps, retry_delay_seconds=1)
def train(run_id: str) -> TrainingResult:
    run, found = _in_worker(run_id, "train")
    result = TrainingResult.model_validate(found)
    _finish(run, "train", result)
    rows = [
        f"| {c.step} | {c.valid_reward} | {c.billed_seconds} | `{c.weights_sha256[:12]}` |"
        for c in result.checkpoints
    ]
    _markdown(
        "checkpoints", ["| step | validation reward | billed seconds | weights |", "|---|---|---|---|", *rows]
    )
    return result


@task(name="evaluate", **kept, **patient)
def evaluate(run_id: str) -> EvaluationReport:
    run, found = _in_worker(run_id, "evaluate")
    report = EvaluationReport.model_validate(found)
    _finish(run, "evaluate", report)
    tracking.log_report(run, "evaluation/report.json", "evaluation/answers.jsonl")
    rows = [
        f"| {m.name} | {m.reward.mean:.3f} ({m.reward.low:.3f} to {m.reward.high:.3f}) | {m.greedy_reward.mean:.3f} | {m.pass_rate.mean:.1%} |"
        for m in [report.base, *report.candidates]
    ]
    _markdown(
        "evaluate",
        [
            report.reason,
            "",
            "| model | reward (95 % interval) | greedy | passed |",
            "|---|---|---|---|",
            *rows,
        ],
    )
    return report


@task(name="register", **kept, **patient)
def register(run_id: str) -> ModelVersion:
    run = open_run(run_id)
    with _started(run, "register"):
        version = registry.register(run)
    _finish(run, "register", version)
    return version


KEPT = (validate, warm_start, calibrate, train, evaluate, register)


@task(name="compare", **patient)
def compare(run_id: str, champion: int) -> Comparison:
    """Challenger against champion on the challenger's test rows."""
    run = open_run(run_id)
    _, found = _in_worker(run_id, "compare", registry.bundle_key(run.home, f"{run.record.name}/{champion}"))
    return Comparison.model_validate(found)


@task(name="deploy", **patient)
def publish_and_smoke(run_id: str, name: str, version: int) -> Deployment:
    """Publish the bundle, serve it on loopback, and grade its answers. Moves no alias."""
    run = open_run(run_id)
    key = deploy.publish_bundle(run, name, version)
    _, found = _in_worker(run_id, "smoke", key)
    previous = registry.aliases(run.home, name).get("champion")
    return Deployment(
        name=name,
        version=version,
        bundle=f"{run.home.files}/{key}",
        previous=previous,
        smoke_rows=found["rows"],
        smoke_reward=found["reward"],
    )


def record_promotion(run_id: str, deployment: Deployment | None = None, reason: str = "") -> None:
    """Keep what became of the version with its job, and draw the report anew."""
    run = open_run(run_id)
    if deployment is not None:
        _finish(run, "deploy", deployment)
    run.record.stages["promotion"] = {"promoted": deployment is not None, "reason": reason}
    run.save()
    lifecycle.write_report(run)


def gate(stage: str, ok: bool, reasons: list[str]) -> None:
    """End the job with the reasons when a stage's verdict is no, before more is spent."""
    if not ok:
        raise GateClosed(f"stopped after {stage}: " + " ".join(reasons))


def _markdown(key: str, lines: list[str]) -> None:
    create_markdown_artifact("\n".join(lines), key=key.replace("_", "-"))
