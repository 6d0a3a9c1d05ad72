"""python -m prom_jax.regulate --config=configs/th.py [--workdir=DIR]

Decides λ, the weight of the pivot loss, as pivot.regulate says. With 'auto' and 'mean' the base model is
probed, once for a work directory: what the probe finds is kept there as regulation.json (of several languages
as regulation.sw.json and so on), which prepare and train read.
"""

import argparse
from pathlib import Path

from prom_jax.analysis import regulation
from prom_jax.config import languages, of_language
from prom_jax.parallel import flags, sharding
from prom_jax.training.regulation import Regulation, decide, file_name, label_of
from prom_jax.training.setup import open_base
from prom_jax.utils import cli
from prom_jax.utils.console import console


def regulate(config, workdir: Path) -> dict[str, Regulation]:
    """Decides λ of each language, and prints why.

    Args:
      config: see `prom_jax.config`.
      workdir: the work directory; where a probe decides it gets what this found, unless it has one that
        holds.

    Returns:
      The decisions by language.

    Raises:
      UserError: for input that cannot be used.
    """
    mesh = sharding.make_mesh(**config.mesh)
    base = open_base(config, workdir)
    codes, decisions = languages(config), {}
    for code, found in regulation.measured(config, base, workdir, mesh).items():
        decision = decisions[code] = decide(of_language(config, code), base.config, found)
        console.print(decision.lines(label_of(code, codes)))
        if decision.measured:
            console.print(f"kept in {workdir / file_name(code, codes)}")
    return decisions


def main(argv=None):
    """Reads the command line and decides."""
    arguments = parse(argv)
    with flags.processes(arguments):
        regulate(arguments.config, arguments.workdir)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.regulate", __doc__)
    parser.add_run()
    flags.add_processes(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.guard(main)
