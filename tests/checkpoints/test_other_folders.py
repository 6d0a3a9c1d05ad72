"""Folders of safetensors that others wrote: old ones, of several files, of models that see pictures too."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import prom_jax
from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.models.auto import config_from_hf
from prom_jax.models.settings import REQUIRED
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import PIVOT, SIZES, TOKENIZER, hf_model, save, tensors


def test_a_shard_may_have_the_name_of_a_head(tmp_path):
    hf_model().save_pretrained(tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    head = content.pop("lm_head.weight")
    save_file(content, tmp_path / "model.safetensors")
    save_file({"lm_head.weight": head}, tmp_path / "lm_head.safetensors")
    files = dict.fromkeys(content, "model.safetensors") | {"lm_head.weight": "lm_head.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    reader = open_reader(tmp_path)
    assert reader.heads == {}
    np.testing.assert_array_equal(load_params(reader)["lm_head"], head)


@pytest.mark.parametrize("equal", [True, False])
def test_lm_head_beside_a_tied_config_as_in_transformers(tmp_path, equal):
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    embedding = content["model.embed_tokens.weight"]
    content["lm_head.weight"] = embedding.copy() if equal else embedding + 1
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # of old folders
    save_file(content, tmp_path / "model.safetensors", {"format": "pt"})
    reader = open_reader(tmp_path)
    params = load_params(reader)
    assert ("lm_head" in params) is not equal
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(params["embed_tokens" if equal else "lm_head"], theirs)


# What commit f878607 wrote: the model card up to its rows, config.json, and what that has of how it was made.
FIRST_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- prom_jax
base_model: "owner/base"
language: "sw"
---
"""
FIRST_DETAILS = {"base_model": "owner/base", "language": "sw", "method": "prom", "pivot.layer": 3, "seed": 0}

FIRST_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "prom_jax": FIRST_DETAILS,
}


def test_an_export_of_the_first_version_loads_and_is_replaced(tmp_path, capsys):
    hf = hf_model(rope_theta=FIRST_CONFIG["rope_theta"])
    hf.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FIRST_CONFIG))
    (tmp_path / "README.md").write_text(FIRST_CARD)
    head = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    metadata = {"format": "pt", "pivot_layer": "3"}
    save_file({"pivot_head.weight": head}, tmp_path / "pivot_head.safetensors", metadata)
    reader = open_reader(tmp_path)
    assert reader.heads == PIVOT and reader.details == FIRST_DETAILS
    params = load_params(reader, heads=PIVOT)
    np.testing.assert_array_equal(params["pivot_head"], head)

    model, _ = prom_jax.load(tmp_path)
    assert capsys.readouterr().out == ""  # no key of it is skipped
    assert model.heads == PIVOT and [len(stack) for stack in model.stacks] == [3, 1]
    np.testing.assert_array_equal(model.head("pivot_head"), head)
    tokens = np.arange(40)[None] % 64
    with torch.no_grad():
        theirs = hf(torch.from_numpy(tokens), output_hidden_states=True)
    np.testing.assert_allclose(model(tokens), theirs.logits, rtol=1e-4, atol=1e-4)
    states = model.hidden_states(tokens, layers=(3,))[0]
    np.testing.assert_allclose(states, theirs.hidden_states[3], rtol=1e-4, atol=1e-4)

    before = tensors(tmp_path)
    save(params, reader, tmp_path, PIVOT)
    assert tensors(tmp_path) == before
    assert open_reader(tmp_path).heads == PIVOT and open_reader(tmp_path).config == reader.config


def rename_to_transformers_4(name):
    """transformers 5 reads both spellings, and which one it writes has changed."""
    name = name.replace("model.language_model.", "language_model.model.")
    return name.removeprefix("model.") if name.startswith(("model.vision", "model.multi")) else name


@pytest.mark.parametrize("version", [4, 5])
def test_the_language_model_of_a_multimodal_folder(tmp_path, capsys, version):
    """Gemma 3 of text and pictures, in the names of either version of transformers: its text model alone is
    read, and what is exported is one."""
    text = {**SIZES, "head_dim": 8, "vocab_size": 70, "sliding_window": 16, "eos_token_id": 2}
    text |= {
        "bos_token_id": 1,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    config.image_token_index, config.mm_tokens_per_image = 69, 4
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    folder, state = tmp_path / "folder", {n: p.detach().numpy() for n, p in model.named_parameters()}
    model.config.save_pretrained(folder)
    if version == 4:
        state = {rename_to_transformers_4(name): value for name, value in state.items()}
        content = json.loads((folder / "config.json").read_text())
        left_out = ("bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings")
        kept = {key: value for key, value in text.items() if key not in left_out}
        content["text_config"] = {"model_type": "gemma3_text", **kept}
        content |= {"eos_token_id": 2, "bos_token_id": 1}
        (folder / "config.json").write_text(json.dumps(content))
    TOKENIZER.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")

    ours, tokenizer = prom_jax.load(folder)
    printed = " ".join(capsys.readouterr().out.split())
    assert "tensors of multi_modal_projector and vision_tower" in printed
    assert "its language model alone is read" in printed
    assert ours.config.model_type == "gemma3_text"
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, 2)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 60))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(tokens), logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    prom_jax.save_hf(ours, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.from_numpy(tokens)).logits, logits, rtol=0, atol=1e-5)


def test_other_settings_of_a_multimodal_folder_are_named():
    text = {"model_type": "gemma3_text", **{key: SIZES[key] for key in REQUIRED}}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    assert config_from_hf(whole) == config_from_hf(text)
    assert config_from_hf({**whole, "eos_token_id": [1, 106]}).eos_token_id == (1, 106)
    for settings, error in (
        ({"text_config": []}, r"text_config=\[\]: expected an object"),
        ({"vision_scale": 2}, "vision_scale=2"),
        ({"architectures": ["Gemma3Model"]}, "expected Gemma3ForConditionalGeneration"),
        ({"text_config": {**text, "model_type": "llama"}}, "model_type 'llama': expected 'gemma3_text'"),
    ):
        with pytest.raises(UserError, match=error):
            config_from_hf({**whole, **settings})
