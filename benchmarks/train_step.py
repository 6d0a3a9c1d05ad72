"""python -m benchmarks.train_step --config=FILE[:variant] --peer=published|padded|xllama2
    [--repetitions=5] [--compile] [--out=FILE] [--config.KEY=VALUE …]

Times updates of PROM beside a peer's on the same examples, in the same dtype, on the same device or cores:

  published  torch and transformers as in the published script: English and target text each through all
             blocks, packed end to end into rows of data.seq_len that see each other
  padded     the same, but a text a row, padded to the longest of four as in Alpaca; its losses must be ours
  xllama2    our own baseline: all text through all blocks and the main head

With adapters (:lora) the peer's are peft's, of the same rank, matrices and initial values, its pivot head's
too.

Each side is a process of its own, and they take turns; a first update of each is not counted. λ is as
configured, whatever a probe would say. Needs requirements-dev.txt.
"""

import argparse
import copy
import math
import os
import resource
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks import measure
from prom_jax import train
from prom_jax.checkpoints import pretrained as models
from prom_jax.ops import attention
from prom_jax.parallel import sharding
from prom_jax.training import budget
from prom_jax.utils import cli, command
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError

TOLERANCE = 1e-3  # relative, between losses in float32 after several updates
# Dense bfloat16 FLOP/s, from the vendors' data sheets, by the beginning of a device's name.
PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}
LAYOUTS = {
    "published": "texts end to end in rows of data.seq_len that see each other",
    "padded": "a text a row, padded to the longest of four",
}


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # processes share a GPU
    config = measure.configuration(arguments.config, arguments.repetitions + 1)
    with tempfile.TemporaryDirectory() as folder:
        ours = train.plan(config, Path(folder, "ours"))
        sides = {"ours": measure.Worker(Ours, config, f"{folder}/ours")}
        if arguments.peer == "xllama2":
            baseline = copy.deepcopy(config)
            baseline.method = "xllama2"
            theirs = train.plan(baseline, Path(folder, "peer"))
            sides["peer"] = measure.Worker(Ours, baseline, f"{folder}/peer")
        else:
            theirs = ours
            sides["peer"] = torch_side(ours, folder, arguments)
        jobs = {"ours": ours, "peer": theirs}
        results, seconds = run(jobs, sides, arguments)
        peaks = {name: side.call("peak") for name, side in sides.items()}
    report(jobs, results, seconds, peaks, arguments)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("benchmarks.train_step", __doc__)
    parser.add_run()
    peers = ("published", "padded", "xllama2")
    parser.add_argument("--peer", choices=peers, default="published", help="what stands beside PROM")
    measure.add_arguments(parser, 5, "updates of each side that count")
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer")
    return parser.parse_args(argv)


def torch_side(job: train.Job, folder: str, arguments: argparse.Namespace) -> measure.Worker:
    """The peer in torch, with the weights that `job` starts from."""
    from benchmarks.peers import Peer

    if job.mesh.size > 1:
        raise UserError(f"the peer runs on one device, not {job.mesh.size}: set CUDA_VISIBLE_DEVICES=0")
    source = job.config.model
    if source.endswith(".gguf"):
        source = f"{folder}/hf"
        models.save_hf(*models.load(job.config.model), source, dtype="float32")
    about = job.method, job.config
    return measure.Worker(Peer, source, arguments.peer, *about, arguments.compile)


class Ours:
    """A run of prom_jax, update by update."""

    def __init__(self, config, workdir: str):
        console.quiet = True  # the parent has printed all
        command.keep_freed_memory()
        self.job = train.plan(config, Path(workdir))
        jax.set_mesh(self.job.mesh)
        self.update, abstract = train.compile_update(self.job)
        params, opt_state = train.init_state(self.job, train.load(self.job), abstract)
        trained, self.frozen = self.job.split(params)
        self.state = trained, opt_state
        self.upcoming = train.batch_iterator(self.job, 0)
        self.stops = sharding.by_process(self.job.mesh, False)

    def step(self) -> tuple[float, int]:
        """The next update; returns its loss and the places of its rows, filled or not."""
        batch, _ = next(self.upcoming)
        results = jax.block_until_ready(self.update(*self.state, batch, self.stops, self.frozen))
        *self.state, metrics = results
        return float(metrics["loss"]), sum(map(math.prod, self.job.batches.shapes.values()))

    def peak(self) -> int:
        """Bytes in use at most: of a device, or of this process on a CPU."""
        statistics = jax.local_devices()[0].memory_stats() or {}
        of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return statistics.get("peak_bytes_in_use", of_process)


