"""python -m benchmarks.startup --config=FILE[:variant] [--repetitions=3] [--out=FILE] [training flags]

Seconds from the training command to the end of its first update, in a new work directory, by what passes
between the lines that it prints: with nothing compiled before (cold, once), with what that left (warm), and
the same where torch cannot be imported (without torch), as transformers imports it wherever it is installed.
What is probed and evaluated before the first update counts; --config.pivot.regulate=never and
--config.eval.holdout=0 leave that out. Seconds of the processors say what of it other processes took no part
in.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from prom_jax.utils import cli

# What has been done when a line that begins so comes.
PHASES = {
    "model ": "imports, model's description, tokenizer",
    "method ": "regulation",
    "steps ": "records, plan of batches",
    "memory ": "compilation of the update",
    "step     0": "weights, base model's evaluation",
    "step     1": "first update (with all since the line before)",
}
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = None\n"


def main(argv=None):
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--repetitions", type=int, default=3, help="of the warm runs, which take turns")
    parser.add_argument("--out")
    arguments, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(WITHOUT_TORCH, encoding="utf-8")
        warm = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "PYTHONUNBUFFERED": "1"}
        sides = {"warm": warm, "without torch": warm | {"PYTHONPATH": folder}}
        runs = {"cold": [phases(flags, warm)], **{name: [] for name in sides}}
        for _ in range(arguments.repetitions):
            for name, environment in sides.items():
                runs[name].append(phases(flags, environment))
    rows = [
        {"what": what, **{name: measure.median([run[what] for run in each]) for name, each in runs.items()}}
        for what in runs["cold"][0]
    ]
    measure.report("Seconds to the first update", rows, arguments.out)


def phases(flags: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each phase of a run, and of all of them; the run ends with its first update."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "prom_jax.train", f"--workdir={workdir}", *flags, "--config.steps=1"]
        began = last = time.perf_counter()
        before, seconds = _processors(), {}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                now = time.perf_counter()
                for what in (what for beginning, what in PHASES.items() if line.startswith(beginning)):
                    seconds[what], last = now - last, now
                if line.startswith("step     1"):
                    process.kill()
    if list(seconds)[-1:] != list(PHASES.values())[-1:]:
        raise SystemExit(f"the run ended before its first update: {' '.join(command)}")
    return seconds | {"all": last - began, "all, seconds of the processors": _processors() - before}


def _processors() -> float:
    """Seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    cli.guard(main)
