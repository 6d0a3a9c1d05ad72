"""The bootstrap against scipy's and against the normal approximation."""

import numpy as np
from scipy.stats import bootstrap

from prom_jax.analysis.statistics import interval, resampled_means

VALUES = np.random.default_rng(0).gamma(2.0, size=(120, 3))


def test_intervals_are_those_of_scipy():
    low, high = interval(resampled_means(VALUES, seed=0))
    theirs = bootstrap(
        (VALUES,), np.mean, axis=0, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose(low, theirs.low, atol=0.06 * width.max())
    np.testing.assert_allclose(high, theirs.high, atol=0.06 * width.max())
    np.testing.assert_allclose(width, 2 * 1.96 * VALUES.std(axis=0) / np.sqrt(len(VALUES)), rtol=0.1)


def test_one_draw_serves_all_columns():
    columns = np.stack([VALUES[:, 0], VALUES[:, 0] + 1], axis=1)
    means = resampled_means(columns, seed=3)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1)
    np.testing.assert_array_equal(means, resampled_means(columns, seed=3))
    assert not np.array_equal(means, resampled_means(columns, seed=4))


def test_ends_are_values_that_occur():
    assert interval(np.array([1] * 30 + [2] * 970)) == (1, 2)
    assert interval(np.array([1] * 20 + [2] * 980)) == (2, 2)
