"""Checkpoints: complete or absent, verified when read, the best kept.

`checkpoints/step-000040/` holds weights, tokenizer, optimizer, scheduler and random states as the
transformers Trainer writes them, the billing ledger, and a manifest with the SHA-256 of every file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tasks.errors import Damaged
from tasks.results import CheckpointInfo
from tasks.run import Run
from tasks.store import (
    MANIFEST,
    LocalStore,
    folder_manifest,
    get_folder,
    put_folder,
    sha256_file,
    sync_and_rename,
)
from tasks.train.ledger import FILE as LEDGER
from tasks.train.ledger import Ledger

PARTIAL = ".partial"
WEIGHTS = "model.safetensors"


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def seal(folder: Path, target: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a finished folder and give it its final name, durably and in one step."""
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": folder_manifest(folder)}, indent=1), "utf-8")
    if target.exists():  # left by an attempt whose later steps were lost; this one is its equal
        shutil.rmtree(target)
    sync_and_rename(folder, target)


def intact(folder: Path) -> bool:
    """Does every file of the manifest exist with its SHA-256?"""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return all(sha256_file(folder / name) == facts["sha256"] for name, facts in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def weights_sha256(folder: Path) -> str:
    """One hash for the weights, over all their shards."""
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return sha256_file(shards[0])
    import hashlib

    return hashlib.sha256("".join(sha256_file(shard) for shard in shards).encode()).hexdigest()


def publish(run: Run, step: int) -> None:
    """Copy a sealed checkpoint to the store, its manifest last."""
    if not isinstance(run.home.store, LocalStore):
        name = name_of(step)
        put_folder(run.home.store, run.path("checkpoints", name), f"{run.key}/checkpoints/{name}")


def steps(run: Run) -> list[int]:
    """Steps with a checkpoint in the store or in the run folder, ascending."""
    names = set(run.home.store.names(f"{run.key}/checkpoints"))
    if run.path("checkpoints").is_dir():
        names |= set(os.listdir(run.path("checkpoints")))
    return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))


def newest_intact(run: Run) -> tuple[int, Path] | None:
    """The last checkpoint that passes its checksums; damaged ones are passed over with an event."""
    for step in reversed(steps(run)):
        folder = run.path("checkpoints", name_of(step))
        if intact(folder):
            return step, folder
        if not isinstance(run.home.store, LocalStore):  # none here, or a copy that was cut off
            with contextlib.suppress(Damaged):
                return step, get_folder(run.home.store, f"{run.key}/checkpoints/{name_of(step)}", folder)
        run.emit("warning", message=f"checkpoint of step {step} is damaged or incomplete and is not used")
    return None


def describe(run: Run, step: int) -> CheckpointInfo:
    manifest = json.loads(_read(run, step, MANIFEST))
    return CheckpointInfo(
        step=step,
        uri=run.uri("checkpoints", name_of(step)),
        weights_sha256=manifest["weights_sha256"],
        valid_reward=manifest["valid_reward"],
        billed_seconds=Ledger.loads(_read(run, step, LEDGER)).seconds,
    )


def _read(run: Run, step: int, name: str) -> bytes:
    """A small file of a checkpoint, which may be in the store only after a move to another machine."""
    local = run.path("checkpoints", name_of(step), name)
    if local.exists():
        return local.read_bytes()
    return run.home.store.read(f"{run.key}/checkpoints/{name_of(step)}/{name}")


def best_of(infos: list[CheckpointInfo]) -> CheckpointInfo:
    """Highest validation reward; of equals the later, which has seen more."""
    return max(
        infos,
        key=lambda info: (info.valid_reward if info.valid_reward is not None else float("-inf"), info.step),
    )


def prune(run: Run, keep: int) -> None:
    """Keep the `keep` best by validation reward, and the newest, which holds the state to resume from."""
    infos = [describe(run, step) for step in steps(run) if run.path("checkpoints", name_of(step)).exists()]
    ranked = sorted(
        infos, key=lambda i: (i.valid_reward if i.valid_reward is not None else float("-inf"), i.step)
    )
    kept = {info.step for info in ranked[-keep:]} | {max(info.step for info in infos)}
    for info in infos:
        if info.step not in kept:
            run.home.store.delete(f"{run.key}/checkpoints/{name_of(info.step)}")
            shutil.rmtree(run.path("checkpoints", name_of(info.step)), ignore_errors=True)
