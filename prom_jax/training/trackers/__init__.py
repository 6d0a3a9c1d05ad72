"""What a run reports: metrics.jsonl, which is the record, and the trackers in which people watch it.

Every module of this folder with a `TRACKER` is found by itself, and is known by the name of its file.
"""

import contextlib
import importlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process
from prom_jax.utils.workdir import cannot_write, write_text


class Run(NamedTuple):
    """What a tracker is told of a run when it is opened.

    Attributes:
      workdir: of the run.
      id: letters and digits, which stay the same when the run goes on.
      step: the one from which it goes on; -1 at its start.
      settings: of the run, in JSON's types.
    """

    workdir: Path
    id: str
    step: int
    settings: dict


class Tracker(Protocol):
    """A place where people watch a run. `TRACKER` of a module makes one from a `Run`.

    Attributes:
      repeats: whether it takes steps again that a stopped run had reported, and puts them in place of the
        first; otherwise it gets each row once.
    """

    repeats: bool

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step: of an update or, with names that begin with `eval_`, of an evaluation."""

    def text(self, name: str, markdown: str) -> None:
        """A page of text."""

    def table(self, name: str, rows: list[dict]) -> None:
        """Rows with the same keys."""

    def image(self, name: str, path: Path) -> None:
        """A picture, in a PNG file."""

    def close(self) -> None:
        """Writes what is left."""


def find_trackers(names: Sequence[str]) -> dict[str, Callable[[Run], Tracker]]:
    """What makes each tracker.

    Raises:
      UserError: for one that is not known, or whose package is not installed.
    """
    known = sorted(path.stem for folder in __path__ for path in Path(folder).glob("[!_]*.py"))
    for name in names:
        if name not in known:
            raise UserError(f"trackers={name!r}: expected some of {', '.join(known)}")
    return {name: importlib.import_module(f"{__name__}.{name}").TRACKER for name in names}


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, and passes everything on to trackers. Only process 0
    does so; others keep the rows in memory.

    A tracker that fails is given up with a warning: the record has all that it would have shown.

    Args:
      workdir: of the run.
      step: rows after it, and a torn last line, are removed: they will be made again.
      trackers: of `find_trackers`.
      settings: that they are told.
    """

    def __init__(self, workdir: Path, step: int, trackers: dict | None = None, settings: dict | None = None):
        workdir = Path(workdir)
        path = workdir / "metrics.jsonl"
        reported = read(path)
        self.rows = [row for row in reported if row["step"] <= step]
        self._reported = {_key(row) for row in reported}
        self._file = None
        self._trackers: dict[str, Tracker] = {}
        if not is_main_process():
            return
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a", encoding="utf-8")
        run = Run(workdir, _run_id(workdir), step, settings or {})
        self._trackers = {name: make(run) for name, make in (trackers or {}).items()}

    def write(self, step: int, values: dict):
        """Adds a row."""
        row = {"step": step, **{key: float(value) for key, value in values.items()}}
        self.rows.append(row)
        if not self._file:
            return
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(Path(self._file.name), error) from error
        again = _key(row) in self._reported
        numbers = {key: value for key, value in row.items() if key != "step"}

        def pass_on(tracker: Tracker):
            if tracker.repeats or not again:
                tracker.scalars(step, numbers)

        self._each(pass_on)

    def text(self, name: str, markdown: str):
        """Passes a text to the trackers."""
        self._each(lambda tracker: tracker.text(name, markdown))

    def table(self, name: str, rows: list[dict]):
        """Passes a table to the trackers."""
        self._each(lambda tracker: tracker.table(name, rows))

    def image(self, name: str, path: Path):
        """Passes a picture to the trackers."""
        self._each(lambda tracker: tracker.image(name, path))

    def evaluation(self, step: int) -> dict | None:
        """The evaluation row of a step, if it was made."""
        rows = [row for row in self.rows if row["step"] == step and "loss" not in row]
        return rows[-1] if rows else None

    def close(self):
        """Flushes everything; nothing can be written any more."""
        if self._file:
            with contextlib.suppress(OSError):  # a full disk, of which writing has told
                self._file.close()
            self._each(lambda tracker: tracker.close())
            self._file, self._trackers = None, {}

    def _each(self, act: Callable[[Tracker], object]):
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # of others' packages, networks, disks
                del self._trackers[name]
                console.print(
                    f"WARNING   {name} gets nothing more of this run ({type(error).__name__}: {error}): "
                    "metrics.jsonl has it all"
                )


def _key(row: dict) -> tuple[int, bool]:
    """A step has at most one row of an update and one of an evaluation."""
    return row["step"], "loss" in row


def _run_id(workdir: Path) -> str:
    """The run's id, made at its start."""
    path = workdir / "run_id.txt"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def read(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a torn last line is left out.

    Raises:
      UserError: if another line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: fix or remove the file") from error
    return rows
