"""One update: gradients of the objective, summed over parts, clipped, and AdamW."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from prom_jax import llama
from prom_jax.objective import Objective, weight_sums
from prom_jax.sharding import BATCH, constrain, constrain_params


def make_schedule(learning_rate, warmup_ratio, schedule, num_steps):
    """Learning rate by update: linear warmup from 0, then 'cosine' or 'linear' decay to 0."""
    warmup = min(math.ceil(warmup_ratio * num_steps), num_steps - 1)
    rest = max(1, num_steps - warmup)
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, rest)
    else:
        decay = optax.linear_schedule(learning_rate, 0.0, rest)
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, max(1, warmup)), decay], [warmup])


def make_optimizer(schedule, weight_decay, clip, moment_dtype="float32"):
    """AdamW (betas 0.9 and 0.999) on gradients of norm at most `clip`; 0 for no clipping.

    Norm scales do not decay, as in the trainer that the paper used. `moment_dtype`: of the first moment.
    """
    adamw = optax.adamw(
        schedule, b1=0.9, b2=0.999, weight_decay=weight_decay, mask=_decays, mu_dtype=moment_dtype
    )
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


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
        metrics["grad_norm"] = optax.global_norm(gradients)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics["param_norm"] = optax.global_norm(params)
        return params, opt_state, metrics

    return update


def accumulate(function, params, batch, parts: int):
    """Sum of `function(params, part)` over `parts` parts of the batch, one after the other."""
    if parts == 1:
        return function(params, batch)
    batch = jax.tree.map(functools.partial(_split, parts=parts), batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], batch)),
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(params, part)), None

    return jax.lax.scan(add, zeros, batch)[0]


def _split(x, parts):
    """[R, T] to [parts, R / parts, T]; row r goes to part r mod parts, so that no row changes its device."""
    return constrain(x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), None, BATCH)
