"""`config.json` of each family, in both directions, against transformers' own classes."""

import importlib

import numpy as np
import pytest
import transformers

from prom_jax.models.auto import config_from_hf, config_to_hf, family_of, known_families
from prom_jax.models.config import LayerKind, Rope, RopeScaling
from prom_jax.models.layers import rope_frequencies
from prom_jax.models.settings import REQUIRED
from prom_jax.utils.errors import UserError
from tests.reference import FAMILIES, SIZES, config_class

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "hidden_act": "silu", "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.02, "pretraining_tp": 1, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
    "use_cache": True, "_name_or_path": "somewhere",
}  # fmt: skip
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
MANY_EOS = {"eos_token_id": [128001, 128008, 128009], "head_dim": 128, "num_key_value_heads": 8}
# Settings as transformers 4 writes them, which are replaced as version 5 does.
VERSIONS = {
    "default": ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    "linear, type": (
        {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
    ),
    "llama3, rope_type": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, **MANY_EOS},
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    ),
    "llama with biases": (
        {"rope_theta": 1e4, "attention_bias": True, "mlp_bias": True},
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "mistral": (
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 4096,
            "rope_theta": 1e4,
            "num_key_value_heads": 8,
        },
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen2.5": (
        {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643,
            "eos_token_id": 151645, "max_window_layers": 28, "num_key_value_heads": 4, "hidden_size": 3584,
            "num_attention_heads": 28, "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "sliding_window": 131072, "use_sliding_window": False, "vocab_size": 152064,
            "attention_dropout": 0.0,
        },
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": (
        {
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2560,
            "max_window_layers": 36, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "olmo2": (
        {
            "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False,
            "eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
            "vocab_size": 100352,
        },
        {"rope_type": "default", "rope_theta": 5e5},
    ),
    "gemma2": (
        {
            "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 4608, "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0,
            "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
            "tie_word_embeddings": True, "vocab_size": 256000,
        },
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2560,
            "intermediate_size": 10240, "num_attention_heads": 8, "num_hidden_layers": 34,
            "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1e6, "sliding_window": 1024, "sliding_window_pattern": 6,
            "tie_word_embeddings": True, "vocab_size": 262208,
        },
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    ),
    "smollm3": (
        {
            "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
            "hidden_size": 2048, "layer_types": ["full_attention"] * 36, "max_window_layers": 28,
            "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": 9 * [1, 1, 1, 0],
            "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2,
            "rope_theta": 5e6, "sliding_window": None, "use_sliding_window": False,
        },
        {"rope_type": "default", "rope_theta": 5e6},
    ),
    "granite": (
        {
            "model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.1, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
            "logits_scaling": 16.0, "mlp_bias": False, "num_key_value_heads": 8, "residual_multiplier": 0.22,
            "rope_theta": 1e7, "tie_word_embeddings": True,
        },
        {"rope_type": "default", "rope_theta": 1e7},
    ),
    "mistral nemo": (
        {
            "model_type": "mistral", "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0,
            "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40,
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6,
            "sliding_window": None, "vocab_size": 131072,
        },
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen2.5, yarn": (
        {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 131072,
            "max_window_layers": 28, "num_key_value_heads": 4, "hidden_size": 3584, "rope_theta": 1e6,
            "num_attention_heads": 28, "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "vocab_size": 152064,
            "use_sliding_window": False, "sliding_window": 131072,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "phi3": (
        {
            "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "eos_token_id": 32000, "pad_token_id": 32000,
            "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "rope_theta": 1e4, "sliding_window": 2047,
            "vocab_size": 32064,
        },
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "glm4": (
        {
            "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
            "intermediate_size": 13696, "max_position_embeddings": 32768, "num_hidden_layers": 40,
            "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
            "rope_theta": 1e4, "vocab_size": 151552, "bos_token_id": None,
        },
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "olmo3": (
        {
            "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "attention_bias": False,
            "bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277, "rope_theta": 5e5,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "sliding_window": 4096,
            "max_position_embeddings": 65536, "rms_norm_eps": 1e-6, "vocab_size": 100278,
            "rope_scaling": {
                "rope_type": "yarn", "attention_factor": 1.25, "beta_fast": 30.0, "factor": 8.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 5e5, "attention_factor": 1.25, "beta_fast": 30.0,
                "factor": 8.0, "original_max_position_embeddings": 8192,
            },
        },
    ),
}  # fmt: skip
# What transformers keeps beside the architecture.
NOT_COMPARED = {
    "transformers_version", "architectures", "dtype", "_name_or_path", "initializer_range", "pretraining_tp",
    "no_rope_layer_interval", "cache_implementation", "max_window_layers", "hidden_act", "attention_dropout",
    "_sliding_window_pattern", "sliding_window_pattern",
}  # fmt: skip


def hf_class(model_type):
    return transformers.AutoConfig.for_model(model_type).__class__


def assert_same_settings(ours, theirs):
    """Of two configurations of transformers everything that counts."""
    ours, theirs = ours.to_dict(), theirs.to_dict()
    for key in theirs.keys() - NOT_COMPARED:
        value, expected = ours[key], theirs[key]
        if key == "rope_parameters":
            value, expected = ({k: v for k, v in rope.items() if k != "type"} for rope in (value, expected))
        assert value == expected, key


@pytest.mark.parametrize("name", VERSIONS)
def test_config_round_trip(name):
    version_4, rope = VERSIONS[name]
    version_4 = {**LLAMA2_7B, **version_4}
    if name == "granite":
        with pytest.raises(UserError, match=r"attention_dropout=0\.1"):
            config_from_hf(version_4)
        version_4["attention_dropout"] = 0.0
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    version_5 = {key: value for key, value in version_4.items() if key not in old}
    version_5["rope_parameters"] = rope
    config = config_from_hf(version_4)
    assert config_from_hf(version_5) == config
    assert config_from_hf(config_to_hf(config)) == config

    cls = hf_class(config.model_type)
    theirs, ours = cls.from_dict(dict(version_4)), cls.from_dict(config_to_hf(config))
    assert_same_settings(ours, theirs)
    assert config_to_hf(config)["architectures"] == [family_of(config).architecture]
    assert config_from_hf(theirs.to_dict()) == config

    small = {"vocab_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "layer_types": None}
    small |= {"no_rope_layers": [1], "pad_token_id": None}
    hf = {key: value for key, value in config_to_hf(config).items() if key not in small}
    model = transformers.AutoModel.from_config(cls.from_dict({**hf, **small}))
    rope = config.layers[0].rope
    frequencies = rope_frequencies(rope, config.head_dim, rope.share)
    rotary = model.rotary_emb
    theirs = getattr(rotary, "inv_freq", None)  # Gemma 3 has one of each type of layer
    theirs = rotary.sliding_attention_inv_freq if theirs is None else theirs
    np.testing.assert_allclose(frequencies, theirs.numpy(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_comes_back_from_transformers(family):
    name, shape = FAMILIES[family]
    cls = config_class(name)
    theirs = cls(**{**SIZES, **shape})
    config = config_from_hf(theirs.to_dict())
    assert not config.skipped
    assert config_from_hf(config_to_hf(config)) == config
    assert_same_settings(cls.from_dict(config_to_hf(config)), theirs)


@pytest.mark.parametrize("model_type", known_families())
def test_absent_keys_are_as_in_transformers(model_type):
    bare = {"model_type": model_type, **{key: LLAMA2_7B[key] for key in REQUIRED}}
    config = config_from_hf(bare)
    assert config == config_from_hf(hf_class(model_type).from_dict(dict(bare)).to_dict())
    # A file that leaves out what is at its default, as `save_pretrained` of version 4 did.
    theirs = hf_class(model_type)()
    assert config_from_hf(theirs.to_diff_dict() | {key: getattr(theirs, key) for key in REQUIRED}) == (
        config_from_hf(theirs.to_dict())
    )


def test_families_are_known_by_their_files():
    for model_type, family in known_families().items():
        assert family.model_type == model_type
        module = importlib.import_module(f"prom_jax.models.families.{model_type.removesuffix('_text')}")
        assert module.FAMILY is family
        assert hasattr(transformers, family.architecture)
        names = [row.name for row in family.tensors]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"\0": "silu"}, r"\\x00='silu'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "'proportional'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}},
            "original_max_position_embeddings=2048: expected the model's context, 16384",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "depth": 2}}, r"'yarn' has .*'depth'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 2}}, "truncate=2: expected true"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' has"),
        ({"rope_scaling": {"type": "linear"}}, "expected .'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor='half'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"factor=0\.5"),
        ({"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"]}, "Qwen9ForCausalLM"),
        ({"model_type": "qwen2"}, r"unsupported architecture \['LlamaForCausalLM'\] .*'qwen2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.OtherForCausalLM"}}, "auto_map"),
        ({"model_type": None}, "model_type None"),
        ({"logit_scale": 2.0}, r"logit_scale=2\.0"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"attention_bias": "yes"}, "attention_bias='yes': expected true, false or null"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types with .'sliding_attention'"),
    ],
)
def test_unsupported_settings_are_named(settings, error):
    with pytest.raises(UserError, match=error):
        config_from_hf({**LLAMA2_7B, **settings})


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("qwen2.5", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2.5", {"max_window_layers": None}, "max_window_layers=None: expected a whole number"),
        ("qwen2.5", {"layer_types": ["full_attention"] * 27}, "there are 27 layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 36}, "layer_types with .'chunked_attention'"),
        ("olmo2", {"sliding_window": 512}, "sliding_window=512"),
        ("olmo2", {"layer_types": ["sliding_attention"] * 32}, "layer_types with .'sliding_attention'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar=None: expected a number above 0"),
        ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected null"),
        ("gemma3", {"sliding_window": None}, "sliding_window=None: expected a number above 0"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters with .'rope_type'"),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "full_attention=3 in rope_parameters"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": "x"}}}, "rope_theta='x'"),
        ("gemma3", {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "'proportional'"),
        ("gemma3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]: expected 0 or 1 for each of 36"),
        ("smollm3", {"no_rope_layers": 36 * ["1"]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("granite", {"logits_scaling": 0}, "logits_scaling=0"),
        ("granite", {"residual_multiplier": []}, r"residual_multiplier=\[\]"),
    ],
)
def test_unsupported_settings_of_a_family_are_named(name, settings, error):
    with pytest.raises(UserError, match=error):
        config_from_hf({**LLAMA2_7B, **VERSIONS[name][0], "attention_dropout": 0.0, **settings})


def test_caps_may_be_absent():
    config = config_from_hf({**LLAMA2_7B, **VERSIONS["gemma2"][0], "attn_logit_softcapping": None})
    assert (config.attention_softcap, config.logit_softcap) == (None, 30.0)
    assert config_from_hf(config_to_hf(config)) == config


def test_layers_are_told_apart():
    settings = {**LLAMA2_7B, **VERSIONS["qwen2.5"][0], "use_sliding_window": True, "max_window_layers": 20}
    config = config_from_hf(settings)
    assert [kind.window for kind in config.layers] == 20 * [None] + 8 * [131072]
    assert config.windows == (None, 131072) and len(config.kinds) == 2
    types = 14 * ["sliding_attention", "full_attention"]
    config = config_from_hf(settings | {"layer_types": types})
    assert [kind.window for kind in config.layers] == 14 * [131072, None]
    assert config_from_hf(config_to_hf(config)) == config
    config = config_from_hf({**LLAMA2_7B, **VERSIONS["smollm3"][0]})
    assert [kind.rope is None for kind in config.layers] == 9 * [False, False, False, True]
    assert config.ropes == (Rope(5e6), None)
    windows = {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}
    config = config_from_hf({**LLAMA2_7B, **VERSIONS["smollm3"][0], **windows})
    assert [kind.window for kind in config.layers] == 9 * [None, None, None, 64]
    assert config_from_hf(config_to_hf(config)) == config


def test_each_type_of_layer_has_a_rotary_embedding():
    settings = {**LLAMA2_7B, **VERSIONS["gemma3"][0]}
    config = config_from_hf(settings)
    assert config.layers[:6] == 5 * (LayerKind(1024, Rope(1e4)),) + (
        LayerKind(None, Rope(1e6, RopeScaling("linear", 8.0))),
    )
    assert config.eos_token_id == (1, 106)
    without = {
        **settings,
        "rope_parameters": {"sliding_attention": {"rope_theta": None}, "full_attention": None},
    }
    assert config_from_hf(without) == config
    # A scaling of the layers with a window too, which the keys of transformers 4 cannot say.
    thetas = {"sliding_attention": 2e4, "full_attention": 3e6}
    ropes = {
        name: {"rope_type": "linear", "factor": 2.0, "rope_theta": theta} for name, theta in thetas.items()
    }
    settings = {key: value for key, value in settings.items() if "rope_" not in key}
    config = config_from_hf(settings | {"rope_parameters": ropes})
    assert config.ropes == tuple(Rope(theta, RopeScaling("linear", 2.0)) for theta in thetas.values())
    assert config_from_hf(config_to_hf(config)) == config
    theirs = hf_class("gemma3_text").from_dict(config_to_hf(config))
    assert config_from_hf(theirs.to_dict()) == config


def test_a_scaling_keeps_its_numbers():
    config = config_from_hf({**LLAMA2_7B, **VERSIONS["llama3, rope_type"][0]})
    assert config.layers == 32 * (config.layers[0],)
    assert config.layers[0].rope == Rope(5e5, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))
    assert config.eos_token_id == (128001, 128008, 128009)


