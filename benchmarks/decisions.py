"""python -m benchmarks.decisions --model=MODEL [--languages=ar,el] [--seeds=0,1,2] [--tables=DIR]

What regulation decides, with other demonstrations for each seed: a table in Markdown.
"""

import argparse
import tempfile
from pathlib import Path

from prom_jax.analysis import regulation
from prom_jax.analysis.tables import known_languages
from prom_jax.config import default
from prom_jax.parallel.sharding import make_mesh
from prom_jax.training.regulation import decide
from prom_jax.training.setup import open_base
from prom_jax.utils import cli
from prom_jax.utils.console import console

COLUMNS = (
    "",
    "seed",
    "λ",
    "task",
    "sets",
    "rows",
    "P(target) at N",
    "of rows",
    "P(English) at n",
    "P(target) at n",
    "difference",
)


def main(argv=None):
    """Reads the command line and decides."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decisions",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--languages", default=",".join(known_languages()), help="one or more")
    parser.add_argument("--seeds", default="0,1,2", help="one or more")
    parser.add_argument("--tables", default="", help="as in prom_jax.probe")
    parser.add_argument("--regulate", default="auto", choices=("auto", "mean"))
    arguments = parser.parse_args(argv)
    config = default()
    config.model, config.probe.tables = arguments.model, arguments.tables
    config.pivot.regulate = arguments.regulate
    console.print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for config.language in arguments.languages.split(","):
        for config.seed in map(int, arguments.seeds.split(",")):
            for line in lines(config):
                console.print(f"| {' | '.join(line)} |")


def lines(config):
    """A line for each task that was asked; λ stands in the one that decides."""
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(config, Path(folder))
        mesh = make_mesh(**config.mesh)
        found = regulation.measured(config, base, Path(folder), mesh)[config.language]
    weight = decide(config, base.config, found).weight
    for task, numbers in found["tasks"].items():
        low, high = numbers["interval"]
        yield (
            config.language,
            str(config.seed),
            f"{weight:g}" if task == found["task"] else "",
            f"{task}{'' if numbers['can_do'] else ', not done'}",
            str(len(numbers["sets"])),
            str(numbers["rows"]),
            f"{numbers['last']['target']:.2g}",
            f"{numbers['last']['effective_rows']:.1f}",
            f"{numbers['english']:.2g}",
            f"{numbers['target']:.2g}",
            f"{numbers['difference']:.2g} [{low:.2g}, {high:.2g}]",
        )


if __name__ == "__main__":
    cli.guard(main)
