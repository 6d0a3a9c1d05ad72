"""Flags about devices and processes, for commands."""

import argparse
import os

from prom_jax.parallel.multihost import run_distributed
from prom_jax.parallel.sharding import AXES, make_mesh
from prom_jax.utils import cli


def add_compute(parser, data: int = 1, fsdp: int = -1, tensor: int = 1):
    """Adds the dtype of computing and the mesh's sizes to a parser.

    Args:
      parser: an argparse parser.
      data, fsdp, tensor: default sizes of the mesh's axes; -1 takes all devices that are left.
    """
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--compute_dtype",
        choices=("float32", "bfloat16"),
        help="dtype of computing (default: float32 on CPU, bfloat16 elsewhere)",
    )
    for axis, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        about = f"devices along the axis {axis}; -1: all that are left"
        group.add_argument(f"--mesh.{axis}", metavar="N", type=cli.integer, default=size, help=about)


def mesh(arguments: argparse.Namespace):
    """The mesh that the flags of `add_compute` ask for."""
    return make_mesh(*(getattr(arguments, f"mesh.{axis}") for axis in AXES))


def add_processes(parser):
    """Adds what `processes` takes to an argparse parser."""
    group = parser.add_argument_group("processes", "Where the environment does not tell of them.")
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="process 0 (default: $JAX_COORDINATOR_ADDRESS)")
    add(
        "--num_processes",
        metavar="N",
        type=cli.integer,
        default=_from_environment("JAX_NUM_PROCESSES"),
        help="how many there are (default: $JAX_NUM_PROCESSES)",
    )
    add(
        "--process_id",
        metavar="N",
        type=cli.integer,
        default=_from_environment("JAX_PROCESS_ID"),
        help="which one this is, from 0 (default: $JAX_PROCESS_ID)",
    )
    add(
        "--connect_timeout",
        metavar="SECONDS",
        type=cli.number,
        default=300.0,
        help="until when all processes must have come",
    )
    add(
        "--hang_timeout",
        metavar="SECONDS",
        type=cli.number,
        default=3600.0,
        help="after which a step that hangs ends the run; 0: never",
    )


def processes(arguments: argparse.Namespace):
    """A context in which this process runs in step with those that the flags of `add_processes` or the
    environment tell of; see `multihost.run_distributed`."""
    return run_distributed(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        connect_timeout=arguments.connect_timeout,
        hang_timeout=arguments.hang_timeout,
    )


def _from_environment(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None
