"""Intervals: how far a mean over rows, or a share of them, may be from that over all rows there could be."""

import functools

import numpy as np
from scipy.stats import binomtest

RESAMPLES, WEIGHTINGS = 2000, 10_000
LEVEL = 0.95


def resampled_means(values, seed: int) -> np.ndarray:
    """Means over the first axis of `values` [rows, …], the rows drawn anew with replacement.

    One draw serves all columns, so that differences of columns can be taken. Returns: [RESAMPLES, …] float64.
    """
    values = np.asarray(values, np.float64)
    return np.tensordot(_draws(len(values), seed), values, axes=1) / len(values)


@functools.lru_cache(maxsize=4)  # the same serve many columns
def _draws(rows: int, seed: int) -> np.ndarray:
    """How often each row is drawn in each resample, [RESAMPLES, rows]."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)


def interval(samples) -> tuple[np.ndarray, np.ndarray]:
    """Low and high ends of the central 95 % of `samples` [RESAMPLES, …]; always values that occur."""
    outside = (1 - LEVEL) / 2
    return tuple(np.quantile(samples, [outside, 1 - outside], axis=0, method="inverted_cdf"))


def mean_interval(values, least: float, most: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a mean over rows whose values lie between two bounds, as probabilities do.

    The rows, and one more that has the worst value there could be, are given random weights (Dirichlet,
    uniform): the end of the interval is a quantile of the weighted mean (Gaffke 2005, "Three test statistics
    for a nonparametric one-sided hypothesis on the mean of a nonnegative variable"; Learned-Miller and Thomas
    2019, arXiv 1905.06208). The worst value stands for the rare rows that carry the mean of a heavy-tailed
    variable and that a sample may lack; of zeros and ones alone it makes the interval of Clopper and Pearson.
    `python -m benchmarks.coverage` compares it with others.

    Args:
      values: [rows, …].
      least, most: the bounds.
      seed: of the weights.

    Returns:
      Low and high ends, float64 […].
    """
    values = np.asarray(values, np.float64)
    weights = _weights(len(values) + 1, seed)
    means = np.tensordot(weights[:, :-1], values, axes=1)
    worst = weights[:, -1].reshape(-1, *(1,) * (values.ndim - 1))
    outside = (1 - LEVEL) / 2
    low = np.quantile(means + worst * least, outside, axis=0)
    return low, np.quantile(means + worst * most, 1 - outside, axis=0)


@functools.lru_cache(maxsize=4)
def _weights(rows: int, seed: int) -> np.ndarray:
    """Random weights of rows, each time with the sum 1, [WEIGHTINGS, rows]."""
    return np.random.default_rng(seed).dirichlet(np.ones(rows), size=WEIGHTINGS)


def share_interval(number: int, of: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper and Pearson)."""
    found = binomtest(number, of).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


def effective_rows(values) -> np.ndarray:
    """How many rows a mean rests on: (Σ|x|)² / Σx² over the first axis (Kish's effective sample size).

    As many as there are where all weigh the same, 1 where one row is all of the mean, 0 where all are 0.
    """
    sizes = np.abs(np.asarray(values, np.float64))
    largest = sizes.max(axis=0)
    shares = sizes / np.where(largest > 0, largest, 1)  # squares of probabilities may underflow
    squares = (shares**2).sum(axis=0)
    return shares.sum(axis=0) ** 2 / np.where(squares > 0, squares, 1)
