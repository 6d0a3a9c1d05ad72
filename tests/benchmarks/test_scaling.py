"""What moves between devices in a training step, as XLA's partitioner leaves it on any hardware."""

import collections
import dataclasses

import pytest

from benchmarks import scaling
from benchmarks.synthetic import llama2_7b
from prom_jax.parallel import sharding

LENGTH = 44  # this and its quarter are tokens in a row, and nothing else
VOCABULARY, HIDDEN, INNER, PIVOT = 200, 64, 96, 2
CONFIG = dataclasses.replace(
    llama2_7b(4),
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)


def partitioned(folder, **sizes):
    """The collectives of a step on a mesh, before a device's own passes touch them."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    scaling.compile_step(sharding.make_mesh(**sizes), CONFIG, PIVOT, LENGTH, options=options)
    (program,) = folder.glob("*after_spmd-partitioning*")
    return scaling.collectives(program.read_text())


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return partitioned(tmp_path_factory.mktemp("fsdp"), fsdp=8)


def is_activation(collective):
    """Whether what moves has a row's tokens as a dimension, and is no token id."""
    return any(
        {LENGTH, LENGTH // scaling.ENGLISH} & set(shape) for kind, shape in collective.shapes if kind != "s32"
    )


def test_weights_are_gathered_once_a_pass_in_the_compute_dtype(fsdp):
    matrices = {(HIDDEN, HIDDEN): 4, (INNER, HIDDEN): 2, (HIDDEN, INNER): 1, (HIDDEN,): 2}
    loops, others = collections.defaultdict(collections.Counter), collections.Counter()
    for each in fsdp:
        if each.kind == "all-gather" and each.shapes[0][0] != "s32":
            ((dtype, shape),) = each.shapes
            assert dtype == "bf16"
            (loops[each.computation] if each.times > 1 else others)[shape] += 1
    # Forward and backward, either stack: English and target go through the lower one side by side.
    assert list(loops.values()) == 4 * [matrices]
    assert others == {(VOCABULARY, HIDDEN): 2, (HIDDEN,): 1}  # two heads, the final norm


def test_activations_stay_where_they_are_but_for_the_embedding(fsdp):
    moved = [each for each in fsdp if is_activation(each)]
    assert {(each.kind, each.times) for each in moved} == {("all-to-all", 1)}
    assert len(moved) == 4  # English and target, forward and backward
    rows = scaling.ROWS // 8
    table = 2 * VOCABULARY * HIDDEN
    assert max(each.sent for each in moved) == 2 * rows * LENGTH * HIDDEN * 7 / 8 < table


def test_tensor_parallelism_needs_sums_of_activations_alone(tmp_path, capfd):
    moved = [each for each in partitioned(tmp_path, fsdp=4, tensor=2) if is_activation(each)]
    assert {each.kind for each in moved if each.times > 1} == {"all-reduce"}
    forward = [each for each in moved if each.times > 1 and "transpose" not in each.source]
    assert len(forward) == 3 * 2  # after attention and after the MLP
    assert "rematerialization" not in capfd.readouterr().err
