"""Meshes, where parameters lie on them, and rows."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests.reference import hf_model


def test_the_rest_of_the_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]).shape)["fsdp"] == 1


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 4, 1), (-1, -1, 1), (0, 8, 1), (2, 8, 1)])
def test_a_mesh_that_does_not_match(sizes):
    with pytest.raises(UserError, match=f"mesh.data={sizes[0]} .* does not match the 8 devices"):
        sharding.make_mesh(*sizes)


def test_parameters():
    mesh = sharding.make_mesh(2, 2, 2)
    axes = decoder.param_axes(config_from_hf(hf_model("llama2").config.to_dict()))
    place = lambda name, shape: sharding.param_sharding(mesh, axes[name], shape).spec
    assert place("q_proj", shape=(3, 8, 4)) == PartitionSpec(None, "tensor", "fsdp")
    assert place("down_proj", shape=(3, 8, 4)) == PartitionSpec(None, "fsdp", "tensor")
    assert place("norm", shape=(4,)) == PartitionSpec("fsdp")
    # 199 rows do not split in two: the axis stays whole.
    assert place("lm_head", shape=(199, 4)) == PartitionSpec(None, "fsdp")


def test_rows_are_padded_with_empty_ones():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = {"tokens": np.arange(10, dtype=np.int32).reshape(5, 2)}
    placed = sharding.place_rows(mesh, rows, multiple=2)["tokens"]
    assert placed.shape == (8, 2) and placed.sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(placed[:5], rows["tokens"])
    assert not placed[5:].any()


def test_without_a_mesh_nothing_is_asked():
    x = np.ones(3)
    assert sharding.constrain(x, "fsdp") is x
    assert sharding.num_batch_shards(jax.sharding.get_abstract_mesh()) == 1
