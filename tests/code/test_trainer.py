"""RFTTrainer against plain TRL: the same loss, the same gradient, the same weights after training."""

from __future__ import annotations

import logging

import pytest
import torch

from tasks.train.trainer import PromptOrder, RFTTrainer, shared_prefix_logps

PAD, EOS = 0, 1
LIMIT = 7
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, 64)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def prompt_rows(count: int) -> list[str]:
    """Prompts of 1 to 6 words."""
    return [
        " ".join(f"w{2 + (7 * row + place) % 61}" for place in range(1 + row % 6)) for row in range(count)
    ]


@pytest.fixture
def build(small_model, tokenizer, tmp_path):
    """build(RFTTrainer, loss_type="grpo"): a trainer of eight completions a step, four a prompt."""
    from datasets import Dataset
    from trl import GRPOConfig

    def make(kind, family="Qwen3", reward=None, rows=6, callbacks=(), **changes):
        model = small_model(family, initializer_range=0.25)
        if changes.get("beta"):  # TRL reads the reference model from where the model came from
            model.save_pretrained(tmp_path / "model")
            model = type(model).from_pretrained(tmp_path / "model")
        model.generation_config.eos_token_id = changes.pop("also_ends", None)
        epochs = {"prompt_epochs": changes.pop("prompt_epochs", 2)} if issubclass(kind, RFTTrainer) else {}
        settings = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "max_completion_length": LIMIT,
            "temperature": 0.8,
            "top_k": 0,
            "learning_rate": 0.05,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "epsilon_high": 0.28,
            "beta": 0.0,
            "max_grad_norm": 1.0,
            "max_steps": 3,
            "seed": 7,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_dropout": True,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
        }
        trainer = kind(
            model=model,
            reward_funcs=reward or by_length,
            args=GRPOConfig(output_dir=str(tmp_path), **{**settings, **changes}),
            train_dataset=Dataset.from_dict({"prompt": prompt_rows(rows), "row": list(range(rows))}),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            **epochs,
        )
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        return trainer

    return make


