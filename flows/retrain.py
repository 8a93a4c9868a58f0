"""The chain: prompts and a grader in, a registered challenger (and, where asked, a served champion) out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.promote import promote
from tasks import stages
from tasks.job import Job
from tasks.lifecycle import lifecycle
from tasks.run import Run, start_run
from tasks.stages import gate


@flow(name="retrain", flow_run_name="{job.name}", persist_result=False)
def retrain(job: Job) -> dict[str, Any]:
    """Train a model on prompts and a grader, and keep it only if it is better.

    Args:
        job: What to train, on what, judged how.
    """
    run = start_run(job)
    if run.record.status == "succeeded":
        return {"job": run.id, "unchanged": True}
    with lifecycle(run), stages.under_prefect(run):
        up_to_calibration(run)
        stages.train.with_options(retries=job.resources.restarts)(run.id)
        evaluation = stages.evaluate(run.id)
        gate("evaluate", evaluation.ok, [evaluation.reason])
        version = stages.register(run.id)
        if job.promotion.approval == "none":
            promote(version.name, version.version)
    return {"job": run.id, "unchanged": False}


@flow(name="calibrate", flow_run_name="{job.name}", persist_result=False)
def calibrate(job: Job) -> dict[str, Any]:
    """The chain up to calibration: is this grader fit to train this model on this data?

    Args:
        job: What would be trained, on what, judged how.
    """
    run = start_run(job)
    with lifecycle(run, ends="queued"), stages.under_prefect(run):
        up_to_calibration(run)
    return {"job": run.id}


def up_to_calibration(run: Run) -> None:
    """What comes before a second is billed: each gate closed here has cost nothing but time."""
    dataset = stages.validate(run.id)
    gate("validate", dataset.ok, [f.message for f in dataset.findings if f.severity == "critical"])
    if run.job.warm_start:
        stages.warm_start(run.id)
    calibration = stages.calibrate(run.id)
    gate("calibrate", calibration.ok, calibration.reasons)
