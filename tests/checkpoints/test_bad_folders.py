"""What is wrong with a folder of safetensors is said when it is opened, with the remedy."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import hf_model


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
