"""Random bits that are a function of what they are for, made elementwise.

`jax.random` would first write eight bytes for each number on a GPU, and its numbers depend on the shape.
"""

import jax
import jax.numpy as jnp


def hash_bits(x):
    """Mixes the bits of uint32 (multiply and xor-shift, constants found by C. Wellons's search)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def dropout(x, keys, salt, rate: float):
    """`x` with a share `rate` of its values 0 and the others divided by 1 - rate.

    Args:
      x: [..., I].
      keys: uint32 [...]: which values of a row are 0 depends on its key and the salt alone.
      salt: an int or a traced integer, another one for each place where a row is dropped from.
      rate: at least 0, less than 1.

    Returns:
      As `x`.
    """
    rows = hash_bits(keys ^ hash_bits(jnp.uint32(salt)))
    columns = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
    kept = hash_bits(rows[..., None] + columns) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x / (1 - rate), 0)
