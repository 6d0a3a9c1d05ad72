"""Intervals by the bootstrap: how far a mean over rows would move with other rows."""

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def resampled_means(values, seed: int) -> np.ndarray:
    """Means over the first axis of `values` [rows, …], the rows drawn anew with replacement.

    One draw serves all columns, so that differences of columns can be taken. Returns: [RESAMPLES, …] float64.
    """
    values = np.asarray(values, np.float64)
    rows = len(values)
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return np.tensordot(draws, values, axes=1) / rows


def interval(samples) -> tuple[np.ndarray, np.ndarray]:
    """Low and high ends of the central 95 % of `samples` [RESAMPLES, …]; always values that occur."""
    outside = (1 - LEVEL) / 2
    return tuple(np.quantile(samples, [outside, 1 - outside], axis=0, method="inverted_cdf"))
