"""Checkpoints that survive: meshes, policies, damage, a full disk."""

import json
import os
import random
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prom_jax import train as door
from prom_jax.checkpoints.description import Description, describe
from prom_jax.checkpoints.orbax import CheckpointReader
from prom_jax.checkpoints.params import ParamsReader
from prom_jax.checkpoints.training import Checkpoints, checksums
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests.reference import hf_model, to_model

MESHES = {"one": {"fsdp": 1}, "fsdp": {"fsdp": 8}, "tensor": {"fsdp": 1, "tensor": 8}}
MESHES["mixed"] = {"data": 2, "fsdp": 2, "tensor": 2}


def state(mesh, seed=0):
    """A little of what training holds: a stack, a matrix, bfloat16 and float32, and a scalar."""
    chance = np.random.default_rng(seed)
    params = {
        "stack0": {"q_proj": chance.standard_normal((3, 16, 24), np.float32)},
        "lm_head": jnp.asarray(chance.standard_normal((32, 16), np.float32), jnp.bfloat16),
    }

    def place(path, x):
        return jax.device_put(x, sharding.param_sharding(mesh, ("tensor", "fsdp"), x.shape))

    count = jax.device_put(jnp.int32(7), NamedSharding(mesh, PartitionSpec()))
    return {"params": jax.tree.map_with_path(place, params), "opt_state": {"count": count}}


def make_mesh(name):
    sizes = MESHES[name]
    return sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def abstract(items):
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return {name: jax.tree.map(shape, item) for name, item in items.items()}


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, (expected["params"], expected["opt_state"]))


def saved(directory, steps, **policy):
    """A directory with a state of each step, seeded by its number."""
    store = Checkpoints(directory, **policy)
    for step, loss in steps.items():
        store.save(step, loss, **state(make_mesh("fsdp"), step))
    store.close()
    return directory


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


@pytest.mark.parametrize(
    "before, after", [("fsdp", "one"), ("one", "fsdp"), ("fsdp", "tensor"), ("mixed", "fsdp")]
)
def test_another_mesh(tmp_path, before, after):
    store = Checkpoints(tmp_path)
    expected = state(make_mesh(before))
    store.save(5, **expected)
    store.close()
    wanted = abstract(state(make_mesh(after)))
    step, found = Checkpoints(tmp_path).resume(**wanted)
    assert step == 5
    assert_same(found, expected)
    jax.tree.map(lambda x, want: x.sharding == want.sharding or pytest.fail(), found, tuple(wanted.values()))


def test_what_is_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 4.0, 6: 5.0, 7: 6.0}
    assert steps(saved(tmp_path / "latest", losses, keep=2)) == [6, 7]
    assert steps(saved(tmp_path / "best", losses, keep=1, keep_best=2)) == [2, 4, 7]
    assert steps(saved(tmp_path / "every", losses, keep=1, keep_every=3)) == [3, 6, 7]
    assert steps(saved(tmp_path / "all", losses)) == [*losses]


def data_files(step):
    """The files that hold the arrays' values."""
    return [path for path in step.glob("*/**/d/*") if path.stat().st_size > 1000]


def flip_a_bit(step):
    path = max(data_files(step), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(step):
    for path in data_files(step):
        path.write_bytes(path.read_bytes()[:100])


def lose_values(step):
    for path in data_files(step):
        path.unlink()


def lose_tree(step):
    (step / "params" / "_METADATA").write_text("{")


def lose_item(step):
    subprocess.run(["rm", "-r", step / "opt_state"], check=True)


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lose_values, lose_tree, lose_item])
def test_a_damaged_step_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    saved(tmp_path, {1: None, 2: None})
    damage(tmp_path / "2")
    store = Checkpoints(tmp_path)
    step, found = store.resume(**abstract(state(make_mesh("one"))))
    assert step == 1
    assert_same(found, state(make_mesh("one"), 1))
    assert "step 2 is damaged" in (told := capsys.readouterr().out) and "going on from step 1" in told
    assert (tmp_path / "2.damaged").is_dir()
    store.save(2, **state(make_mesh("one"), 2))  # its place is free again
    store.close()
    assert steps(tmp_path) == [1, 2]


