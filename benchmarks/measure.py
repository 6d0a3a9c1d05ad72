"""What benchmarks share: repetitions that take turns, medians, and a table that is also written as JSON."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.table import Table

from prom_jax.checkpoints import pretrained as models
from prom_jax.utils import cli, command
from prom_jax.utils.console import console

PACKAGES = ("jax", "torch", "transformers", "tokenizers", "datasets", "tensorflow-datasets", "grain")


def configuration(config, steps: int):
    """A configuration for a run of `steps` updates, with λ as it says whatever a probe would."""
    command.keep_freed_memory()  # which works before JAX is asked for its devices
    config.pivot.regulate = "never"
    config.steps = steps
    config.compute_dtype = config.compute_dtype or models.default_compute_dtype()
    return config


def add_arguments(parser, repetitions: int, counted: str):
    """Adds --repetitions, with its default and what it counts, and --out to a parser."""
    parser.add_argument("--repetitions", metavar="N", type=cli.at_least(1), default=repetitions, help=counted)
    parser.add_argument("--out", metavar="FILE", help="where the table goes as JSON")


def interleaved(sides: dict[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each side. The sides take turns, so that what else the machine does
    falls on all; a first run of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if repetition:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class Worker:
    """An object in a process of its own: sides share neither threads nor an allocator, and each has its peak
    of memory.

    Args: build, arguments: what makes it there; both can be pickled.
    """

    def __init__(self, build: Callable, *arguments):
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawn, initializer=_build, initargs=(build, arguments))

    def call(self, method: str, *arguments):
        """What the object's method returns."""
        return self._process.submit(_call, method, arguments).result()


def _build(build: Callable, arguments: tuple) -> None:
    global _object
    _object = build(*arguments)


def _call(method: str, arguments: tuple):
    return getattr(_object, method)(*arguments)


def report(title: str, rows: list[dict], out: str | None, notes: tuple[str, ...] = ()) -> None:
    """Prints the rows as a table and the notes, and writes them with the machine and versions into `out`."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(
            *(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values())
        )
    console.print(table)
    for note in notes:
        console.print(note)
    machine = environment()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if out:
        Path(out).write_text(
            json.dumps({"title": title, "rows": rows, "notes": notes, "environment": machine}, indent=2)
            + "\n",
            encoding="utf-8",
        )


def environment() -> dict[str, str]:
    """The machine and the versions of what was measured, as far as it is installed."""
    installed = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {"cores": str(len(os.sched_getaffinity(0))), "python": platform.python_version()} | versions


def median(seconds: list[float]) -> float:
    """Of the repetitions."""
    return statistics.median(seconds)


def compared(what: str, values: dict[str, list[float]]) -> dict:
    """A row of the table: the medians of two sides, and that of the first's over the second's, repetition by
    repetition (which may differ in size)."""
    medians = {name: float(median(each)) for name, each in values.items()}
    first, second = values.values()
    return {"what": what, **medians, "ratio": float(median([a / b for a, b in zip(first, second)]))}
