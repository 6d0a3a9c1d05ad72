"""Folders of safetensors against transformers, byte for byte, and what a reader of them refuses."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import prom_jax
from prom_jax.checkpoints.params import ParamsReader, load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.checkpoints.safetensors import save_hf
from prom_jax.data.templates import wording
from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.models.settings import REQUIRED
from prom_jax.tokenization import folder
from prom_jax.utils.errors import UserError
from tests.tokenization.made_up import TEXTS
from tests.tokenization.test_sentencepiece import VARIANTS, write_model

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
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
CARD = {"base_model": "owner/base", "language": "sw", "method": "prom", "learning_rate": 2e-5}
PIVOT = {"pivot_head": 3}  # and the block after which it reads
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


def save(params, reader, directory, heads=None, **options):
    """Writes parameters, with further heads as in `Decoder`."""
    options = {"dtype": reader.dtype, "chat_template": "ours", "card": CARD, **options}
    model = decoder.with_params(decoder.abstract(reader.config, heads=heads or {}), params)
    save_hf(ParamsReader(model), TOKENIZER, directory, **options)


def tensors(directory):
    """All tensors of a folder, by transformers' names, as (dtype, shape, bytes)."""
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found |= {k: (v.dtype, v.shape, v.tobytes()) for k, v in load_file(path).items()}
    return found


@pytest.mark.parametrize("heads", [{}, PIVOT], ids=["plain", "pivot"])
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


