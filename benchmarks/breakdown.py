"""python -m benchmarks.breakdown --config=FILE[:variant] [--repetitions=3] [--out=FILE] [training flags]
python -m benchmarks.breakdown --draw FILE.json … --out=FILE.png

Where an update's time goes: profiles compiled updates after one that is not counted, takes the fastest, and
sums by kind what the threads (of a GPU: the streams) did. The source lines and operations that the compiled
program keeps for each of its instructions tell the kind: attention and heads are all of theirs, products
included; `elementwise` and `copies, zeros` (what moves or fills memory alone) are of the blocks; `the rest`
is loops, lookups and the runtime.

Seconds are those of all threads over their number, so that they add up to the update's. A thread that waits
for a core counts as busy. λ is as configured, whatever a probe would say.
"""

import argparse
import functools
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
from jax.profiler import ProfileData, ProfileOptions
from matplotlib.figure import Figure

from benchmarks import measure
from benchmarks.train_step import Ours
from prom_jax.utils import cli
from prom_jax.utils.console import console

COLOURS = {
    "matrix products": "tab:blue",
    "attention": "tab:orange",
    "heads": "tab:green",
    "elementwise": "tab:red",
    "copies, zeros": "tab:purple",
    "optimizer": "tab:brown",
    "the rest": "tab:gray",
    "idle": "lightgray",
}
# What a source line belongs to: of the calls that led to it, the innermost in one of these files.
FILES = {
    "/ops/attention": "attention",
    "/ops/cross_entropy.py": "heads",
    "/ops/": None,  # the operation tells
    "/models/": None,
    "/training/objective.py": None,
    "/training/": "optimizer",
    "/optax/": "optimizer",
}
WAITING = "(wait for completion)"  # how the name of what only waits for other threads ends
GRADIENT = "accumulate"  # of training/step.py what only sums gradients of the blocks
PRODUCTS = {"dot", "convolution", "custom-call"}
INSTRUCTION = re.compile(r"^ *(?:ROOT )?%(\S+) = (.*)$", re.MULTILINE)
CONTROL = {"while", "conditional", "gather", "scatter", "sort"}
MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "copy", "broadcast", "iota",
    "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "select", "convert",
    "fusion", "call",
}  # fmt: skip


def main(argv=None):
    """Reads the command line, measures and reports."""
    parser = cli.Parser("benchmarks.breakdown", __doc__)
    parser.add_run()
    measure.add_arguments(parser, 3, "updates of which the fastest is reported")
    arguments = parser.parse_args(argv)
    config = measure.configuration(arguments.config, 2 * arguments.repetitions + 1)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, folder)
        console.quiet = False
        ours.step()
        pairs = [(seconds(ours.step), traced(ours.step)) for _ in range(arguments.repetitions)]
    unprofiled, profiles = zip(*pairs)
    wall, data = min(profiles, key=lambda profile: profile[0])
    kind, spent = kinds(ours.update.as_text()), Counter()
    for instruction, nanoseconds in self_times(data).items():
        spent[kind(instruction)] += nanoseconds / 1e9 / lanes(data)
    spent["idle"] = max(0.0, wall - spent.total())
    rows = [{"what": what, "seconds": spent[what], "share": spent[what] / wall} for what in COLOURS]
    title = f"An update of {config.batch.sequences} rows of {config.data.seq_len}, {wall:.3g} s"
    notes = f"without the profiler {min(unprofiled):.3g} s", f"{lanes(data)} threads (or devices) at once"
    measure.report(title, rows, arguments.out, notes)


def seconds(function) -> float:
    """What a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def traced(function) -> tuple[float, ProfileData]:
    """What a call takes, and its profile."""
    options = ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls are many and none of these instructions
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            wall = seconds(function)
        (file,) = Path(folder).rglob("*.xplane.pb")
        return wall, ProfileData.from_file(str(file))


# What the threads did -----------------------------------------------------------------------------


def lines(data) -> list:
    """The threads of a profile; of devices their streams, where there are any."""
    devices = [plane for plane in data.planes if plane.name.startswith("/device:")]
    streams = [line for plane in devices for line in plane.lines if line.name.startswith("Stream")]
    return streams or [line for plane in data.planes if plane.name == "/host:CPU" for line in plane.lines]


def lanes(data) -> int:
    """How much of that can be done at once: a device's streams share it, threads have a core each."""
    devices = sum(any(line.name.startswith("Stream") for line in plane.lines) for plane in data.planes)
    return devices or len(os.sched_getaffinity(0))


def self_times(data) -> Counter:
    """Nanoseconds in each instruction of the program, without those in the ones that it calls. What a thread
    does as part of another's instruction is that instruction's; None stands for what is nobody's."""
    spent, handed = Counter(), {}
    for line in lines(data):
        inside = []  # ends and names of the spans that are open
        for start, end, what, number in sorted(spans(line), key=lambda span: (span[0], -span[1])):
            while inside and inside[-1][0] <= start:
                inside.pop()
            around = inside[-1][1] if inside else None
            if what == "handed over":
                handed[number] = around
                continue
            spent[what or number] += end - start
            if around is not None:
                spent[around] -= end - start
            inside.append((end, what or number))
    of_instructions = Counter()
    for what, nanoseconds in spent.items():
        while isinstance(what, int):
            what = handed.get(what)
        of_instructions[what] += nanoseconds
    del of_instructions[WAITING]
    return of_instructions


