"""Pictures that other commands left among the runs."""

import json
from pathlib import Path
from typing import NamedTuple

from prom_jax.reporting.runs import DAMAGE


class Figure(NamedTuple):
    """A picture, where it was found below the runs, and of which model."""

    title: str
    path: Path
    where: str
    model: str


# Picture, the file next to it that says of which model it is, title.
KINDS = (
    ("grid.png", "probe.json", "Cloze probe"),
    ("grid.compare.png", "probe.json", "Cloze probe, before and after"),
    ("interference.png", "interference.json", "Gradient interference"),
)


def find(root: Path) -> list[Figure]:
    """Pictures of the probe and of interference below a folder."""
    return [
        Figure(title, path, str(path.parent.relative_to(root)), _model(path.with_name(source)))
        for name, source, title in KINDS
        for path in sorted(root.rglob(name))
        if path.with_name(source).is_file()
    ]


def _model(path: Path) -> str:
    """As probe.json or interference.json tells it; '' if it does not."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entry = entries.get("settings") or next(iter(entries.values()))
        return str(entry["model"])
    except (*DAMAGE, StopIteration):
        return ""
