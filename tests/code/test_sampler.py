"""The sampler draws what `model.generate` draws: token for token when greedy, in distribution when not."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from tasks.train import sampler
from tasks.train.sampler import choose, left_pad, sample, shared_path_refusal

PAD = 0
LIMIT = 12


def prompts(vocabulary: int = 64) -> list[list[int]]:
    """Seven distinct prompts of lengths 1 to 9, most of them several times, not always side by side."""
    generator = torch.Generator().manual_seed(3)
    distinct = [
        torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        for length in (5, 1, 9, 3, 9, 2, 6)
    ]
    return [distinct[i] for i in (0, 0, 0, 1, 2, 2, 1, 3, 4, 4, 5, 0, 6, 6)]


def by_generate(model, given: list[list[int]], eos_ids: list[int]) -> list[list[int]]:
    """Greedy completions of transformers' own loop, cut after the first end token."""
    ids, mask = left_pad(given, PAD, "cpu")
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=LIMIT,
        do_sample=False,
        eos_token_id=eos_ids or None,
        pad_token_id=PAD,
    )
    cut = []
    for row in out[:, ids.size(1) :].tolist():
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        cut.append(row[: ends[0] + 1] if ends else row)
    return cut


def end_tokens(model) -> list[int]:
    """Two tokens that this model says at different places, so that rows end at different times."""
    runs = by_generate(model, prompts(), [])
    places: dict[int, set[int]] = {}
    for run in runs:
        for place, token in enumerate(run):
            places.setdefault(token, set()).add(place)
    never_all = [t for t in places if t != PAD and any(t not in run for run in runs)]
    return sorted(never_all, key=lambda t: (-len(places[t]), t))[:2]


def greedy(model, given, eos_ids, **changes):
    arguments = {"max_new_tokens": LIMIT, "temperature": 0, "eos_ids": eos_ids, "pad_id": PAD, **changes}
    return sample(model, given, **arguments)


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Qwen2", "GPT2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_equals_generate(small_model, family, seed):
    model = small_model(family, seed)
    assert shared_path_refusal(model) is None
    eos_ids = end_tokens(model)
    expected = by_generate(model, prompts(), eos_ids)
    lengths = {len(row) for row in expected}
    assert len(lengths) > 2, "a test in which all rows end together would not show that ended rows leave"
    assert greedy(model, prompts(), eos_ids) == expected


def test_greedy_equals_generate_with_tied_embeddings_and_one_prompt(small_model):
    model = small_model("Qwen3", tie_word_embeddings=True)
    one = [[7, 8, 9]]
    assert greedy(model, one, []) == by_generate(model, one, [])


def test_a_padding_token_inside_a_prompt_is_a_token(small_model):
    model = small_model("Llama")
    given = [[PAD, 5, 6], [5, 6], [PAD, PAD, 9, 4, 3]]
    assert greedy(model, given, []) == [greedy(model, [p], [])[0] for p in given]
    assert greedy(model, given, []) == by_generate(model, given, [])


def test_rows_are_cut_into_batches_and_come_back_in_order(small_model, monkeypatch):
    model = small_model("Qwen3", 1)
    eos_ids = end_tokens(model)
    whole = greedy(model, prompts(), eos_ids)
    monkeypatch.setattr(sampler, "ROWS_PER_BATCH", 3)
    assert greedy(model, prompts(), eos_ids) == whole


def test_each_distinct_prompt_is_encoded_once_and_ended_rows_leave(small_model, monkeypatch):
    """The shortcut is really taken: rows in the first forward are distinct prompts, later ones only fall."""
    model = small_model("Qwen3")
    eos_ids = end_tokens(model)
    sizes = []
    forward = model.base_model.forward

    def counted(*args, **kwargs):
        sizes.append(kwargs["input_ids"].size(0))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", counted)
    completions = greedy(model, prompts(), eos_ids)
    assert sizes[0] == 7
    # The step that draws token n + 1 holds the rows whose completion is longer than n tokens.
    assert sizes[1:] == [n for k in range(1, LIMIT) if (n := sum(len(c) > k for c in completions))]
    assert sizes[-1] < len(completions)


