"""Bootstrap intervals: reproducible, bounded in memory, and as wide as statistics says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.intervals import bootstrap


def test_the_mean_is_the_plain_mean_and_lies_inside():
    values = [0.0, 1.0, 1.0, 0.25, 0.5, 0.75, 0.0]
    interval = bootstrap(values, 1000, 1)
    assert interval.mean == pytest.approx(0.5)
    assert interval.low < interval.mean < interval.high


def test_same_seed_same_interval_other_seed_another():
    values = list(np.random.default_rng(0).random(40))
    assert bootstrap(values, 999, 7) == bootstrap(values, 999, 7)
    assert bootstrap(values, 999, 7) != bootstrap(values, 999, 8)


def test_no_spread_no_width():
    interval = bootstrap([0.25] * 9, 500, 3)
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)
    alone = bootstrap([0.7], 200, 3)
    assert (alone.low, alone.high) == (0.7, 0.7)


def test_width_is_that_of_the_normal_approximation_for_many_rows():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    interval = bootstrap(list(values), 10_000, 5)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_small_sample_against_all_resamples():
    """Three rows have 27 equally likely resamples; their quantiles can be written down."""
    values = [0.0, 1.0, 10.0]
    means = np.sort([(a + b + c) / 3 for a in values for b in values for c in values])
    interval = bootstrap(values, 40_000, 2)
    # 2.5 % of 27 is less than one resample: the extremes, which each have probability 1/27.
    assert interval.low == means[0]
    assert interval.high == means[-1]


def test_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(12)
    hits = 0
    for trial in range(300):
        interval = bootstrap(list(rng.binomial(1, 0.4, 80)), 600, trial)
        hits += interval.low <= 0.4 <= interval.high
    assert 0.89 <= hits / 300 <= 0.985


@pytest.mark.parametrize("resamples", [200, 499, 500, 501, 1700])
def test_blocks_change_nothing(resamples, monkeypatch):
    """All resamples are filled, whatever the block size leaves over."""
    values = list(np.random.default_rng(4).random(30) + 5)
    interval = bootstrap(values, resamples, 9)
    assert 5 < interval.low < interval.high < 6


def test_pairing_cancels_what_makes_rows_hard():
    rng = np.random.default_rng(6)
    hard = rng.normal(0, 5, 200)
    before, after = hard + rng.normal(0, 0.1, 200), hard + 0.3 + rng.normal(0, 0.1, 200)
    gain = bootstrap(list(after - before), 2000, 1)
    alone = bootstrap(list(after), 2000, 1)
    assert gain.low > 0.2
    assert gain.high - gain.low < 0.1 < alone.high - alone.low
