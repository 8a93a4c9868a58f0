"""MLflow: one run per job, found again by tag, written with explicit run ids.

MLflow's active run is thread-local and silently opens another run when it is missing, so it is not used.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tasks.home import Home
from tasks.run import Run

EXPERIMENT = "openrft"
JOB_TAG = "openrft.job_id"


def client(home: Home) -> Any:
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    home.state.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=home.tracking_uri, registry_uri=home.tracking_uri)


def open_tracking(run: Run) -> str:
    """The id of the job's MLflow run: its earlier one, or a new one with parameters and dataset inputs."""
    mlflow = client(run.home)
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    id = experiment.experiment_id if experiment else mlflow.create_experiment(EXPERIMENT, run.home.artifacts)
    found = mlflow.search_runs([id], f"tags.`{JOB_TAG}` = '{run.id}'", max_results=1)
    if found:
        mlflow.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    job = run.job
    tags = {
        JOB_TAG: run.id,
        "mlflow.runName": run.record.name,
        "openrft.model": job.model,
        "openrft.grader_sha256": run.record.grader_sha256,
        "openrft.rate_card": f"{run.record.rate_card.name} v{run.record.rate_card.version}",
        **{f"metadata.{key}": value for key, value in job.metadata.items()},
    }
    made = mlflow.create_run(id, tags=tags, start_time=int(time.time() * 1000))
    return str(made.info.run_id)


def log_setup(run: Run) -> None:
    """Parameters (every `auto` resolved), dataset inputs with digests, the job and grader as artifacts."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    mlflow, id = client(run.home), run.record.mlflow_run_id
    report = run.record.stages["validate"]
    job = run.job
    params = {**report["resolved"], "model": job.model, "seed": job.seed, "loss": job.optimizer.loss}
    params |= {
        "temperature": job.sampling.temperature,
        "kl": job.optimizer.kl,
        "grader": run.record.grader["type"],
    }
    mlflow.log_batch(id, params=[Param(key, str(value)) for key, value in params.items()])
    inputs = [
        DatasetInput(
            Dataset(
                name=split,
                digest=facts["sha256"][:36],
                source_type="local" if "://" not in facts["uri"] else facts["uri"].split("://")[0],
                source=json.dumps({"uri": facts["uri"]}),
                profile=json.dumps({"num_rows": facts["rows"], "sha256": facts["sha256"]}),
            ),
            [InputTag("mlflow.data.context", split)],
        )
        for split, facts in report["files"].items()
    ]
    mlflow.log_inputs(id, datasets=inputs)
    mlflow.log_dict(id, job.model_dump(mode="json"), "job.json")
    mlflow.log_dict(id, run.record.grader, "grader.json")


def log_event(run: Run, event: dict[str, Any], mlflow: Any) -> None:
    """Metrics of one worker event, at its step, in one call."""
    from mlflow.entities import Metric

    values = dict(event.get("metrics") or {})
    values |= {f"billing/{name}": value for name, value in (event.get("billing") or {}).items()}
    if values:
        now = int(event["t"] * 1000)
        metrics = [Metric(name, float(value), now, int(event["step"])) for name, value in values.items()]
        mlflow.log_batch(run.record.mlflow_run_id, metrics=metrics)


def log_report(run: Run, *names: str) -> None:
    """Files or folders of the run folder as artifacts."""
    mlflow, id = client(run.home), run.record.mlflow_run_id
    for name in names:
        path: Path = run.path(name)
        if path.is_dir():
            mlflow.log_artifacts(id, str(path), name)
        elif path.exists():
            mlflow.log_artifact(id, str(path), str(Path(name).parent) if "/" in name else None)


def close_tracking(run: Run) -> None:
    """Set the run's final status from the job's."""
    status = {"succeeded": "FINISHED", "cancelled": "KILLED"}.get(run.record.status, "FAILED")
    client(run.home).set_terminated(run.record.mlflow_run_id, status)