def test_a_row_that_ends_at_once_is_its_end_token_only(small_model):
    model = small_model("Qwen3")
    first = greedy(model, prompts(), [], max_new_tokens=1)
    assert all(len(row) == 1 for row in first)
    every_first = sorted({row[0] for row in first})
    assert greedy(model, prompts(), every_first) == first


def sequence_probabilities(model, prompt: list[int], limit: int, eos: int, temperature: float):
    """Exact probability of every completion, from whole forward passes without a cache."""
    vocabulary = model.config.vocab_size
    done: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(limit):
        texts = list(open_)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(t) for t in texts])).logits[:, -1].double()
        following: dict[tuple[int, ...], float] = {}
        for text, row in zip(texts, torch.softmax(logits / temperature, -1).tolist(), strict=True):
            for token in range(vocabulary):
                target = done if token == eos else following
                target[(*text, token)] = open_[text] * row[token]
        open_ = following
    return {**done, **open_}


def chi_square_p(counts: Counter, probabilities: dict, draws: int) -> float:
    """p-value of observed against expected; outcomes expected fewer than 8 times are taken together."""
    common = [k for k, p in probabilities.items() if p * draws >= 8]
    assert len(common) >= 5, "too few outcomes for the test to mean anything"
    observed = [counts[k] for k in common]
    expected = [probabilities[k] * draws for k in common]
    rare = draws - sum(expected)
    if rare > 1e-6 * draws:
        observed.append(draws - sum(observed))
        expected.append(rare)
    scale = draws / sum(expected)
    return chisquare(observed, [e * scale for e in expected]).pvalue


@pytest.mark.parametrize(("family", "temperature"), [("Qwen3", 1.0), ("Llama", 0.7)])
def test_sampled_completions_follow_the_softmax(small_model, family, temperature):
    """Whole completions of up to three tokens, ended ones among them, of two prompts drawn together."""
    model = small_model(family, vocab_size=8, initializer_range=0.3)
    first, second, draws = [1, 2, 3, 4, 5], [6, 2], 4000
    completions = sample(
        model,
        [first] * draws + [second] * draws,
        max_new_tokens=3,
        temperature=temperature,
        eos_ids=[3],
        pad_id=PAD,
        generator=torch.Generator().manual_seed(11),
    )
    for prompt, part in ((first, completions[:draws]), (second, completions[draws:])):
        exact = sequence_probabilities(model, prompt, 3, 3, temperature)
        assert sum(exact.values()) == pytest.approx(1)
        counts = Counter(map(tuple, part))
        assert set(counts) <= set(exact)
        assert chi_square_p(counts, exact, draws) > 0.001
        # The same counts do not fit another temperature: the test can tell.
        wrong = sequence_probabilities(model, prompt, 3, 3, temperature * 1.5)
        assert chi_square_p(counts, wrong, draws) < 1e-6


def test_choose_follows_the_softmax_and_its_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -3.0, 0.5])
    draws = 8000
    chosen = choose(logits.expand(draws, -1), 2.0, torch.Generator().manual_seed(5))
    exact = dict(enumerate(torch.softmax(logits.double() / 2.0, -1).tolist()))
    assert chi_square_p(Counter(chosen.tolist()), exact, draws) > 0.001
    assert choose(logits[None], 0, None).tolist() == [2]


def draw(model, generator, given=None, **changes):
    arguments = {"max_new_tokens": 8, "temperature": 1.0, "eos_ids": [5], "pad_id": PAD, **changes}
    return sample(model, given or prompts(), generator=generator, **arguments)


@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_a_generator_repeats_itself_and_leaves_the_global_state(small_model, family):
    model = small_model(family)  # Mistral's window sends it through `generate`
    assert (shared_path_refusal(model) is None) == (family == "Qwen3")
    before = torch.random.get_rng_state()
    one = draw(model, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)  # has no say
    assert draw(model, torch.Generator().manual_seed(1)) == one
    assert draw(model, torch.Generator().manual_seed(2)) != one
    torch.random.set_rng_state(before)


