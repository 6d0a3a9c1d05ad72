"""The masking rule: packed examples, sliding windows, padding; and attention against its formula."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from prom_jax.ops.attention import (
    TOKAMAX_BLOCK,
    PackedMask,
    attention,
    attention_mask,
    packed_masks,
    resolve,
    segment_id,
    supports_shared_prefixes,
)
from prom_jax.ops.attention_cpu import BLOCK
from prom_jax.parallel.sharding import make_mesh
from tests.reference import hf_model, pack, random_examples, to_model


def softmax_attention(q, k, v, mask, softcap=None):
    """The formula, a query at a time."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, t])
        head = h // (q.shape[2] // k.shape[2])
        scores = k[b, seen, head] @ q[b, t, h] / np.sqrt(q.shape[3])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores)
        out[b, t, h] = weights / weights.sum() @ v[b, seen, head]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend, softcap", [("xla", None), ("blocks", None), ("xla", 0.5), ("blocks", 0.5)])
def test_against_the_formula(kv_heads, window, backend, softcap):
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 9, 6, 8))
    k, v = random.normal(size=(2, 2, 9, kv_heads, 8))
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3], range(9)])
    segments = np.array([[1] * 5 + [2] * 4, [1] * 9])
    mask = attention_mask(positions, positions, segments, segments, window)
    for b, t, s in np.ndindex(2, 9, 9):
        near = window is None or t - s < window
        assert mask[b, 0, t, s] == (segments[b, t] == segments[b, s] and s <= t and near)
    qkv = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out = attention(*qkv, mask, backend, softcap=softcap)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, mask, softcap), rtol=1e-5, atol=1e-6)


def test_a_segment_sees_what_it_continues():
    paths = [
        (0, 0, 0),
        (1,),
        (2,),
        (1, 1),
        (1, 2),
        (1, 1, 1),
        (1, 1, 2),
        (1, 2, 1),
        (2, 0, 1),
        (0, 0, 1),
        (0, 3),
    ]
    segments = np.array([[segment_id(*path) for path in paths]])
    positions = np.zeros_like(segments)
    mask = attention_mask(positions, positions, segments, segments)[0, 0]
    levels = [(*path, 0, 0)[:3] for path in paths]
    for q, k in itertools.product(range(len(paths)), repeat=2):
        named = [
            (own, other) for own, other in zip(levels[q], levels[k]) if other
        ]  # levels of the key's path
        deeper = levels[k][2] == 0 and (levels[k][1] == 0 or levels[k][0] == levels[q][0])
        continued = q == k or (k != 0 and deeper and all(own == other for own, other in named))
        assert mask[q, k] == continued, (paths[q], paths[k])
    assert segment_id(0, 0, 7) == 7
    assert supports_shared_prefixes("blocks") and not supports_shared_prefixes("splash")


def packed_segments(rows, length):
    """Rows with examples of many lengths, and padding."""
    segments = np.sort(np.random.default_rng(1).integers(1, 6, (rows, length)), axis=1)
    segments[:, length - length // 5 :] = 0
    return segments.astype(np.int32)


def packed_rows(rows, length, window=None, heads=4, kv_heads=2):
    """Queries, keys and values of such rows, their mask, and weights of the outputs that are 0 where padding
    is."""
    random = np.random.default_rng(0)
    q = random.normal(size=(rows, length, heads, 16)).astype(np.float32)
    k, v = random.normal(size=(2, rows, length, kv_heads, 16)).astype(np.float32)
    segments = packed_segments(rows, length)
    positions = np.broadcast_to(np.arange(length), segments.shape)
    mask = attention_mask(positions, positions, segments, segments, window)
    weights = random.normal(size=q.shape).astype(np.float32) * (segments > 0)[..., None, None]
    return (q, k, v), mask, weights


def value_and_gradients(qkv, mask, weights, backend, softcap=None):
    """Of `attention`, or of `backend` where that is a function."""

    def weighted(*qkv):
        given = {"softcap": softcap} if callable(backend) else {"backend": backend, "softcap": softcap}
        out = (backend if callable(backend) else attention)(*qkv, mask, **given)
        return (out * weights).sum(), out * (weights != 0)

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients


@pytest.mark.parametrize(
    "rows, length, window",
    [(1, 7, None), (2, 3 * BLOCK - 8, None), (3, 3 * BLOCK + 1, 40), (2, 2 * BLOCK, 1)],
)
@pytest.mark.parametrize("backend", ["blocks", "tokamax"])
def test_blocks_give_the_values_and_gradients_of_whole_scores(backend, rows, length, window):
    arguments = packed_rows(rows, length, window)
    for ours, theirs in zip(value_and_gradients(*arguments, backend), value_and_gradients(*arguments, "xla")):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, rows", [((8, 1, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 3), ((4, 2, 1), 1)])
def test_blocks_on_a_mesh(shape, rows):
    arguments = packed_rows(rows, 100)
    expected = value_and_gradients(*arguments, "blocks")
    with jax.set_mesh(make_mesh(*shape)):
        for ours, alone in zip(value_and_gradients(*arguments, "blocks"), expected):
            np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)


