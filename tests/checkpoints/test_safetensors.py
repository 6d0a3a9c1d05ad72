"""Folders of safetensors, written: against transformers, byte for byte."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prom_jax
from prom_jax.checkpoints.params import ParamsReader, load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.data.templates import wording
from prom_jax.models import decoder
from prom_jax.tokenization import folder
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import PIVOT, hf_model, save, tensors
from tests.tokenization.made_up import TEXTS
from tests.tokenization.test_sentencepiece import VARIANTS, write_model


@pytest.mark.parametrize("heads", [{}, PIVOT], ids=["plain", "pivot"])
@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"tie_word_embeddings": False}),
        (torch.bfloat16, {"tie_word_embeddings": True}),
        (torch.bfloat16, {"family": "mistral", "sliding_window": 7, "head_dim": 16, "rope_theta": 1e6}),
        (torch.float16, {"num_key_value_heads": 4}),
    ],
)
def test_round_trip_is_byte_identical(tmp_path, dtype, settings, shards, heads):
    original, again = tmp_path / "original", tmp_path / "again"
    many = {"max_shard_size": "20KB"} if shards == "many" else {}
    hf_model(dtype, **settings).save_pretrained(original, **many)
    reader = open_reader(original)
    params = load_params(reader, heads=heads)
    save(params, reader, again, heads, max_shard_bytes=20_000 if shards == "many" else 10**9)
    assert tensors(again) == tensors(original)
    assert len(list(again.glob("model-*.safetensors"))) > 1 or shards == "one"

    loaded, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True, dtype="auto")
    assert not any(info.values())
    assert loaded.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    tokens = torch.arange(40)[None] % 64
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_the_folder_is_whole(tmp_path):
    hf_model(eos_token_id=[5, 2], bos_token_id=1).save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    save(load_params(reader), reader, tmp_path / "new" / "out", max_shard_bytes=20_000)
    out = tmp_path / "new" / "out"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation | {"bos_token_id": 1, "eos_token_id": [2, 5]} == generation
    assert "_from_model_config" not in generation
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.language == "sw"
    assert card.data.tags == ["prom_jax"]
    assert "| learning_rate | 2e-05 |" in card.text
    assert AutoTokenizer.from_pretrained(out).chat_template == "ours"
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "ours"  # for transformers 4
    assert config["model_max_length"] == 64
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors(out).values())
    assert open_reader(out).config == reader.config


def test_a_small_folder_with_a_pivot_head_has_an_index_of_the_model(tmp_path):
    """vLLM reads every *.safetensors of a folder without one (vllm#4989)."""
    hf_model().save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    save(load_params(reader), reader, tmp_path / "plain")
    assert not (tmp_path / "plain" / "model.safetensors.index.json").exists()
    save(load_params(reader, heads=PIVOT), reader, tmp_path / "out", PIVOT)
    out = tmp_path / "out"
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == dict.fromkeys(load_file(out / "model.safetensors"), "model.safetensors")
    assert (out / "pivot_head.safetensors").exists()
    assert open_reader(out).heads == PIVOT
    AutoModelForCausalLM.from_pretrained(out)


def test_values_beyond_float16_are_refused(tmp_path):
    model = hf_model()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3:5] = 1e6
    model.save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has 2 values beyond float16"):
        save(load_params(reader), reader, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    save(load_params(reader), reader, tmp_path / "out", dtype="bfloat16")


def test_an_extended_vocabulary_is_exported_with_a_warning(tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    extended = folder.load(write_model(tmp_path / "tokenizer", VARIANTS["extended"][0]()))
    hf_model(vocab_size=len(extended)).save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    model = decoder.with_params(decoder.abstract(reader.config), load_params(reader))
    prom_jax.save_hf(model, extended, tmp_path / "out")
    assert "transformers 4 does with use_fast=False" in " ".join(capsys.readouterr().out.split())
    _, again = prom_jax.load(tmp_path / "out")
    for text in TEXTS:
        assert again(text).input_ids == extended(text).input_ids
    messages = [{"role": "user", "content": "hi there"}]
    ids = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == again(wording("en").prompt("hi there")).input_ids


def test_export_replaces_an_export_and_nothing_else(tmp_path):
    hf_model().save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    params, out = load_params(reader), tmp_path / "out"
    out.mkdir()
    save(params, reader, out, max_shard_bytes=20_000)
    save(params, reader, out)
    assert not list(out.glob("*index.json"))
    with pytest.raises(UserError, match="no earlier export"):
        save(params, reader, tmp_path / "base")
    with pytest.raises(UserError, match="is a file"):
        save(params, reader, out / "config.json")
    with pytest.raises(UserError, match=r"export\.dtype='int8'"):
        save(params, reader, tmp_path / "other", dtype="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    hf_model().save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    params = load_params(reader)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(UserError, match=r"0\.0 GB are free"):
            save(params, reader, tmp_path / "out")
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(28, "No space left on device")

        patch.setattr(ParamsReader, "read", full)
        with pytest.raises(UserError, match="No space left"):
            save(params, reader, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from prom_jax.parallel import sharding
from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from tests.checkpoints.made_up import PIVOT, save
reader = open_reader(sys.argv[3])
params = load_params(reader, sharding.make_mesh(fsdp=4, tensor=2), heads=PIVOT)
assert not params["stack0"]["q_proj"].is_fully_addressable
save(params, reader, sys.argv[4], PIVOT)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    hf_model().save_pretrained(tmp_path / "base")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", TWO_PROCESSES, address]
    processes = [
        subprocess.Popen(
            [*command, str(i), tmp_path / "base", tmp_path / "out"], env=os.environ | flags, text=True
        )
        for i in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert tensors(tmp_path / "out") == tensors(tmp_path / "base")
    head = load_file(tmp_path / "out" / "pivot_head.safetensors")["pivot_head.weight"]
    np.testing.assert_array_equal(head, load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"])
