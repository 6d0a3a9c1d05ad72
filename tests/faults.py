"""Runs of two processes that break at random moments; used by test_distributed.

    python -m tests.faults FAULT STEP PROCESS flags…

is prom_jax.train with a fault at a step of a process (see `spoil`).
"""

import contextlib
import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TIMINGS = {"tokens_per_second", "model_flops_per_second"}
LIMIT = 60  # seconds in which all processes must have ended after a fault
STATUS = {  # by fault: what all processes, or those that are left, end with
    "term one": 75, "term all": 75, "kill": 69, "stop": 69, "data": 2, "hang": 69, "nan": 2, "disk one": 2,
    "disk all": 2,
}  # fmt: skip
ABORT = -6  # what is left after process 0, the coordinator, is killed ends with: JAX sees to it
MESSAGE = {
    "kill": "no sign of life", "stop": "no sign of life", "data": "data of step", "hang": "nothing has moved",
    "nan": "loss nan", "disk one": "File too large", "disk all": "File too large",
}  # fmt: skip
INSIDE = ("data", "hang", "nan", "disk one", "disk all")  # made in the processes, by `spoil`
FILE_BYTES = 20_000  # what a file may hold on a disk that is full: less than the parts of a checkpoint


def metrics(workdir: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the machine."""
    lines = (
        (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else ()
    )
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


class Run:
    """Processes of one run, with a device each; what they print goes into files."""

    def __init__(self, config: Path, workdir: Path, module=("prom_jax.train",), number: int = 2, flags=()):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        flag = "--xla_force_host_platform_device_count=8"
        environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(flag, "")}
        self.workdir, self.logs = (
            workdir,
            [workdir.parent / f"{workdir.name}-{id}.log" for id in range(number)],
        )
        self.processes = []
        for id, log in enumerate(self.logs):
            command = [sys.executable, "-u", "-m", *module, f"--config={config}", f"--workdir={workdir}"]
            command += [f"--coordinator=localhost:{port}", f"--num_processes={number}", f"--process_id={id}"]
            with log.open("a") as output:
                process = subprocess.Popen(
                    [*command, *flags], stdout=output, stderr=subprocess.STDOUT, env=environment
                )
            self.processes.append(process)

    def wait(self, timeout: float) -> list[int]:
        """Exit statuses; kills what has not ended in time, and raises TimeoutExpired."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0, end - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self):
        """Ends every process."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def until(self, rows: int, timeout: float = 300):
        """Waits until metrics.jsonl has so many rows, or the run has ended."""
        end = time.monotonic() + timeout
        while len(metrics(self.workdir)) < rows and all(p.poll() is None for p in self.processes):
            assert time.monotonic() < end, "the run does not start"
            time.sleep(0.02)

    def output(self, id: int) -> str:
        """What a process has printed."""
        return self.logs[id].read_text(errors="replace")


def broken(config: Path, workdir: Path, fault: str, chance: random.Random) -> str:
    """Runs until the fault has ended it; a line that tells what happened."""
    victim, step = chance.randrange(2), chance.randint(2, 11)
    module = ("prom_jax.train",)
    if fault in INSIDE:
        module = ("tests.faults", fault, str(step), str(victim))
    run = Run(config, workdir, module, flags=["--hang_timeout=15"] if fault == "hang" else [])
    left = [0, 1]
    try:
        run.until(step)
        if fault in INSIDE:
            run.processes[0].wait(300)
        else:
            time.sleep(chance.uniform(0, 0.2))
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(fault, signal.SIGTERM)
            for process in run.processes if fault == "term all" else [run.processes[victim]]:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
        if fault in ("kill", "stop"):
            left = [1 - victim]
        begun = time.monotonic()
        ended = [run.processes[id].wait(LIMIT) for id in left]
        seconds = time.monotonic() - begun
    finally:
        run.kill()
    rows = metrics(workdir)
    reached = rows[-1]["step"] if rows else 0
    told = f"{fault:<8} process {victim} step {reached:>2}: {ended} after {seconds:4.1f} s"
    if ended == [0] * len(ended):
        return f"{told} (it was over)"
    text = "".join(run.output(id) for id in left)
    outside = fault.startswith("term") and -signal.SIGTERM in [p.returncode for p in run.processes]
    if fault == "stop" and victim == 0:
        assert ended == [69] and "process 0, the coordinator, has not answered" in text, f"{told}\n{text}"
    elif fault == "kill" and victim == 0:
        assert ended == [ABORT] and "coordination service" in text, f"{told}\n{text}"
    elif not outside:  # of the updates, where SIGTERM ends a process at once
        assert set(ended) == {STATUS[fault]} and MESSAGE.get(fault, "") in text, f"{told}\n{text}"
    return told


def spoil(fault: str, at: int, victim: int):
    """Makes reading the data of a step fail ('data') or hang ('hang') in a process, gives weights in all
    processes that are not numbers ('nan'), or lets files grow no more, in one or all, from the first
    checkpoint at or after the step ('disk …')."""
    from prom_jax.checkpoints.training import Checkpoints
    from prom_jax.data.loader import Batches

    read, save = Batches.read, Checkpoints.save
    mine = f"--process_id={victim}" in sys.argv

    def spoiled(batches, step, wanted=None):
        batch = read(batches, step, wanted)
        if batches.num_steps < 12 or step + 1 != at:  # an evaluation has fewer
            return batch
        if fault == "data" and mine:
            raise OSError(5, "Input/output error")
        if fault == "hang" and mine:
            time.sleep(3600)
        if fault == "nan":
            batch["target"]["weights"] *= np.float32("nan")
        return batch

    def full(checkpoints, step, *args, **items):
        if step >= at and (fault == "disk all" or (fault == "disk one" and mine)):
            checkpoints._finish()  # the one before
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY))
        save(checkpoints, step, *args, **items)

    Batches.read, Checkpoints.save = spoiled, full


def prepare(folder: Path, tokenizer) -> Path:
    """A tiny model, its data, and a configuration file of 12 steps for both, which is returned."""
    from tests.tiny import make, tiny_config

    folder.mkdir(parents=True, exist_ok=True)
    c = tiny_config(make(folder, tokenizer))
    c.steps, c.eval.samples = 12, 0
    path = folder / "config.py"
    path.write_text(
        "from prom_jax import config as configuration\n\n\ndef get_config(variant=''):\n"
        f"    c = configuration.default()\n    c.update({json.loads(c.to_json())!r})\n    return c\n"
    )
    return path


def unbroken(config: Path, workdir: Path) -> list[dict]:
    """The rows of a run that nothing disturbs."""
    run = Run(config, workdir)
    assert run.wait(300) == [0, 0], run.output(0) + run.output(1)
    return metrics(workdir)


if __name__ == "__main__":
    spoil(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.argv[1:] = sys.argv[4:]
    runpy.run_module("prom_jax.train", run_name="__main__")
