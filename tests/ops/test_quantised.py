"""Matrices in 8 and 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prom_jax.ops.quantised import NF4, Quantised, codes_of, dequantise, quantised_linear, scales_of


def quantised(matrix, kind):
    return Quantised(jnp.asarray(codes_of(matrix, kind)), jnp.asarray(scales_of(matrix, kind)))


@pytest.mark.parametrize(("kind", "rms"), [("int8", 0.006), ("nf4", 0.1)])
def test_the_nearest_code_of_each_block(kind, rms):
    random = np.random.default_rng(0)
    matrix = random.normal(size=(3, 10, 192)).astype(np.float32) * 10.0 ** random.integers(-4, 4, (3, 10, 1))
    matrix[1, 2] = 0
    weight = quantised(matrix, kind)
    assert weight.codes.shape == (3, 10, 96 if kind == "nf4" else 192) and weight.codes.itemsize == 1
    assert weight.scales.shape == (3, 10, 3)
    blocks = matrix.reshape(3, 10, 3, 64)
    largest = np.abs(blocks).max(-1, keepdims=True)
    table = np.arange(-127, 128) / 127 if kind == "int8" else NF4
    candidates = table[:, None] * largest[..., None, :]
    nearest = np.abs(blocks[..., None, :] - candidates).min(-2)
    made = np.asarray(dequantise(weight, jnp.float32)).reshape(blocks.shape)
    np.testing.assert_allclose(np.abs(made - blocks), nearest, rtol=1e-3, atol=1e-5 * largest.max())
    errors = (made - blocks)[largest[..., 0] > 0] / np.broadcast_to(largest, blocks.shape)[
        largest[..., 0] > 0
    ]
    assert np.sqrt(np.mean(errors**2)) < rms
    np.testing.assert_array_equal(made[1, 2], 0)


def test_rows_that_no_block_divides():
    matrix = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    weight = quantised(matrix, "int8")
    assert weight.scales.shape == (4, 3)
    assert np.abs(dequantise(weight, jnp.float32) - matrix).max() < 0.02


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_linear_map_is_that_of_the_matrix_and_keeps_the_codes_alone(kind):
    random = np.random.default_rng(0)
    weight = quantised(random.normal(size=(24, 128)).astype(np.float32), kind)
    x = jnp.asarray(random.normal(size=(2, 5, 128)).astype(np.float32))
    matrix = dequantise(weight, jnp.float32)
    plain = lambda x: jnp.sin(x @ matrix.T).sum()
    ours = lambda x: jnp.sin(quantised_linear(x, weight)).sum()
    np.testing.assert_allclose(quantised_linear(x, weight), x @ matrix.T, rtol=1e-5, atol=1e-5)
    device = jax.devices()[0]  # as a run has them: committed, in a program that is compiled ahead of time
    compiled = jax.jit(quantised_linear).lower(x, weight).compile()
    made = compiled(*jax.device_put((x, weight), device))
    np.testing.assert_allclose(made, x @ matrix.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-4, atol=1e-4)
    _, backward = jax.vjp(lambda x: quantised_linear(x, weight), x)
    kept = {x.dtype for x in jax.tree.leaves(backward) if x.shape == matrix.shape}
    assert kept <= {weight.codes.dtype}


def test_rows_of_an_odd_number_have_no_nf4_codes():
    with pytest.raises(ValueError, match=r"a matrix \[2, 3\] has rows of an odd number"):
        codes_of(np.zeros((2, 3), np.float32), "nf4")
