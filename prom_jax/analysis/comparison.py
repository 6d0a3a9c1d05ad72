"""Is one method better than another on the same items? Paired tests, and Holm's correction of many."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000
CHUNK = 2**22  # clusters drawn at a time, to bound memory


class McNemar(NamedTuple):
    """Items that only one side has right, and the exact two-sided p of so uneven a split."""

    first_only: int
    second_only: int
    p: float


class Bootstrap(NamedTuple):
    """Mean difference, ends of its 95 % interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def mcnemar(first, second) -> McNemar:
    """McNemar's exact test (binomial over the discordant items).

    Args:
      first, second: bool [items], which items each side has right, in the same order.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    p = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    return McNemar(gained, lost, float(p))


def clustered_bootstrap(differences, clusters, seed: int = 0) -> Bootstrap:
    """Bootstrap of a mean of paired differences, whole clusters drawn anew with replacement.

    Items of one cluster (the questions of a paragraph) are not independent, so a resample takes all or none
    of them. Trainings with several seeds are drawn anew too, independently of the clusters, as all of them
    answer the same items; what k of them differ from their mean is enlarged by √(k / (k − 1)), since k draws
    from k vary too little by that. p is the share of resamples that are as far from the mean as the mean is
    from 0, and never less than 2 / 2ⁿ, the odds that n clusters all differ in one direction by chance: few of
    them prove nothing. `python -m benchmarks.power` says what the intervals hold.

    Args:
      differences: float [items] or [seeds, items], first minus second.
      clusters: [items], which cluster an item is of.
    """
    names, members = np.unique(np.asarray(clusters), return_inverse=True)
    each = np.atleast_2d(np.asarray(differences, np.float64))
    sums, sizes = np.stack([np.bincount(members, row) for row in each]), np.bincount(members)
    seeds, mean = len(sums), sums.mean(axis=0)
    sums = mean + (sums - mean) * np.sqrt(seeds / max(1, seeds - 1))
    observed = mean.sum() / sizes.sum()
    random, of_seeds = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    at_once = max(1, CHUNK // (len(names) * seeds))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, at_once):
        number = min(at_once, RESAMPLES - start)
        draws = random.integers(len(names), size=(number, len(names)))
        weights = of_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), size=number).T / seeds
        totals = (weights * sums[:, draws].sum(axis=2)).sum(axis=0)  # [number], as all that follows
        means[start : start + number] = totals / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    # A rounding error must not tell a resample that equals the extreme from the extreme.
    as_far = np.abs(means - observed) >= abs(observed) * (1 - 1e-9)
    p = max((1 + as_far.sum()) / (1 + RESAMPLES), 2.0 ** (1 - len(names)))
    return Bootstrap(float(observed), float(low), float(high), float(p))


def holm(p_values) -> np.ndarray:
    """Holm's step-down adjustment, float64 [tests]: below 0.05 is significant over the whole family."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(adjusted, 1.0)
