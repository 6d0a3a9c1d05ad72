"""Linear maps of one input."""

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.ops.platform import on_cpu


def linear(x, weights, training: bool = True) -> list:
    """x [..., I] times each weight [O, I].

    On a CPU, where a gradient may be wanted, the weights are joined into one matrix: the gradient of a weight
    needs the product's gradient transposed. Of a joint product that is written first and then copied; else
    XLA computes it in transposed order, ten times slower.

    Args:
      x: [..., I].
      weights: a list of [O, I], each O its own.
      training: False where a few new tokens next to a cache are not worth a copy of the weights.
    Returns:
      A list of [..., O].
    """
    split_by_tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
    if len(weights) == 1 or not training or split_by_tensor or not on_cpu():
        return [jnp.einsum("...i,oi->...o", x, weight) for weight in weights]
    return joined_linear(x, weights)


def joined_linear(x, weights) -> list:
    """`linear` by one product."""
    ends = np.cumsum([len(weight) for weight in weights])
    return jnp.split(jnp.einsum("...i,oi->...o", x, jnp.concatenate(weights)), ends[:-1], axis=-1)
