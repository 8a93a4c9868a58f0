"""Means with 95 % intervals from a paired bootstrap over rows.

Rows are the unit of resampling: completions of one row are not independent. Comparing two models, the
same rows are drawn for both, so what makes a row hard cancels. Percentile intervals (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

import numpy as np

from tasks.results import Interval


def bootstrap(per_row: list[float], resamples: int, seed: int) -> Interval:
    """95 % interval of the mean of one value per row; paired differences make it a paired comparison."""
    values = np.asarray(per_row, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # in blocks, so that memory stays bounded for many rows
        stop = min(start + 500, resamples)
        means[start:stop] = values[rng.integers(0, len(values), (stop - start, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))