def test_blocks_that_nobody_sees_are_skipped():
    (q, k, v), mask, weights = packed_rows(2, 4 * BLOCK)
    mask[..., 2 * BLOCK :] = False
    hidden = [np.concatenate([x[:, : 2 * BLOCK], np.nan * x[:, 2 * BLOCK :]], axis=1) for x in (k, v)]
    expected = value_and_gradients((q, k, v), mask, weights, "blocks")
    for ours, theirs in zip(value_and_gradients((q, *hidden), mask, weights, "blocks"), expected):
        np.testing.assert_array_equal(ours, theirs)  # what is hidden was never read


def mask_of_rows(backend, segments, window=None):
    """What a kernel takes of packed rows."""
    positions = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    return packed_masks(positions, segments, [window], backend).of(0)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("backend", ["splash", "tokamax"])  # of tokamax what it has for any machine
def test_kernels_give_the_values_and_gradients_of_whole_scores(interpreted, backend, shape, window):
    qkv, mask, weights = packed_rows(4, 256, window)
    expected = value_and_gradients(qkv, mask, weights, "xla")
    seen = mask_of_rows(backend, packed_segments(4, 256), window)
    with jax.set_mesh(make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])):
        for ours, theirs in zip(value_and_gradients(qkv, seen, weights, backend), expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def whole_scores(q, k, v, mask, softcap):
    """The formula, with all scores at once."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = softcap * jnp.tanh(scores / softcap)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)


@pytest.mark.parametrize("softcap", [0.7, 50.0])  # which bends most scores, and hardly any
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("backend", ["xla", "blocks", "splash", "tokamax"])
def test_soft_capped_scores(interpreted, backend, window, softcap):
    qkv, mask, weights = packed_rows(2, 256, window)
    expected = value_and_gradients(qkv, mask, weights, whole_scores, softcap)
    mask = mask_of_rows(backend, packed_segments(2, 256), window)
    for ours, theirs in zip(value_and_gradients(qkv, mask, weights, backend, softcap), expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("backend", ["xla", "blocks", "tokamax"])
def test_a_layer_of_a_cache(backend, softcap):
    """Few queries, and keys and values of several layers, of which one is read."""
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 3, 4, 16)).astype(np.float32)
    k, v = random.normal(size=(2, 3, 2, 2, 300, 16)).astype(np.float32)  # [N, B, K, S, D] each
    mask = random.random((2, 1, 3, 300)) < 0.2
    out = attention(q, k, v, mask, backend, layer=jnp.int32(1), softcap=softcap)
    expected = softmax_attention(q, k[1].swapaxes(1, 2), v[1].swapaxes(1, 2), mask, softcap)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parsed", [False, True])
def test_tokamax_leaves_flags_as_they_were(monkeypatch, parsed):
    """And reads no arguments: those of a program that does not use absl would be refused."""
    monkeypatch.setitem(flags.FLAGS.__dict__, "__flags_parsed", parsed)
    monkeypatch.setattr("sys.argv", ["program", "--a_flag_of_its_own=1"])
    qkv, mask, weights = packed_rows(1, 128 + parsed)  # of a shape of its own, so that it is traced
    value_and_gradients(qkv, mask, weights, "tokamax")
    assert flags.FLAGS.is_parsed() == parsed


def assert_keeps_examples_apart(backend, dtype):
    segments = packed_segments(1, 256)
    qkv = [jnp.asarray(x, dtype) for x in packed_rows(1, 256)[0]]
    second = segments[0] == 2
    seen = mask_of_rows(backend, segments)

    def of_second(*qkv):
        out = attention(*qkv, seen, backend)
        return (out.astype(jnp.float32)[:, second] ** 2).sum(), out

    run = jax.jit(jax.value_and_grad(of_second, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(*qkv)
    (_, changed), gradients_of_changed = run(*(jnp.where(second[None, :, None, None], x, x + 1) for x in qkv))
    for before, after in zip((out, *gradients), (changed, *gradients_of_changed)):
        np.testing.assert_array_equal(after[:, second], before[:, second])
    assert (changed[:, ~second] != out[:, ~second]).any()
    assert all((gradient[:, ~second] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["xla", "blocks", "splash", "tokamax"])
def test_examples_are_kept_apart(interpreted, backend):
    assert_keeps_examples_apart(backend, jnp.float32)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="for a GPU, with JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("backend", ["xla", "cudnn", "tokamax"])
@pytest.mark.parametrize("window", [None, 40])
def test_on_a_gpu(backend, window):
    assert_keeps_examples_apart(backend, jnp.bfloat16)
    qkv, mask, weights = packed_rows(4, 256, window)
    exact = value_and_gradients(qkv, mask, weights, "xla")
    rounded = value_and_gradients([jnp.asarray(x, jnp.bfloat16) for x in qkv], mask, weights, backend)
    for ours, theirs in zip(rounded, exact):
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 0.01 * np.linalg.norm(theirs)


@pytest.mark.parametrize("queries, keys", [(512, 512), (336, 1360), (57, 57)])
@pytest.mark.parametrize("dtype, kernel", [("bfloat16", "mosaic_gpu"), ("float32", "triton")])
def test_tokamax_computes_with_its_kernels_on_a_gpu(hopper, queries, keys, dtype, kernel):
    """Lowered, not run: of both directions, none of which holds a row's scores."""
    shape = lambda length, heads: jax.ShapeDtypeStruct((2, length, heads, 64), dtype)
    mask = jax.ShapeDtypeStruct((2, 1, queries, keys), bool)
    loss = lambda q, k, v, mask: attention(q, k, v, mask, "tokamax").astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    traced = gradient.trace(shape(queries, 4), shape(keys, 2), shape(keys, 2), mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @\S*(mosaic_gpu|triton)", text)
    assert set(calls) == {kernel} and len(calls) >= 2
    whole = [-(-length // TOKAMAX_BLOCK) * TOKAMAX_BLOCK for length in (queries, keys)]
    assert f"{whole[0]}x{whole[1]}xi1" in text and f"{whole[0]}x{whole[1]}xf32" not in text


@pytest.mark.parametrize(
    "platform, installed, backend",
    [
        ("cpu", True, "blocks"),
        ("tpu", True, "splash"),
        ("gpu", True, "tokamax"),
        ("gpu", False, "xla"),
        ("METAL", True, "xla"),
    ],
)
def test_auto(monkeypatch, platform, installed, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr("prom_jax.ops.attention.has_tokamax", lambda: installed)
    assert resolve("auto") == backend and resolve("cudnn") == "cudnn"


def test_rows_that_splash_cannot_take_get_a_mask():
    positions = np.broadcast_to(np.arange(100), (2, 100))
    mask = packed_masks(positions, packed_segments(2, 100), [None], "splash").of(0)
    assert mask.shape == (2, 1, 100, 100)
    mask = packed_masks(positions, packed_segments(2, 128), [None], "splash").of(0)
    assert isinstance(mask, PackedMask)


def test_blocks_in_bfloat16_keep_sums_in_float32():
    (q, k, v), mask, weights = packed_rows(1, 5 * BLOCK)
    exact = value_and_gradients((q, k, v), mask, weights, "xla")
    rounded = value_and_gradients([jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)], mask, weights, "blocks")
    for ours, theirs in zip(rounded, exact):
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 0.01 * np.linalg.norm(theirs)


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
    (window,) = model.config.windows
    reach = 10 + 4 * (window - 1) if window else 39  # four layers, each carries it window - 1 places on
    assert moved.tolist() == [10 <= place <= reach for place in range(40)]


def test_padding_is_finite(model):
    rows = pack(random_examples(0, [20]), [[0], []], 32)  # a half empty row and an empty one
    assert np.isfinite(forward(model, rows)).all()


@pytest.mark.parametrize("backend", ["xla", "blocks"])
def test_a_query_that_sees_nothing_is_finite_in_value_and_gradient(backend):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 3, 4)).astype(np.float32)
    mask = np.array([[[[False, False], [True, True]]]])
    out, backward = jax.vjp(lambda *qkv: attention(*qkv, mask, backend), q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *backward(jnp.ones_like(out))))
