"""Frozen matrices in 8 or 4 bits, with a scale for each block of values, and the linear map of one.

int8 codes are multiples of a block's largest value over 127. nf4 codes are the 16 quantiles of a normal
distribution that Dettmers et al. (2023, "QLoRA", appendix E) give, times a block's largest value. A byte has
two of them, i and i + I / 2 of a row: arrays of JAX's own uint4 take a byte a value on CPUs, and what is
compiled ahead of time refuses them (JAX 0.10.2).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # values of a row that share a scale


class Kind(NamedTuple):
    """The dtype of codes, and the number of values that one has."""

    dtype: type
    values: int


KINDS = {"int8": Kind(jnp.int8, 1), "nf4": Kind(jnp.uint8, 2)}
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
], np.float32)  # fmt: skip


class Quantised(NamedTuple):
    """A matrix, or a stack of them.

    Attributes:
      codes: int8 [..., O, I], or for nf4 uint8 [..., O, I / 2].
      scales: float32 [..., O, I / block].
    """

    codes: jax.Array
    scales: jax.Array


def block_size(inputs: int) -> int:
    """How many values of a row of so many share a scale."""
    return math.gcd(BLOCK, inputs)


def scales_of(matrix: np.ndarray, kind: str) -> np.ndarray:
    """The scales of a matrix [..., O, I], on the host: float32 [..., O, I / block]."""
    largest = np.abs(_blocks(matrix)).max(axis=-1)
    return largest / np.float32(127) if kind == "int8" else largest


def codes_of(matrix: np.ndarray, kind: str) -> np.ndarray:
    """The codes of a matrix [..., O, I], on the host.

    Raises:
      ValueError: for nf4, if I is odd.
    """
    scales = scales_of(matrix, kind)[..., None]
    shares = (_blocks(matrix) / np.where(scales > 0, scales, 1)).reshape(matrix.shape)
    if kind == "nf4":
        if matrix.shape[-1] % 2:
            raise ValueError(
                f"nf4 has two values a byte: a matrix {list(matrix.shape)} has rows of an odd number"
            )
        first, second = np.split(np.searchsorted((NF4[1:] + NF4[:-1]) / 2, shares), 2, axis=-1)
        codes = first + 16 * second
    else:
        codes = np.rint(shares)
    return codes.astype(KINDS[kind].dtype)


def _blocks(matrix) -> np.ndarray:
    size = block_size(matrix.shape[-1])
    return np.asarray(matrix, np.float32).reshape(*matrix.shape[:-1], -1, size)


def dequantise(weight: Quantised, dtype) -> jax.Array:
    """The matrix."""
    codes, scales = weight
    values = codes
    if codes.dtype == KINDS["nf4"].dtype:
        values = jnp.asarray(NF4)[jnp.concatenate([codes % 16, codes // 16], axis=-1).astype(jnp.int32)]
    # The scales take the shape of the codes, not these that of blocks, so that no layout has to change.
    of_values = jnp.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)
    return (values.astype(jnp.float32) * of_values).astype(dtype)


@jax.custom_vjp
def quantised_linear(x, weight: Quantised):
    """x [..., I] times the matrix [O, I], which has no gradient. The codes alone are kept for the way back,
    on which it is made again."""
    return jnp.einsum("...i,oi->...o", x, dequantise(weight, x.dtype))


def _forward(x, weight):
    return quantised_linear(x, weight), weight


def _backward(weight, gradient):
    return jnp.einsum("...o,oi->...i", gradient, dequantise(weight, gradient.dtype)), None


quantised_linear.defvjp(_forward, _backward)
