"""python -m benchmarks.lora [--rows=4] [--length=2048] [--rank=16] [--out=FILE]

What adapters save at LLaMA-2-7B, from shapes alone: bytes of an update of PROM on one TPU v5p, by its
compiler, for frozen parameters in bfloat16, int8 and nf4; bytes of a checkpoint; and FLOPs over those of full
fine-tuning, of the program before it is compiled. Needs `libtpu`, as benchmarks.scaling does.

How fast an update is beside peft: python -m benchmarks.train_step --config=configs/demo.py:lora --peer=padded
"""

import functools
import os

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.scaling import ENGLISH, PIVOT, on_device, slice_of
from benchmarks.synthetic import llama2_7b
from prom_jax.checkpoints.params import abstract_params
from prom_jax.models import decoder
from prom_jax.models.blocks import Compute
from prom_jax.models.lora import LoRA, linear_maps
from prom_jax.parallel import sharding
from prom_jax.training.methods.prom import PROM
from prom_jax.training.optimizer import abstract_state
from prom_jax.training.step import make_update, split_params
from prom_jax.utils import cli

BASES = {"bfloat16": "", "int8": "int8", "nf4": "nf4"}


def main(argv=None):
    """Reads the command line and compiles."""
    parser = cli.Parser("benchmarks.lora", __doc__)
    for name, default in (("rows", 4), ("length", 2048), ("rank", 16)):
        parser.add_argument(f"--{name}", metavar="N", type=cli.at_least(1), default=default, help=name)
    parser.add_argument("--out", metavar="FILE", help="where the table goes as JSON")
    arguments = parser.parse_args(argv)
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    rows = [memory(base, arguments) for base in BASES]
    title = (
        f"LoRA of rank {arguments.rank} on LLaMA-2-7B, {arguments.rows} rows of {arguments.length}, one v5p"
    )
    measure.report(title, rows, arguments.out)
    rows = [
        {
            "remat": remat,
            "FLOPs over full fine-tuning's": flops(remat, arguments, True) / flops(remat, arguments),
        }
        for remat in ("none", "full")
    ]
    measure.report("FLOPs of an update", rows, None)


def adapter(config, rank: int, base: str) -> LoRA:
    """Of all matrices of the blocks, and of the pivot head."""
    targets = (*linear_maps(decoder.tensors(config)), "pivot_head")
    return LoRA(rank, 2.0 * rank, targets, base_dtype="bfloat16", quantised=BASES[base])


def setup(mesh, config, pivot: int, lora: LoRA | None, arguments, **compute):
    """An update as a function, and the shapes that it takes: trained, optimizer state, batch, frozen."""
    method = PROM(pivot, head="lora" if lora else "own")
    compute = Compute("bfloat16", **compute)
    model = decoder.abstract(config, compute=compute, heads=method.heads, lora=lora)
    optimizer = optax.adamw(1e-4)
    trained, frozen = split_params(abstract_params(model, mesh), model, method)
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH))

    def rows(length):
        return {
            name: jax.ShapeDtypeStruct(
                (arguments.rows, length), np.float32 if name == "weights" else np.int32, sharding=where
            )
            for name in ("tokens", "positions", "segments", "labels", "weights")
        }

    batch = {"target": rows(arguments.length), "english": rows(arguments.length // ENGLISH)}
    update = jax.jit(make_update(model, method, optimizer, 1), donate_argnums=(0, 1))
    return update, (trained, abstract_state(optimizer, trained, mesh), batch, frozen)


def memory(base: str, arguments) -> dict:
    """What an update takes, in GB."""
    mesh, config = sharding.make_mesh(devices=slice_of(1)), llama2_7b()
    lora = adapter(config, arguments.rank, base)
    update, shapes = setup(mesh, config, PIVOT, lora, arguments, remat="full", attention="splash")
    with jax.set_mesh(mesh):
        compiled = update.lower(*shapes).compile()
    statistics = compiled.memory_analysis()
    needed = statistics.argument_size_in_bytes + statistics.temp_size_in_bytes
    trained, state, _, frozen = shapes
    return {
        "base": base,
        "frozen GB": on_device(frozen) / 1e9,
        "trained and optimizer GB": (on_device(trained) + on_device(state)) / 1e9,
        "temporary GB": statistics.temp_size_in_bytes / 1e9,
        "in all GB": needed / 1e9,
        "checkpoint MB": (on_device(trained) + on_device(state)) / 1e6,
    }


def flops(remat: str, arguments, with_adapters: bool = False) -> float:
    """Of an update of 32 blocks, of which three quarters have English: from those of 4 and 8, as all blocks
    are the same."""

    def of(layers):
        config, mesh = llama2_7b(layers), sharding.make_mesh(fsdp=1, devices=jax.devices("cpu")[:1])
        lora = adapter(config, arguments.rank, "bfloat16") if with_adapters else None
        scan = jax.lax.scan
        jax.lax.scan = functools.partial(scan, unroll=True)  # a loop's body is counted once
        try:
            update, shapes = setup(
                mesh, config, layers * 3 // 4, lora, arguments, remat=remat, attention="xla"
            )
            return update.lower(*shapes).cost_analysis()["flops"]
        finally:
            jax.lax.scan = scan

    few, more = of(4), of(8)
    return few + (more - few) * (32 - 4) / 4


if __name__ == "__main__":
    cli.guard(main)
