"""python -m benchmarks.scaling [--devices=8,32,128,256] [--rows=32] [--length=2048]
    [--attention=splash] [--state=float32] [--hlo=DIRECTORY] [--out=FILE]

Compiles training steps of LLaMA-2-7B for slices of TPU v5p from shapes alone, with the compiler that such a
slice would use and without one: bytes of parameters, optimizer, activations and temporaries, FLOPs, and what
collectives send, all of one device in one step; then the time that this predicts. Needs `libtpu`, in the
version that `pip install -e '.[tpu]'` brings.
"""

import argparse
import collections
import math
import os
import re
import time
import types
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.synthetic import llama2_7b
from prom_jax.checkpoints.params import abstract_params
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.training import budget
from prom_jax.training.methods.prom import PROM
from prom_jax.training.optimizer import abstract_state, make_optimizer, make_schedule
from prom_jax.training.step import make_update
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError

# Of v5p, by the chips that are used.
SLICES = {1: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
ROWS, PIVOT = 32, 24  # the paper's
ENGLISH = 4  # a row of English has so many times fewer tokens
HAVE_LOSS = {"target": 2 / 3, "english": 1 / 2}  # of a row's tokens
# A gather is kept whole rather than taken apart into a ring of steps that overlap with the product: the bytes
# are the same, and it is easier to read and to compile.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Chips, their bfloat16 FLOP/s, and bytes a second that one sends in one direction; from the data sheets of
# NVIDIA (dense; half of NVLink's figure) and the documentation of Cloud TPU (half of ICI's).
HARDWARE = {
    "8 × A100-80GB": (8, 312e12, 300e9),
    "8 × H100": (8, 989e12, 450e9),
    "v5p-64, 32 chips": (32, 459e12, 600e9),
}
REACHED = 0.5  # of either figure: an assumption
RECOMPUTED = 4 / 3  # FLOPs over model FLOPs, as each block's forward pass is run twice
UPDATES = 3 * 52_002 // ROWS  # three epochs of Alpaca, were every pair rows of its own
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--devices", default="8,32,128,256", help="chips, several with commas")
    parser.add_argument("--rows", type=int, default=ROWS, help="of an update")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--attention", default="splash", choices=("splash", "xla"))
    parser.add_argument("--state", default="float32", choices=("float32", "bfloat16"), help="optimizer.dtype")
    parser.add_argument("--hlo", help="a directory for the compiled programs' text")
    parser.add_argument("--out")
    arguments = parser.parse_args(argv)
    # Nothing here asks for a TPU, nor for the metadata server of a machine that has one.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    rows = [study(int(chips), arguments) for chips in arguments.devices.split(",")]
    title = f"LLaMA-2-7B on TPU v5p, per chip and step (GB = 1e9 bytes), rows of {arguments.length} tokens"
    measure.report(title, rows, arguments.out)
    predictions = [
        predict(name, row, arguments.length)
        for name, (chips, *_) in HARDWARE.items()
        for row in rows
        if row["chips"] == chips and arguments.rows == ROWS
    ]
    if predictions:
        title = (
            f"Predicted, not measured: {REACHED:.0%} of the FLOP/s and of the bandwidth of the data sheets"
        )
        measure.report(title, predictions, None)


def predict(name: str, row: dict, length: int) -> dict:
    """The time of a step on some hardware, if all that is sent hides behind computing, and if none does."""
    peak, bandwidth = HARDWARE[name][1:]
    computing = RECOMPUTED * row["model TFLOP"] * 1e12 / (REACHED * peak)
    sending = sum(row[f"{kind} GB"] for kind in KINDS) * 1e9 / (REACHED * bandwidth)
    best, worst = max(computing, sending), computing + sending
    tokens = ROWS * (length + length // ENGLISH)
    return {
        "hardware": name,
        "computing s": computing,
        "sending s": sending,
        "step s": f"{best:.2f} to {worst:.2f}",
        "tokens/s": f"{tokens / worst:,.0f} to {tokens / best:,.0f}",
        f"hours for {UPDATES:,} updates": f"{UPDATES * best / 3600:.1f} to {UPDATES * worst / 3600:.1f}",
    }


def study(chips: int, arguments) -> dict:
    """Compiles one step and tells what it takes. Chips beyond one a row split matrices (`tensor`), so that
    the batch stays the paper's."""
    length, rows = arguments.length, arguments.rows
    tensor = -(-chips // rows)
    mesh = sharding.make_mesh(1, -1, tensor, devices=slice_of(chips))
    began = time.perf_counter()
    compiled, (params, opt_state), batch = compile_step(
        mesh, llama2_7b(), PIVOT, length, rows, attention=arguments.attention, state=arguments.state
    )
    seconds, program = time.perf_counter() - began, compiled.as_text()
    if arguments.hlo:
        Path(arguments.hlo).mkdir(parents=True, exist_ok=True)
        (Path(arguments.hlo) / f"{chips}.txt").write_text(program)
    sent = collections.Counter()
    for each in collectives(program):
        sent[each.kind] += each.sent * each.times
    gigabytes = lambda number: number / 1e9
    return {
        "chips": chips,
        "fsdp × tensor": f"{mesh.shape['fsdp']} × {tensor}",
        "parameters GB": gigabytes(on_device(params)),
        "optimizer GB": gigabytes(on_device(opt_state)),
        "activations GB": gigabytes(kept_activations(llama2_7b(), batch)),
        "temporary GB": gigabytes(compiled.memory_analysis().temp_size_in_bytes),
        "model TFLOP": model_flops(llama2_7b(), length, rows) / chips / 1e12,
        **{f"{kind} GB": gigabytes(sent[kind]) for kind in KINDS},
        "compiled in s": seconds,
    }


def slice_of(chips: int):
    """Devices of a slice that need not be there."""
    if chips not in SLICES:
        raise UserError(f"--devices={chips}: expected any of {', '.join(map(str, SLICES))}")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"v5p:{SLICES[chips]}")
        return topology.devices[:chips]  # the smallest slice has more than one
    except RuntimeError as error:
        raise UserError(
            f"the TPU compiler cannot be used ({error}): pip install -e '.[tpu]', and let one process at a "
            "time use it"
        ) from error


def compile_step(
    mesh,
    config,
    pivot_layer: int,
    length: int,
    rows=ROWS,
    options=OPTIONS,
    attention="xla",
    state="float32",
):
    """The compiled update of PROM on a mesh, blocks recomputed, and the shapes that it takes.

    Returns: the program; parameters and optimizer state; the batch.
    """
    method = PROM(pivot_layer)
    compute = decoder.Compute("bfloat16", "full", attention)  # 'auto' would look at this machine
    model = decoder.abstract(config, compute=compute, heads=method.heads, param_dtype=state)
    schedule = make_schedule(2e-5, 0.03, "cosine", 1000)
    optimizer = make_optimizer(schedule, weight_decay=0.0, clip=1.0, dtype=state)
    params = abstract_params(model, mesh)
    state = params, abstract_state(optimizer, params, mesh)
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    part = lambda length: {
        name: jax.ShapeDtypeStruct(
            (rows, length), np.float32 if name == "weights" else np.int32, sharding=where
        )
        for name in ("tokens", "positions", "segments", "labels", "weights")
    }
    batch = {"target": part(length), "english": part(length // ENGLISH)}
    update = jax.jit(make_update(model, method, optimizer, 1), donate_argnums=(0, 1))
    with jax.set_mesh(mesh):
        return update.lower(*state, batch).compile(compiler_options=options), state, batch


def on_device(tree) -> int:
    """Bytes of one device's shards."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def kept_activations(config, batch) -> int:
    """Bytes that a device keeps from forward to backward: every block's input, in bfloat16."""
    blocks = {"target": config.num_hidden_layers, "english": PIVOT}
    tokens = lambda rows: math.prod(rows["tokens"].sharding.shard_shape(rows["tokens"].shape))
    return sum(2 * blocks[stream] * config.hidden_size * tokens(rows) for stream, rows in batch.items())


def model_flops(config, length: int, rows: int) -> float:
    """FLOPs of a step of full rows, as `budget` counts them: without recomputation."""
    lengths = {"target": np.full(rows, length), "english": np.full(rows, length // ENGLISH)}
    streams = {
        stream: types.SimpleNamespace(lengths=each, weights=HAVE_LOSS[stream] * each)
        for stream, each in lengths.items()
    }
    records = types.SimpleNamespace(streams=streams)
    return budget.training_flops(config, PROM(PIVOT), records, np.arange(rows))


# Collectives of a compiled program.


class Collective(types.SimpleNamespace):
    """kind: one of KINDS; shapes: of its result, as (dtype, sizes); sent: bytes that a device sends each
    time; times: in a step; computation: that it is in; source: the JAX operation that it comes from."""


def collectives(program: str) -> list[Collective]:
    """Those of a compiled program's text; one in a loop whose length is not known is counted once."""
    # A kernel's own text may have lines that begin with a brace.
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}$", program, re.MULTILINE | re.DOTALL))
    entry = re.search(r"^ENTRY %(\S+)", program, re.MULTILINE)[1]
    found = []

    def visit(name, times):
        for line in bodies[name].splitlines():
            operation = re.search(r"= (.*?) ([a-z][\w-]*)\(", line)
            if not operation or operation[2].endswith(("-done", "-update")):
                continue
            kind = operation[2].removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, operation[1], line, computation=name, times=times))
            condition = re.search(r"condition=%([\w.\-]+)", line)
            turns = re.findall(r"constant\((\d+)\)", bodies[condition[1]]) if condition else []
            for called in re.findall(r"(?:body|calls)=%([\w.\-]+)", line):
                visit(called, times * int((turns or [1])[0]))

    visit(entry, 1)
    return found


def _collective(kind: str, result: str, line: str, **where) -> Collective:
    shapes = [
        (dtype, tuple(map(int, sizes.split(","))))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]+)\]", result)
    ]
    if f"{kind}-start" in line and kind != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # the operands come first
    # A TPU's reduce-scatter is an all-reduce of which a fusion of this name keeps a part.
    is_scattered = kind == "all-reduce" and where["computation"].startswith("all-reduce-scatter")
    group = 1 if kind == "collective-permute" else _group_size(line)
    share = {
        "collective-permute": 1,
        "all-reduce": (1 if is_scattered else 2) * (group - 1) / group,
        "reduce-scatter": group - 1,
    }.get(kind, (group - 1) / group)
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind="reduce-scatter" if is_scattered else kind,
        shapes=shapes,
        sent=share * sum(WIDTHS[dtype] * math.prod(sizes) for dtype, sizes in shapes),
        source=source[1] if source else "",
        **where,
    )


def _group_size(line: str) -> int:
    """How many devices take part together, in either of the notations."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(
            int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        )
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    return len(re.search(r"replica_groups=\{\{([\d,]+)\}", line)[1].split(","))


if __name__ == "__main__":
    cli.guard(main)
