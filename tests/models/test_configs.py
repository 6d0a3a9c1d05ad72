"""Published `config.json` files, read as transformers reads them: configs.json has them, each with the public
repository and the file that it was taken from. What no public repository there gives is made of transformers'
own configuration classes."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from prom_jax.checkpoints.params import hf_shapes
from prom_jax.models.auto import config_from_hf, config_to_hf
from prom_jax.models.family import FULL, SLIDING
from prom_jax.models.layers import rope_frequencies
from prom_jax.utils.errors import UserError
from tests.reference import randomized, relative_error, to_model

ROWS = json.loads(Path(__file__).with_name("configs.json").read_text())
FILES = {row["name"]: row["config"] for row in ROWS}
CLASSES = {  # their defaults are the sizes of a published model
    "Gemma3": transformers.Gemma3Config,  # with its vision part
    "Glm4": transformers.Glm4Config,
    "Mistral": transformers.MistralConfig,
    "Olmo3": transformers.Olmo3Config,
    "SmolLM3": transformers.SmolLM3Config,
}
NAMES = [name for name in FILES if "quantization_config" not in FILES[name]] + list(CLASSES)
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def content(name):
    """A file's content."""
    return copy.deepcopy(FILES[name]) if name in FILES else CLASSES[name]().to_dict()


def read_by_transformers(name):
    """The language model's configuration in transformers."""
    file = content(name)
    return transformers.AutoConfig.for_model(file["model_type"]).from_dict(file).get_text_config()


def causal_lm(config):
    """A model of transformers, without memory for its weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def with_layers(config, number):
    """A configuration of transformers with the first layers alone."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = number
    for key in ("layer_types", "no_rope_layers"):
        if getattr(config, key, None):
            setattr(config, key, getattr(config, key)[:number])
    return config


def windows(theirs):
    """The window of each layer in transformers, None for none."""
    types = getattr(theirs, "layer_types", None) or [SLIDING] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    return [window if layer_type == SLIDING else None for layer_type in types]


def rope(rotary, window):
    """A layer's frequencies in transformers, and what cosines and sines are multiplied by."""
    prefix = "" if hasattr(rotary, "inv_freq") else f"{SLIDING if window else FULL}_"
    frequencies, scale = (getattr(rotary, prefix + name) for name in ("inv_freq", "attention_scaling"))
    return frequencies.numpy(), scale


def test_every_file_names_its_source():
    assert len(FILES) == len(ROWS) >= 40
    for row in ROWS:
        repository, path = row["source"].split(": ")
        assert repository.count("/") == 1 and path


@pytest.mark.parametrize("name", NAMES)
def test_published_file(name):
    theirs, ours = read_by_transformers(name), config_from_hf(content(name))
    for key in SAME:
        value = getattr(ours, key)
        assert (list(value) if isinstance(value, tuple) else value) == getattr(theirs, key), key
    longest = getattr(theirs, "original_max_position_embeddings", None) or theirs.max_position_embeddings
    assert ours.max_position_embeddings == longest
    assert [kind.window for kind in ours.layers] == windows(theirs)
    rotated = getattr(theirs, "no_rope_layers", [1] * ours.num_hidden_layers)
    assert [kind.rope is not None for kind in ours.layers] == list(map(bool, rotated))

    model = causal_lm(with_layers(theirs, 2))
    shapes = hf_shapes(dataclasses.replace(ours, num_hidden_layers=2, layers=ours.layers[:2]))
    assert shapes == {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    rotary = type(model.model.rotary_emb)(theirs)
    for kind in set(ours.layers):
        if kind.rope:
            frequencies, scale = rope(rotary, kind.window)
            np.testing.assert_allclose(
                rope_frequencies(kind.rope, ours.head_dim, kind.rope.share), frequencies, rtol=2e-6
            )
            assert kind.rope.scale == pytest.approx(scale, rel=1e-12)

    scale = ours.attention_scale or ours.head_dim**-0.5
    assert scale == pytest.approx(model.model.layers[0].self_attn.scaling, rel=1e-12)
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    assert ours.residual_scale == getattr(theirs, "residual_multiplier", 1.0)
    assert ours.logit_scale == 1 / getattr(theirs, "logits_scaling", 1.0)

    # An export says the same.
    again = transformers.AutoConfig.for_model(ours.model_type).from_dict(config_to_hf(ours))
    assert config_from_hf(again.to_dict()) == ours
    assert windows(again) == windows(theirs)


@pytest.mark.parametrize("name", sorted(FILES.keys() - set(NAMES)))
def test_quantised_file_is_refused_by_name(name):
    with pytest.raises(UserError, match="quantization_config"):
        config_from_hf(content(name))


def narrow(theirs):
    """A configuration of transformers of a few narrow layers, and a short window; otherwise the same."""
    config = with_layers(theirs, min(4, theirs.num_hidden_layers))
    queries_a_key = theirs.num_attention_heads // theirs.num_key_value_heads
    config.num_key_value_heads = max(1, 8 // queries_a_key)
    config.num_attention_heads = queries_a_key * config.num_key_value_heads
    config.hidden_size, config.intermediate_size, config.vocab_size = 16 * config.num_attention_heads, 96, 199
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config._attn_implementation, config.dtype = "eager", torch.float32
    if getattr(config, "head_dim", None):
        config.head_dim = 16
    for key in ("sliding_window", "sliding_window_size"):
        if getattr(config, key, None):
            setattr(config, key, 100)
    for key, factors in config.rope_parameters.items():
        if key in ("short_factor", "long_factor"):
            config.rope_parameters[key] = factors[: int(8 * config.rope_parameters["partial_rotary_factor"])]
    return config


@functools.cache
def error_of_logits(model_type, content):
    """Of a random model of transformers with a configuration that is given as JSON."""
    config = transformers.AutoConfig.for_model(model_type).from_dict(json.loads(content))
    torch.manual_seed(0)
    model = randomized(transformers.AutoModelForCausalLM.from_config(config).eval())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 600))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    return relative_error(to_model(model)(tokens), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_computes_what_transformers_computes(name):
    config = narrow(read_by_transformers(name))
    # At some bases numpy's power and torch's differ in a frequency's last bit: up to 1.7e-4 after 600 tokens.
    assert error_of_logits(config.model_type, json.dumps(config.to_dict(), sort_keys=True)) < 4e-4
