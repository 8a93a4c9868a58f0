"""One document about a job: what `openrft show JOB --json` prints."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from tasks import lifecycle
from tasks.run import Run
from tasks.train import checkpoint


def summary(run: Run) -> dict[str, Any]:
    """Status, bill, evidence, model version and where things are; absent parts are None."""
    record, stages = run.record, run.record.stages
    evaluated, registered = stages.get("evaluate"), stages.get("register")
    steps, weights, seconds = captured(run)
    return {
        "id": record.id,
        "name": record.name,
        "status": status(run),
        "error": record.error,
        "model": record.job.model,
        "seed": record.job.seed,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "steps": steps,
        "weights_sha256": weights,
        "billing": {
            "seconds": float(seconds),
            "usd": float(record.rate_card.charge(seconds)),
            "rate_card": record.rate_card.name,
            "rounding": record.rate_card.rounding,
        },
        "evaluation": {
            "rows": evaluated["rows"],
            "base": evaluated["base"],
            "best": evaluated["best"],
            "gain": evaluated["gain"],
            "greedy_gain": evaluated["greedy_gain"],
        }
        if evaluated
        else None,
        "calibration": stages.get("calibrate"),
        "model_version": {"name": registered["name"], "version": registered["version"]}
        if registered
        else None,
        "aliases": _aliases(run, registered) if registered else [],
        "deployment": stages.get("deploy"),
        "mlflow_run_id": record.mlflow_run_id,
        "flow_run_id": record.flow_run_id,
        "report": run.uri("report.html") if run.home.store.exists(f"{run.key}/report.html") else None,
    }


def status(run: Run) -> str:
    """The record's status; `interrupted` for a job that says it is running while no process holds its lock."""
    alive = run.record.status != "running" or lifecycle.is_held(run)
    return run.record.status if alive else "interrupted"


def captured(run: Run) -> tuple[int, str | None, Decimal]:
    """(steps, weights, billed seconds) of a job: of its best checkpoint once trained, else of its newest.

    A job that is still training, or was stopped, is billed what its newest retained checkpoint holds.
    """
    trained = run.record.stages.get("train")
    if trained:
        return trained["steps"], trained["weights_sha256"], Decimal(trained["billed_seconds"])
    found = checkpoint.steps(run)
    if not found:
        return 0, None, Decimal(0)
    newest = checkpoint.describe(run, found[-1])
    return newest.step, newest.weights_sha256, newest.billed_seconds


def _aliases(run: Run, registered: dict[str, Any]) -> list[str]:
    """Read from the store, where each move is written, so that asking does not load MLflow."""
    from tasks.aliases import read

    version = registered["version"]
    return sorted(alias for alias, v in read(run.home, registered["name"]).items() if v == version)