def spans(line):
    """(start, end, instruction, None) of a thread's instructions, WAITING in its place where it only waits,
    (start, end, None, number) of the tasks that it was given, and (at, at, 'handed over', number) where it
    gave one to another thread."""
    began = None
    for event in line.events:
        stats, at = dict(event.stats), event.start_ns
        if "hlo_op" in stats:
            yield at, event.end_ns, stats["hlo_op"], None
        elif event.name.endswith(WAITING):
            yield at, event.end_ns, WAITING, None
        elif event.name == "ThreadpoolListener::Record":
            yield at, at, "handed over", stats["_p"]
        elif event.name == "ThreadpoolListener::StartRegion":
            began = at, stats["_c"]
        elif event.name == "ThreadpoolListener::StopRegion" and began:
            yield began[0], at, None, began[1]


# What an instruction is ---------------------------------------------------------------------------


def kinds(program: str):
    """A function that gives the kind of a compiled program's instruction by its name, from the text."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}$", program, re.MULTILINE | re.DOTALL))
    instructions, home, caller, source = {}, {}, {}, sources(program)
    for computation, body in bodies.items():
        for name, text in INSTRUCTION.findall(body):
            instructions[name] = text
            home[name] = computation
            caller |= dict.fromkeys(re.findall(r"(?:body|calls|to_apply)=%([\w.\-]+)", text), name)

    def operations(text: str):
        """(type, operation) of an instruction, and of those in the computation that it calls."""
        yield re.match(r"(\S+|\(.*?\)) ([a-z][\w-]*)\(", text).groups()
        if called := re.search(r"(?:calls|to_apply)=%([\w.\-]+)", text):
            for _, inner in INSTRUCTION.findall(bodies[called[1]]):
                yield from operations(inner)

    def frame(name: str) -> str | None:
        """An instruction's stack frame; what XLA made itself has that of the loop that it is in."""
        while name in instructions:
            if known := re.search(r"stack_frame_id=(\d+)", instructions[name]):
                return known[1]
            name = caller.get(home[name])

    @functools.cache
    def kind(name: str | None) -> str:
        if name not in instructions:
            return "the rest"
        if of_source := source(frame(name)):
            return of_source
        types, done = zip(*operations(instructions[name]))
        if PRODUCTS & set(done):
            return "matrix products"
        if CONTROL & set(done):
            return "the rest"
        computes = any(re.match("f|bf", each) and what not in MOVES for each, what in zip(types, done))
        return "elementwise" if computes else "copies, zeros"

    return kind


def sources(program: str):
    """A function that gives the kind that a stack frame's source tells, or None."""
    rows = lambda pattern: {key: rest for key, *rest in re.findall(pattern, program, re.MULTILINE)}
    part = lambda heading: program.partition(f"\n{heading}\n")[2].partition("\n\n")[0]
    names = lambda heading: dict(re.findall(r'^(\d+) "(.*)"$', part(heading), re.MULTILINE))
    files, functions = names("FileNames"), names("FunctionNames")
    places = rows(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) ")
    frames = rows(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}")

    def source(frame: str | None) -> str | None:
        while frame in frames:
            place, parent = frames[frame]
            file, function = files[places[place][0]], functions[places[place][1]]
            for name, kind in FILES.items():
                if name in file:
                    return None if function.startswith(GRADIENT) else kind
            frame = str(int(parent) - 1)  # 1 is none
        return None

    return source


# The figure ---------------------------------------------------------------------------------------


def draw(argv=None):
    """Reads the command line of `--draw` and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__)
    parser.add_argument("--draw", nargs="+", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    bars = {path.stem: json.loads(path.read_text())["rows"] for path in arguments.draw}
    stacked_bars(bars, arguments.out)


def stacked_bars(bars: dict[str, list[dict]], path: Path):
    """Draws a bar of seconds by kind for each name."""
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for name, rows in bars.items():
        left = 0.0
        for row in rows:
            bar = axes.barh(name, row["seconds"], left=left, color=COLOURS[row["what"]], label=row["what"])
            if row["share"] >= 0.03:
                axes.bar_label(bar, [f"{row['seconds']:.1f}"], label_type="center", fontsize="small")
            left += row["seconds"]
        axes.text(left, name, f" {left:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="seconds of an update", xlim=(0, 1.1 * axes.get_xlim()[1] / 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    of_first = len(labels) // len(bars)
    figure.legend(handles[:of_first], labels[:of_first], loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draws = any(argument.startswith("--draw") for argument in sys.argv)
    cli.guard(draw if draws else main)
