"""Evaluations found on disk, and which of the paper's rows each one belongs to."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prom_jax.training.methods import known_methods
from prom_jax.utils.errors import UserError

# Labels of rows in tables, in their order: the base model, the methods, and PROM last.
METHODS = {
    "base": "base model",
    **{name: method.label for name, method in known_methods().items() if name != "prom"},
    "unregulated": "PROM − regulation",
    "prom": known_methods()["prom"].label,
}
HARMLESS = {"limit"}  # settings that change no document's score


def finite(value) -> float | None:
    """A number, or None for what is no finite one."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


class NotComparable(Exception):
    """Why two evaluations cannot be set against each other, in one sentence."""


class Pivot(NamedTuple):
    """n, α, λ and the norm before the pivot head, and further keys of it that a run records."""

    layer: int
    label_smoothing: float
    weight: float
    norm: str
    others: tuple = ()

    def __str__(self):
        others = [f"{key} {value}" for key, value in (("norm", self.norm), *self.others)]
        others = others[self.norm == "none" :]
        return ", ".join(
            [f"n = {self.layer}", f"α = {self.label_smoothing:g}", f"λ = {self.weight:g}", *others]
        )


class Sample(NamedTuple):
    """One document's scores, what it is clustered by, and a hash of what was asked (prompt and gold)."""

    scores: dict[str, float]
    cluster: str
    asked: int


@dataclass(frozen=True, eq=False)
class Run:
    """One results.json.

    Attributes:
      folder: of the file.
      model, settings, tasks: as in the file.
      base: the model that was adapted, or that was evaluated as it is.
      method: of METHODS; language, seed: None where the method has none; pivot: PROM's. PROM without one was
        regulated: λ = 0.
    """

    folder: Path
    model: dict
    settings: dict
    tasks: dict
    base: str
    method: str
    language: str | None
    seed: int | None
    pivot: Pivot | None

    def value(self, task: str, metric: str) -> float | None:
        """A score in percent; None where it is missing or not a number."""
        share = finite(self.tasks.get(task, {}).get("metrics", {}).get(metric, {}).get("value"))
        return None if share is None else 100 * share

    def documents(self, task: str) -> int:
        """How many were scored."""
        return self.tasks[task].get("n", 0)

    @functools.cached_property
    def samples(self) -> dict[str, dict[int, Sample]]:
        """By task and document.

        Raises:
          NotComparable: if there is no samples.jsonl, or it is damaged.
        """
        path = self.folder / "samples.jsonl"
        samples = {task: {} for task in self.tasks}
        try:
            with open(path, encoding="utf-8") as file:
                for row in map(json.loads, file):
                    asked = hash((row["prompt"], json.dumps(row["gold"])))
                    sample = Sample(row["scores"], row["cluster"], asked)
                    samples.setdefault(row["task"], {})[row["doc_id"]] = sample
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NotComparable(f"{path} cannot be read ({_short(error)})") from error
        return samples


def find(root: Path) -> tuple[list[Run], list[str]]:
    """Every evaluation below a folder, and a sentence on each file that is not one.

    Raises:
      UserError: if there is none.
    """
    runs, notes = [], []
    for path in sorted(root.rglob("results.json")):
        try:
            runs.append(read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path} is left out: not a results.json of prom_jax.evaluate ({_short(error)}).")
    if not runs:
        found = f"; {notes[0]}" if notes else ""
        raise UserError(
            f"--runs={root} holds no results.json that can be read{found}: give the folder that "
            "prom_jax.evaluate wrote to, or one above it"
        )
    for run in runs:
        notes += [
            f"{run.folder}: {metric} of {task} is not a number, and counts as missing."
            for task, content in run.tasks.items()
            for metric in content["metrics"]
            if run.value(task, metric) is None
        ]
    return runs, notes


def read(path: Path) -> Run:
    """One results.json; raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    model, settings, tasks = content["model"], dict(content["settings"]), content["tasks"]
    if not all("value" in metric for task in tasks.values() for metric in task["metrics"].values()):
        raise ValueError("a metric without a value")
    training = model["training"]
    about = {"folder": path.parent, "model": model, "settings": settings, "tasks": tasks}
    if training is None:
        base = _spelled_alike(model["source"])
        return Run(**about, base=base, method="base", language=None, seed=None, pivot=None)
    pivot = _pivot(training)
    return Run(
        **about,
        base=_spelled_alike(training["base_model"]),
        method=_method(training, pivot),
        language=training["language"],
        seed=training["seed"],
        pivot=pivot,
    )


def _method(training: dict, pivot: Pivot | None) -> str:
    method = training["method"]
    if method == "prom" and training.get("regulate") == "never":
        # λ = 0 by configuration trains what Bactrian+(t) trains.
        method = "unregulated" if pivot else "bactrian"
    if method not in METHODS:
        raise ValueError(f"method {method!r}")
    return method


def _pivot(training: dict) -> Pivot | None:
    if training["method"] != "prom" or not training.get("pivot.weight"):
        return None
    keys = {key.removeprefix("pivot."): training[key] for key in training if key.startswith("pivot.")}
    known = {name: keys.pop(name) for name in Pivot._fields if name in keys}
    return Pivot(**known, others=tuple(sorted(keys.items())))


def _spelled_alike(model: str) -> str:
    """A base model in files by its name alone, which is all that an export says of it; a hub id as it is."""
    model = model.removeprefix("./").rstrip("/")
    path = Path(model)
    return path.name if path.is_absolute() or path.exists() else model


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def differing_settings(first: Run, second: Run) -> list[str]:
    """Settings that may change a score and are not equal, such as 'bos: True and False'."""
    keys = sorted((first.settings.keys() | second.settings.keys()) - HARMLESS)
    return unequal(first.settings, second.settings, keys)


def unequal(first: dict, second: dict, keys) -> list[str]:
    """Keys whose values differ, with both of these."""
    return [
        f"{key}: {first.get(key)} and {second.get(key)}" for key in keys if first.get(key) != second.get(key)
    ]
