"""The root-mean-square norm."""

import functools

import jax
import jax.numpy as jnp

from prom_jax.ops.platform import on_cpu


def rms_norm(x, weight, eps: float, unit_offset: bool = False):
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019, eq. 4), computed in float32.

    Args:
      x: [..., D].
      weight: [D].
      eps: added to the mean square.
      unit_offset: whether the scale is 1 + weight, applied in float32, as in Gemma.

    Returns:
      [..., D] in the dtype of `x`.
    """
    if on_cpu():
        return _rms_norm_cpu(x, weight, eps, unit_offset)
    x_float = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x_float * x_float, axis=-1, keepdims=True) + eps)
    return _scaled(x_float * inverse, weight, x.dtype, unit_offset)


def _scaled(normed, weight, dtype, unit_offset: bool):
    if unit_offset:
        return (normed * (1 + weight.astype(jnp.float32))).astype(dtype)
    return normed.astype(dtype) * weight.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm_cpu(x, weight, eps, unit_offset):
    """The same with row sums as matrix products, in a gradient of its own too: XLA's sums take a CPU four
    times as long."""
    return _scaled(_normed(x, eps)[0], weight, x.dtype, unit_offset)


def _normed(x, eps):
    """`x` over its root mean square, and one over that, in float32."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(_mean_of_products(x, x) + eps)
    return x * inverse, inverse


def _mean_of_products(x, y):
    return jnp.einsum("...d,...d->...", x, y, precision="highest")[..., None] / x.shape[-1]


def _forward(x, weight, eps, unit_offset):
    return _rms_norm_cpu(x, weight, eps, unit_offset), (x, weight)


def _backward(eps, unit_offset, saved, d_out):
    x, weight = saved
    normed, inverse = _normed(x, eps)
    d_out = d_out.astype(jnp.float32)
    d_weight = (d_out * normed).sum(axis=tuple(range(x.ndim - 1)))
    d_normed = d_out * (weight.astype(jnp.float32) + (1 if unit_offset else 0))
    d_x = (d_normed - normed * _mean_of_products(d_normed, normed)) * inverse
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_rms_norm_cpu.defvjp(_forward, _backward)