def run(jobs: dict, sides: dict, arguments: argparse.Namespace) -> tuple[dict, dict]:
    """(loss, places) of each side's updates, and seconds of those that count."""
    results = {name: [] for name in sides}

    def update(name):
        job, number = jobs[name], len(results[name])
        in_torch = name == "peer" and arguments.peer in LAYOUTS
        given = (texts(job, number), float(job.schedule(number))) if in_torch else ()
        results[name].append(sides[name].call("step", *given))

    turns = {name: lambda name=name: update(name) for name in sides}
    seconds = measure.interleaved(turns, arguments.repetitions)
    return results, seconds


def texts(job: train.Job, step: int) -> dict[str, list]:
    """Token ids of an update's examples and whether each bears loss, by stream."""
    records = job.records.read(job.batches.examples_of(step))

    def of_stream(stream):
        return [(record[f"{stream}_tokens"], record[f"{stream}_loss"]) for record in records]

    return {stream: [text for text in of_stream(stream) if len(text[0])] for stream in job.batches.shapes}


def work(job: train.Job, step: int) -> dict[str, float]:
    """What an update trains on, whoever computes it."""
    records, examples = job.records, job.batches.examples_of(step)
    flops = budget.training_flops(job.base.config, job.method, records, examples, job.lora)
    loss_tokens = sum(records.streams[stream].weights[examples].sum() for stream in job.batches.shapes)
    return {
        "examples": len(examples),
        "tokens": job.batches.tokens(step),
        "loss tokens": int(loss_tokens),
        "model GFLOPs": flops / 1e9,
    }


def report(jobs: dict, results: dict, seconds: dict, peaks: dict, arguments: argparse.Namespace) -> None:
    """Medians over updates as a table, and what each side does."""
    config, mesh = jobs["ours"].config, jobs["ours"].mesh
    steps = range(1, len(seconds["ours"]) + 1)
    amounts = {name: [work(job, step) for step in steps] for name, job in jobs.items()}
    rows = [measure.compared("seconds an update", seconds)]
    for what in amounts["ours"][0]:
        amount = lambda name, what=what: [each[what] for each in amounts[name]]
        rate = {name: np.divide(amount(name), seconds[name]) for name in jobs}
        rows.append(measure.compared(f"{what} a second", rate))
    device = mesh.devices.flat[0].device_kind
    for peak in (peak for beginning, peak in PEAKS.items() if device.startswith(beginning)):
        # What a side shares it does not compute; that is about as many FLOPs as tokens.
        done = {name: 1 - job.batches.saved for name, job in jobs.items()}
        done |= {"peer": 1.0} if arguments.peer in LAYOUTS else {}
        mfu = {name: done[name] * each * 1e9 / (peak * mesh.size) for name, each in rate.items()}
        rows.append(measure.compared("MFU", mfu))
    losses, places = ({name: [step[i] for step in results[name]] for name in jobs} for i in (0, 1))
    places = {name: each[1:] for name, each in places.items()}
    rows.append(measure.compared("places computed an update", places))
    rows.append(measure.compared("peak memory (GiB)", {name: [peak / 2**30] for name, peak in peaks.items()}))
    apart = np.abs(np.divide(losses["peer"], losses["ours"]) - 1).max()
    notes = [f"{name}: {text}" for name, text in about(jobs, arguments.peer).items()]
    notes += [f"losses: the peer's differ from ours by {apart:.1e} of these at most"]
    title = f"Updates of {config.batch.sequences} rows of {config.data.seq_len} on {mesh.size} × {device}"
    measure.report(title, rows, arguments.out, notes)
    if arguments.peer == "padded" and config.compute_dtype == "float32" and not apart < TOLERANCE:
        raise SystemExit("the two sides do not compute the same")


def about(jobs: dict, peer: str) -> dict[str, str]:
    """What each side does, in a line."""
    descriptions = {}
    for name, job in jobs.items():
        config = job.config
        backend, dtype = attention.resolve(config.attention), config.optimizer.dtype
        shapes = ", ".join(
            f"{rows} × {length} {stream}" for stream, (rows, length) in job.batches.shapes.items()
        )
        appended = f", {job.batches.appended} appended" * bool(job.batches.appended)
        descriptions[name] = (
            f"{config.method} in JAX; texts in rows ({shapes}{appended}) without "
            f"seeing each other; shared prompts save {job.batches.saved:.0%} of the tokens; attention "
            f"{backend}; heads on loss-bearing tokens; AdamW in {dtype}"
        )
    if peer in LAYOUTS:
        descriptions["peer"] = (
            f"prom in torch{' with peft' * (config.adapter.kind == 'lora')}; {LAYOUTS[peer]}; English "
            "through all blocks; attention SDPA, causal; heads on all tokens; AdamW fused, in float32"
        )
    both = f"{config.compute_dtype}, remat {config.remat}, clip {config.optimizer.clip}"
    return descriptions | {"both": both}


if __name__ == "__main__":
    cli.guard(main)
