"""Dropout's values by their keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from prom_jax.ops.random import dropout


def test_dropout_depends_on_key_and_salt_alone():
    x = jnp.ones((3, 50, 400))
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (3, 50), np.uint32))
    dropped = np.asarray(dropout(x, keys, 7, 0.3))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.7)}
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert np.abs(dropped.mean(axis=(0, 1)) - 1).max() < 0.3 and np.abs(dropped.mean(axis=2) - 1).max() < 0.2
    # Rows in other places have the same values.
    moved = dropout(x[:, ::-1], keys[:, ::-1], 7, 0.3)
    np.testing.assert_array_equal(moved[:, ::-1], dropped)
    # Another salt, and other keys, take other ones: about .58 of them agree.
    agree = [np.mean(dropped == other) for other in (dropout(x, keys, 8, 0.3), dropout(x, keys + 1, 7, 0.3))]
    assert agree == pytest.approx([0.58, 0.58], abs=0.02)
    np.testing.assert_array_equal(dropout(x, keys, 7, 0.0), x)
