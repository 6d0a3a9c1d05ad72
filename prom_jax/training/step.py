"""One update: gradients of a method's loss, summed over micro-batches, and the optimizer's step."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from prom_jax.models import decoder
from prom_jax.parallel.sharding import BATCH, constrain, constrain_params
from prom_jax.training.objective import Method
from prom_jax.training.optimizer import to_float32


def make_update(
    model: decoder.Decoder,
    method: Method,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    appended: str | None = None,
    chunks: Mapping[str, int] | None = None,
):
    """The function (trained, opt_state, batch, frozen) → (trained, opt_state, metrics) of one update, of the
    parameters that are trained and of the others ({} for none), as `split_params` divides them.

    Args:
      model: abstract, the structure that both parts of the parameters fill.
      method: whose loss is minimised.
      optimizer: its state is that of the trained parameters.
      accumulation: into how many parts the batch is split; gradients are summed over them, each term
        divided by the divisors of the whole update, so the result is that of the whole batch.
      appended: the stream that continues the rows of the first one, as `data.loader.Batches` says.
      chunks: of loss tokens by stream, as in `training.objective.head_chunks`.

    Returns:
      Metrics are float32 scalars: loss, and by name of a sum loss_… (per token) and weight_…; grad_norm;
      param_norm, of the trained parameters after the update.
    """
    axes = decoder.param_axes(model.config, model.heads, model.lora)

    def update(trained, opt_state, batch, frozen=MappingProxyType({})):
        divisors = method.divisors(batch)
        scale = method.coefficients(divisors)
        losses = _losses(model, method, frozen, scale, appended, chunks)
        gradients, sums = accumulate(_differentiate(losses, method.combine), trained, batch, accumulation)
        if method.combine is not None:
            gradients = method.combine(gradients)
        gradients = constrain_params(gradients, axes)  # XLA may have laid them out otherwise
        metrics = {"loss": sum(scale[name] * sums[name] for name in sums)}
        for name in sums:
            metrics[f"loss_{name}"] = sums[name] / jnp.maximum(divisors[name], 1.0)
            metrics[f"weight_{name}"] = divisors[name]
        metrics["grad_norm"] = optax.global_norm(to_float32(gradients))
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        metrics["param_norm"] = optax.global_norm(to_float32(trained))
        return trained, opt_state, metrics

    return update


def make_term_norms(
    model: decoder.Decoder,
    method: Method,
    accumulation: int,
    appended: str | None = None,
    chunks: Mapping[str, int] | None = None,
):
    """The function (trained, batch, frozen) → {name of a sum: the norm of its gradient, float32} of an
    update.

    Each gradient is multiplied and divided as in the loss, so that their sum, but for a method that combines
    them otherwise, is the update's. They are made one after the other, so that no more than one is in memory.

    Args:
      model, method, accumulation, appended, chunks: as in `make_update`.
    """
    axes = decoder.param_axes(model.config, model.heads, model.lora)
    names = [name for term in method.terms for name in term.names]

    def term_norms(trained, batch, frozen=MappingProxyType({})):
        scale = method.coefficients(method.divisors(batch))
        losses = _losses(model, method, frozen, scale, appended, chunks)

        def norm(chosen):
            def total(trained, part):
                each, _ = losses(trained, part)
                return sum(chosen[number] * each[name] for number, name in enumerate(names))

            gradients = accumulate(jax.grad(total), trained, batch, accumulation)
            return optax.global_norm(to_float32(constrain_params(gradients, axes)))

        return dict(zip(names, jax.lax.map(norm, jnp.eye(len(names)))))

    return term_norms


def _losses(model, method: Method, frozen, scale: dict, appended, chunks):
    """The function (trained parameters, part of a batch) → each sum as it is in the loss, and as it is."""

    def losses(trained, part):
        whole = decoder.with_params(model, merge_params(trained, frozen))
        sums = method.sums(whole, part, appended, chunks)
        return {name: scale[name] * sums[name] for name in sums}, sums

    return losses


def _differentiate(losses, combine):
    """From losses {name: …} and sums to gradients and sums: the gradients of the losses' total, or, where
    they are to be combined otherwise, those of each, by name."""

    def total(trained, part):
        each, sums = losses(trained, part)
        return sum(each.values()), sums

    def of_each(trained, part):
        each, backward, sums = jax.vjp(lambda trained: losses(trained, part), trained, has_aux=True)
        zeros = jax.tree.map(jnp.zeros_like, each)
        return {name: backward(zeros | {name: jnp.ones_like(each[name])})[0] for name in each}, sums

    return jax.grad(total, has_aux=True) if combine is None else of_each


def split_params(params: dict, model: decoder.Decoder, method: Method) -> tuple[dict, dict]:
    """The parameters that a method trains, and those that are frozen: by the method, or around adapters."""

    def is_trained(path):
        return method.trains(path) and not model.is_frozen(path[-1])

    return divide(params, is_trained)


def divide(params: Mapping, belongs, path: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Two parts of a nested dict: the leaves whose path belongs to the first, and the others."""
    parts = {}, {}
    for name, value in params.items():
        here = (*path, name)
        if isinstance(value, Mapping):
            for part, inner in zip(parts, divide(value, belongs, here)):
                part |= {name: inner} if inner else {}
        else:
            parts[0 if belongs(here) else 1][name] = value
    return parts


def merge_params(one: Mapping, other: Mapping) -> dict:
    """The nested dict of which both are parts; of what is in both, the first's."""
    shared = {name: value for name, value in one.items() if isinstance(value, Mapping) and name in other}
    return {**other, **one, **{name: merge_params(value, other[name]) for name, value in shared.items()}}


def accumulate(function, params, batch, parts: int):
    """Sum of `function(params, part)` over `parts` parts of the batch, one after the other, in float32 at
    least where there are several.

    (optax's `microbatch` wants as many rows in every stream, and sums in the gradients' own dtype.)
    """
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
