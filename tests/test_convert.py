"""Untouched weights through from_hf and to_hf, from every kind of source."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import prom_jax
from prom_jax import checkpoints, convert, llama, readers, weights
from prom_jax.errors import UserError
from tests.reference import hf_model


def folder(path, tokenizer, dtype, tied, family="llama3"):
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    hf = hf_model(family, tie_word_embeddings=tied, **settings).to(dtype)
    hf.save_pretrained(path, max_shard_size="200KB")
    tokenizer.save_pretrained(path)
    return path


def tensors(path):
    files = [load_file(file) for file in path.glob("model*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_comes_back_byte_for_byte(tmp_path, byte_level, dtype, tied, capsys):
    source = folder(tmp_path / "source", byte_level, dtype, tied)
    convert.main(["from_hf", str(source), str(tmp_path / "orbax")])
    convert.main(["to_hf", str(tmp_path / "orbax"), str(tmp_path / "back")])
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) is not tied
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8)), name
    assert f"wrote {tmp_path / 'back'}" in capsys.readouterr().out


def test_another_dtype(tmp_path, byte_level):
    source = folder(tmp_path / "source", byte_level, torch.float32, True)
    convert.main(["from_hf", str(source), str(tmp_path / "orbax"), "--dtype=bfloat16"])
    convert.main(["to_hf", str(tmp_path / "orbax"), str(tmp_path / "back")])
    for name, tensor in tensors(source).items():
        assert tensor.to(torch.bfloat16).equal(tensors(tmp_path / "back")[name])
    convert.main(["to_hf", str(source), str(tmp_path / "half"), "--dtype=float16"])
    assert tensors(tmp_path / "half")["model.norm.weight"].dtype == torch.float16


def test_a_pivot_head_travels(tmp_path, byte_level):
    source = folder(tmp_path / "source", byte_level, torch.float32, False)
    model, tokenizer = prom_jax.load(source)
    params = weights.load_params(readers.open_reader(source), pivot_layer=3, pivot_head=True)
    params["pivot_head"] = params["pivot_head"] + 1
    split = llama.abstract(model.config, pivot_layer=3, pivot_head=True)
    prom_jax.save_hf(llama.with_params(split, params), tokenizer, tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "orbax")
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    back, _ = prom_jax.load(tmp_path / "back")
    assert back.pivot_layer == 3
    np.testing.assert_array_equal(back.pivot_head[...], params["pivot_head"])
    np.testing.assert_array_equal(back.upper.q_proj[...], params["upper"]["q_proj"])
    assert json.loads((tmp_path / "orbax" / "model.json").read_text())["pivot_layer"] == 3


def test_a_place_in_use_is_refused(tmp_path, byte_level):
    source = folder(tmp_path / "source", byte_level, torch.float32, True)
    with pytest.raises(UserError, match="source is not empty"):
        convert.from_hf(source, source)
    with pytest.raises(UserError, match="not empty and no earlier export"):
        convert.to_hf(source, source)


def test_a_folder_without_a_whole_step_is_refused(tmp_path, byte_level):
    source = folder(tmp_path / "source", byte_level, torch.float32, True)
    convert.from_hf(source, tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "0")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert checkpoints.find(tmp_path / "orbax") == tmp_path / "orbax"
    assert checkpoints.find(tmp_path) is None
