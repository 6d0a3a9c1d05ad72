"""Weights in and out, against transformers and plain formulas."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from prom_jax.checkpoints.params import ParamsReader, load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.checkpoints.safetensors import save_hf
from prom_jax.models import decoder as llama
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CARD = {"base_model": "owner/base", "language": "sw", "method": "prom", "learning_rate": 2e-5}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")),
    bos_token="<s>",
    eos_token="</s>",
)


def hf_model(dtype=torch.float32, mistral=False, **settings):
    torch.manual_seed(0)
    config, model = (MistralConfig, MistralForCausalLM) if mistral else (LlamaConfig, LlamaForCausalLM)
    model = model(config(**{**SIZES, **settings})).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def save(params, reader, directory, **options):
    options = {"dtype": reader.dtype, "chat_template": "ours", "card": CARD, **options}
    save_hf(ParamsReader(params, reader.config), TOKENIZER, directory, **options)


def tensors(directory):
    """All tensors of a folder, by transformers' names, as (dtype, shape, bytes)."""
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found |= {k: (v.dtype, v.shape, v.tobytes()) for k, v in load_file(path).items()}
    return found


@pytest.mark.parametrize("pivot", [{}, {"pivot_layer": 3, "pivot_head": True}])
@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"tie_word_embeddings": False}),
        (torch.bfloat16, {"tie_word_embeddings": True}),
        (torch.bfloat16, {"mistral": True, "sliding_window": 7, "head_dim": 16, "rope_theta": 1e6}),
        (torch.float16, {"num_key_value_heads": 4}),
    ],
)
def test_round_trip_is_byte_identical(tmp_path, dtype, settings, shards, pivot):
    original, again = tmp_path / "original", tmp_path / "again"
    many = {"max_shard_size": "20KB"} if shards == "many" else {}
    hf_model(dtype, **settings).save_pretrained(original, **many)
    reader = open_reader(original)
    params = load_params(reader, **pivot)
    save(params, reader, again, max_shard_bytes=20_000 if shards == "many" else 10**9)
    assert tensors(again) == tensors(original)
    assert len(list(again.glob("model-*.safetensors"))) > 1 or shards == "one"

    loaded, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True, dtype="auto")
    assert not any(info.values())
    assert loaded.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    tokens = torch.arange(40)[None] % 64
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_pivot_head_starts_as_a_copy_and_comes_back(tmp_path, tied):
    hf_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    params = load_params(reader, pivot_layer=3, pivot_head=True)
    head = params["embed_tokens" if tied else "lm_head"]
    np.testing.assert_array_equal(params["pivot_head"], head)
    assert [params[stack]["q_proj"].shape[0] for stack in ("lower", "upper")] == [3, 1]

    params["pivot_head"] = params["pivot_head"] + 1
    save(params, reader, tmp_path / "out")
    with safe_open(tmp_path / "out" / "pivot_head.safetensors", "numpy") as file:
        assert list(file.keys()) == ["pivot_head.weight"]
        assert file.metadata()["pivot_layer"] == "3"
    again = open_reader(tmp_path / "out")
    assert again.pivot_layer == 3
    trained = load_params(again, pivot_layer=3, pivot_head=True)
    jax.tree.map(np.testing.assert_array_equal, trained, params)
    assert "pivot_head" not in load_params(again)
    with pytest.raises(UserError, match=r"layer 3.*pivot\.layer is 2"):
        load_params(again, pivot_layer=2, pivot_head=True)


def test_parameters_are_where_the_model_wants_them(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path)
    reader = open_reader(tmp_path)
    params = load_params(reader, pivot_layer=1)
    tokens = np.arange(40)[None] % 64
    ours = llama.with_params(llama.abstract(reader.config, pivot_layer=1), params)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(tokens), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_shards_equal_the_whole(tmp_path, sizes):
    hf_model().save_pretrained(tmp_path / "base")
    mesh = sharding.make_mesh(**{"fsdp": 1, **sizes})
    reader = open_reader(tmp_path / "base")
    whole = load_params(reader, pivot_layer=3, pivot_head=True)
    parts = load_params(reader, mesh, pivot_layer=3, pivot_head=True)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    q_proj = parts["lower"]["q_proj"]
    assert q_proj.sharding == sharding.param_sharding(mesh, ("lower", "q_proj"), q_proj.shape)
    assert q_proj.addressable_shards[0].data.size < q_proj.size
    save(parts, reader, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "base")


def test_only_the_asked_part_is_read(tmp_path, monkeypatch):
    hf_model().save_pretrained(tmp_path)
    reader = open_reader(tmp_path)
    read, sizes = reader.read, []

    def spy(name, index):
        part = read(name, index)
        sizes.append(part.size / np.prod(reader.shape(name)))
        return part

    monkeypatch.setattr(reader, "read", spy)
    load_params(reader, sharding.make_mesh(fsdp=8))
    assert set(sizes) == {1 / 8}


def test_dtype_can_be_chosen(tmp_path):
    hf_model(torch.bfloat16).save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    assert reader.dtype == jnp.bfloat16
    params = load_params(reader, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    save(params, reader, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "base")


def test_the_folder_is_whole(tmp_path):
    hf_model(eos_token_id=[5, 2], bos_token_id=1).save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    save(load_params(reader), reader, tmp_path / "new" / "out", max_shard_bytes=20_000)
    out = tmp_path / "new" / "out"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    card = (out / "README.md").read_text()
    assert 'base_model: "owner/base"' in card
    assert 'language: "sw"' in card
    assert "| learning_rate | 2e-05 |" in card
    assert AutoTokenizer.from_pretrained(out).chat_template == "ours"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors(out).values())
    assert open_reader(out).config == reader.config


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
from tests.checkpoints.test_safetensors import save
reader = open_reader(sys.argv[3])
params = load_params(reader, sharding.make_mesh(fsdp=4, tensor=2), pivot_layer=3, pivot_head=True)
assert not params["lower"]["q_proj"].is_fully_addressable
save(params, reader, sys.argv[4])
"""


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