def test_a_generator_moves_on_from_call_to_call(small_model):
    for family in ("Qwen3", "Mistral"):
        generator = torch.Generator().manual_seed(1)
        model = small_model(family)
        assert draw(model, generator) != draw(model, generator)


def test_without_a_generator_the_global_seed_decides(small_model):
    model = small_model("Qwen3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        one = draw(model, None)
        two = draw(model, None)
        torch.manual_seed(4)
        assert draw(model, None) == one
        assert one != two


@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_left_as_it_was(small_model, family, training):
    model = small_model(family)
    model.train(training)
    draw(model, torch.Generator().manual_seed(1))
    assert model.training is training


def test_training_mode_is_restored_after_an_error(small_model):
    model = small_model("Qwen3")
    model.train()
    with pytest.raises(IndexError):
        greedy(model, [[1, 64]], [])  # token 64 does not exist
    assert model.training is True


def test_completions_end_with_their_end_token_or_at_the_limit(small_model):
    model = small_model("Qwen3", vocab_size=8, initializer_range=0.2)
    completions = draw(model, torch.Generator().manual_seed(1), [[1, 2]] * 300, eos_ids=[5, 6])
    assert {len(row) for row in completions} == set(range(1, 9))
    for row in completions:
        assert not set(row[:-1]) & {5, 6}
        assert row[-1] in (5, 6) or len(row) == 8


WINDOWED = [
    ("Mistral", {"sliding_window": 4}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    ("Gemma3Text", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
]


@pytest.mark.parametrize(("family", "changes"), WINDOWED)
def test_windowed_attention_falls_back_to_generate(small_model, family, changes):
    model = small_model(family, **changes)
    assert shared_path_refusal(model) is not None
    eos_ids = end_tokens(model)
    assert greedy(model, prompts(), eos_ids) == by_generate(model, prompts(), eos_ids)


def test_the_fallback_samples_the_plain_softmax_whatever_the_models_own_settings(small_model):
    model = small_model("Mistral", vocab_size=8, initializer_range=0.3)
    model.generation_config.top_p = 0.3
    model.generation_config.top_k = 2
    model.generation_config.repetition_penalty = 3.0
    draws = 4000
    completions = draw(
        model, torch.Generator().manual_seed(2), [[1, 2, 3]] * draws, max_new_tokens=2, eos_ids=[3]
    )
    exact = sequence_probabilities(model, [1, 2, 3], 2, 3, 1.0)
    assert chi_square_p(Counter(map(tuple, completions)), exact, draws) > 0.001
    assert (model.generation_config.top_p, model.generation_config.repetition_penalty) == (0.3, 3.0)


def test_greedy_ignores_the_models_own_settings_on_both_paths(small_model):
    for family in ("Qwen3", "Mistral"):
        model = small_model(family)
        plain = greedy(model, prompts(), [])
        model.generation_config.repetition_penalty = 5.0
        assert greedy(model, prompts(), []) == plain


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("Gemma2", {"query_pre_attn_scalar": 8}, "final_logit_softcapping"),
        ("Granite", {"logits_scaling": 4.0}, "logits_scaling"),
        ("Cohere", {"logit_scale": 0.25}, "logit_scale"),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "experts"),
        ("Phi", {}, "bias"),
    ],
)
def test_heads_and_layers_that_the_shortcut_cannot_reproduce_are_refused(small_model, family, changes, why):
    assert why in (shared_path_refusal(small_model(family, **changes)) or "nothing refused")


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4], [5, 6]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_permuting_rows_permutes_greedy_completions(small_model):
    model = small_model("Llama", 2)
    eos_ids = end_tokens(model)
    expected = dict(zip(map(tuple, prompts()), greedy(model, prompts(), eos_ids), strict=True))
    for order in itertools.islice(itertools.permutations(range(14)), 0, 5_000_000, 1_700_000):
        given = [prompts()[i] for i in order]
        assert greedy(model, given, eos_ids) == [expected[tuple(p)] for p in given]
