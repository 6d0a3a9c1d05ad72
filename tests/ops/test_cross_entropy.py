"""Chunked cross-entropy against the plain formula, in value and gradient, on one device and on meshes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

from prom_jax.models import decoder
from prom_jax.ops.cross_entropy import CHUNK_COST, CHUNKS, choose_chunk, cross_entropy
from prom_jax.parallel import sharding
from prom_jax.training.methods.prom import PROM
from prom_jax.training.step import make_update
from tests.reference import hf_model, pack, place_params, random_examples, relative_error, to_model

ROWS, LENGTH, HIDDEN, VOCABULARY = 8, 12, 16, 40


def inputs(weights="binary", vocabulary=VOCABULARY):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(ROWS, LENGTH, HIDDEN)).astype(np.float32)
    head = random.normal(size=(vocabulary, HIDDEN)).astype(np.float32)
    labels = random.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    values = {
        "binary": random.random((ROWS, LENGTH)) < 0.5,
        "any": random.random((ROWS, LENGTH)) * (random.random((ROWS, LENGTH)) < 0.7),
        "all": np.ones((ROWS, LENGTH)),
        "none": np.zeros((ROWS, LENGTH)),
    }
    return hidden, head, labels, values[weights].astype(np.float32)


def plain(hidden, head, labels, weights, label_smoothing, softcap=None):
    """Value and gradients by torch."""
    hidden, head = (torch.from_numpy(x).requires_grad_() for x in (hidden, head))
    logits, labels = (hidden @ head.T).flatten(0, 1), torch.from_numpy(labels).long().ravel()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    loss = (losses * torch.from_numpy(weights).ravel()).sum()
    loss.backward()
    return loss.item(), (hidden.grad.numpy(), head.grad.numpy())


@functools.partial(jax.jit, static_argnames=("label_smoothing", "chunk", "softcap"))
def chunked(hidden, head, labels, weights, label_smoothing, chunk, softcap=None):
    """Value where no gradient is asked for; value and gradients."""
    loss = lambda hidden, head: cross_entropy(hidden, head, labels, weights, label_smoothing, chunk, softcap)
    return loss(hidden, head), jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)


def assert_same(ours, theirs, tolerance=2e-6):
    value, (loss, tree) = ours
    assert relative_error(loss, theirs[0]) <= tolerance
    assert relative_error(value, loss) <= 2e-6
    for gradients in zip(tree, theirs[1], strict=True):
        assert relative_error(*gradients) <= tolerance


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [16, 7, 1000])  # 96 tokens: divides them, does not, exceeds them
def test_chunked_equals_plain(label_smoothing, chunk):
    for weights in ("binary", "any", "all"):
        arrays = inputs(weights)
        assert_same(chunked(*arrays, label_smoothing, chunk), plain(*arrays, label_smoothing))
    assert not any(np.any(x) for x in jax.tree.leaves(chunked(*inputs("none"), label_smoothing, chunk)))


@pytest.mark.parametrize("softcap", [2.0, 30.0])  # which bends most logits, and hardly any
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_soft_capped_logits(label_smoothing, softcap):
    for weights in ("binary", "any"):
        arrays = inputs(weights)
        ours = chunked(*arrays, label_smoothing, 16, softcap)
        assert_same(ours, plain(*arrays, label_smoothing, softcap))


def test_a_vocabulary_that_has_no_parts():
    arrays = inputs(vocabulary=41)
    assert_same(chunked(*arrays, 0.1, 16), plain(*arrays, 0.1))


def test_scaled_loss_scales_the_gradient():
    hidden, head, labels, weights = map(jnp.asarray, inputs())
    loss = lambda hidden, head: cross_entropy(hidden, head, labels, weights, 0.1, 16) / 3
    _, gradients = plain(*inputs(), 0.1)
    for ours, theirs in zip(jax.grad(loss, argnums=(0, 1))(hidden, head), gradients):
        assert relative_error(ours, theirs / 3) <= 2e-6


def test_bfloat16_is_close():
    hidden, head, labels, weights = inputs()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    ours = chunked(hidden, head, labels, weights, 0.1, 16)
    assert [x.dtype for x in jax.tree.leaves(ours)] == [jnp.float32] * 2 + [jnp.bfloat16, jnp.float32]
    assert_same(ours, plain(np.asarray(hidden, np.float32), head, labels, weights, 0.1), tolerance=0.02)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 8}]
)
def test_meshes_equal_one_device(sizes):
    mesh = sharding.make_mesh(**sizes)
    for kind in ("any", "none"):
        hidden, head, labels, weights = arrays = inputs(kind)
        weights[:3] = 0  # shards with nothing to do, others with more or less
        hidden, labels, weights = sharding.place_rows(mesh, (hidden, labels, weights))
        head = jax.device_put(head, sharding.param_sharding(mesh, ("tensor", "fsdp"), head.shape))
        with jax.set_mesh(mesh):
            ours = chunked(hidden, head, labels, weights, 0.1, 5)
        if kind == "any":
            assert_same(ours, plain(*arrays, 0.1))
        else:
            assert not any(np.any(x) for x in jax.tree.leaves(ours))


def test_a_shard_computes_its_own_rows_alone():
    mesh = sharding.make_mesh(fsdp=8)
    hidden, head, labels, weights = inputs()
    rows = sharding.place_rows(mesh, (hidden, labels, weights))
    with jax.set_mesh(mesh):
        program = chunked.lower(rows[0], head, *rows[1:], 0.0, ROWS * LENGTH).compile().as_text()
    logits = lambda tokens: f"f32[{tokens},{VOCABULARY}]"
    assert logits(LENGTH) in program
    assert logits(ROWS * LENGTH) not in program


# Memory: 512 tokens, and a vocabulary whose size, or half of it on a tensor axis, is no other dimension's.

VOCAB, TOKENS, CHUNK = 1018, 512, 32


def buffers(step, tied=False, **sizes):
    """Of the compiled step of a whole model: the most rows of vocabulary size in any array of the optimised
    program (of one device), and the largest array's share of the [tokens, vocabulary] that the device has."""
    hf = hf_model("llama2", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=tied)
    head = next(hf.model.embed_tokens.parameters())
    model = to_model(hf, pivot_layer=1, pivot_head=head, remat="full")
    rows = pack(random_examples(0, [32] * 16, VOCAB), [[i] for i in range(16)], 32)
    optimizer = optax.adamw(1e-3)
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        params = place_params(mesh, decoder.to_params(model), model.config)
        batch = sharding.place_rows(mesh, {"target": rows, "english": rows})
        arguments = params, optimizer.init(params), batch
        program = jax.jit(step(model, optimizer)).lower(*arguments).compile().as_text()
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", program)}
    vocabulary = VOCAB // mesh.shape["tensor"]
    limit = TOKENS // sharding.num_batch_shards(mesh) * vocabulary
    widest = max(math.prod(s) // v for s in shapes for v in (VOCAB, vocabulary) if v in s)
    return widest, max(map(math.prod, shapes)) / limit


@pytest.mark.parametrize(
    ("sizes", "tied"), [({"fsdp": 1}, False), ({"data": 2, "fsdp": 2, "tensor": 2}, True)]
)
def test_no_buffer_of_tokens_by_vocabulary(sizes, tied):
    prom = lambda model, optimizer: make_update(
        model, PROM(layer=1), optimizer, 1, chunks={"target": CHUNK, "english": CHUNK}
    )
    widest, share = buffers(prom, tied, **sizes)
    assert widest == 32  # the tokens of a chunk, or the columns of a head's matrix
    assert share < 1


def test_the_plain_formula_has_such_a_buffer():
    def plain_step(model, optimizer):
        def loss(params, rows):
            logits = decoder.with_params(model, params)(rows["tokens"], rows["positions"], rows["segments"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["labels"])
            return (losses * rows["weights"]).sum()

        return lambda params, opt_state, batch: jax.grad(loss)(params, batch["target"])

    widest, share = buffers(plain_step, fsdp=1)
    assert widest == TOKENS
    assert share >= 1


@pytest.mark.parametrize("numbers", [[47, 40, 52], [578, 437, 600], [1024] * 3, [0, 0], [2000, 10, 10, 10]])
def test_the_chunk_is_the_cheapest_for_the_plans_loss_tokens(numbers):
    def cost(chunk):
        return sum(max(1, math.ceil(number / chunk)) * (chunk + CHUNK_COST) for number in numbers)

    assert choose_chunk(numbers, 2048) == min(CHUNKS, key=cost)
    assert choose_chunk(numbers, 40) == 40  # a shard has no more


def test_few_loss_tokens_take_a_small_chunk_and_many_a_large_one():
    assert choose_chunk([47, 40, 52], 2048) == 64
    assert choose_chunk([900, 1000, 1024], 1024) >= 512
