"""A job's course as its events tell it: rewards by step, restarts, warnings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks.wording import finite


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
        elif kind == "step" and finite(metrics.get("train/reward")):
            result.train[step] = metrics["train/reward"]
        elif kind == "validation":
            result.valid[step] = {name: value for name, value in metrics.items() if finite(value)}
        elif kind == "checkpoint":
            result.checkpoints[step] = float(event.get("billed_seconds") or 0.0)
        elif kind == "warning" and (message := str(event.get("message", ""))) not in result.warnings:
            result.warnings.append(message)
    return result
