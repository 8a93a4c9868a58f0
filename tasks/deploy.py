"""Deployment: a verified bundle of a model version in the store, which is all that serving reads."""

from __future__ import annotations

import json
import shutil
import time

from tasks.run import Run
from tasks.store import MANIFEST, folder_manifest, get_folder, put_folder
from tasks.train import checkpoint

# What a bundle holds of a checkpoint: all that serving needs and nothing that training alone needs.
SUFFIXES = (".safetensors", ".jinja", ".model", ".txt")
NAMES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def publish_bundle(run: Run, name: str, version: int) -> str:
    """Copy a version's weights, tokenizer and chat template to models/<name>/<version>; returns the key.

    Published again, the same files are verified and left alone.
    """
    key = f"models/{name}/{version}"
    store = run.home.store
    if store.exists(f"{key}/{MANIFEST}"):
        get_folder(store, key, run.home.scratch(key))
        return key
    step = int(run.record.stages["train"]["best_step"])
    name_of_step = checkpoint.name_of(step)
    source = get_folder(store, f"{run.key}/checkpoints/{name_of_step}", run.path("checkpoints", name_of_step))
    folder = run.path("work", "bundle")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in SUFFIXES or file.name in NAMES:
            shutil.copyfile(file, folder / file.name)
    manifest = {
        "name": name,
        "version": version,
        "created": int(time.time()),
        "job": run.id,
        "base_model": run.job.model,
        "step": step,
        "grader_sha256": run.record.grader_sha256,
        "weights_sha256": checkpoint.weights_sha256(folder),
        "files": folder_manifest(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    put_folder(store, folder, key)
    get_folder(store, key, run.home.scratch(key))
    shutil.rmtree(folder)
    return key
