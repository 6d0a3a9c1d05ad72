"""With the switch for CPUs off: the plain formulas give the same, and can be differentiated forward too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prom_jax.models import decoder
from prom_jax.models.blocks import REMAT
from prom_jax.models.inputs import Rows
from prom_jax.ops.cross_entropy import cross_entropy
from prom_jax.ops.linear import linear
from prom_jax.ops.norm import rms_norm
from prom_jax.training.methods.prom import PROM
from tests.reference import hf_model, pack, random_examples, relative_error, relative_errors, to_model

TOLERANCE = 1e-5
METHOD = PROM(layer=1, weight=0.7)
BATCH = {
    "target": pack(random_examples(1, [20, 13, 17]), [[0, 1], [2]], 36),
    "english": pack(random_examples(2, [12, 15]), [[0], [1]], 16),
}


def off():
    return False


def switch_off(patch):
    """Makes every module in `ops` that asks for a CPU believe that there is none."""
    for module in ("norm", "cross_entropy", "linear"):
        patch.setattr(f"prom_jax.ops.{module}.on_cpu", off)


@pytest.fixture
def both(monkeypatch):
    """Calls a function with the switch on and with it off; nothing that it compiles may be its own twice."""

    def call(function, *arguments):
        on = function(*arguments)
        with monkeypatch.context() as patch:
            switch_off(patch)
            return on, function(*arguments)

    return call


def assert_same(on, off):
    for theirs, ours in zip(*map(jax.tree.leaves, (on, off)), strict=True):
        assert ours.dtype == theirs.dtype and relative_error(ours, theirs) <= TOLERANCE


def with_gradients(function, *inputs):
    """The value of a function with one array or several, and the gradients under fixed random weights."""
    out, backward = jax.vjp(function, *inputs)
    random = np.random.default_rng(1)
    return out, backward(jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), out))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm(both, unit_offset):
    random = np.random.default_rng(0)
    x, weight = (random.normal(size=shape).astype(np.float32) for shape in ((3, 5, 64), (64,)))

    def norm(x, weight):
        return rms_norm(x, weight, 1e-5, unit_offset)

    assert_same(*both(with_gradients, norm, x, weight))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy(both, softcap):
    random = np.random.default_rng(0)
    hidden, head = (jnp.asarray(random.normal(size=size)) for size in ((4, 12, 16), (192, 16)))
    labels = jnp.asarray(random.integers(0, 192, (4, 12)))
    weights = jnp.asarray(random.random((4, 12)), jnp.float32)

    def loss(hidden, head):
        return cross_entropy(hidden, head, labels, weights, 0.1, 16, softcap)

    assert_same(*both(with_gradients, loss, hidden, head))


@pytest.mark.parametrize("training", [False, True])
def test_linear(both, training):
    random = np.random.default_rng(0)
    x, *matrices = (
        random.normal(size=shape).astype(np.float32) for shape in ((2, 5, 8), (6, 8), (3, 8), (4, 8))
    )

    def products(x, *matrices):
        return linear(x, matrices, training)

    assert_same(*both(with_gradients, products, x, *matrices))


@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_a_whole_model(both, attention):
    hf = hf_model("llama3", num_hidden_layers=2)
    model = to_model(hf, pivot_layer=1, pivot_head=hf.lm_head.weight, attention=attention)

    def losses():
        def total(params):
            sums = METHOD.sums(decoder.with_params(model, params), BATCH, chunks=dict.fromkeys(BATCH, 16))
            return sum(sums.values()), sums

        return jax.value_and_grad(total, has_aux=True)(decoder.to_params(model))

    (on, gradients_on), (off, gradients_off) = both(losses)
    assert_same(on, off)
    assert max(relative_errors(gradients_off, gradients_on).values()) <= TOLERANCE


def assert_forward_is_backward(function, inputs):
    """The derivative in one direction, forward and by the gradient, of a weighted sum of what a function
    gives."""
    random = np.random.default_rng(3)

    def random_like(x):
        return jnp.asarray(random.normal(size=x.shape), x.dtype)

    def loss(inputs):
        out = function(inputs)
        return jnp.vdot(out, np.random.default_rng(4).normal(size=out.shape))

    def direction(gradient, noise):
        return gradient / optax.global_norm(gradients) + noise / optax.global_norm(noises)

    gradients, noises = jax.grad(loss)(inputs), jax.tree.map(random_like, inputs)
    tangents = jax.tree.map(direction, gradients, noises)  # not at right angles to the gradient
    _, forward = jax.jvp(loss, (inputs,), (tangents,))
    backward = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradients, tangents)))
    assert float(forward) == pytest.approx(float(backward), rel=TOLERANCE)


def test_the_norm_is_differentiated_forward(monkeypatch):
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((3, 5, 64), (64,)))

    def norm(inputs):
        return rms_norm(*inputs, 1e-5)

    with pytest.raises(TypeError, match="custom_vjp"):  # the CPU's remedy has a gradient alone
        assert_forward_is_backward(norm, (x, weight))
    switch_off(monkeypatch)
    assert_forward_is_backward(norm, (x, weight))


@pytest.mark.parametrize("remat", REMAT)
def test_a_model_is_differentiated_forward(monkeypatch, remat):
    switch_off(monkeypatch)
    model = to_model(hf_model("mistral", sliding_window=6), attention="xla", remat=remat)
    rows = BATCH["target"]

    def logits(params):
        whole = decoder.with_params(model, params)
        ((last,),) = whole.forward(Rows(rows["tokens"], rows["positions"], rows["segments"])).states
        return whole.logits(last)

    assert_forward_is_backward(logits, decoder.to_params(model))
