"""Untouched weights through from_hf and to_hf, from every kind of source."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import prom_jax
from prom_jax import convert
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints.description import find
from prom_jax.checkpoints.orbax import CheckpointReader
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.checkpoints.safetensors import SafetensorsReader
from prom_jax.data.chat import chat_template
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
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
    heads = {"pivot_head": 3}
    params = weights.load_params(open_reader(source), heads=heads)
    params["pivot_head"] = params["pivot_head"] + 1
    split = decoder.abstract(model.config, heads=heads)
    prom_jax.save_hf(decoder.with_params(split, params), tokenizer, tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "orbax")
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    back, _ = prom_jax.load(tmp_path / "back")
    assert back.heads == heads
    np.testing.assert_array_equal(back.pivot_head[...], params["pivot_head"])
    np.testing.assert_array_equal(back.stack1.q_proj[...], params["stack1"]["q_proj"])
    assert json.loads((tmp_path / "orbax" / "model.json").read_text())["heads"] == heads


def test_details_travel_with_an_export(tmp_path, byte_level):
    """How a model was made reaches every program that opens its export, and outlives conversions."""
    model, tokenizer = prom_jax.load(folder(tmp_path / "source", byte_level, torch.float32, True))
    card = {"base_model": "owner/base", "method": "prom", "pivot.weight": 0.1, "prompts": "sw", "seed": 0}
    template = chat_template(tokenizer, "sw")
    prom_jax.save_hf(model, tokenizer, tmp_path / "hf", card=card, template=template)
    assert open_reader(tmp_path / "hf").details == card
    assert open_reader(tmp_path / "source").details == {}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").prom_jax == card
    convert.from_hf(tmp_path / "hf", tmp_path / "orbax")
    assert CheckpointReader(tmp_path / "orbax").details == card
    (tmp_path / "back").mkdir()
    convert.to_hf(tmp_path / "orbax", tmp_path / "back" / "hf")  # a card has the folder's name for a title
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / "hf" / path.name).read_bytes(), path.name


def test_a_checkpoint_is_read_in_parts(tmp_path, byte_level):
    source = folder(tmp_path / "source", byte_level, torch.bfloat16, False)
    convert.from_hf(source, tmp_path / "orbax")
    folder_reader, reader = open_reader(source), CheckpointReader(tmp_path / "orbax")
    assert reader.names == folder_reader.names and reader.dtype == folder_reader.dtype
    for name in reader.names:
        index = tuple(slice(size // 4, size // 2) for size in reader.shape(name))
        np.testing.assert_array_equal(reader.read(name, index), folder_reader.read(name, index), strict=True)
    mesh = sharding.make_mesh(fsdp=8)
    parts, whole = weights.load_params(reader, mesh), weights.load_params(folder_reader)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_a_stack_is_never_read_whole(tmp_path, byte_level, monkeypatch):
    """What is asked of a source at a time is one layer at most, going there and coming back."""
    source = folder(tmp_path / "source", byte_level, torch.float32, False)
    asked = []
    for owner in (SafetensorsReader, CheckpointReader):
        read = owner.read

        def spy(self, name, index, read=read):
            part = read(self, name, index)
            asked.append(part.nbytes)
            return part

        monkeypatch.setattr(owner, "read", spy)
    convert.from_hf(source, tmp_path / "orbax")
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert max(asked) == max(tensor.nbytes for tensor in tensors(source).values())
    assert sum(asked) == 2 * sum(tensor.nbytes for tensor in tensors(source).values())


def test_one_step_of_several(tmp_path, byte_level):
    source = folder(tmp_path / "source", byte_level, torch.float32, True)
    convert.from_hf(source, tmp_path / "orbax")
    shutil.copytree(tmp_path / "orbax" / "0", tmp_path / "orbax" / "7")
    (tmp_path / "orbax" / "7" / "params" / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"orbax/7 is damaged, .* cannot be read"):
        convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    convert.to_hf(tmp_path / "orbax" / "0", tmp_path / "back")
    assert tensors(tmp_path / "back").keys() == tensors(source).keys()
    with pytest.raises(UserError, match="orbax/3 holds no whole checkpoint"):
        convert.to_hf(tmp_path / "orbax" / "3", tmp_path / "other")


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
    assert find(tmp_path / "orbax") == tmp_path / "orbax"
    assert find(tmp_path) is None
