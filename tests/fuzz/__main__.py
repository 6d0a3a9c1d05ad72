"""python -m tests.fuzz [--minutes=M] [--out=DIR] [TARGET …]

Feeds the readers files that nobody meant to write, found by atheris (`pip install atheris`), for M minutes a
target. A reader has to work or to raise UserError in one line, within SECONDS and MEMORY, without opening
what is not its own, asking the network or starting anything. Prints a line a target, and leaves each input
that broke this in DIR/TARGET/findings, beside it why. DIR/TARGET/corpus keeps what was found worth to go on
from.
"""

import argparse
import contextlib
import hashlib
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

SECONDS = 10  # for one input; most take milliseconds
MEMORY = 512 * 2**20  # bytes for one input of at most LARGEST
LARGEST = 2**16
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
# Of Python's audit events, those that reach out of the process.
OUTSIDE = (
    "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class"
)  # fmt: skip


def main():
    """Fuzzes one target after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=2, help="for each target")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "prom_jax_fuzz")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # of the processes that this one starts
    arguments = parser.parse_args()
    if arguments.only:
        return fuzz(arguments.only, arguments.out, 60 * arguments.minutes)
    from tests.fuzz.targets import TARGETS

    for name in arguments.targets or TARGETS:
        before = time.monotonic()
        executions = supervise(name, arguments.out / name, 60 * arguments.minutes)
        findings = len(list((arguments.out / name / "findings").glob("*.txt")))
        seconds = time.monotonic() - before
        print(f"{name:<14} {executions:>10,} executions {seconds:>6.0f} s  {findings} findings", flush=True)


def supervise(name: str, out: Path, seconds: float) -> int:
    """Runs `fuzz` in a process of its own, again where an input ends it; returns the number of executions."""
    (out / "findings").mkdir(parents=True, exist_ok=True)
    (out / "corpus").mkdir(exist_ok=True)
    (out / "work").mkdir(exist_ok=True)
    counter, input = out / "executions", out / "input"
    counter.write_bytes(bytes(8))
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 5:
        command = [sys.executable, "-m", "tests.fuzz", f"--only={name}", f"--out={out}"]
        command.append(f"--minutes={left / 60}")
        with open(out / "log", "ab") as log:
            environment = os.environ | ENVIRONMENT | {"TMPDIR": str(out / "work")}
            status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        if status:  # killed by a signal, or by libFuzzer for its time
            reason = "took too long" if status == 70 else f"ended the process with status {status}"
            log = (out / "log").read_bytes()[-4000:].decode(errors="replace")
            keep(out, input.read_bytes(), reason, f"{reason}\n\n{log}")
    return int.from_bytes(counter.read_bytes(), "little")


def fuzz(name: str, out: Path, seconds: float):
    """Fuzzes one target in this process until the time is over or an input kills it."""
    import atheris

    with atheris.instrument_imports(include=["prom_jax", "gguf"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = out / "corpus"
    for seed in target.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    folder = out / "work"
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    counter = mmap.mmap(os.open(out / "executions", os.O_RDWR), 8)
    watch = Watch(folder)
    for seed in target.seeds:  # what is imported and compiled at first use is not the input's
        run(target, watch, out, seed)
    limit = memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def once(data):
        (out / "input").write_bytes(data)
        run(target, watch, out, data)
        counter[:] = (int.from_bytes(counter[:], "little") + 1).to_bytes(8, "little")

    mutate = lambda data, size, seed: target.mutate(data, size, random.Random(seed))
    flags = [f"-max_total_time={int(seconds)}", f"-timeout={SECONDS}", f"-max_len={LARGEST}"]
    flags += ["-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    atheris.Setup(["fuzz", *flags, str(corpus)], once, custom_mutator=mutate)
    atheris.Fuzz()


def run(target, watch: "Watch", out: Path, data: bytes):
    """Reads one input; what goes wrong is kept."""
    from prom_jax.utils.errors import UserError

    try:
        target.write(watch.folder / "files", data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return  # stands for no file
    watch.seen = []
    try:
        with watch:
            target.read(watch.folder / "files")
    except UserError as error:
        if len(str(error).splitlines()) != 1 or not str(error).isprintable():
            keep(out, data, "unclear error", str(error))
    except BaseException as error:  # such as a panic of Rust's
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "prom_jax/" in frame.filename][-1:]
        keep(out, data, f"{type(error).__name__} {ours}", "".join(traceback.format_exception(error)[-30:]))
    for event in watch.seen:
        keep(out, data, event, event)


class Watch:
    """While it is entered, notes what is opened outside the folder, Python and the package, and what reaches
    out of the process."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self._on = folder, [], False
        own = Path(__file__).resolve().parents[2]
        own = (folder, own, sys.prefix, sys.base_prefix, *sys.path, "/proc/", "/sys/", "/dev/null")
        self._own = tuple(os.path.realpath(path) for path in own)
        sys.addaudithook(self._note)

    def __enter__(self):
        self._on = True

    def __exit__(self, *error):
        self._on = False

    def _note(self, event, arguments):
        if not self._on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self._own):
                self.seen.append(f"opened {path}")
        elif event in OUTSIDE:
            self.seen.append(f"{event} {arguments!r:.200}")


def keep(out: Path, data: bytes, reason: str, text: str):
    """Keeps an input, one a reason."""
    name = hashlib.sha256(reason.encode()).hexdigest()[:12]
    path = out / "findings" / f"{name}.txt"
    if not path.exists():
        path.with_suffix(".input").write_bytes(data)
        with contextlib.suppress(MemoryError):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")


def memory() -> int:
    """Bytes of private writable memory, which RLIMIT_DATA limits."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


if __name__ == "__main__":
    main()
