"""The decoder against transformers: every layer, logits, exits, caches, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import prom_jax
from prom_jax.evaluation.decode import greedy
from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.models.blocks import REMAT, Compute
from prom_jax.models.config import LayerKind, RopeScaling
from prom_jax.models.inputs import Exit, Rows
from prom_jax.parallel import sharding
from prom_jax.training.methods.bactrian import Bactrian
from prom_jax.utils.errors import UserError
from tests.reference import (
    FAMILIES,
    SIZES,
    generate,
    gradients,
    hf_model,
    pack,
    place_params,
    random_examples,
    relative_error,
    relative_errors,
    short_window,
    to_model,
)

MAX_ERROR, MAX_TOKEN_ERROR = 1e-4, 2e-4
LENGTH = 600  # short prompts hide a wrong rotary embedding
NEW = 12
# The last one is far longer than the short windows.
PROMPTS = [np.random.default_rng(length).integers(0, 199, length).tolist() for length in (5, 70)]


def tokens_of(hf):
    return np.random.default_rng(1).integers(0, hf.config.vocab_size, (1, LENGTH))


def hf_forward(hf, tokens):
    """Logits, and hidden states by hooks: transformers' own last one is already normed."""
    states = []

    def keep_input(module, inputs):
        states.append(inputs[0])

    def keep_output(module, inputs, output):
        states.append(output[0] if type(output) is tuple else output)

    hooks = [hf.model.layers[0].register_forward_pre_hook(keep_input)]
    hooks += [layer.register_forward_hook(keep_output) for layer in hf.model.layers]
    with torch.no_grad():
        logits = hf(torch.from_numpy(tokens)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return np.stack(states), logits


def worst_errors(ours, theirs):
    """Of any layer: the error of an element, relative to the layer's largest, and of a token, in L2."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    token_error = (np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max()
    return max(relative_error(*layer) for layer in zip(ours, theirs, strict=True)), token_error


def assert_parity(name, model, hf, tokens):
    states, logits = hf_forward(hf, tokens)
    pairs = {"states": (model.hidden_states(tokens), states), "logits": (model(tokens)[None], logits[None])}
    errors = {what: worst_errors(*pair) for what, pair in pairs.items()}
    told = ", ".join(f"{what} {element:.1e} / {token:.1e}" for what, (element, token) in errors.items())
    print(f"{name}: {told} (element / token)")
    for error, token_error in errors.values():
        assert error <= MAX_ERROR
        assert token_error <= MAX_TOKEN_ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_transformers(family):
    hf = hf_model(family)
    tokens = tokens_of(hf)
    one_stack, two_stacks = to_model(hf), to_model(hf, pivot_layer=3)
    assert_parity(family, one_stack, hf, tokens)
    error, _ = worst_errors(two_stacks.hidden_states(tokens), one_stack.hidden_states(tokens))
    assert error <= MAX_ERROR / 10


def changed(config, window=None, theta=None, scaling=None, **fields):
    """A config with other fields, or with layers in which what is given of these is another where they have
    one."""

    def change(kind):
        rope = kind.rope
        if rope and theta:
            rope = dataclasses.replace(rope, theta=theta)
        if rope and scaling:
            rope = dataclasses.replace(rope, scaling=scaling)
        return LayerKind(window if kind.window and window else kind.window, rope)

    return dataclasses.replace(config, layers=tuple(map(change, config.layers)), **fields)


@pytest.mark.parametrize(
    ("family", "bug"),
    [
        ("llama2", {"rms_norm_eps": 1e-6}),
        ("llama2", {"theta": 10010.0}),
        ("llama3", {"scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 65)}),
        ("linear", {"scaling": RopeScaling("linear", 4.004)}),
        ("mistral", {"window": 127}),
        ("qwen2 with windows", {"window": 99}),
        ("olmo2", {"rms_norm_eps": 1.1e-5}),
        ("gemma2", {"window": 101}),
        ("gemma2", {"attention_softcap": 5.02}),
        ("gemma2", {"attention_scale": 24.1**-0.5}),
        ("gemma2", {"embedding_scale": 8.01}),
        ("gemma3", {"window": 101}),
        ("gemma3", {"attention_scale": 24.1**-0.5}),
        ("granite", {"residual_scale": 0.221}),
        ("granite", {"attention_scale": 0.201}),
    ],
)
def test_the_tolerance_catches_a_small_bug(family, bug):
    hf = hf_model(family)
    config = changed(config_from_hf(hf.config.to_dict()), **bug)
    tokens = tokens_of(hf)
    ours = to_model(hf, config=config).hidden_states(tokens)
    error, token_error = worst_errors(ours, hf_forward(hf, tokens)[0])
    assert error > 5 * MAX_ERROR
    assert token_error > 5 * MAX_TOKEN_ERROR


@pytest.mark.parametrize(
    "changes", [{"theta": 1.01e4}, {"theta": 1.1e6}, {"scaling": RopeScaling("linear", 8.1)}]
)
def test_each_kind_of_layer_has_its_own_angles(changes):
    """A small bug in those of one kind alone."""
    hf = hf_model("gemma3")
    config, tokens = config_from_hf(hf.config.to_dict()), tokens_of(hf)
    local = changes.get("theta", 1e6) < 1e5

    def change(kind):
        affected = (kind.window is not None) == local
        return dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, **changes)) if affected else kind

    assert len(config.ropes) == len(config.windows) == 2
    wrong = dataclasses.replace(config, layers=tuple(map(change, config.layers)))
    ours = to_model(hf, config=wrong).hidden_states(tokens)
    error, token_error = worst_errors(ours, hf_forward(hf, tokens)[0])
    assert error > 5 * MAX_ERROR
    assert token_error > 5 * MAX_TOKEN_ERROR


@pytest.mark.parametrize(
    ("family", "bug"), [("gemma2", {"logit_softcap": 1.1}), ("granite", {"logit_scale": 1 / 6.01})]
)
def test_the_tolerance_catches_a_small_bug_of_logits(family, bug):
    hf = hf_model(family)
    tokens = tokens_of(hf)
    ours = to_model(hf, config=changed(config_from_hf(hf.config.to_dict()), **bug))(tokens)
    error, token_error = worst_errors(ours, hf_forward(hf, tokens)[1])
    assert error > 5 * MAX_ERROR
    assert token_error > 5 * MAX_TOKEN_ERROR


def test_a_layer_without_positions_has_none():
    hf = hf_model("smollm3")
    config = config_from_hf(hf.config.to_dict())
    first, second = config.layers[:2]
    assert [kind.rope for kind in config.layers] == 2 * [first.rope, None]
    model = to_model(hf, config=dataclasses.replace(config, layers=(*config.layers[:3], first)))
    states = model.hidden_states(tokens_of(hf))
    assert worst_errors(states, hf_forward(hf, tokens_of(hf))[0])[0] > 100 * MAX_ERROR
    # Where no layer has any, only the order of positions counts.
    model = to_model(hf, config=dataclasses.replace(config, layers=4 * (second,)))
    tokens = tokens_of(hf)[:, :8]
    np.testing.assert_array_equal(model(tokens), model(tokens, 3 * np.arange(8)[None]))


def test_exits_are_hidden_states():
    hf = hf_model("llama3")
    model, tokens = to_model(hf, pivot_layer=3), tokens_of(hf)
    states = model.hidden_states(tokens)
    assert states.shape == (5, 1, LENGTH, 64)
    np.testing.assert_array_equal(model.hidden_states(tokens, layers=(4, 0)), states[np.array([4, 0])])
    np.testing.assert_array_equal(states[0], model.embed_tokens[...][tokens])
    assert relative_error(model.logits(states[4]), model(tokens)) < 1e-6
    # With another batch.
    for exits, expected in (
        ([Exit(3)], [states[3]]),
        ([Exit(3), Exit()], states[3:]),
        ([Exit(stop=500), Exit(3, start=500)], [states[4][:, :500], states[3][:, 500:]]),
    ):
        rows = Rows(jnp.asarray(tokens), exits=tuple(exits))
        other = Rows(jnp.asarray(tokens[:, :64]))
        (of_other,), of_rows = _forward(model, other, rows).states
        assert relative_error(of_other, states[4][:, :64]) < 1e-5
        for ours, theirs in zip(of_rows, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5


@jax.jit
def _forward(model, *batches):
    return model.forward(*batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_transformers(family):
    hf = hf_model(family, **short_window(family))
    assert greedy(to_model(hf, 3), PROMPTS, NEW, []) == [generate(hf, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["qwen3 with biases", "olmo2", "gemma2", "gemma3"])
def test_a_mesh_changes_nothing(family):
    """Norms over what is divided among devices, biases, and windows by layer."""
    model = to_model(hf_model(family, **short_window(family)))
    batch = {"target": pack(random_examples(0, [60, 50, 40, 64]), [[0], [1], [2], [3]], 64)}
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = decoder.with_params(model, place_params(mesh, decoder.to_params(model), model.config))
    (losses, alone) = gradients(model, Bactrian(), batch)
    with jax.set_mesh(mesh):
        metrics, ours = gradients(spread, Bactrian(), sharding.place_rows(mesh, batch))
    assert metrics["loss"] == pytest.approx(float(losses["loss"]), rel=1e-5)
    assert max(relative_errors(ours, alone).values()) < 1e-4


@pytest.mark.parametrize("family", ["smollm2", "gemma2"])
def test_remat_changes_nothing(family):
    hf = hf_model(family)
    batch = {"target": pack(random_examples(0, [60, 50]), [[0], [1]], 64)}
    results = {remat: gradients(to_model(hf, remat=remat), Bactrian(), batch) for remat in REMAT}

    def assert_same(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())

    for remat in ("full", "dots"):
        jax.tree.map(assert_same, results[remat], results["none"])


@pytest.mark.parametrize("family", ["llama3", "qwen2", "olmo2", "gemma2", "gemma3", "granite"])
def test_bfloat16_is_as_close_as_in_transformers(family):
    hf = hf_model(family)
    model, tokens = to_model(hf, dtype="bfloat16"), tokens_of(hf)
    exact, logits = hf_forward(hf, tokens)[1], model(tokens)
    assert model.embed(tokens).dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        theirs = hf.bfloat16()(torch.from_numpy(tokens)).logits.float().numpy()
    error, their_error = np.linalg.norm(logits - exact), np.linalg.norm(theirs - exact)
    print(f"{family}: {error / np.linalg.norm(exact):.3f}, theirs {their_error / np.linalg.norm(exact):.3f}")
    assert 0 < error < 1.2 * their_error < 0.2 * np.linalg.norm(exact)


LLAMA2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip


def test_number_of_parameters():
    config = config_from_hf(LLAMA2_7B)
    assert decoder.num_parameters(decoder.abstract(config)) == 6_738_415_616
    with_pivot = decoder.abstract(config, heads={"pivot_head": 24})
    assert decoder.num_parameters(with_pivot) == 6_738_415_616 + 131_072_000


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_all_of_transformers(family):
    hf = hf_model(family)
    model = decoder.abstract(config_from_hf(hf.config.to_dict()), exits=(1, 3))
    assert decoder.num_parameters(model) == sum(p.numel() for p in hf.parameters())


def test_a_layer_that_is_not_there_is_named():
    model = to_model(hf_model("llama2"))
    tokens = np.arange(8)[None]
    assert model.hidden_states(tokens, layers=[4, 0]).shape[0] == 2
    with pytest.raises(UserError, match=r"layers=\(5,\): expected each in 0 to 4"):
        model.hidden_states(tokens, layers=(5,))


def test_exits_and_settings_are_checked():
    settings = {key: SIZES[key] for key in LLAMA2_7B if key in SIZES}
    config = config_from_hf({"model_type": "llama", **settings})
    for layer in (-1, 5):
        for where in ({"exits": [layer]}, {"heads": {"pivot_head": layer}}):
            with pytest.raises(UserError, match=f"exit={layer}: expected 1 to 3"):
                decoder.abstract(config, **where)
    for name in ("dtype", "remat", "attention"):
        with pytest.raises(UserError, match="'other': expected one of"):
            Compute(**{name: "other"})


# A real model.

TEXT = """\
The harbour master kept two notebooks. In the first he wrote the hour of every tide, 04:17, 10:52, 16:39,
and the name of each boat that left with it; in the second, which nobody was allowed to read, he drew the
birds. Gannets fall like folded paper. A cormorant dries its wings as if it were about to conduct an
orchestra.

def area(width: float, height: float) -> float:
    if width < 0 or height < 0:
        raise ValueError(f"negative side: {width} x {height}")
    return width * height

Why does bread rise? Yeast feeds on sugar in the dough and gives off carbon dioxide, which the gluten
traps in small bubbles; at about 60 degrees Celsius the yeast dies, the starch sets, and the bubbles stay
where they are. Salt slows this down. Too much of it, say 5 % of the flour's weight, stops it altogether.

Minutes of the meeting of 3 March: (1) the roof will be mended before winter, at a cost of no more than
$12,400; (2) Ms. Okafor was elected treasurer, 14 votes to 9; (3) nobody could say where the projector
had gone.

| river   | length (km) | mouth            |
|---------|-------------|------------------|
| Danube  | 2,850       | Black Sea        |
| Mekong  | 4,350       | South China Sea  |
| Rufiji  | 600         | Indian Ocean     |

"You never listened," said the younger sister. "I listened," answered the other, "I only disagreed." They
walked on without speaking as far as the mill, where the path divides, and there, without looking back,
each of them took the way that the other had wanted to take.

If x + y = 10 and x - y = 4, then adding the two gives 2x = 14, so x = 7 and y = 3. Check: 7 * 3 = 21.

Der Zug hat heute zwanzig Minuten Verspätung. Je voudrais un café, s'il vous plaît. Habari za asubuhi?
Nzuri.

A glacier is not a block of ice but a very slow river. It picks up gravel, grinds the rock beneath it to
flour, and turns the lakes below a milky blue. When it melts it leaves its luggage behind in long low
hills; a farmer who curses the stones in his field is complaining, ten thousand years late, about the
weather.

To install the shelf you need four screws, a level and some patience. Hold the rail against the wall,
mark the holes with a pencil, drill 40 mm deep, and push in the plugs. Do not hang anything on it before
the glue is dry! The orchestra tuned; the lights went down; somewhere in the third row a telephone began
to ring, and the conductor, who had waited eleven years for this evening, lowered his arms and laughed.
"""


@pytest.mark.slow
def test_smollm2_from_gguf_and_from_its_export(smollm2):
    model, tokenizer, folder, hf = smollm2
    assert decoder.num_parameters(model) == 134_515_008
    tokens = np.array([tokenizer(TEXT)["input_ids"][:LENGTH]])
    assert tokens.shape == (1, LENGTH)
    assert_parity("smollm2", model, hf, tokens)
    assert_parity("its export", prom_jax.load(folder)[0], hf, tokens)

    prompts = [tokens[0, :40].tolist(), tokenizer("The capital of Kenya is")["input_ids"], tokens[0].tolist()]
    ours = greedy(model, prompts, 32, [])
    for prompt, new in zip(prompts, ours):
        theirs = hf.generate(
            torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert tokenizer.decode(new) == tokenizer.decode(theirs[0, len(prompt) :])
