"""Linear maps of one input."""

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.ops.platform import on_cpu
from prom_jax.ops.quantised import Quantised, quantised_linear


def linear(x, weights, training: bool = True) -> list:
    """x [..., I] times each weight [O, I].

    On a CPU, where a gradient may be wanted, the weights are joined into one matrix: the gradient of a weight
    needs the product's gradient transposed. Of a joint product that is written first and then copied; else
    XLA computes it in transposed order, ten times slower.

    Args:
      x: [..., I].
      weights: a list of [O, I], each O its own; those that are `Quantised` have no gradient.
      training: False where the weights have no gradient, such as for a few new tokens next to a cache, which
        are not worth a copy of them.

    Returns:
      A list of [..., O].
    """
    split_by_tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
    if len(weights) == 1 or not training or split_by_tensor or not on_cpu():
        return [
            quantised_linear(x, weight)
            if isinstance(weight, Quantised)
            else jnp.einsum("...i,oi->...o", x, weight)
            for weight in weights
        ]
    return joined_linear(x, weights)


def joined_linear(x, weights) -> list:
    """`linear` by one product."""
    ends = np.cumsum([len(weight) for weight in weights])
    return jnp.split(jnp.einsum("...i,oi->...o", x, jnp.concatenate(weights)), ends[:-1], axis=-1)


def low_rank(x, downs, ups) -> list:
    """x [..., I] times each product of matrices B A, of which A [R, I] goes first, so that B A is never made.

    Args:
      x: [..., I].
      downs: a list of A [R, I], which are applied by one product.
      ups: as many B [O, R], each O and R its own.

    Returns:
      A list of [..., O].
    """
    if not downs:
        return []
    ends = np.cumsum([len(down) for down in downs])
    inner = jnp.split(jnp.einsum("...i,ri->...r", x, jnp.concatenate(downs)), ends[:-1], axis=-1)
    return [_up(low, up) for low, up in zip(inner, ups)]


@jax.custom_vjp
def _up(low, up):
    """low [..., R] times B [O, R]. The gradient of B is the product of R rows and O columns, transposed: as
    JAX makes it, of O rows, XLA on a CPU computes what comes back, [..., O], in transposed order for it."""
    return jnp.einsum("...r,or->...o", low, up)


def _up_forward(low, up):
    return _up(low, up), (low, up)


def _up_backward(inputs, gradient):
    low, up = inputs
    d_up = jnp.einsum("...r,...o->ro", low, gradient).T
    return jnp.einsum("...o,or->...r", gradient, up), d_up


_up.defvjp(_up_forward, _up_backward)
