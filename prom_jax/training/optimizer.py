"""AdamW, its schedule, and stochastic rounding of a state in bfloat16."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from prom_jax.ops.random import hash_bits


def make_schedule(learning_rate, warmup_ratio, schedule, num_steps):
    """Learning rate by update: linear warmup from 0, then 'cosine' or 'linear' decay to 0."""
    warmup = min(math.ceil(warmup_ratio * num_steps), num_steps - 1)
    rest = max(1, num_steps - warmup)
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, warmup + rest)
    rise = optax.linear_schedule(0.0, learning_rate, max(1, warmup))
    return optax.join_schedules([rise, optax.linear_schedule(learning_rate, 0.0, rest)], [warmup])


def make_optimizer(schedule, weight_decay, clip, dtype="float32"):
    """AdamW (betas 0.9 and 0.999) on gradients of norm at most `clip`; 0 for no clipping.

    Norm scales and biases do not decay, as in the trainer that the paper used.

    Args:
      schedule: learning rate by update.
      weight_decay: of AdamW.
      clip: the largest norm of the gradients.
      dtype: of parameters and moments; 'bfloat16' as in `with_stochastic_rounding`.
    """
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay, mask=_decays)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    return with_stochastic_rounding(optimizer) if dtype == "bfloat16" else optimizer


class RoundedState(NamedTuple):
    """count: int32, the number of updates; inner: the state of the optimizer that is rounded."""

    count: jax.Array
    inner: optax.OptState


def with_stochastic_rounding(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps an optimizer's parameters and moments in bfloat16 between updates, which are computed in float32.

    Rounded to the nearest, an update of less than 1/512 of a parameter would be lost, and the second moment's
    always. Stochastic rounding is unbiased; it depends on the index of the element and the number of the
    update alone.
    """

    def init(params):
        return RoundedState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(gradients, state, params):
        before = to_float32(params)
        updates, moments = inner.update(to_float32(gradients), to_float32(state.inner), before)
        after = jax.tree.map(jnp.add, before, updates)
        after, moments = _rounded((after, moments), state.count)
        # The difference of two such numbers is exact in float32, and so is its sum with the first.
        updates = jax.tree.map(jnp.subtract, to_float32(after), before)
        return updates, RoundedState(state.count + 1, moments)

    return optax.GradientTransformation(init, update)


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def to_float32(tree):
    """The tree with all floating-point numbers in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, tree)


def _rounded(tree, seed):
    """The tree with all floating-point numbers in bfloat16, stochastically rounded."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [
        stochastic_round(x, seed * len(leaves) + number) if _is_float(x) else x
        for number, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, leaves)


def stochastic_round(x, seed):
    """Stochastic rounding of float32 to bfloat16; unbiased.

    The random bits are a hash of index and seed: elementwise, so that it becomes part of what makes `x`.

    Args:
      x: float32 of any shape.
      seed: uint32; another one gives other bits.

    Returns:
      Bfloat16 of the same shape.
    """
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = hash_bits(index ^ hash_bits(jnp.uint32(seed))) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _decays(params: dict) -> dict:
    def is_matrix(path, _):
        return not path[-1].key.endswith(("norm", "_bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def abstract_state(optimizer, params: dict, mesh):
    """The optimizer's state for abstract parameters: moments sharded as these are, the rest replicated."""
    state = jax.eval_shape(optimizer.init, params)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = optax.tree.map_params(
        optimizer, lambda _, param: param.sharding, state, params, transform_non_params=lambda _: whole
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
