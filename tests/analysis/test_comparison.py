"""Paired tests against hand values, a plain loop, and the normal approximation."""

import math

import numpy as np
import pytest

from prom_jax.analysis.comparison import RESAMPLES, clustered_bootstrap, holm, mcnemar


def test_mcnemar_is_the_binomial_over_discordant_items():
    # 8 items only the first has right, 2 only the second; both or neither do not count.
    first = [1] * 8 + [0] * 2 + [1] * 5 + [0] * 7
    second = [0] * 8 + [1] * 2 + [1] * 5 + [0] * 7
    by_hand = 2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10
    assert mcnemar(first, second) == (8, 2, pytest.approx(by_hand))
    assert mcnemar(second, first) == (2, 8, pytest.approx(by_hand))
    assert mcnemar(first, first) == (0, 0, 1.0)


def plain_loop(differences, clusters, draws, seed):
    """Means of resamples, one cluster and one resample at a time."""
    random = np.random.default_rng(seed)
    groups = [
        [d for d, c in zip(differences, clusters) if c == name] for name in dict.fromkeys(clusters)
    ]  # fmt: skip
    means = []
    for _ in range(draws):
        items = [item for i in random.integers(len(groups), size=len(groups)) for item in groups[i]]
        means.append(sum(items) / len(items))
    return np.array(means)


def test_bootstrap_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    clusters = [f"paragraph {i}" for i in range(30) for _ in range(1 + i % 5)]
    of_paragraph = dict(zip(dict.fromkeys(clusters), random.normal(size=30)))
    differences = np.array([0.25 + of_paragraph[name] + 0.3 * random.normal() for name in clusters])
    ours = clustered_bootstrap(differences, clusters, seed=1)
    means = plain_loop(differences.tolist(), clusters, 10_000, seed=2)
    low, high = np.quantile(means, (0.025, 0.975))
    assert ours.difference == pytest.approx(differences.mean())
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    expected = np.mean(np.abs(means - differences.mean()) >= abs(differences.mean()))
    assert 0.05 < expected < 0.5  # neither end, where any test would agree
    assert ours.p == pytest.approx(expected, abs=0.02)


def test_seeds_are_drawn_too():
    random = np.random.default_rng(0)
    items, clusters = random.normal(size=200), np.repeat(np.arange(50), 4)
    one = clustered_bootstrap(items, clusters)
    assert clustered_bootstrap([items], clusters) == one
    same = clustered_bootstrap([items, items, items], clusters)  # seeds that make no difference
    assert (same.low, same.high) == pytest.approx((one.low, one.high), abs=1e-9)
    # Where items make none, the standard deviation is that of the mean of seeds, √(s² / 3).
    shifts = np.array([-0.5, 0.1, 0.7])
    spread = clustered_bootstrap(np.repeat(shifts[:, None], 200, axis=1), clusters)
    draws = random.choice(shifts, size=(100_000, 3)).mean(axis=1)
    draws = shifts.mean() + (draws - shifts.mean()) * math.sqrt(3 / 2)
    assert draws.std() == pytest.approx(shifts.std(ddof=1) / math.sqrt(3), rel=0.01)
    assert (spread.low, spread.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), abs=1e-9)
    # And both together add up.
    both = clustered_bootstrap(items + 0.2 * shifts[:, None], clusters)
    parts = [np.var(items.reshape(50, 4).mean(axis=1), ddof=1) / 50, 0.04 * shifts.var(ddof=1) / 3]
    assert both.high - both.low == pytest.approx(2 * 1.96 * math.sqrt(sum(parts)), rel=0.05)


def test_items_of_a_cluster_are_not_independent():
    values = np.random.default_rng(0).normal(size=100)
    repeated, items = np.repeat(values, 9), np.arange(900)
    clustered, independent = (
        clustered_bootstrap(repeated, clusters) for clusters in (np.repeat(items[:100], 9), items)
    )
    width = lambda result: result.high - result.low
    assert width(clustered) / width(independent) == pytest.approx(3, rel=0.05)
    assert width(clustered) == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.05)


def test_p_at_its_ends():
    items = np.arange(50)
    assert clustered_bootstrap(np.zeros(50), items).p == 1
    assert clustered_bootstrap(np.full(50, 0.1), items).p == 1 / (1 + RESAMPLES)
    balanced = np.where(items % 2, 1.0, -1.0)
    assert clustered_bootstrap(balanced, items).p == 1


def test_bootstrap_is_seeded():
    values = np.random.default_rng(0).normal(size=40)
    assert clustered_bootstrap(values, range(40), 3) == clustered_bootstrap(values, range(40), 3)
    assert clustered_bootstrap(values, range(40), 3) != clustered_bootstrap(values, range(40), 4)


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, which may not fall again.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert holm([]).shape == (0,)


def test_few_clusters_prove_nothing():
    differences = np.ones(12)
    assert clustered_bootstrap(differences, [0] * 6 + [1] * 6).p == 0.5
    assert clustered_bootstrap(differences, range(12)).p < 0.001
