"""An update is the same in parts and on meshes; schedules and AdamW against transformers and torch."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.training.methods.prom import PROM
from prom_jax.training.optimizer import make_optimizer, make_schedule, stochastic_round
from prom_jax.training.step import make_update
from tests.reference import (
    gradients,
    hf_model,
    pack,
    place_params,
    random_examples,
    relative_errors,
    to_model,
)

METHOD = PROM(layer=3, weight=0.7)
STEPS, RATE = 5, 1e-4


def batch(step):
    """Rows that differ much in their number of loss-bearing tokens; the last English one has none."""
    target = random_examples(step, [24, 9, 12, 5, 24, 20, 3, 11, 17, 6, 21])
    english = random_examples(100 + step, [14, 7, 6, 15, 4, 1])
    return {
        "target": pack(target, [[0], [1, 2], [3], [4], [5, 6], [7], [8, 9], [10]], 24),
        "english": pack(english, [[0], [1, 2], [3], [4], [5]], 15),
    }


@pytest.fixture(scope="module")
def model():
    hf = hf_model("llama3")
    return to_model(hf, pivot_layer=3, pivot_head=copy.deepcopy(hf.lm_head).weight)


def mesh_of(**sizes):
    return sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


def run(model, mesh, accumulation=1, dtype="float32"):
    """Five steps. Returns the metrics of each, the gradients of the first and the parameters after the last.

    Adam's first moment after one step is a tenth of the gradient.
    """
    schedule = make_schedule(RATE, 0.0, "linear", STEPS)
    optimizer = make_optimizer(schedule, weight_decay=0.1, clip=1.0, dtype=dtype)
    update = jax.jit(
        make_update(model, METHOD, optimizer, accumulation, chunks=dict.fromkeys(METHOD.streams, 16))
    )
    with jax.set_mesh(mesh):
        params = place_params(mesh, decoder.to_params(model), model.config)
        start, opt_state, metrics, first = params, optimizer.init(params), [], None
        for step in range(STEPS):
            rows = sharding.place_rows(mesh, batch(step), accumulation)
            params, opt_state, result = update(params, opt_state, rows)
            metrics.append(jax.device_get(result))
            first = first or jax.device_get(optax.tree.get(opt_state, "mu"))
    unclipped = 10 * max(1.0, metrics[0]["grad_norm"])
    first = jax.tree.map(lambda moment: unclipped * moment, first)
    stays = lambda x, was: x.sharding.is_equivalent_to(was.sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(stays, params, start)))
    return metrics, first, jax.device_get(params)


@pytest.fixture(scope="module")
def one_device(model):
    return run(model, mesh_of(fsdp=1))


@pytest.mark.parametrize(
    ("sizes", "accumulation"), [({"fsdp": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)]
)
def test_five_steps_on_a_mesh_equal_one_device(model, one_device, sizes, accumulation):
    (metrics, first, params), theirs = run(model, mesh_of(**sizes), accumulation), one_device
    for step, (ours, expected) in enumerate(zip(metrics, theirs[0], strict=True)):
        assert set(ours) == set(expected)
        for key in expected:
            assert ours[key] == pytest.approx(expected[key], rel=2e-5), (step, key)
    errors = relative_errors(first, theirs[1])
    assert max(errors.values()) <= 2e-5

    # AdamW divides by the gradient's size. A gradient that is nothing but rounding has either sign, and moves
    # its parameter by up to the learning rate: a single value may differ so much, a tensor's movement hardly.
    for ours, expected, start in zip(*map(jax.tree.leaves, (params, theirs[2], decoder.to_params(model)))):
        assert np.abs(ours - expected).max() <= RATE
        assert np.linalg.norm(ours - expected) <= 0.01 * np.linalg.norm(expected - start)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_equals_whole(model, one_device, accumulation):
    rows = sharding.place_rows(mesh_of(fsdp=1), batch(0), accumulation)
    metrics, parts = jax.device_get(gradients(model, METHOD, rows, accumulation))
    for key, value in metrics.items():
        assert value == pytest.approx(one_device[0][0][key], rel=1e-5), key
    assert max(relative_errors(parts, one_device[1]).values()) <= 2e-5


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.25])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_are_those_of_transformers(name, warmup_ratio):
    steps = 50
    make = getattr(transformers, f"get_{name}_schedule_with_warmup")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-5)
    theirs = make(optimizer, math.ceil(warmup_ratio * steps), steps)
    ours = make_schedule(2e-5, warmup_ratio, name, steps)
    for step in range(steps + 1):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-4, abs=1e-11), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_optimizer_is_that_of_torch(clip):
    random = np.random.default_rng(0)
    values = {"a": random.normal(size=(4, 3)), "b": random.normal(size=5)}
    ours = {key: jnp.asarray(value, jnp.float32) for key, value in values.items()}
    theirs = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    optimizer = make_optimizer(lambda step: 0.01 / (1 + step), weight_decay=0.1, clip=clip)
    state = optimizer.init(ours)
    their_optimizer = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        size = (0.1, 10)[step % 2]  # the large ones alone are clipped
        gradient = {key: size * random.normal(size=value.shape) for key, value in values.items()}
        gradient = {key: value.astype(np.float32) for key, value in gradient.items()}
        updates, state = optimizer.update({k: jnp.asarray(g) for k, g in gradient.items()}, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for key, tensor in theirs.items():
            tensor.grad = torch.from_numpy(gradient[key])
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        their_optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        their_optimizer.step()
        for key in values:
            np.testing.assert_allclose(ours[key], theirs[key].numpy(), rtol=1e-5, atol=1e-6)


def test_rounding_at_random_is_to_either_side_and_keeps_the_mean():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    x[:3] = 0, 1, -0.375  # are bfloat16 already
    times = 4000
    rounded = jax.vmap(lambda seed: stochastic_round(jnp.asarray(x), seed))(jnp.arange(times))
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded, np.float32)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(np.where(x == 0, 1, x)))) - 7)
    assert (np.abs(rounded - x) < spacing).all()
    np.testing.assert_array_equal(rounded[:, :3], np.tile(x[:3], (times, 1)))
    assert (np.abs(rounded.mean(axis=0) - x) <= 5 * spacing / 2 / np.sqrt(times)).all()
    unequal = [np.mean(rounded[0] != rounded[1]), np.mean(rounded[:, 10] != rounded[0, 10])]
    assert min(unequal) > 0.05  # neither the same for all updates nor for all places


def test_what_is_not_finite_stays():
    x = jnp.asarray([np.inf, -np.inf, np.nan], jnp.float32)
    np.testing.assert_array_equal(np.asarray(stochastic_round(x, 1), np.float32), x)


def test_small_updates_count_in_bfloat16():
    def moved(optimizer, dtype):
        params = {"lm_head": jnp.ones((64, 64), dtype)}

        def step(state, number):
            params, opt_state = state
            gradients = {"lm_head": jnp.full((64, 64), 0.1 + 0.001 * number)}
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        start = params, optimizer.init(params)
        (params, state), _ = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(400)))(start)
        assert {optax.tree.get(state, name)["lm_head"].dtype for name in ("mu", "nu")} == {jnp.dtype(dtype)}
        second = optax.tree.get(state, "nu")["lm_head"].astype(jnp.float32).mean()
        return float(1 - params["lm_head"].astype(jnp.float32).mean()), float(second)

    exact = moved(make_optimizer(lambda step: 1e-5, 0.0, 0.0), jnp.float32)
    at_random = moved(make_optimizer(lambda step: 1e-5, 0.0, 0.0, "bfloat16"), jnp.bfloat16)
    assert at_random == pytest.approx(exact, rel=0.05)
    assert moved(optax.adamw(1e-5, weight_decay=0.0), jnp.bfloat16)[0] == 0  # to the nearest, it stays


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_in_bfloat16_is_close_to_float32(model, one_device, accumulation):
    halved = decoder.with_params(
        decoder.abstract(model.config, compute=model.compute, heads=model.heads, param_dtype="bfloat16"),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.to_params(model)),
    )
    metrics, _, params = run(halved, mesh_of(data=2, fsdp=2, tensor=2), accumulation, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for ours, theirs in zip(metrics, one_device[0], strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=0.05 if "norm" in key else 0.01), key
