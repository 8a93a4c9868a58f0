"""`tiny`: small, reproducible, an ordinary Hugging Face folder, and whole text in, whole text out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.train.tiny import VOCABULARY, build_tiny

TEXTS = [f"denies gout {n}; has asthma, on T2DM treatment" for n in range(40)] + [
    "J45.909, E11.9",
    "none",
] * 40


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    build_tiny(TEXTS, out, seed=7)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    build_tiny(iter(TEXTS), tmp_path / "again", seed=7)
    assert digests(tmp_path / "again") == digests(folder)
    build_tiny(TEXTS, tmp_path / "other", seed=8)
    other = digests(tmp_path / "other")
    assert other["model.safetensors"] != digests(folder)["model.safetensors"]
    assert other["tokenizer.json"] == digests(folder)["tokenizer.json"]


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_tiny(TEXTS, tmp_path, seed=7)
    assert torch.equal(torch.rand(4), expected)


def test_model_is_small_plain_and_float32(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) <= min(VOCABULARY, model.config.vocab_size)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_first_layers_start_out_local(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(4, 200, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = model(input_ids=ids, output_attentions=True).attentions
    near = [sum(a[0, :, t, t - 4 : t + 1].sum(-1).mean().item() for t in range(16, 48)) / 32 for a in layers]
    assert min(near[:2]) > 0.6, near
    assert max(near[2:]) < 0.5, near


@pytest.mark.parametrize(
    "text", ["denies gout", 'Größe 12.5 $ {"a": [1]}\n\n  x\t日本 🙂', "", " E11.9,I10 , J45.909"]
)
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_identifier_is_one_token_anywhere_in_a_list(tokenizer: Any) -> None:
    assert tokenizer.tokenize("J45.909, E11.9") == ["J45.909", ",Ġ", "E11.9"]
    assert tokenizer.tokenize("12") == ["1", "2"]


def test_template_marks_the_assistants_tokens(tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "Codes."},
        {"role": "user", "content": [{"type": "text", "text": "has asthma"}]},
        {"role": "assistant", "content": "J45.909"},
    ]
    done = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(done["input_ids"], done["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "J45.909<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert done["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]


def test_template_shows_tools_and_their_calls(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"code": "I10"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I10?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "hypertension"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert '"name": "look_up"' in text
    assert '<tool_call>{"name": "look_up", "arguments": {"code": "I10"}}</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\nhypertension<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