def test_a_step_that_was_not_finished_does_not_count(tmp_path):
    saved(tmp_path, {1: None, 2: None})
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    store = Checkpoints(tmp_path)
    assert store.resume(**abstract(state(make_mesh("one"))))[0] == 1
    store.save(3, **state(make_mesh("one")))
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_nothing_whole_is_a_start(tmp_path):
    assert Checkpoints(tmp_path).resume(**abstract(state(make_mesh("one")))) == (0, None)


def test_every_bit_counts():
    chance = random.Random(0)
    for dtype in (np.float32, jnp.bfloat16, np.int32):
        x = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
        bits = x.copy().view(np.uint8)
        bits.ravel()[chance.randrange(bits.size)] ^= 1 << chance.randrange(8)
        assert checksums({"x": x}) != checksums({"x": bits.view(dtype).reshape(x.shape)})
    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    assert checksums(x) == {"": int(np.sum(x.view(np.uint32), dtype=np.uint32))}
    spread = jax.device_put(x, NamedSharding(make_mesh("fsdp"), PartitionSpec(None, "fsdp")))
    assert checksums(spread) == checksums(x)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_one_step_alone(small_disk, capsys):
    store, mesh = Checkpoints(small_disk / "checkpoints"), make_mesh("one")
    store.save(1, **state(mesh, 1))
    store.close()
    store = Checkpoints(small_disk / "checkpoints")
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    big = state(mesh, 2)
    store.save(2, **big)
    with pytest.raises(UserError, match=r"step 2 could not be saved \(No space left.*whole step is 1"):
        store.close()
    assert "WARNING   " in capsys.readouterr().out
    assert_same((big["params"], big["opt_state"]), state(mesh, 2))  # is still there
    assert steps(small_disk / "checkpoints") == [1]
    (small_disk / "filler").unlink()
    store = Checkpoints(small_disk / "checkpoints")
    step, found = store.resume(**abstract(big))
    assert step == 1
    assert_same(found, state(mesh, 1))
    store.save(2, **big)
    store.close()
    assert steps(small_disk / "checkpoints") == [1, 2]


def test_room_that_is_made_lets_the_next_save_through(small_disk):
    store, mesh = Checkpoints(small_disk / "checkpoints"), make_mesh("one")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 16384))
    store.save(1, **state(mesh, 1))
    store._finish()
    filler.unlink()
    store.save(2, **state(mesh, 2))
    store.close()
    assert steps(small_disk / "checkpoints") == [2]


@pytest.mark.slow
def test_training_goes_on_from_the_step_before_a_damaged_one(config, tmp_path, capsys):
    config.checkpoint.keep_best, config.checkpoint.directory = 1, str(tmp_path / "elsewhere")
    config.eval.every, config.eval.samples = 3, 0
    door.train(config, tmp_path / "run")
    assert steps(tmp_path / "elsewhere") == [6, 8]
    read = lambda: [
        {key: value for key, value in json.loads(line).items() if "_per_second" not in key}
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    before = read()
    cut(tmp_path / "elsewhere" / "8")
    door.train(config, tmp_path / "run")
    assert "step 8 is damaged" in (told := capsys.readouterr().out) and "resumed   after step 6" in told
    assert read() == before
    assert CheckpointReader(tmp_path / "elsewhere").step == 8


def test_stacks_that_are_cut_at_an_exit_without_a_head_are_read(byte_level, tmp_path):
    model = to_model(hf_model("llama2"), 3, hf_model("llama2").lm_head.weight, more_exits=(1,))
    assert model.exits == (1, 3) and model.heads == {"pivot_head": 3}
    describe(tmp_path, Description(model.config, model.heads, "float32", {}, (1,)), byte_level)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params=decoder.to_params(model))
    checkpoints.close()
    reader = CheckpointReader(tmp_path)
    expected = ParamsReader(model)
    assert reader.names == expected.names and reader.heads == model.heads
    for name in (*reader.names, "pivot_head.weight"):
        whole = tuple(map(slice, reader.shape(name)))
        np.testing.assert_array_equal(reader.read(name, whole), expected.read(name, whole))
