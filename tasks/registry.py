"""The model registry: versions, and the aliases `challenger`, `champion` and `previous`.

MLflow keeps no history of its aliases, so each move is also a line of models/<name>/history.jsonl in the
store: what, from, to, who, why, when.
"""

from __future__ import annotations

import contextlib
import difflib
import getpass
import json
import time
from typing import Any

from tasks.errors import BadInput, StageFailed
from tasks.home import Home
from tasks.results import EvaluationReport, ModelVersion, TrainingResult
from tasks.run import Run
from tasks.store import MANIFEST
from tasks.tracking import client

VERSION_TAG_JOB = "openrft.job_id"


def register(run: Run) -> ModelVersion:
    """A version of the job's registered model for the best checkpoint; `challenger` when evaluation passed.

    Asked again for the same job and weights, it returns the version that is there.
    """
    from mlflow.entities import Metric

    mlflow = client(run.home)
    training = TrainingResult.model_validate(run.record.stages["train"])
    evaluation = EvaluationReport.model_validate(run.record.stages["evaluate"])
    name, best = run.record.name, training.best_step
    source = next(info.uri for info in training.checkpoints if info.step == best)
    _ensure_model(mlflow, name)
    version = _find(mlflow, name, run.id, training.weights_sha256)
    if version is None:
        model = mlflow.create_logged_model(
            experiment_id=mlflow.get_run(run.record.mlflow_run_id).info.experiment_id,
            name=name,
            source_run_id=run.record.mlflow_run_id,
            model_type="policy",
            params={"step": str(best), "base": run.job.model},
            tags={VERSION_TAG_JOB: run.id},
        )
        _log_model_files(run, mlflow, model.model_id, source)
        mlflow.finalize_logged_model(model.model_id, "READY")
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, best, model_id=model.model_id)
            for key, value in (
                ("test/reward", evaluation.best.reward.mean),
                ("test/gain", evaluation.gain.mean),
            )
        ]
        mlflow.log_batch(run.record.mlflow_run_id, metrics=metrics)
        version = mlflow.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run.record.mlflow_run_id,
            model_id=model.model_id,
            tags=_version_tags(run, training, evaluation, source),
            description=evaluation.reason,
        )
    number = int(version.version)
    if evaluation.ok:
        move_alias(run.home, name, "challenger", number, f"job {run.id}: {evaluation.reason}")
    return ModelVersion(
        name=name, version=number, source=source, weights_sha256=training.weights_sha256, step=best
    )


def _version_tags(
    run: Run, training: TrainingResult, evaluation: EvaluationReport, source: str
) -> dict[str, str]:
    return {
        VERSION_TAG_JOB: run.id,
        "openrft.base_model": run.job.model,
        "openrft.step": str(training.best_step),
        "openrft.checkpoint": source,
        "openrft.weights_sha256": training.weights_sha256,
        "openrft.grader_sha256": run.record.grader_sha256,
        "openrft.billed_seconds": str(training.billed_seconds),
        "openrft.billed_usd": str(training.billed_usd),
        "openrft.test_reward": f"{evaluation.best.reward.mean:.6f}",
        "openrft.test_gain": f"{evaluation.gain.mean:.6f}",
        "openrft.test_gain_low": f"{evaluation.gain.low:.6f}",
        "openrft.test_gain_high": f"{evaluation.gain.high:.6f}",
    }


def _log_model_files(run: Run, mlflow: Any, model_id: str, source: str) -> None:
    """An MLmodel file with signature and input example. Weights travel once, to the store, not to MLflow."""
    import shutil

    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    from tasks.dataset import load_rows

    folder = run.path("work", "mlmodel")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "messages")]),
        outputs=Schema([ColSpec(DataType.string, "content")]),
    )
    example = {"messages": json.dumps(load_rows(run.dataset("test"))[0]["messages"], ensure_ascii=False)}
    (folder / "input_example.json").write_text(json.dumps(example, ensure_ascii=False), "utf-8")
    model = Model(
        run_id=run.record.mlflow_run_id,
        signature=signature,
        saved_input_example_info={"artifact_path": "input_example.json", "type": "json_object"},
        flavors={"openrft": {"weights": source, "format": "huggingface"}},
        model_id=model_id,
    )
    model.save(str(folder / "MLmodel"))
    mlflow.log_model_artifacts(model_id, str(folder))


