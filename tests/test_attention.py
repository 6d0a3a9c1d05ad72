"""Who sees whom: packed examples, sliding windows, padding; and attention against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prom_jax.attention import attention, visible
from tests.reference import hf_model, pack, random_examples, to_model


def softmax_attention(q, k, v, mask):
    """The formula, a query at a time."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, t])
        head = h // (q.shape[2] // k.shape[2])
        scores = np.exp(k[b, seen, head] @ q[b, t, h] / np.sqrt(q.shape[3]))
        out[b, t, h] = scores / scores.sum() @ v[b, seen, head]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_against_the_formula(kv_heads, window):
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 9, 6, 8))
    k, v = random.normal(size=(2, 2, 9, kv_heads, 8))
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3], range(9)])
    segments = np.array([[1] * 5 + [2] * 4, [1] * 9])
    mask = visible(positions, positions, segments, segments, window)
    for b, t, s in np.ndindex(2, 9, 9):
        near = window is None or t - s < window
        assert mask[b, 0, t, s] == (segments[b, t] == segments[b, s] and s <= t and near)
    out = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module", params=["smollm2", "mistral"])
def model(request):
    window = {"sliding_window": 5} if request.param == "mistral" else {}
    return to_model(hf_model(request.param, **window), pivot_layer=2)


def forward(model, rows):
    return np.asarray(model(rows["tokens"], rows["positions"], rows["segments"]))


def test_packed_examples_do_not_see_each_other(model):
    examples = random_examples(0, [20, 17, 12])
    rows = pack(examples, [[0, 1, 2]], 56)
    logits = forward(model, rows)
    others = np.r_[0:20, 37:56]  # and the padding
    changed = dict(rows, tokens=rows["tokens"].at[:, others].add(1) % 199)
    logits_of_changed = forward(model, changed)
    np.testing.assert_array_equal(logits_of_changed[:, 20:37], logits[:, 20:37])
    assert (logits_of_changed[:, others] != logits[:, others]).any(axis=-1).all()

    alone = forward(model, pack(examples, [[1]], 17))
    np.testing.assert_allclose(logits[:, 20:37], alone, rtol=1e-4, atol=1e-4)


def test_a_token_sees_the_past_and_no_further_than_its_windows(model):
    tokens = np.random.default_rng(0).integers(0, 199, (1, 40))
    changed = tokens.copy()
    changed[0, 10] = (changed[0, 10] + 1) % 199
    moved = np.asarray(model(tokens) != model(changed)).any(axis=-1)[0]
    window = model.config.sliding_window
    reach = 10 + 4 * (window - 1) if window else 39  # four layers, each carries it window - 1 places on
    assert moved.tolist() == [10 <= place <= reach for place in range(40)]


def test_padding_is_finite(model):
    rows = pack(random_examples(0, [20]), [[0], []], 32)  # a half empty row and an empty one
    assert np.isfinite(forward(model, rows)).all()


def test_a_query_that_sees_nothing_is_finite_in_value_and_gradient():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 3, 4)).astype(np.float32)
    mask = np.array([[[[False, False], [True, True]]]])
    out, backward = jax.vjp(lambda *qkv: attention(*qkv, mask), q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *backward(jnp.ones_like(out))))
