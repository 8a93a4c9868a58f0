"""Draw completions: each distinct prompt is encoded once, and rows that have ended leave the batch.

The same sampling distribution as `model.generate(do_sample=True, temperature=…)`; a prompt that occurs
G times is prefilled once and its KV cache fanned out over its G rows. Models whose cache or head is
not plain fall back to `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# Completions decoded together: enough to fill a CPU's vector units, few enough to bound the KV cache.
ROWS_PER_BATCH = 512

# Anything here changes logits or attention in ways that the shared path does not reproduce.
_UNSUPPORTED = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)


def backbone(model: Any) -> Any:
    """The transformer without its language-model head."""
    return model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model


def shared_path_refusal(model: Any) -> str | None:
    """Why this model cannot use shared prompt encoding, or None if it can."""
    config = model.config
    for name in _UNSUPPORTED:
        if getattr(config, name, None) not in (None, 1.0):
            return f"{name} is set"
    layers = getattr(config, "layer_types", None) or []
    # Some families switch their window on by naming it (Mistral), others by use_sliding_window (Qwen).
    window = getattr(config, "use_sliding_window", getattr(config, "sliding_window", None))
    if any(kind != "full_attention" for kind in layers) or (window and not layers):
        return "attention is not full in every layer"
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config"):
        return "not a text-only decoder"
    if getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0):
        return "mixture of experts"
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return "the head is missing or has a bias"
    return None


def left_pad(prompts: list[list[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists → (ids, mask), both (B, P), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: list[int],
    pad_id: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Complete each prompt (token ids); temperature 0 is greedy. Returns token lists, EOS included.

    Equal prompts should stand together: they share one encoding. With `generator` the global random
    state is neither read nor moved. `model.training` is left as it was.
    """
    was_training = model.training
    model.eval()
    try:
        decode = _decode_generate if shared_path_refusal(model) else _decode_shared
        out: list[list[int]] = []
        for start in range(0, len(prompts), ROWS_PER_BATCH):
            batch = prompts[start : start + ROWS_PER_BATCH]
            out += decode(model, batch, max_new_tokens, temperature, eos_ids, pad_id, generator)
        return out
    finally:
        model.train(was_training)


def _decode_shared(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    eos_ids: list[int],
    pad_id: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    body, head = backbone(model), model.get_output_embeddings()
    order: dict[tuple[int, ...], int] = {}
    row_prompt = torch.tensor([order.setdefault(tuple(p), len(order)) for p in prompts], device=device)
    ids, mask = left_pad([list(p) for p in order], pad_id, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    encoded = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache = encoded.past_key_values
    cache.batch_select_indices(row_prompt)
    hidden = encoded.last_hidden_state[:, -1][row_prompt]  # left padding: the last column is the last token
    mask, position = mask[row_prompt], positions[row_prompt, -1]

    rows = len(prompts)
    alive = torch.arange(rows, device=device)
    tokens = torch.full((rows, max_new_tokens), pad_id, dtype=torch.long, device=device)
    stops = torch.tensor(eos_ids, device=device)
    lengths = torch.full((rows,), max_new_tokens, dtype=torch.long, device=device)
    for step in range(max_new_tokens):
        chosen = choose(F.linear(hidden.to(head.weight.dtype), head.weight), temperature, generator)
        tokens[alive, step] = chosen
        ended = torch.isin(chosen, stops)
        lengths[alive[ended]] = step + 1
        if step == max_new_tokens - 1 or bool(ended.all()):
            break
        if bool(ended.any()):
            keep = torch.nonzero(~ended).squeeze(1)
            cache.batch_select_indices(keep)
            alive, chosen, mask, position = alive[keep], chosen[keep], mask[keep], position[keep]
        mask = F.pad(mask, (0, 1), value=1)
        position = position + 1
        hidden = body(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """Next token of each row of `logits` (B, V), by softmax(logits / temperature); 0 takes the maximum.

    The maximum of logits + Gumbel noise is a draw from their softmax.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits / temperature - noise.log()).argmax(-1)


def _decode_generate(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    eos_ids: list[int],
    pad_id: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    ids, mask = left_pad(prompts, pad_id, device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}),
    )
    # `generate` fills gaps from the model's own settings, and draws from the device's global state: lend it
    # ours, then put both back.
    own, model.generation_config = model.generation_config, settings
    random: Any = torch.cuda if device.type == "cuda" else torch.random
    place = (device,) if device.type == "cuda" else ()
    before = random.get_rng_state(*place)
    if generator is not None:
        random.set_rng_state(generator.get_state(), *place)
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    finally:
        model.generation_config = own
        if generator is not None:
            generator.set_state(random.get_rng_state(*place))
            random.set_rng_state(before, *place)
    completions = []
    for row in out[:, ids.size(1) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
        completions.append(row[:end])
    return completions
