"""python -m benchmarks.base_dtype --config=FILE[:variant] [--updates=0] [--out=FILE] [--config.KEY=VALUE …]

What it costs to keep the frozen parameters in less precision: held-out bits per byte for each
`adapter.base_dtype`, of the base model and after some updates of its adapters. More text to evaluate on is
given as --config.eval.text.
"""

import argparse
import tempfile
from pathlib import Path

import jax

from benchmarks import measure
from prom_jax import train
from prom_jax.utils import cli
from prom_jax.utils.console import console

DTYPES = ("float32", "bfloat16", "int8", "nf4")
ENDING = "_bits_per_byte"


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    config = measure.configuration(arguments.config, max(arguments.updates, 1))
    config.adapter.kind, config.export.adapter = "lora", False
    config.eval.every = config.eval.samples = 0
    rows = []
    for dtype in DTYPES:
        console.print(f"\n{dtype}")
        config.adapter.base_dtype = dtype
        with tempfile.TemporaryDirectory() as folder:
            before, *after = held_out(config, Path(folder, "run"), arguments.updates)
        rows += [{"updates": 0, "frozen": dtype} | before]
        rows += [{"updates": arguments.updates, "frozen": dtype} | results for results in after]
    measure.report(f"Held-out bits per byte of {config.model}", rows, arguments.out)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("benchmarks.base_dtype", __doc__)
    parser.add_run()
    parser.add_argument("--updates", metavar="N", type=cli.at_least(0), default=0, help="of adapters")
    parser.add_argument("--out", metavar="FILE", help="where the table goes as JSON")
    return parser.parse_args(argv)


def held_out(config, workdir: Path, updates: int) -> list[dict[str, float]]:
    """Bits per byte of each stream, before the updates and, where there are some, after them."""
    if updates:
        summary = train.train(config, workdir)
        results = [summary["base"], summary["final"]]
    else:
        job = train.plan(config, workdir)
        with jax.set_mesh(job.mesh):
            params = train.load(job)
            results = [{key: value for each in job.held_out for key, value in each(params).items()}]
    return [
        {
            key.removeprefix("eval_").removesuffix(ENDING): value
            for key, value in each.items()
            if ENDING in key
        }
        for each in results
    ]


if __name__ == "__main__":
    cli.guard(main)