@pytest.fixture(scope="module")
def plain():
    """TRL's own trainer, given the same prompts in the same order."""
    from trl import GRPOTrainer

    class Plain(GRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return PromptOrder(
                rows=len(self.train_dataset),
                n_epochs=2,
                batch_size=self.args.generation_batch_size // self.num_generations,
                group_size=self.num_generations,
                repeats=self.num_iterations * self.args.steps_per_generation,
                seed=self.args.seed,
            )

    return Plain


def by_length(completions, **_):
    """Groups whose completions are equally long get no advantage at all."""
    return [float(len(c.split())) for c in completions]


def generation_batch(dropped: bool = True) -> dict[str, torch.Tensor]:
    """16 rows of 4 prompts of unequal length; rows that stop at once, rows cut at the limit; two silent groups."""
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> list[int]:
        return torch.randint(2, 64, (count,), generator=generator).tolist()

    prompts = [words(n) for n in (6, 1, 4, 2)]
    prompts[2][1] = PAD  # a padding token that is part of the prompt
    lengths = [1, 7, 3, 1, 7, 7, 2, 5, 2, 1, 4, 6, 3, 3, 1, 7]
    completions = [words(n) if n == LIMIT else [*words(n - 1), EOS] for n in lengths]
    advantages = torch.randn(16, generator=generator)
    if dropped:
        advantages[4:8] = 0.0
        advantages[[8, 10, 13]] = 0.0
    batch = {
        "prompt_ids": torch.full((16, 6), PAD),
        "prompt_mask": torch.zeros(16, 6, dtype=torch.long),
        "completion_ids": torch.full((16, LIMIT), PAD),
        "completion_mask": torch.zeros(16, LIMIT, dtype=torch.long),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }
    for row in range(16):
        prompt, completion = prompts[row // 4], completions[row]
        batch["prompt_ids"][row, 6 - len(prompt) :] = torch.tensor(prompt)
        batch["prompt_mask"][row, 6 - len(prompt) :] = 1
        batch["completion_ids"][row, : len(completion)] = torch.tensor(completion)
        batch["completion_mask"][row, : len(completion)] = 1
    return batch


def loss_and_gradient(trainer, batch) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    parts = [p.grad.flatten().double() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference of two tensors."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("loss", ["dapo", "cispo", "grpo", "dr_grpo", "bnpo"])
def test_same_loss_and_gradient_on_the_same_batch(build, plain, family, loss):
    batch = generation_batch()
    ours, theirs = build(RFTTrainer, family, loss_type=loss), build(plain, family, loss_type=loss)
    assert ours.shared_refusal is None
    value, gradient = loss_and_gradient(ours, batch)
    expected_value, expected = loss_and_gradient(theirs, batch)
    assert expected.norm() > 1e-3
    assert value == pytest.approx(expected_value, rel=TOLERANCE, abs=1e-7)
    assert far(gradient, expected) <= TOLERANCE
    assert ours._metrics["train"]["entropy"] == pytest.approx(theirs._metrics["train"]["entropy"], rel=1e-5)


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_dropping_silent_rows_leaves_loss_and_gradient(build, plain, loss):
    batch = generation_batch()
    ours, theirs = build(RFTTrainer, loss_type=loss), build(plain, loss_type=loss)
    assert ours.drop_refusal is None
    kept = ours._drop_silent_rows(batch)
    assert kept["completion_ids"].size(0) == 9
    assert kept["num_items_in_batch"] == batch["num_items_in_batch"]
    value, gradient = loss_and_gradient(ours, kept)
    expected_value, expected = loss_and_gradient(theirs, batch)
    assert value == pytest.approx(expected_value, rel=TOLERANCE, abs=1e-7)
    assert far(gradient, expected) <= TOLERANCE


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "bnpo"])
def test_losses_that_average_over_rows_keep_them_all(build, plain, loss):
    """Dropping would change these gradients, so the trainer says no."""
    batch = generation_batch()
    trainer = build(RFTTrainer, loss_type=loss)
    assert trainer.drop_refusal is not None
    _, expected = loss_and_gradient(trainer, batch)
    _, wrong = loss_and_gradient(trainer, trainer._drop_silent_rows(batch))
    assert far(wrong, expected) > 1e-2


@pytest.mark.parametrize("loss", ["dapo", "grpo", "cispo"])
def test_same_gradient_off_policy_with_old_logps_and_kl(build, plain, loss):
    """Clipping, the importance ratio and the reference term see the same log-probabilities."""
    batch = generation_batch(dropped=False)
    ours = build(RFTTrainer, loss_type=loss, beta=0.1)
    theirs = build(plain, loss_type=loss, beta=0.1)
    assert ours.drop_refusal is not None  # the KL term uses every row
    generator = torch.Generator().manual_seed(4)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        now, _, _ = theirs._get_per_token_logps_and_entropies(theirs.model, ids, mask, LIMIT)
        again, _, _ = ours._get_per_token_logps_and_entropies(ours.model, ids, mask, LIMIT, batch_size=8)
    real = batch["completion_mask"].bool()
    assert (now - again)[real].abs().max() < 1e-5
    batch["old_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=generator) * real
    batch["ref_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=generator) * real
    value, gradient = loss_and_gradient(ours, batch)
    expected_value, expected = loss_and_gradient(theirs, batch)
    assert value == pytest.approx(expected_value, rel=TOLERANCE)
    assert far(gradient, expected) <= TOLERANCE
    for name in ("kl", "entropy", *(["clip_ratio/region_mean"] if loss != "cispo" else [])):
        assert ours._metrics["train"][name] == pytest.approx(theirs._metrics["train"][name], rel=1e-5)
    if loss == "dapo":
        assert ours._metrics["train"]["clip_ratio/region_mean"][0] > 0.05


@pytest.mark.parametrize("family", ["Llama", "GPT2"])  # rotary positions; learned ones, which padding shifts
def test_log_probabilities_and_entropies_by_hand(small_model, family):
    """Against one plain forward per row, without padding, cache or TRL."""
    model, batch = small_model(family, initializer_range=0.25), generation_batch()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logps, entropies = shared_prefix_logps(model, ids, mask, LIMIT, 0.8, True)
    assert logps.shape == entropies.shape == (16, LIMIT)
    assert not entropies.requires_grad
    for row in range(16):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        n = len(completion)
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double()
        table = torch.log_softmax(logits / 0.8, -1)
        assert torch.allclose(logps[row, :n].double(), table.gather(1, completion[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(entropies[row, :n].double(), -(table.exp() * table).sum(-1), atol=1e-5)
        assert not logps[row, n:].any()
        assert not entropies[row, n:].any()


def test_all_rows_stop_at_once(build, plain):
    """The width of one needs no second pass; nor may a batch in which nothing was written at all fail."""
    batch = generation_batch(dropped=False)
    batch["completion_ids"][:] = PAD
    batch["completion_ids"][:, 0] = EOS
    batch["completion_mask"][:] = 0
    batch["completion_mask"][:, 0] = 1
    batch["num_items_in_batch"] = torch.tensor(16)
    ours, theirs = build(RFTTrainer), build(plain)
    value, gradient = loss_and_gradient(ours, batch)
    expected_value, expected = loss_and_gradient(theirs, batch)
    assert value == pytest.approx(expected_value, rel=TOLERANCE)
    assert far(gradient, expected) <= TOLERANCE
    batch["completion_mask"][:] = 0  # as mask_truncated_completions does when every row was cut
    _, gradient = loss_and_gradient(ours, batch)
    assert not gradient.any()


def test_rows_masked_as_truncated(build, plain):
    """A row whose whole mask is 0 must not disturb the others."""
    batch = generation_batch(dropped=False)
    batch["completion_mask"][[1, 4, 15]] = 0
    value, gradient = loss_and_gradient(build(RFTTrainer), batch)
    expected_value, expected = loss_and_gradient(build(plain), batch)
    assert value == pytest.approx(expected_value, rel=TOLERANCE)
    assert far(gradient, expected) <= TOLERANCE


def test_prompts_are_encoded_once_per_group_in_the_update(build, monkeypatch):
    trainer, batch = build(RFTTrainer), generation_batch()
    shapes = []
    body = trainer.model.base_model
    forward = body.forward

    def counted(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(body, "forward", counted)
    trainer._compute_loss(trainer.model, batch)
    assert shapes == [(4, 6), (16, LIMIT - 1)]


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize("loud", [0, 1, 2, 3, 5, 8, 11, 15, 16])
def test_kept_rows_stay_a_multiple_of_the_chunks(build, chunks, loud):
    trainer = build(RFTTrainer, per_device_train_batch_size=16 // chunks, gradient_accumulation_steps=chunks)
    assert trainer.args.steps_per_generation == chunks
    batch = generation_batch(dropped=False)
    silent = torch.randperm(16, generator=torch.Generator().manual_seed(loud))[: 16 - loud]
    batch["advantages"][silent] = 0.0
    batch["tag"] = torch.arange(16)
    kept = trainer._drop_silent_rows(batch)
    tags = kept["tag"].tolist()
    assert len(tags) == max(chunks, -(-loud // chunks) * chunks)
    assert tags == sorted(set(tags))
    assert {i for i in range(16) if batch["advantages"][i] != 0} <= set(tags)
    assert torch.equal(kept["completion_ids"], batch["completion_ids"][tags])
    assert torch.equal(kept["advantages"], batch["advantages"][tags])
    assert kept["num_items_in_batch"] == batch["num_items_in_batch"]


def test_per_token_advantages_count_a_row_as_loud_if_any_token_is(build):
    trainer, batch = build(RFTTrainer), generation_batch()
    per_token = torch.zeros(16, LIMIT)
    per_token[3, 2] = 0.5
    per_token[9, 0] = -0.5
    batch["advantages"], batch["tag"] = per_token, torch.arange(16)
    assert trainer._drop_silent_rows(batch)["tag"].tolist() == [3, 9]


def scripted(kind):
    """The trainer with completions that depend on the prompt and the step only, not on the sampler."""

    class Scripted(kind):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            generator = torch.Generator().manual_seed(self.state.global_step)
            out = []
            for _ in prompt_ids:
                n = int(torch.randint(1, LIMIT + 1, (1,), generator=generator))
                words = torch.randint(2, 64, (n,), generator=generator).tolist()
                out.append(words if n == LIMIT else [*words[:-1], EOS])
            return out, None

    return Scripted


def mixed_reward(completions, row, **_):
    """Row 0's group is always silent; one completion of row 1 cannot be graded."""
    rewards = [0.0 if r == 0 else float(len(c.split()) % 3) for c, r in zip(completions, row, strict=True)]
    if 1 in row:
        rewards[row.index(1)] = None
    return rewards


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo"},
        {"loss_type": "cispo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"loss_type": "dapo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"loss_type": "dr_grpo", "per_device_train_batch_size": 8},
        {"loss_type": "dapo", "num_iterations": 2},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_whole_training_ends_with_the_same_weights(build, plain, changes):
    """Three optimizer steps through TRL's own loop: rewards, advantages, dropping, accumulation, clipping."""
    trainers = [build(scripted(kind), reward=mixed_reward, **changes) for kind in (RFTTrainer, plain)]
    start = torch.cat([p.detach().flatten().clone() for p in trainers[0].model.parameters()])
    ends = []
    rows_seen = []
    for trainer in trainers:
        seen = rows_seen.append
        loss = trainer._compute_loss

        def counted(model, inputs, loss=loss, seen=seen):
            seen(inputs["completion_ids"].size(0))
            return loss(model, inputs)

        trainer._compute_loss = counted
        trainer.train()
        rows_seen.append(None)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    moved = (ends[1] - start).norm()
    assert moved > 1e-2
    assert (ends[0] - ends[1]).norm() / moved < 1e-4
    first = rows_seen[: rows_seen.index(None)]
    second = rows_seen[rows_seen.index(None) + 1 : -1]
    assert len(first) == len(second)
    assert (sum(first) < sum(second)) == (changes["loss_type"] != "dr_grpo")
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in trainers]
    for ours, theirs in zip(*logs, strict=True):
        assert set(ours) == set(theirs)
        for name in (
            "loss",
            "grad_norm",
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "completions/mean_length",
        ):
            if name in theirs:  # a step that reuses completions reports no rewards
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-4), name


def test_the_sampler_stops_at_every_token_that_ends_an_answer(build):
    """A model may name more end tokens than its tokenizer does (Llama 3, Qwen); TRL honours them all."""
    trainer = build(RFTTrainer, also_ends=[EOS, 5, 6, 9])
    torch.manual_seed(0)
    completions, logprobs = trainer._generate_single_turn([[2, 3]] * 200, None, {}, 4)
    assert logprobs is None
    ends = {EOS, 5, 6, 9}
    assert all(not set(row[:-1]) & ends for row in completions)
    assert {row[-1] for row in completions if len(row) < LIMIT} <= ends
    assert sum(row[-1] in ends - {EOS} for row in completions) > 5


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"gradient_checkpointing": True},
        {"generation_kwargs": {"no_repeat_ngram_size": 2}},
    ],
    ids=str,
)
def test_what_the_shortcut_cannot_do_goes_to_trl(build, changes, caplog):
    with caplog.at_level(logging.WARNING, "tasks.train.trainer"):
        trainer = build(RFTTrainer, **changes)
    assert trainer.shared_refusal
    assert trainer.shared_refusal in caplog.text


def test_windowed_attention_goes_to_trl_and_agrees(build, plain):
    batch = generation_batch()
    ours, theirs = build(RFTTrainer, "Mistral"), build(plain, "Mistral")
    assert ours.shared_refusal
    value, gradient = loss_and_gradient(ours, batch)
    expected_value, expected = loss_and_gradient(theirs, batch)
    assert value == expected_value
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "changes", [{"beta": 0.1}, {"top_entropy_quantile": 0.5}, {"entropy_coef": 0.01}], ids=str
)
def test_terms_that_need_every_row_keep_every_row(build, changes):
    assert build(RFTTrainer, **changes).drop_refusal


def test_an_entropy_bonus_gets_its_gradient(build, plain):
    batch = generation_batch(dropped=False)
    _, gradient = loss_and_gradient(build(RFTTrainer, entropy_coef=0.5), batch)
    _, expected = loss_and_gradient(build(plain, entropy_coef=0.5), batch)
    _, without = loss_and_gradient(build(plain), batch)
    assert far(gradient, expected) <= TOLERANCE
    assert far(without, expected) > 1e-2


def test_phases_are_timed(build):
    trainer = build(RFTTrainer, max_steps=1)
    trainer.train()
    assert set(trainer.phase_seconds) == {"sampling", "grading"}
    assert all(seconds > 0 for seconds in trainer.phase_seconds.values())


# --- the order of prompts


def flat(order: PromptOrder) -> list[int]:
    return list(order)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "group", "repeats"),
    [(12, 3, 4, 2, 1), (10, 4, 4, 3, 2), (7, 5, 3, 2, 3), (5, 2, 5, 8, 1), (3, 4, 7, 1, 1)],
)
def test_prompt_order(rows, epochs, batch, group, repeats):
    order = PromptOrder(rows, epochs, batch, group, repeats, seed=11)
    indices = flat(order)
    assert len(indices) == len(order)
    size = batch * group
    blocks = [indices[i : i + size] for i in range(0, len(indices), size)]
    prompts: list[int] = []
    for start in range(0, len(blocks), repeats):
        same = blocks[start : start + repeats]
        assert all(block == same[0] for block in same)  # the whole batch again, as TRL reuses it
        for i in range(0, size, group):
            assert len(set(same[0][i : i + group])) == 1  # each prompt with its group side by side
            prompts.append(same[0][i])
    assert len(prompts) == rows * epochs // batch * batch
    for start in range(0, len(prompts), rows):  # the last epoch may lack what no whole batch holds
        epoch = prompts[start : start + rows]
        assert len(set(epoch)) == len(epoch)
        if len(epoch) == rows:
            assert sorted(epoch) == list(range(rows))


def test_prompt_order_is_a_function_of_its_seed_alone():
    def make(seed: int) -> list[int]:
        return flat(PromptOrder(20, 3, 4, 2, 1, seed))

    before = torch.random.get_rng_state()
    one = make(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    assert make(5) == one
    torch.random.set_rng_state(before)
    assert make(6) != one
    order = PromptOrder(20, 3, 4, 2, 1, 5)
    assert flat(order) == flat(order) == one
    assert len({tuple(order.order(epoch)) for epoch in range(10)}) == 10
    assert order.order(2) == order.order(2)


def test_prompt_order_continues_by_skipping():
    """transformers resumes by skipping batches of a fresh sampler, across epochs too."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    order = PromptOrder(10, 3, 4, 2, 1, seed=3)
    batches = [b.tolist() for b in DataLoader(range(10), batch_size=8, sampler=order)]
    assert len(batches) == 7
    for done in range(7):
        rest = skip_first_batches(
            DataLoader(range(10), batch_size=8, sampler=PromptOrder(10, 3, 4, 2, 1, seed=3)), done
        )
        assert [b.tolist() for b in rest] == batches[done:]


def test_longer_training_begins_like_shorter():
    short, long = PromptOrder(9, 2, 3, 2, 1, 1), PromptOrder(9, 5, 3, 2, 1, 1)
    assert flat(long)[: len(short)] == flat(short)


def test_the_trainer_uses_this_order_and_whole_steps(build):
    """Prompts reach the reward function in PromptOrder's order, group by group, once per generation."""
    seen = []

    def watch(completions, row, **_):
        seen.append(row)
        return by_length(completions)

    trainer = build(RFTTrainer, reward=watch, rows=6, max_steps=6, num_iterations=2, prompt_epochs=2)
    sampler = trainer._get_train_sampler()
    assert (sampler.rows, sampler.n_epochs, sampler.batch_size) == (6, 2, 2)
    assert (sampler.group_size, sampler.repeats, sampler.seed) == (4, 2, 7)
    trainer.train()
    order = sampler.order(0) + sampler.order(1)
    assert seen == [[i for i in order[k : k + 2] for _ in range(4)] for k in (0, 2, 4)]


def test_after_a_checkpoint_generation_stays_in_phase(build, tmp_path):
    """Completions are reused twice; a checkpoint at an odd step must not shift when new ones are drawn."""
    steps: list[int] = []
    trainers: list[RFTTrainer] = []

    def watch(completions, **_):
        steps.append(trainers[-1].state.global_step)
        return by_length(completions)

    settings = {
        "reward": watch,
        "num_iterations": 2,
        "max_steps": 8,
        "rows": 8,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    trainers.append(build(RFTTrainer, **settings))
    trainers[-1].train()
    assert steps == [0, 2, 4, 6]
    steps.clear()
    trainers.append(build(RFTTrainer, **settings))
    trainers[-1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps == [3, 4, 6]  # at 3 what was to be reused is lost; from 4 on the rhythm is the old one