def _ensure_model(mlflow: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        mlflow.get_registered_model(name)
        return
    mlflow.create_registered_model(name, description="Tuned by OpenRFT")


def _find(mlflow: Any, name: str, job_id: str, weights: str) -> Any:
    for version in mlflow.search_model_versions(f"name = '{name}'"):
        tags = version.tags
        if tags.get(VERSION_TAG_JOB) == job_id and tags.get("openrft.weights_sha256") == weights:
            return version
    return None


def aliases(home: Home, name: str) -> dict[str, int]:
    """{alias: version} of a registered model. Raises BadInput for a name that is not registered."""
    from mlflow.exceptions import MlflowException

    mlflow = client(home)
    try:
        return {alias: int(v) for alias, v in mlflow.get_registered_model(name).aliases.items()}
    except MlflowException:
        known = [m.name for m in mlflow.search_registered_models()]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Registered: {', '.join(known) or 'none yet'}."
        raise BadInput(f"no registered model {name!r}. {hint}") from None


def version_tags(home: Home, name: str, version: int) -> dict[str, str]:
    """Tags of one version. Raises BadInput when there is no such version."""
    from mlflow.exceptions import MlflowException

    aliases(home, name)
    try:
        return dict(client(home).get_model_version(name, str(version)).tags)
    except MlflowException:
        raise BadInput(f"model {name!r} has no version {version}") from None


def move_alias(home: Home, name: str, alias: str, version: int | None, why: str) -> None:
    """Point `alias` at `version` (None removes it) and write the move to the model's history."""
    mlflow = client(home)
    before = aliases(home, name).get(alias)
    if before == version:
        return
    if version is None:
        mlflow.delete_registered_model_alias(name, alias)
    else:
        mlflow.set_registered_model_alias(name, alias, str(version))
    current = aliases(home, name)
    home.store.write(
        f"models/{name}/aliases.json", json.dumps(current).encode()
    )  # what `openrft serve` reads
    entry = {"t": time.time(), "alias": alias, "from": before, "to": version, "why": why, "who": _who()}
    key = f"models/{name}/history.jsonl"
    history = home.store.read(key) if home.store.exists(key) else b""
    home.store.write(key, history + json.dumps(entry).encode() + b"\n")


def make_champion(home: Home, name: str, version: int, why: str) -> None:
    """Move `champion` to `version` and `previous` to what it was; on failure put both back."""
    before = aliases(home, name)
    try:
        if before.get("champion") not in (None, version):
            move_alias(home, name, "previous", before["champion"], why)
        move_alias(home, name, "champion", version, why)
    except BaseException:
        for alias in ("champion", "previous"):
            move_alias(home, name, alias, before.get(alias), "undone: the promotion failed")
        raise


def bundle_key(home: Home, reference: str) -> str:
    """Store key of the published bundle of `name@alias` or `name/version`. Raises BadInput."""
    if "@" in reference:
        name, _, alias = reference.partition("@")
        moved = aliases(home, name)
        if alias not in moved:
            raise BadInput(f"model {name!r} has no alias {alias!r}; it has: {', '.join(moved) or 'none'}")
        version = moved[alias]
    else:
        name, _, text = reference.partition("/")
        if not text.isdigit():
            raise BadInput(f"models:/{reference}: expected models:/name@alias or models:/name/version")
        version = int(text)
    key = f"models/{name}/{version}"
    if not home.store.exists(f"{key}/{MANIFEST}"):
        raise StageFailed(
            f"model {name} version {version} has not been deployed: no bundle at {home.files}/{key}"
        )
    return key


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