def test_keys_that_change_nothing_are_skipped_by_name():
    plain = config_from_hf(LLAMA2_7B)
    assert plain.skipped == ()
    keys = {"temperature": 0.6, "_model_name_or_path": "x", "max_length": 4096, "torch_dtype": "bfloat16"}
    config = config_from_hf(LLAMA2_7B | keys)
    assert config == plain
    assert set(config.skipped) == {"temperature", "_model_name_or_path", "max_length"}
    # The first exports of LLaMA, and code beside the weights that is the same architecture.
    old = {"architectures": ["LLaMAForCausalLM"], "auto_map": {"AutoModelForCausalLM": "m.LlamaForCausalLM"}}
    assert config_from_hf(LLAMA2_7B | old) == plain


def test_a_missing_key_is_named():
    for key in ("vocab_size", "num_hidden_layers"):
        with pytest.raises(UserError, match=f"lacks {key}"):
            config_from_hf({k: v for k, v in LLAMA2_7B.items() if k != key})


def test_gemma3_without_a_local_layer_comes_back():
    settings = {**SIZES, "num_hidden_layers": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    config = config_from_hf(transformers.Gemma3TextConfig(**settings).to_dict())
    assert config.windows == (None,)
    assert config_from_hf(config_to_hf(config)) == config
