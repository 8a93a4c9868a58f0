"""A job that the whole chain does in half a minute: sort words, after noisy demonstrations."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

KINDS = {
    "fruit": ["apple", "pear", "plum"],
    "tool": ["hammer", "saw", "drill"],
    "beast": ["horse", "wolf", "goat"],
}
GRADER = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.kind}}",
}


def write_toy(folder: Path, **changes: object) -> Path:
    """A job folder. The demonstrations are wrong in two of five rows, so that RFT has something to mend."""
    rng = random.Random(3)
    words = [(word, kind) for kind, words in KINDS.items() for word in words]
    numbers = iter(rng.sample(range(10_000), 2_000))

    def row(split: str) -> dict:
        word, kind = rng.choice(words)
        messages = [{"role": "user", "content": f"case {next(numbers)}: {word}"}]
        if split == "demonstrations":
            told = kind if rng.random() < 0.6 else rng.choice(sorted(KINDS))
            return {"messages": [*messages, {"role": "assistant", "content": told}]}
        return {"messages": messages, "kind": kind}

    (folder / "data").mkdir(parents=True)
    for split, count in {"train": 120, "validation": 30, "test": 60, "demonstrations": 600}.items():
        lines = [json.dumps(row(split)) for _ in range(count)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "grader.json").write_text(json.dumps(GRADER))
    job = {
        "model": "tiny",
        "suffix": "toy",
        "seed": 5,
        "training_file": "data/train.jsonl",
        "validation_file": "data/validation.jsonl",
        "test_file": "data/test.jsonl",
        "method": {
            "type": "reinforcement",
            "reinforcement": {
                "grader": "grader.json",
                "hyperparameters": {"n_epochs": 3, "batch_size": 12, "eval_interval": 5, "eval_samples": 1},
            },
        },
        "warm_start": {
            "file": "data/demonstrations.jsonl",
            "epochs": 3,
            "learning_rate": 0.003,
            "batch_size": 32,
        },
        "sampling": {"group_size": 8, "temperature": 1.0, "max_completion_tokens": 6},
        "optimizer": {"learning_rate": 0.001},
        "calibration": {"rows": 24, "samples": 8},
        "evaluation": {"samples": 4, "bootstrap": 2000},
        "resources": {"threads": 1},
        **changes,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


def openrft(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user runs it."""
    return subprocess.run(
        [Path(sys.executable).with_name("openrft"), *arguments],
        cwd=home.parent,
        env={**os.environ, "OPENRFT_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
