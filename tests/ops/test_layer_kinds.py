"""A model with layers of two kinds, of a window and a rotary base each, by every attention backend."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.models.blocks import REMAT
from prom_jax.models.config import LayerKind, Rope
from prom_jax.models.decoder import Compute, Rows
from prom_jax.training.methods.prom import PROM
from tests.reference import hf_model, pack, random_examples, relative_error, relative_errors, to_model

LOCAL, GLOBAL = LayerKind(5, Rope(100.0)), LayerKind(None, Rope(1e6))
LAYERS = (LOCAL, LOCAL, GLOBAL, LOCAL)
PIVOT = 3
METHOD = PROM(PIVOT, weight=0.7)
BACKENDS = (
    "xla",
    "blocks",
    "splash",
    "tokamax",
)  # splash interpreted; of tokamax what it has for any machine
LENGTH = 128  # of a row: a block of splash
EXAMPLES = random_examples(0, [50, 40, 30, 90, 20])
ROWS = pack(EXAMPLES, [[0, 1, 2], [3, 4]], LENGTH)
BATCH = {"target": ROWS, "english": pack(EXAMPLES[2:], [[0, 1], [2]], LENGTH)}


@pytest.fixture(scope="module")
def hf():
    return hf_model("llama2", num_key_value_heads=2, head_dim=16)


def mixed(config, layers=LAYERS, **changes):
    return dataclasses.replace(config, layers=layers, num_hidden_layers=len(layers), **changes)


def model_of(hf, **compute):
    config = mixed(config_from_hf(hf.config.to_dict()))
    return to_model(hf, PIVOT, hf.lm_head.weight, config, **compute)


def plain_states(hf, rows):
    """Hidden states after each layer in float64, layer by layer by the formulas, [N, B, T, D]."""
    weights = {name: x.detach().double().numpy() for name, x in hf.named_parameters()}
    tokens, positions, segments = (np.asarray(rows[name]) for name in ("tokens", "positions", "segments"))
    distance = positions[:, :, None] - positions[:, None, :]
    same = segments[:, :, None] == segments[:, None, :]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + hf.config.rms_norm_eps) * weights[name]

    def turned(x_BTHD, theta):
        half = x_BTHD.shape[-1] // 2
        angles = positions[..., None] * theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
        low, high = x_BTHD[..., :half], x_BTHD[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    x, states = weights["model.embed_tokens.weight"][tokens], []
    for number, kind in enumerate(LAYERS):
        layer = f"model.layers.{number}."
        project = lambda h, name, layer=layer: h @ weights[f"{layer}{name}_proj.weight"].T
        h = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (project(h, f"self_attn.{name}").reshape(*tokens.shape, -1, 16) for name in "qkv")
        q, k = turned(q, kind.rope.theta), turned(k, kind.rope.theta)
        k, v = (np.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
        mask = same & (distance >= 0) & (distance < (kind.window or LENGTH))
        scores = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(16)) * mask[:, None]
        h = np.einsum("bhts,bshd->bthd", scores / scores.sum(-1, keepdims=True), v)
        x = x + project(h.reshape(*tokens.shape, -1), "self_attn.o")
        h = norm(x, f"{layer}post_attention_layernorm.weight")
        gate = project(h, "mlp.gate")
        x = x + project(gate / (1 + np.exp(-gate)) * project(h, "mlp.up"), "mlp.down")
        states.append(x)
    return np.stack(states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_are_those_of_the_plain_formula(interpreted, hf, backend):
    ours = model_of(hf, attention=backend).hidden_states(
        *(ROWS[k] for k in ("tokens", "positions", "segments"))
    )
    real = np.asarray(ROWS["segments"]) > 0
    for state, theirs in zip(ours[1:], plain_states(hf, ROWS), strict=True):
        assert relative_error(state[real], theirs[real]) <= 1e-5


def test_the_kinds_matter(hf):
    """What the test above would not see if all layers were of one kind."""
    expected, real = plain_states(hf, ROWS), np.asarray(ROWS["segments"]) > 0
    config = config_from_hf(hf.config.to_dict())
    for layers in ((LOCAL,) * 4, (GLOBAL,) * 4, LAYERS[::-1],
                   tuple(dataclasses.replace(kind, rope=LOCAL.rope) for kind in LAYERS),
                   tuple(dataclasses.replace(kind, window=LOCAL.window) for kind in LAYERS)):  # fmt: skip
        other = to_model(hf, PIVOT, config=mixed(config, layers))
        states = other.hidden_states(*(ROWS[name] for name in ("tokens", "positions", "segments")))
        assert relative_error(states[4][real], expected[3][real]) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_examples_are_kept_apart(interpreted, hf, backend):
    model = model_of(hf, attention=backend)
    second = np.asarray(ROWS["segments"][0]) == 2
    changed = dict(ROWS, tokens=jnp.where(second, ROWS["tokens"], (ROWS["tokens"] + 1) % 199))
    before, after = (
        np.asarray(model(rows["tokens"], rows["positions"], rows["segments"])) for rows in (ROWS, changed)
    )
    np.testing.assert_array_equal(after[0, second], before[0, second])
    assert (after[0, ~second] != before[0, ~second]).any(axis=-1).all()


def losses(model, params):
    return sum(
        METHOD.sums(decoder.with_params(model, params), BATCH, chunks=dict.fromkeys(BATCH, 64)).values()
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_are_those_of_whole_scores(interpreted, hf, backend):
    def gradients(backend):
        model = model_of(hf, attention=backend)
        params = jax.tree.map(jnp.asarray, decoder.to_params(model))
        return jax.jit(jax.value_and_grad(lambda params: losses(model, params)))(params)

    (ours, of_ours), (theirs, of_theirs) = gradients(backend), gradients("xla")
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert max(relative_errors(of_ours, of_theirs).values()) <= 5e-5


def kept_of_layers(hf, length, **compute):
    """What the backward pass keeps for pairs of columns: shapes with one entry a layer, and without."""
    config = mixed(config_from_hf(hf.config.to_dict()))
    model = to_model(hf, config=config, **compute)  # all blocks in one stack
    # No other dimension is as long as a row, not even of joined products.
    assert max(2 * config.intermediate_size, 2 * config.hidden_size) < length
    rows = pack(EXAMPLES, [[0, 1], [3]], length)

    def backward(params):
        def states(params):
            given = Rows(rows["tokens"], rows["positions"], rows["segments"])
            return decoder.with_params(model, params).forward(given).states

        return jax.vjp(states, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, decoder.to_params(model)))
    pairs = [x.shape for x in kept if x.ndim > 2 and min(x.shape[-2:]) >= length]
    return [shape for shape in pairs if shape[0] == len(LAYERS)], [s for s in pairs if s[0] != len(LAYERS)]


@pytest.mark.parametrize("length", [200, 240])  # a block of queries in 'blocks' divides the second alone
@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mask_is_kept_for_each_layer(hf, backend, remat, length):
    by_layer, masks = kept_of_layers(hf, length, attention=backend, remat=remat)
    assert by_layer == [] and masks == [(2, 2, 1, length, length)]  # of each window, for all layers


@pytest.mark.parametrize("length", [200, 240])
def test_blocks_keep_no_mask_for_each_layer_without_remat(hf, length):
    by_layer, masks = kept_of_layers(hf, length, attention="blocks", remat="none")
    assert by_layer == [] and masks == [(2, 2, 1, length, length)]


@pytest.mark.parametrize("remat", REMAT)
def test_a_tpu_keeps_no_mask_at_all(hf, remat):
    assert kept_of_layers(hf, 256, attention="splash", remat=remat) == ([], [])


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_a_gpu_keeps_no_mask_for_each_layer(hf, hopper, remat):
    by_layer, masks = kept_of_layers(hf, 256, attention="tokamax", remat=remat, dtype="bfloat16")
    assert by_layer == [] and masks == [(2, 2, 1, 256, 256)]


def test_whole_scores_are_kept_without_remat(hf):
    """What the tests above find where there is something to be found."""
    assert kept_of_layers(hf, 200, attention="xla", remat="none")[0]


def gradient_of_mixed(backend, dtype="bfloat16"):
    """The gradient of a mixed model with heads as wide as kernels take them, and shapes of its arguments."""
    sizes = {"hidden_size": 384, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = mixed(config_from_hf(hf_model("llama2").config.to_dict()), **sizes)
    model = decoder.abstract(config, compute=Compute(dtype=dtype, remat="full", attention=backend))

    def loss(params, tokens, positions, segments):
        whole = decoder.with_params(model, params)
        ((states,),) = whole.forward(Rows(tokens, positions, segments)).states
        return states.astype(jnp.float32).sum()

    rows = [jax.ShapeDtypeStruct((2, 256), jnp.int32)] * 3
    return jax.jit(jax.grad(loss)), (decoder.to_params(model), *rows)


def test_a_tpu_has_a_kernel_for_each_kind():
    """Lowered, not run: one of two kernels is chosen as a layer runs, and no mask is made."""
    gradient, arguments = gradient_of_mixed("splash")
    text = gradient.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    programs = re.findall(
        r'@tpu_custom_call\(.*backend_config = "(.*?)".*kernel_name = "(splash_mha_[a-z]+)', text
    )
    of_direction = {name: {program for program, other in programs if other == name} for _, name in programs}
    assert {name: len(different) for name, different in of_direction.items()} == {
        "splash_mha_fwd": 2,
        "splash_mha_dq": 2,
        "splash_mha_dkv": 2,
    }
    assert text.count("stablehlo.case") >= 2  # forward and backward
    assert "256x256xi1" not in text and "256x256xf32" not in text


def test_a_gpu_has_its_kernels_for_both_kinds(hopper, monkeypatch):
    """Lowered, not run: the mask is chosen as a layer runs, and no scores are held. Nor are the arguments of
    the program read as flags, though remat lets tokamax trace some of it late."""
    monkeypatch.setitem(flags.FLAGS.__dict__, "__flags_parsed", False)
    monkeypatch.setattr("sys.argv", ["program", "--a_flag_of_its_own=1"])
    gradient, arguments = gradient_of_mixed("tokamax")
    text = gradient.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert not flags.FLAGS.is_parsed()
    calls = re.findall(r"custom_call @\S*(mosaic_gpu|triton)", text)
    assert set(calls) == {"mosaic_gpu"} and len(calls) >= 2
    assert "2x2x1x256x256xi1" in text  # the masks of both windows, and one of them
    assert re.search(r"dynamic_slice.*2x2x1x256x256xi1.*-> tensor<1x2x1x256x256xi1>", text)
    assert "256x256xf32" not in text
