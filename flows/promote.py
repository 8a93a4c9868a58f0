"""Challenger to champion, served; and back. Its own flow, so that training never waits for a decision."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks import registry, stages
from tasks.errors import BadInput, GateClosed
from tasks.home import open_home
from tasks.run import open_run
from tasks.store import get_folder


@flow(name="promote", flow_run_name="{model} version {version}", persist_result=False)
def promote(model: str, version: int) -> dict[str, Any]:
    """Make a version the champion, if the evidence allows it.

    Args:
        model: Name of the registered model.
        version: The version to promote.
    """
    home = open_home()
    tags = registry.version_tags(home, model, version)
    champion = registry.aliases(home, model).get("champion")
    if champion == version:
        return _outcome(model, version, champion, "it is champion already")
    run_id = tags.get(registry.VERSION_TAG_JOB)
    if run_id is None:
        raise BadInput(
            f"model {model} version {version} was not made by a job of this home; it has no evidence"
        )
    bar = open_run(run_id, home).job.promotion.min_gain
    if float(tags["openrft.test_gain_low"]) <= bar:
        raise GateClosed(
            f"{model} version {version} gains {float(tags['openrft.test_gain']):+.3f} over its base on held-out rows "
            f"(at least {float(tags['openrft.test_gain_low']):+.3f}), which does not clear {bar:+g}; not promoted"
        )
    if champion is not None:
        comparison = stages.compare(run_id, champion)
        if not comparison.ok:
            gain = comparison.gain
            reason = (
                f"version {version} is not shown to be better than champion {champion}: {gain.mean:+.3f} "
                f"(95 % interval {gain.low:+.3f} to {gain.high:+.3f}); the champion stays"
            )
            stages.record_promotion(run_id, reason=reason)
            return _outcome(model, version, champion, reason)
    deployment = stages.publish_and_smoke(run_id, model, version)
    why = f"job {run_id}: smoke test {deployment.smoke_reward:.3f} on {deployment.smoke_rows} rows"
    registry.make_champion(home, model, version, why)
    stages.record_promotion(run_id, deployment)
    return _outcome(model, version, version, why)


def _outcome(model: str, version: int, champion: int, reason: str) -> dict[str, Any]:
    return {"model": model, "version": version, "champion": champion, "reason": reason}


@flow(name="rollback", flow_run_name="{model}", persist_result=False)
def rollback(model: str) -> dict[str, Any]:
    """Put the previous champion back.

    Args:
        model: Name of the registered model.
    """
    home = open_home()
    aliases = registry.aliases(home, model)
    if "previous" not in aliases:
        raise BadInput(f"model {model!r} has no previous champion to go back to")
    key = registry.bundle_key(home, f"{model}@previous")
    get_folder(home.store, key, home.scratch(key))  # a target that does not load is no target
    registry.make_champion(home, model, aliases["previous"], "rollback")
    return {"model": model, "champion": aliases["previous"], "was": aliases.get("champion")}
