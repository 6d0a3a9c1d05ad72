"""The plan of a whole run, kept in a file where there are so many examples that it takes long to make."""

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prom_jax.data import packing
from prom_jax.data.packing import Layout, Plan, Slots, Texts
from prom_jax.data.shares import draw
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import write_bytes

VERSION = 1  # raise it whenever the same texts are planned in another way
KEPT_FROM = 16_384  # examples


class RunPlan(NamedTuple):
    """What a run takes.

    layout: of every update.
    plan: of all epochs, one after the other.
    updates, examples: how many each epoch has, int64 [epochs].
    """

    layout: Layout
    plan: Plan
    updates: np.ndarray
    examples: np.ndarray


class Request(NamedTuple):
    """What a plan is a function of.

    texts: by stream, the primary one first.
    primary_shape: its rows and their length.
    prompts: as for `packing.choose_layout`.
    times: how often an epoch has each example (`shares.fit`), float64 [examples]; None for each once.
    groups: as for `packing.plan_epoch`.
    seed, epochs, steps: as of a run.
    """

    texts: Mapping[str, Texts]
    primary_shape: tuple[int, int]
    prompts: Mapping[str, np.ndarray]
    times: np.ndarray | None
    groups: np.ndarray
    seed: int | None
    epochs: float
    steps: int

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are another plan's if anything of this changes."""
        settings = VERSION, self.primary_shape, self.seed, self.epochs, self.steps, *self.texts, *self.prompts
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
        columns = (column for texts in self.texts.values() for column in texts)
        for array in (*columns, *self.prompts.values(), self.times, self.groups):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def plan_run(request: Request, directory: Path | None = None) -> RunPlan:
    """The plan of a run: kept in a file of a directory, if one is given and there are many examples."""
    if directory is None or len(request.groups) < KEPT_FROM:
        return _make(request)
    path = directory / f"{request.fingerprint}.plan.npz"
    try:
        return _read(path)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # it is not there, or damaged
        made = _make(request)
    _write(path, made)
    return made


def _make(request: Request) -> RunPlan:
    texts, seed, times = dict(request.texts), request.seed, request.times

    def drawn(epoch: int) -> np.ndarray | None:
        if times is None:
            return None
        assert seed is not None  # without one each example comes once (`loader.Batches`)
        return draw(times, seed, epoch)

    layout = packing.choose_layout(texts, request.primary_shape, dict(request.prompts), drawn(0))
    if stream := layout.appended:
        texts[stream] = packing.without_prompts(texts[stream], request.prompts[stream])
    plans: list[Plan] = []
    while sum(p.updates for p in plans) < request.steps if request.steps else len(plans) < request.epochs:
        epoch = len(plans)
        settings = {"seed": seed, "epoch": epoch, "groups": request.groups, "examples": drawn(epoch)}
        plans.append(packing.plan_epoch(texts, layout, **settings))
    updates, examples = ([len(p.ends) - 1 for p in plans], [len(p.examples) for p in plans])
    return RunPlan(layout, packing.join(plans), np.array(updates), np.array(examples))


def _write(path: Path, made: RunPlan) -> None:
    """Keeps a plan; where it cannot, the next run makes it anew."""
    shapes = np.array(list(made.layout.shapes.values()))
    columns = {"examples": made.plan.examples, "ends": made.plan.ends}
    for stream, slots in made.plan.slots.items():
        columns |= {f"{stream}.{name}": column for name, column in slots._asdict().items()}
    columns = {name: column.astype(np.int32) for name, column in columns.items()}  # half of the bytes
    names = {"streams": np.array(list(made.layout.shapes)), "appended": np.array(made.layout.appended or "")}
    epochs = {"epoch_updates": made.updates, "epoch_examples": made.examples}
    content = io.BytesIO()
    np.savez(content, **columns, **names, **epochs, shapes=shapes)
    with contextlib.suppress(UserError):
        write_bytes(path, content.getvalue())


def _read(path: Path) -> RunPlan:
    with np.load(path) as kept:
        streams = kept["streams"].tolist()
        shapes = dict(zip(streams, map(tuple, kept["shapes"].tolist()), strict=True))
        slots = {
            stream: Slots(*(kept[f"{stream}.{name}"].astype(np.int64) for name in Slots._fields))
            for stream in streams
        }
        plan = Plan(kept["examples"].astype(np.int64), slots, kept["ends"].astype(np.int64))
        layout = Layout(shapes, kept["appended"].item() or None)
        return RunPlan(layout, plan, kept["epoch_updates"], kept["epoch_examples"])
