"""Every `auto` becomes a number by a rule; what the user gave is kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import model
from tasks.resolve import (
    EFFORT_BUDGET,
    GROUP_SIZE,
    LEARNING_RATES,
    TARGET_STEPS,
    _micro_batch,
    count_parameters,
    detect_device,
    resolve,
)

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "vocab_size": 150_000}


@pytest.fixture
def resolved(make_run, monkeypatch):
    """resolved(rows, config, hyperparameters={…}, sampling={…})."""

    def call(rows: int = 640, config: dict = TINY, hyperparameters: dict | None = None, **job):
        monkeypatch.setattr(model, "base_config", lambda run: config)
        run = make_run(**job)
        for name, value in (hyperparameters or {}).items():
            setattr(run.job.hyperparameters, name, value)
        return resolve(run, rows)

    return call


def test_all_auto(resolved):
    r = resolved(640)
    assert (r.batch_size, r.n_epochs, r.group_size) == (20, math.ceil(TARGET_STEPS * 20 / 640), GROUP_SIZE)
    assert r.steps == 640 * r.n_epochs // 20 >= TARGET_STEPS
    assert r.learning_rate == LEARNING_RATES[0][1]
    assert r.eval_interval == r.steps // 10
    assert (r.eval_samples, r.max_completion_tokens) == (1, 256)
    assert r.parameters == count_parameters(TINY)
    assert r.threads >= 1
    assert r.device in ("cpu", "cuda")


@pytest.mark.parametrize("rows", [1, 2, 5, 31, 33, 640, 100_000])
def test_any_number_of_rows_gives_a_job_that_can_run(resolved, rows):
    r = resolved(rows)
    assert 1 <= r.batch_size <= min(64, rows)
    assert 1 <= r.n_epochs <= 50
    assert r.steps >= 1
    assert 1 <= r.eval_interval <= r.steps
    assert (r.batch_size * r.group_size) % r.micro_batch == 0


def test_a_batch_is_no_larger_than_the_file(resolved):
    r = resolved(6, hyperparameters={"batch_size": 32, "n_epochs": 2})
    assert (r.batch_size, r.steps) == (6, 2)


def test_what_is_given_is_kept(resolved):
    r = resolved(
        100,
        hyperparameters={"batch_size": 7, "n_epochs": 3, "eval_interval": 4, "eval_samples": 5},
        sampling={"group_size": 6, "max_completion_tokens": 33},
        optimizer={"learning_rate": 0.125},
        resources={"device": "cpu", "threads": 3, "micro_batch": 21},
    )
    assert (r.batch_size, r.n_epochs, r.steps) == (7, 3, 300 // 7)
    assert (r.eval_interval, r.eval_samples, r.group_size, r.max_completion_tokens) == (4, 5, 6, 33)
    assert (r.learning_rate, r.device, r.threads, r.micro_batch) == (0.125, "cpu", 3, 21)


def test_validation_comes_at_least_once(resolved):
    r = resolved(10, hyperparameters={"batch_size": 5, "n_epochs": 1, "eval_interval": 1000})
    assert r.eval_interval == r.steps == 2


@pytest.mark.parametrize(
    ("multiplier", "group"), [(0.001, 2), (0.25, 2), (0.5, 4), (1, 8), (2, 16), (10, 80)]
)
def test_compute_multiplier_scales_the_group(resolved, multiplier, group):
    assert resolved(hyperparameters={"compute_multiplier": multiplier}).group_size == group
    given_group = resolved(hyperparameters={"compute_multiplier": multiplier}, sampling={"group_size": 5})
    assert given_group.group_size == 5


def test_learning_rate_falls_with_size_and_is_scaled(resolved):
    small, large = resolved(config=TINY), resolved(config=LARGE)
    assert small.learning_rate > large.learning_rate
    assert (
        resolved(hyperparameters={"learning_rate_multiplier": 0.5}).learning_rate == small.learning_rate / 2
    )
    assert small.micro_batch > large.micro_batch
    both = resolved(hyperparameters={"learning_rate_multiplier": 2.0}, optimizer={"learning_rate": 0.25})
    assert both.learning_rate == 0.5


@pytest.mark.parametrize("effort", sorted(EFFORT_BUDGET))
def test_effort_scales_the_token_budget(resolved, effort):
    r = resolved(hyperparameters={"reasoning_effort": effort}, sampling={"max_completion_tokens": 100})
    assert r.max_completion_tokens == 100 * EFFORT_BUDGET[effort]


def test_effort_never_leaves_no_token(resolved):
    r = resolved(hyperparameters={"reasoning_effort": "low"}, sampling={"max_completion_tokens": 1})
    assert r.max_completion_tokens == 1


@given(st.integers(1, 600), st.integers(1, 600))
def test_micro_batch_is_the_largest_divisor_that_fits(wanted, completions):
    n = _micro_batch(wanted, completions, 10**6)
    assert completions % n == 0
    assert n <= wanted
    assert not [m for m in range(n + 1, min(wanted, completions) + 1) if completions % m == 0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen3", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
        ("Llama", {"num_key_value_heads": 4, "hidden_size": 64, "head_dim": 16}),
        ("Llama", {"num_key_value_heads": 1, "intermediate_size": 200}),
    ],
)
def test_counted_parameters_are_the_models(small_model, family, changes):
    built = small_model(family, **changes)
    config = {**built.config.to_dict(), "tie_word_embeddings": built.config.tie_word_embeddings}
    assert count_parameters(config) == pytest.approx(sum(p.numel() for p in built.parameters()), rel=0.01)


def test_no_device_is_claimed_when_it_is_hidden(monkeypatch):
    monkeypatch.setattr("os.path.exists", lambda path: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_device() == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert detect_device() == "cuda"
    monkeypatch.setattr("os.path.exists", lambda path: False)
    assert detect_device() == "cpu"
