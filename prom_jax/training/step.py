"""One update: gradients of the objective, summed over parts, clipped, and AdamW."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from prom_jax.models import decoder as llama
from prom_jax.parallel.sharding import BATCH, constrain, constrain_params
from prom_jax.training.objective import Objective, weight_sums


def make_schedule(learning_rate, warmup_ratio, schedule, num_steps):
    """Learning rate by update: linear warmup from 0, then 'cosine' or 'linear' decay to 0."""
    warmup = min(math.ceil(warmup_ratio * num_steps), num_steps - 1)
    rest = max(1, num_steps - warmup)
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, rest)
    else:
        decay = optax.linear_schedule(learning_rate, 0.0, rest)
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, max(1, warmup)), decay], [warmup])


def make_optimizer(schedule, weight_decay, clip, dtype="float32"):
    """AdamW (betas 0.9 and 0.999) on gradients of norm at most `clip`; 0 for no clipping.

    Norm scales do not decay, as in the trainer that the paper used. `dtype`: of parameters and moments;
    'bfloat16' as in `rounded_at_random`.
    """
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay, mask=_decays)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    return rounded_at_random(optimizer) if dtype == "bfloat16" else optimizer


class RoundedState(NamedTuple):
    """count: int32, the number of updates; inner: the state of the optimizer that is rounded."""

    count: jax.Array
    inner: optax.OptState


def rounded_at_random(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose parameters and moments are bfloat16 between updates, which are computed in float32.

    To the nearest, an update of less than 1/512 of a parameter would be lost, and the second moment's always.
    Each number is rounded up or down instead, with the odds that make its mean what it was (stochastic
    rounding), depending on nothing but its place and the number of the update.
    """

    def init(params):
        return RoundedState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(gradients, state, params):
        before = _wide(params)
        updates, moments = inner.update(_wide(gradients), _wide(state.inner), before)
        after = jax.tree.map(jnp.add, before, updates)
        after, moments = _rounded((after, moments), state.count)
        # The difference of two such numbers is exact in float32, and so is its sum with the first.
        updates = jax.tree.map(jnp.subtract, _wide(after), before)
        return updates, RoundedState(state.count + 1, moments)

    return optax.GradientTransformation(init, update)


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _wide(tree):
    """The tree with all floating-point numbers in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, tree)


def _rounded(tree, seed):
    """The tree with all floating-point numbers in bfloat16, rounded at random."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [
        stochastic_round(x, seed * len(leaves) + number) if _is_float(x) else x
        for number, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, leaves)


def stochastic_round(x, seed):
    """float32 to either bfloat16 beside it, with the odds that make the mean what it was.

    The random bits are a hash of place and seed: elementwise, so that it becomes part of what makes `x`.
    `jax.random` would first write eight bytes for each number on a GPU.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = _hash(place ^ _hash(jnp.uint32(seed))) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _hash(x):
    """Mixes the bits of uint32 (multiply and xor-shift, constants found by C. Wellons's search)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _decays(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)


def abstract_state(optimizer, params: dict, mesh):
    """The optimizer's state for abstract parameters: moments lie as these do, the rest whole everywhere."""
    state = jax.eval_shape(optimizer.init, params)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = optax.tree.map_params(
        optimizer, lambda _, param: param.sharding, state, params, transform_non_params=lambda _: whole
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def make_update(model: llama.Llama, objective: Objective, optimizer, accumulation: int):
    """The function (params, opt_state, batch) → (params, opt_state, metrics) of one update.

    Args:
      model: abstract, the structure that `params` fill.
      accumulation: into how many parts the batch is split; gradients are summed over them, each loss
        divided by the weights of the whole update, so the result is that of the whole batch.
    Returns: metrics are float32 scalars: loss, and by role loss_… (per token) and weight_…; grad_norm;
        param_norm after the update.
    """

    def update(params, opt_state, batch):
        weights = weight_sums(batch)
        scale = objective.coefficients(weights)

        def loss(params, part):
            sums = objective.loss_sums(llama.with_params(model, params), part)
            return sum(scale[role] * sums[role] for role in sums), sums

        gradients, sums = accumulate(jax.grad(loss, has_aux=True), params, batch, accumulation)
        gradients = constrain_params(gradients)  # XLA may have laid them out otherwise
        metrics = {"loss": sum(scale[role] * sums[role] for role in sums)}
        for role in sums:
            metrics[f"loss_{role}"] = sums[role] / jnp.maximum(weights[role], 1.0)
            metrics[f"weight_{role}"] = weights[role]
        metrics["grad_norm"] = optax.global_norm(_wide(gradients))
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics["param_norm"] = optax.global_norm(_wide(params))
        return params, opt_state, metrics

    return update


def accumulate(function, params, batch, parts: int):
    """Sum of `function(params, part)` over `parts` parts of the batch, one after the other, in float32 at
    least where there are several."""
    if parts == 1:
        return function(params, batch)
    batch = jax.tree.map(functools.partial(_split, parts=parts), batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], batch)),
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(params, part)), None

    return jax.lax.scan(add, zeros, batch)[0]


def _split(x, parts):
    """[R, T] to [parts, R / parts, T]; row r goes to part r mod parts, so that no row changes its device."""
    return constrain(x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), None, BATCH)
