"""Models of a few thousand parameters, built from a configuration: nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import pytest

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large enough that the logits of a random model differ clearly and depend on what was said before.
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def small_model():
    """small_model("Qwen3", vocab_size=8): a random model of that family, always with the same weights."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def build(family: str, seed: int = 0, **changes):
        config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model.eval()

    yield build
    torch.set_num_threads(threads)
