"""Parameters between a reader and the devices: stacks, shards, dtypes and the pivot head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import PIVOT, hf_model, save, tensors


@pytest.mark.parametrize("tied", [True, False])
def test_pivot_head_starts_as_a_copy_and_comes_back(tmp_path, tied):
    hf_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    reader = open_reader(tmp_path / "base")
    params = load_params(reader, heads=PIVOT)
    head = params["embed_tokens" if tied else "lm_head"]
    np.testing.assert_array_equal(params["pivot_head"], head)
    assert [params[stack]["q_proj"].shape[0] for stack in ("stack0", "stack1")] == [3, 1]

    params["pivot_head"] = params["pivot_head"] + 1
    save(params, reader, tmp_path / "out", PIVOT)
    with safe_open(tmp_path / "out" / "pivot_head.safetensors", "numpy") as file:
        assert list(file.keys()) == ["pivot_head.weight"]
        assert file.metadata()["pivot_layer"] == "3"
    again = open_reader(tmp_path / "out")
    assert again.heads == PIVOT
    trained = load_params(again, heads=PIVOT)
    jax.tree.map(np.testing.assert_array_equal, trained, params)
    assert "pivot_head" not in load_params(again)
    with pytest.raises(UserError, match=r"layer 3.*pivot\.layer is 2"):
        load_params(again, heads={"pivot_head": 2})


def test_parameters_are_where_the_model_wants_them(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path)
    reader = open_reader(tmp_path)
    params = load_params(reader, exits=(1,))
    tokens = np.arange(40)[None] % 64
    ours = decoder.with_params(decoder.abstract(reader.config, exits=(1,)), params)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(tokens), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_shards_equal_the_whole(tmp_path, sizes):
    hf_model().save_pretrained(tmp_path / "base")
    mesh = sharding.make_mesh(**{"fsdp": 1, **sizes})
    reader = open_reader(tmp_path / "base")
    whole = load_params(reader, heads=PIVOT)
    parts = load_params(reader, mesh, heads=PIVOT)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    q_proj = parts["stack0"]["q_proj"]
    assert q_proj.sharding == sharding.param_sharding(mesh, ("tensor", "fsdp"), q_proj.shape)
    assert q_proj.addressable_shards[0].data.size < q_proj.size
    save(parts, reader, tmp_path / "out", PIVOT)
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
