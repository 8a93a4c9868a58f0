"""Resolve every `auto` of a job to a number, before training, by rules that a reader can check."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from tasks.errors import BadInput
from tasks.results import Resolved

if TYPE_CHECKING:
    from tasks.run import Run

GROUP_SIZE = 8
TARGET_STEPS = 200
# Base learning rate by parameter count: small models stand, and need, larger steps.
LEARNING_RATES = ((10_000_000, 3e-4), (200_000_000, 3e-5), (math.inf, 1e-6))
# Completions per forward pass that fit 16 GB at a few hundred tokens each.
MICRO_BATCHES = ((10_000_000, 512), (200_000_000, 32), (1_000_000_000, 8), (math.inf, 2))
EFFORT_BUDGET = {"default": 1.0, "low": 0.5, "medium": 1.0, "high": 2.0}


def resolve(run: Run, rows: int) -> Resolved:
    """Numbers for a job of `rows` training rows."""
    from tasks.model import base_config

    job, h = run.job, run.job.hyperparameters
    parameters = count_parameters(base_config(run))
    if not parameters and "auto" in (job.optimizer.learning_rate, job.resources.micro_batch):
        raise BadInput(
            f"model: the size of {job.model!r} cannot be read from its configuration; "
            "set optimizer.learning_rate and resources.micro_batch"
        )
    batch_size = max(1, min(64, rows // 32)) if isinstance(h.batch_size, str) else h.batch_size
    batch_size = min(batch_size, rows)
    epochs = max(1, min(50, math.ceil(TARGET_STEPS * batch_size / rows)))
    n_epochs = epochs if isinstance(h.n_epochs, str) else h.n_epochs
    steps = rows * n_epochs // batch_size
    multiplier = 1.0 if h.compute_multiplier == "auto" else h.compute_multiplier
    group = max(2, round(GROUP_SIZE * multiplier))
    group_size = group if isinstance(job.sampling.group_size, str) else job.sampling.group_size
    rate = job.optimizer.learning_rate
    if rate == "auto":
        rate = _by_size(LEARNING_RATES, parameters)
    if h.learning_rate_multiplier != "auto":
        rate *= h.learning_rate_multiplier
    tokens = round(job.sampling.max_completion_tokens * EFFORT_BUDGET[h.reasoning_effort])
    return Resolved(
        n_epochs=n_epochs,
        batch_size=batch_size,
        group_size=group_size,
        steps=steps,
        learning_rate=rate,
        eval_interval=min(steps, max(1, steps // 10) if h.eval_interval == "auto" else h.eval_interval),
        eval_samples=1 if h.eval_samples == "auto" else h.eval_samples,
        max_completion_tokens=max(1, tokens),
        micro_batch=_micro_batch(job.resources.micro_batch, batch_size * group_size, parameters),
        threads=os.cpu_count() or 1 if job.resources.threads == "auto" else job.resources.threads,
        device=job.resources.device if job.resources.device != "auto" else detect_device(),
        parameters=parameters,
    )


def _by_size(table: tuple[tuple[float, Any], ...], parameters: int) -> Any:
    return next(value for limit, value in table if parameters < limit)


def _micro_batch(given: int | str, completions: int, parameters: int) -> int:
    """The largest divisor of `completions` that is no larger than what was asked or fits."""
    wanted = _by_size(MICRO_BATCHES, parameters) if isinstance(given, str) else given
    return next(n for n in range(min(wanted, completions), 0, -1) if completions % n == 0)


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of a Llama-shaped decoder from its configuration (norms and biases left out)."""
    config = config.get("text_config") or config
    hidden, layers = config.get("hidden_size", 0), config.get("num_hidden_layers", 0)
    heads = config.get("num_attention_heads", 1)
    width = config.get("head_dim") or hidden // max(heads, 1)
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
    feed_forward = 3 * hidden * config.get("intermediate_size", 4 * hidden)
    embeddings = config.get("vocab_size", 0) * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(embeddings + layers * (attention + feed_forward))


def detect_device() -> str:
    """`cuda` where the driver's device files are; importing torch only to ask would cost seconds."""
    return "cuda" if os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES", "0") else "cpu"
