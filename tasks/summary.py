"""One document about a job: what `openrft show JOB --json` prints."""

from __future__ import annotations

from typing import Any

from tasks.run import Run


def summary(run: Run) -> dict[str, Any]:
    """Status, bill, evidence, model version and where things are; absent parts are None."""
    record, stages = run.record, run.record.stages
    trained, evaluated, registered = (stages.get(name) for name in ("train", "evaluate", "register"))
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "error": record.error,
        "model": record.job.model,
        "seed": record.job.seed,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "steps": trained["steps"] if trained else 0,
        "weights_sha256": trained["weights_sha256"] if trained else None,
        "billing": {
            "seconds": float(trained["billed_seconds"]) if trained else 0.0,
            "usd": float(trained["billed_usd"]) if trained else 0.0,
            "rate_card": record.rate_card.name,
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
        "report": run.uri("report.html"),
    }


def _aliases(run: Run, registered: dict[str, Any]) -> list[str]:
    """Read from the store, where each move is written, so that asking does not load MLflow."""
    from tasks.aliases import read

    version = registered["version"]
    return sorted(alias for alias, v in read(run.home, registered["name"]).items() if v == version)
