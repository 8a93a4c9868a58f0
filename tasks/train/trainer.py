"""RFTTrainer: TRL's GRPOTrainer with the same gradient for less work, and resume that is exact.

Same constructor, same dataset and reward-function conventions. What is overridden, and why:

* `_generate_single_turn`: each prompt is encoded once per group, finished rows leave the batch.
* `_get_per_token_logps_and_entropies`: each prompt is encoded once in the update, with gradients
  through the shared cache, and only completion positions are projected to the vocabulary.
* `_generate_and_score_completions`: rows with an advantage of exactly zero are dropped where the
  loss's normaliser counts the whole generation batch, so that the gradient stays the same.
* `_get_train_sampler`: the order of prompts is a pure function of (seed, epoch, index).

Where a model or an option does not allow a shortcut, TRL's own path runs and says so once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from trl import GRPOTrainer

from tasks.train.sampler import backbone, sample, shared_path_refusal

log = logging.getLogger(__name__)


class PromptOrder(Sampler):
    """Indices of all epochs as one sequence: `n_epochs` seeded permutations, cut into whole batches.

    Each batch of `batch_size` prompts is yielded with every prompt `group_size` times, and the whole
    batch `repeats` times (once per micro-step that reuses the same completions), as TRL expects. Being
    a pure function of its arguments, it continues at any step by skipping.
    """

    def __init__(
        self, rows: int, n_epochs: int, batch_size: int, group_size: int, repeats: int, seed: int
    ) -> None:
        self.rows, self.n_epochs, self.batch_size = rows, n_epochs, batch_size
        self.group_size, self.repeats, self.seed = group_size, repeats, seed

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.rows, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        flat = [index for epoch in range(self.n_epochs) for index in self.order(epoch)]
        for start in range(0, len(flat) - self.batch_size + 1, self.batch_size):
            for _ in range(self.repeats):
                for index in flat[start : start + self.batch_size]:
                    yield from [index] * self.group_size

    def __len__(self) -> int:
        batches = self.rows * self.n_epochs // self.batch_size
        return batches * self.batch_size * self.group_size * self.repeats


class RFTTrainer(GRPOTrainer):
    """`GRPOTrainer` with exact shortcuts. `prompt_epochs` is the number of passes that PromptOrder lays out."""

    def __init__(self, *args: Any, prompt_epochs: int = 1, **kwargs: Any) -> None:
        self.prompt_epochs = prompt_epochs
        self.phase_seconds: dict[str, float] = {"sampling": 0.0, "grading": 0.0}
        super().__init__(*args, **kwargs)
        self.shared_refusal = self._refuse_shared()
        if self.shared_refusal:
            log.warning("shared prompt encoding is off: %s", self.shared_refusal)
        self.drop_refusal = self._refuse_drop()
        if self.drop_refusal:
            log.info("zero-advantage rows are kept: %s", self.drop_refusal)

    def _refuse_shared(self) -> str | None:
        if self.use_vllm or self.use_transformers_continuous_batching or self.tools or self.environments:
            return "vLLM, continuous batching, tools or environments sample for themselves"
        if self.accelerator.num_processes > 1:
            return "several processes need the wrapped model's forward"
        if self.args.gradient_checkpointing:
            return "gradient checkpointing forbids a cache"
        if (
            self.top_p not in (None, 1.0)
            or self.top_k not in (None, 0)
            or self.min_p
            or self.repetition_penalty != 1.0
            or self.args.generation_kwargs
        ):
            return "a sampling option beyond temperature is set"
        return shared_path_refusal(self.accelerator.unwrap_model(self.model))

    def _refuse_drop(self) -> str | None:
        if self.loss_type not in ("dapo", "cispo"):
            return f"{self.loss_type} averages over rows"
        if self.beta != 0 or self.top_entropy_quantile < 1 or self.use_adaptive_entropy or self.entropy_coef:
            return "KL or entropy terms use every row"
        if self.accelerator.num_processes > 1:
            return "every process must hold the same number of rows"
        return None

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return PromptOrder(
            rows=len(dataset if dataset is not None else self.train_dataset),
            n_epochs=self.prompt_epochs,
            batch_size=self.args.generation_batch_size // self.num_generations,
            group_size=self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # TRL restarts its micro-step counter at 0 and would generate out of phase
            self._step = self.state.global_step * self.args.gradient_accumulation_steps

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: Any,
        has_tool_images: bool = False,
    ) -> Any:
        started = time.perf_counter()
        try:
            if self.shared_refusal:
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )
            model = self.accelerator.unwrap_model(self.model)
            with self.accelerator.autocast():
                completions = sample(
                    model,
                    prompt_ids,
                    max_new_tokens=self.max_completion_length,
                    temperature=self.temperature,
                    eos_ids=self.eos_token_ids,
                    pad_id=self._tokenizer.pad_token_id,
                )
            return completions, None
        finally:
            self.phase_seconds["sampling"] += time.perf_counter() - started

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        started = time.perf_counter()
        try:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.phase_seconds["grading"] += time.perf_counter() - started

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        return batch if self.drop_refusal or not self.model.training else self._drop_silent_rows(batch)

    def _drop_silent_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Leave out rows whose advantage is exactly 0: they add nothing to the loss's sum, and
        `num_items_in_batch`, its divisor, was counted before. The kept number stays a multiple of
        steps_per_generation, because TRL's split floors and would lose rows."""
        advantages = batch["advantages"]
        rows, chunks = advantages.size(0), self.args.steps_per_generation
        loud = (advantages != 0) if advantages.dim() == 1 else (advantages != 0).any(1)
        kept = torch.nonzero(loud).squeeze(1)
        filler = torch.nonzero(~loud).squeeze(1)[: max(chunks, -(-len(kept) // chunks) * chunks) - len(kept)]
        keep = torch.cat([kept, filler]).sort().values
        if len(keep) == rows:
            return batch
        return {
            name: value[keep]
            if isinstance(value, torch.Tensor) and value.dim() and value.size(0) == rows
            else value
            for name, value in batch.items()
        }

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> Any:
        wants_entropy_gradient = compute_entropy and torch.is_grad_enabled() and self._entropy_bonus_enabled
        if (
            self.shared_refusal
            or compute_aux_loss
            or wants_entropy_gradient
            or any(value is not None for value in multimodal.values())
        ):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        with self.accelerator.autocast():
            logps, entropies = shared_prefix_logps(
                self.accelerator.unwrap_model(model),
                input_ids,
                attention_mask,
                logits_to_keep,
                self.temperature,
                compute_entropy,
            )
        return logps, entropies, None


def shared_prefix_logps(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    temperature: float,
    compute_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of completion tokens, each distinct prompt encoded once with gradient.

    input_ids, attention_mask: (B, P + T), prompts padded on the left, completions on the right;
    `logits_to_keep` is T. Returns (B, T) log-probabilities and entropies (without gradient), 0 at
    padding. The prompt's keys and values are indexed to its rows, and indexing's backward sums the
    rows' gradients into the one prompt pass (Prefix Grouper, arXiv 2506.05433).
    """
    split = input_ids.size(1) - logits_to_keep
    mask = attention_mask[:, split:]
    width = max(int(mask.sum(1).max()), 1)
    mask, completions = mask[:, :width], input_ids[:, split : split + width]
    # The mask takes part in the comparison, so that a padding id inside a prompt cannot confuse it.
    unique, owner = torch.unique(
        torch.cat([attention_mask[:, :split], input_ids[:, :split]], 1), dim=0, return_inverse=True
    )
    prompt_mask, prompts = unique[:, :split], unique[:, split:]
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    body, head = backbone(model), model.get_output_embeddings()
    encoded = body(input_ids=prompts, attention_mask=prompt_mask, position_ids=positions, use_cache=True)
    hidden = encoded.last_hidden_state[:, -1:][owner]
    if width > 1:
        cache = encoded.past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[owner], layer.values[owner]
        steps = torch.arange(1, width, device=input_ids.device)
        continued = body(
            input_ids=completions[:, :-1],
            attention_mask=torch.cat([prompt_mask[owner], mask[:, :-1]], 1),
            position_ids=positions[owner, -1:] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = torch.cat([hidden, continued.last_hidden_state], 1)
    real = mask.bool()
    logits = head(hidden[real]).float() / temperature
    logps = _spread(-F.cross_entropy(logits, completions[real], reduction="none"), real, logits_to_keep)
    entropies = None
    if compute_entropy:
        with torch.no_grad():
            spread = F.log_softmax(logits, -1)
            entropies = _spread(-(spread.exp() * spread).sum(-1), real, logits_to_keep)
    return logps, entropies


def _spread(values: torch.Tensor, real: torch.Tensor, width: int) -> torch.Tensor:
    """Flat values of the real tokens → (B, width), 0 elsewhere."""
    full = torch.zeros(real.shape, dtype=values.dtype, device=values.device).masked_scatter(real, values)
    return F.pad(full, (0, width - real.size(1)))
