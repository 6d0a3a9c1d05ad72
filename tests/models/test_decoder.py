"""The model against transformers, layer by layer, and its configuration in both directions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import prom_jax
from prom_jax.evaluation.decode import greedy
from prom_jax.models import decoder as llama
from prom_jax.models.config import LlamaConfig, RopeScaling
from prom_jax.training.objective import main_loss
from prom_jax.utils.errors import UserError
from tests.reference import FAMILIES, SIZES, hf_model, pack, random_examples, relative_error, to_model

MAX_ERROR, MAX_TOKEN_ERROR = 1e-4, 2e-4
LENGTH = 600  # short prompts hide a wrong rotary embedding


def tokens_of(hf):
    return np.random.default_rng(1).integers(0, hf.config.vocab_size, (1, LENGTH))


def hf_forward(hf, tokens):
    """Logits, and hidden states by hooks: transformers' own last one is already normed."""
    states = []
    keep = lambda module, inputs, output: states.append(output[0] if type(output) is tuple else output)
    hooks = [module.register_forward_hook(keep) for module in (hf.model.embed_tokens, *hf.model.layers)]
    with torch.no_grad():
        logits = hf(torch.from_numpy(tokens)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return np.stack(states), logits


def worst_errors(ours, theirs):
    """Of any layer: the error of an element, relative to the layer's largest, and of a token, in L2."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    norm = lambda x: np.linalg.norm(x, axis=-1)
    token_error = (norm(ours - theirs) / norm(theirs)).max()
    return max(relative_error(*layer) for layer in zip(ours, theirs, strict=True)), token_error


def assert_parity(model, hf, tokens):
    states, logits = hf_forward(hf, tokens)
    for name, ours, theirs in (
        ("states", model.hidden_states(tokens), states),
        ("logits", model(tokens)[None], logits[None]),
    ):
        error, token_error = worst_errors(ours, theirs)
        print(f"{name}: element {error:.1e}, token {token_error:.1e}")
        assert error <= MAX_ERROR
        assert token_error <= MAX_TOKEN_ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_transformers(family):
    hf = hf_model(family)
    tokens = tokens_of(hf)
    one_stack, two_stacks = to_model(hf), to_model(hf, pivot_layer=3)
    assert_parity(one_stack, hf, tokens)
    error, _ = worst_errors(two_stacks.hidden_states(tokens), one_stack.hidden_states(tokens))
    assert error <= MAX_ERROR / 10


@pytest.mark.parametrize(
    ("family", "bug"),
    [
        ("llama2", {"rms_norm_eps": 1e-6}),
        ("llama2", {"rope_theta": 10010.0}),
        ("llama3", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 65)}),
        ("linear", {"rope_scaling": RopeScaling("linear", 4.004)}),
        ("mistral", {"sliding_window": 127}),
    ],
)
def test_the_tolerance_catches_a_small_bug(family, bug):
    hf = hf_model(family)
    config = dataclasses.replace(LlamaConfig.from_hf(hf.config.to_dict()), **bug)
    tokens = tokens_of(hf)
    ours = to_model(hf, config=config).hidden_states(tokens)
    error, token_error = worst_errors(ours, hf_forward(hf, tokens)[0])
    assert error > 5 * MAX_ERROR
    assert token_error > 5 * MAX_TOKEN_ERROR


def test_exits_are_hidden_states():
    hf = hf_model("llama3")
    model, tokens = to_model(hf, pivot_layer=3), tokens_of(hf)
    states = model.hidden_states(tokens)
    assert states.shape == (5, 1, LENGTH, 64)
    np.testing.assert_array_equal(model.hidden_states(tokens, layers=(4, 0)), states[np.array([4, 0])])
    assert relative_error(model.pivot_states(tokens), states[3]) < 1e-6
    assert relative_error(model.final_states(tokens), model.final_norm(states[4])) < 1e-6
    np.testing.assert_array_equal(states[0], model.embed_tokens[...][tokens])


def test_remat_changes_nothing():
    hf = hf_model("smollm2")
    rows = pack(random_examples(0, [60, 50]), [[0], [1]], 64)
    losses = {}
    for remat in llama.REMAT:
        model = to_model(hf, remat=remat)
        loss = lambda params, model=model: main_loss(llama.with_params(model, params), rows)
        losses[remat] = jax.jit(jax.value_and_grad(loss))(llama.to_params(model))
    for remat in ("full", "dots"):
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
        jax.tree.map(same, losses[remat], losses["none"])


def test_bfloat16_is_as_close_as_in_transformers():
    hf = hf_model("llama3")
    model, tokens = to_model(hf, dtype="bfloat16"), tokens_of(hf)
    exact, logits = hf_forward(hf, tokens)[1], model(tokens)
    assert model.embed(tokens).dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        theirs = hf.bfloat16()(torch.from_numpy(tokens)).logits.float().numpy()
    error, their_error = np.linalg.norm(logits - exact), np.linalg.norm(theirs - exact)
    assert 0 < error < 1.2 * their_error < 0.2 * np.linalg.norm(exact)


# Configuration.

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "hidden_act": "silu", "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.02, "pretraining_tp": 1, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
    "use_cache": True, "_name_or_path": "somewhere",
}  # fmt: skip
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
# Pairs of the same model as transformers 4 and as transformers 5 write it.
VERSIONS = {
    "default": (
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "linear, type": (
        {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}},
    ),
    "llama3, rope_type": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
        {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
    ),
    "mistral": (
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 4096,
            "rope_theta": 1e4,
            "num_key_value_heads": 8,
        },
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "num_key_value_heads": 8,
        },
    ),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_config_round_trip(name):
    version_4, version_5 = ({**LLAMA2_7B, **settings} for settings in VERSIONS[name])
    config = LlamaConfig.from_hf(version_4)
    assert LlamaConfig.from_hf(version_5) == config
    assert LlamaConfig.from_hf(config.to_hf()) == config

    cls = transformers.MistralConfig if name == "mistral" else transformers.LlamaConfig
    theirs, ours = cls.from_dict(dict(version_4)), cls.from_dict(config.to_hf())
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "eos_token_id",
                "max_position_embeddings", "tie_word_embeddings", "hidden_act"):  # fmt: skip
        assert getattr(ours, key) == getattr(theirs, key), key
    drop_type = lambda rope: {key: value for key, value in rope.items() if key != "type"}
    assert drop_type(ours.rope_parameters) == drop_type(theirs.rope_parameters)
    assert getattr(ours, "sliding_window", None) == config.sliding_window
    assert LlamaConfig.from_hf(theirs.to_dict()) == config

    small = {"vocab_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    model = transformers.AutoModel.from_config(cls.from_dict({**config.to_hf(), **small}))
    np.testing.assert_allclose(
        llama.rope_frequencies(config), model.rotary_emb.inv_freq.numpy(), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("cls", [transformers.LlamaConfig, transformers.MistralConfig])
def test_absent_keys_are_as_in_transformers(cls):
    bare = {"model_type": cls.model_type, **{key: LLAMA2_7B[key] for key in REQUIRED}}
    assert LlamaConfig.from_hf(bare) == LlamaConfig.from_hf(cls.from_dict(dict(bare)).to_dict())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"\0": "silu"}, r"\\x00='silu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "expected .'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": None}, "model_type None"),
        ({"logit_scale": 2.0}, "logit_scale=2.0"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
    ],
)
def test_unsupported_settings_are_named(settings, error):
    with pytest.raises(UserError, match=error):
        LlamaConfig.from_hf({**LLAMA2_7B, **settings})


def test_a_missing_key_is_named():
    for key in ("vocab_size", "num_hidden_layers"):
        with pytest.raises(UserError, match=f"lacks {key}"):
            LlamaConfig.from_hf({k: v for k, v in LLAMA2_7B.items() if k != key})


def test_number_of_parameters():
    config = LlamaConfig.from_hf(LLAMA2_7B)
    assert llama.num_parameters(llama.abstract(config)) == 6_738_415_616
    with_pivot = llama.abstract(config, pivot_layer=24, pivot_head=True)
    assert llama.num_parameters(with_pivot) == 6_738_415_616 + 131_072_000


def test_a_layer_that_is_not_there_is_named():
    model = to_model(hf_model("llama2"))
    tokens = np.arange(8)[None]
    assert model.hidden_states(tokens, layers=[4, 0]).shape[0] == 2
    with pytest.raises(UserError, match=r"layers=\(5,\): expected each in 0 to 4"):
        model.hidden_states(tokens, layers=(5,))


def test_pivot_layer_is_checked():
    config = LlamaConfig.from_hf({"model_type": "llama", **{key: SIZES[key] for key in REQUIRED}})
    for pivot_layer in (-1, 4, 5):
        with pytest.raises(UserError, match=f"pivot.layer={pivot_layer}: expected 1 to 3"):
            llama.abstract(config, pivot_layer=pivot_layer)
    for name in ("dtype", "remat", "attention"):
        with pytest.raises(UserError, match="'other': expected one of"):
            llama.Compute(**{name: "other"})


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
    assert llama.num_parameters(model) == 134_515_008
    tokens = np.array([tokenizer(TEXT)["input_ids"][:LENGTH]])
    assert tokens.shape == (1, LENGTH)
    assert_parity(model, hf, tokens)
    assert_parity(prom_jax.load(folder)[0], hf, tokens)

    prompts = [tokens[0, :40].tolist(), tokenizer("The capital of Kenya is")["input_ids"], tokens[0].tolist()]
    ours = greedy(model, prompts, 32, [])
    for prompt, new in zip(prompts, ours):
        theirs = hf.generate(
            torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert tokenizer.decode(new) == tokenizer.decode(theirs[0, len(prompt) :])