def edit_config(directory, **settings):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_bad_folders_are_refused(tmp_path):
    good = tmp_path / "good"
    hf_model().save_pretrained(good)
    content = load_file(good / "model.safetensors")

    def bad(error, change):
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(UserError, match=error):
            load_params(open_reader(folder))
        shutil.rmtree(folder)

    def weights(**changes):
        changed = {k: v for k, v in {**content, **changes}.items() if v is not None}
        return lambda folder: save_file(changed, folder / "model.safetensors")

    def cut(size):
        return lambda folder: os.truncate(folder / "model.safetensors", size)

    def index(file_name):
        text = json.dumps({"weight_map": {"model.norm.weight": file_name}})

        def change(folder):
            (folder / "model.safetensors.index.json").write_text(text)
            (folder / "model.safetensors").unlink()

        return change

    def renamed(start):
        return lambda folder: save_file(
            {start + name: value for name, value in content.items()}, folder / "model.safetensors"
        )

    def adapter(folder):
        (folder / "adapter_config.json").write_text("{}")

    def adapter_alone(folder):
        adapter(folder)
        (folder / "config.json").unlink()

    def both(folder):
        shutil.copy(folder / "model.safetensors", folder / "part.safetensors")
        weight_map = dict.fromkeys(content, "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def with_one(value):
        matrix = content["model.layers.2.mlp.up_proj.weight"].copy()
        matrix[3, 5] = value
        return weights(**{"model.layers.2.mlp.up_proj.weight": matrix})

    def pickle_alone(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    norm = "model.norm.weight"
    bad(r"model\.safetensors is not a whole safetensors file", cut(20_000))
    bad(r"model\.safetensors is not a whole safetensors file", cut(5))
    bad(r"model\.safetensors is not a whole safetensors file", cut(0))
    bad(r"lacks model\.norm\.weight", weights(**{norm: None}))
    bad(r"holds model\.norm\.bias", weights(**{"model.norm.bias": content[norm]}))
    bad(r"model\.norm\.weight has the shape \[31\].*\[32\]", weights(**{norm: content[norm][:31].copy()}))
    bad(r"model\.norm\.weight is of type I64", weights(**{norm: np.arange(32)}))
    bad(r"embed_tokens\.weight has the shape", lambda folder: edit_config(folder, vocab_size=65))
    bad(r"lacks model\.layers\.4\S* \S* \S* and 6 more", lambda f: edit_config(f, num_hidden_layers=5))
    bad("unsupported architecture", lambda folder: edit_config(folder, model_type="gpt2"))
    bad(r"config\.json does not exist", lambda folder: (folder / "config.json").unlink())
    bad(r"config\.json is not valid JSON", lambda folder: (folder / "config.json").write_text("{"))
    bad("pickle alone", pickle_alone)
    bad("no weights", lambda folder: (folder / "model.safetensors").unlink())
    for outside in (
        "../good/model.safetensors",
        str(good / "model.safetensors"),
        "sub/x.safetensors",
        "x.bin",
    ):
        bad("expected safetensors files in the same folder", index(outside))
    bad("does not exist, though the index", index("gone.safetensors"))
    (tmp_path / "one.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    bad("which the index says is there", lambda folder: [
        save_file({"x": content[norm]}, folder / "part.safetensors"), index("part.safetensors")(folder)
    ])  # fmt: skip
    bad(r"has both model\.safetensors and an index of other files: .*remove", both)
    bad(r"holds an adapter \(adapter_config\.json\) beside its model.*merge_and_unload.*or remove", adapter)
    bad(r"sets base_model_name_or_path=None: expected the path or hub id of the model", adapter_alone)
    bad(r"names of a compiled model; save `model\._orig_mod`", renamed("_orig_mod."))
    bad("are an adapter's; merge", weights(**{f"{norm}.lora_A.weight": content[norm]}))
    bad(r"lacks lm_head\.weight.*set `tie_word_embeddings` to true", weights(**{"lm_head.weight": None}))
    bad(
        r"layers\.2\.mlp\.up_proj\.weight has 1 values that are no finite numbers, such as nan",
        with_one(np.nan),
    )
    bad(r"has 1 values that are no finite numbers, such as inf", with_one(np.inf))
    bad("pivot_layer", lambda f: save_file({"x": content[norm]}, f / "pivot_head.safetensors"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: expected 1 to 10000"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000: expected a whole number"),
        ({"hidden_size": [32]}, r"hidden_size=\[32\]: expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number above 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2': expected a whole number above 0 or null"),
        ({"head_dim": 7}, "head_dim=7: rotary embeddings need an even number"),
        ({"intermediate_size": True}, "intermediate_size=True: expected a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: expected a number above 0"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id=\[1, '2'\]: expected a token's number or a list"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected true or false"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: expected a name"),
        ({"rope_parameters": 7}, "rope_parameters=7: expected an object"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            "factor='2': expected a number above 0",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map=.*not supported"),
        ({"x": "a" * 1000}, "x='a{99}, which"),
    ],
)
def test_values_that_a_config_cannot_have_are_named(tmp_path, settings, error):
    hf_model().save_pretrained(tmp_path)
    edit_config(tmp_path, **settings)
    with pytest.raises(UserError, match=error):
        open_reader(tmp_path)


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        open_reader(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"weight_map|no tensors|names 1"):
        open_reader(tmp_path)


def test_a_tied_head_of_endless_rows_is_not_compared(tmp_path):
    """Rows without columns take no bytes, so that a file may have as many as it likes."""
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"] = {"dtype": "F32", "shape": [10**15, 0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UserError, match=r"lm_head\.weight has the shape"):
        load_params(open_reader(tmp_path))


def test_terminal_codes_of_a_file_show_as_escapes(tmp_path):
    hf_model().save_pretrained(tmp_path)
    header = json.dumps(
        {"a": {"dtype": "\x1b[31m", "shape": [1], "data_offsets": [0, 4]}}, ensure_ascii=False
    )
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(UserError) as raised:
        open_reader(tmp_path)
    assert r"\x1b[31m" in str(raised.value) and str(raised.value).isprintable()


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
    hf = hf_model()
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


TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from prom_jax.parallel import sharding
from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from tests.checkpoints.test_safetensors import PIVOT, save
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
        "layer_types": LAYER_TYPES,
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
