"""Folders of safetensors against transformers, and everything that a reader of them refuses."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.utils.errors import UserError
from tests.checkpoints.test_safetensors import hf_model


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
        return lambda folder: (folder / "model.safetensors.index.json").write_text(text)

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
    bad("which the index places there", lambda folder: [
        save_file({"x": content[norm]}, folder / "part.safetensors"), index("part.safetensors")(folder)
    ])  # fmt: skip
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


def test_links_lead_out_of_a_folder_only_into_the_hubs_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    hf_model().save_pretrained(snapshot)
    shutil.copytree(snapshot, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).unlink()
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        assert open_reader(source).names

    def bad():
        with pytest.raises(UserError, match="leads out of its folder, or no file"):
            open_reader(folder)

    folder = shutil.copytree(snapshot, tmp_path / "copy")  # of the files
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(blobs / "generation_config.json")
    bad()
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    bad()
    (blobs / "config.json").unlink()
    (blobs / "config.json").symlink_to("/etc/hostname")
    folder = snapshot
    bad()


def test_bad_sources_are_refused(tmp_path):
    for source in (tmp_path / "gone", "a/b/c", "gone.gguf", "owner/gone.gguf"):
        with pytest.raises(UserError, match="does not exist"):
            open_reader(source)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match="is not a model"):
        open_reader(tmp_path / "weights.bin")
    with pytest.raises(UserError, match=r"ask for access and log in with `hf auth login`"):
        open_reader("no-such-owner/no-such-model")  # offline here


def test_a_gated_model_says_where_to_ask(monkeypatch):
    def gated(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a real response

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(UserError, match=r"ask for access on its page on the hub"):
        open_reader("owner/model")


def test_terminal_codes_of_a_file_show_as_escapes(tmp_path):
    hf_model().save_pretrained(tmp_path)
    header = json.dumps(
        {"a": {"dtype": "\x1b[31m", "shape": [1], "data_offsets": [0, 4]}}, ensure_ascii=False
    )
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(UserError) as raised:
        open_reader(tmp_path)
    assert r"\x1b[31m" in str(raised.value) and str(raised.value).isprintable()
