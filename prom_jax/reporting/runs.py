"""Evaluations found on disk: of which base model each is, how it was trained, what its documents scored."""

import collections
import dataclasses
import functools
import json
import re
import sys
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
# What stands in a damaged file raises one of these where it is read.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def finite(value) -> float | None:
    """A number, or None for what is none, not finite, or an integer that is none of a float."""
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


class NotComparable(Exception):
    """Why two evaluations cannot be set against each other, in one sentence."""


class Pivot(NamedTuple):
    """n, α, λ and the norm before the pivot head, and further keys of it that a run records."""

    layer: int
    label_smoothing: float
    weight: float
    norm: str
    others: tuple = ()

    @property
    def order(self) -> tuple:
        """What pivots are sorted by."""
        return *self[:3], str(self)

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


class Answer(NamedTuple):
    """What a document asked, what was acceptable, and what was answered."""

    prompt: str
    golds: list
    output: str


@dataclass(frozen=True, eq=False)
class Run:
    """One results.json.

    Attributes:
      folder: of the file; name: its path below the folder that was searched.
      model, settings, tasks: as in the file.
      base: the model that was adapted, or that was evaluated as it is.
      method: 'base', or how it was trained; languages: that it was adapted to, none for a base model; seed:
        None for a base model; pivot: PROM's.
        PROM without one was regulated: λ = 0.
    """

    folder: Path
    name: str
    model: dict
    settings: dict
    tasks: dict
    base: str
    method: str
    languages: tuple[str, ...]
    seed: int | None
    pivot: Pivot | None

    def value(self, task: str, metric: str) -> float | None:
        """A score, as it is; None where it is missing or not a number."""
        return finite(self.tasks.get(task, {}).get("metrics", {}).get(metric, {}).get("value"))

    def higher_is_better(self, task: str, metric: str) -> bool:
        """Of a metric; true where the file does not say."""
        return self.tasks[task]["metrics"].get(metric, {}).get("higher_is_better") is not False

    def documents(self, task: str) -> int:
        """How many were scored."""
        return self.tasks[task].get("n", 0)

    @functools.cached_property
    def samples(self) -> dict[str, dict[int, Sample]]:
        """By task and document.

        Raises:
          NotComparable: if there is no samples.jsonl, or it is damaged.
        """
        samples = {task: {} for task in self.tasks}
        for task, document, row in self._rows():
            asked = hash((str(row["prompt"]), str(row["gold"])))
            samples.setdefault(task, {})[document] = Sample(row["scores"], str(row["cluster"]), asked)
        return samples

    def answers(self, task: str, documents) -> dict[int, Answer]:
        """The answers to some documents of a task, those that are one text.

        Raises:
          NotComparable: as `samples`.
        """
        return {
            document: Answer(str(row["prompt"]), _as_list(row["gold"]), row["output"])
            for of, document, row in self._rows()
            if of == task and document in documents and isinstance(row["output"], str)
        }

    def _rows(self):
        """The lines of samples.jsonl, each with its task and document before it."""
        path = self.folder / "samples.jsonl"
        try:
            with open(path, encoding="utf-8") as file:
                for row in map(json.loads, file):
                    missing = [key for key in SAMPLE_KEYS if key not in row]
                    if missing or type(row["doc_id"]) is not int or type(row["scores"]) is not dict:
                        raise ValueError(f"a line lacks {', '.join(missing) or 'a document or its scores'}")
                    yield str(row["task"]), row["doc_id"], row
        except DAMAGE as error:
            raise NotComparable(f"{self.name}/samples.jsonl cannot be read ({_short(error)})") from error


SAMPLE_KEYS = ("task", "doc_id", "prompt", "output", "gold", "scores", "cluster")


def find(root: Path) -> tuple[list[Run], list[str]]:
    """Every evaluation below a folder, and a sentence on each file that is not one.

    Raises:
      UserError: if there is none.
    """
    runs, notes = [], []
    for path in sorted(root.rglob("results.json")):
        name = path.parent.relative_to(root).as_posix()
        try:
            runs.append(read(path, name))
        except DAMAGE as error:
            notes.append(
                f"{name}/results.json is left out: not a results.json of prom_jax.evaluate ({_short(error)})."
            )
    if not runs:
        found = f"; {notes[0]}" if notes else ""
        raise UserError(
            f"--runs={root} holds no results.json that can be read{found}: give the folder that "
            "prom_jax.evaluate wrote to, or one above it"
        )
    for run in runs:
        notes += [
            f"{run.name}: {metric} of {task} is not a number, and counts as missing."
            for task, content in run.tasks.items()
            for metric in content["metrics"]
            if run.value(task, metric) is None
        ]
    names = base_names({run.base for run in runs})
    return [dataclasses.replace(run, base=names[run.base]) for run in runs], notes


def read(path: Path, name: str = ".") -> Run:
    """One results.json; raises one of DAMAGE for anything else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    model, settings, tasks = content["model"], dict(content["settings"]), content["tasks"]
    for task in tasks.values():
        if type(task.get("n", 0)) is not int:
            raise ValueError("a task's number of documents is no integer")
        if not all(type(metric) is dict and "value" in metric for metric in task["metrics"].values()):
            raise ValueError("a metric without a value")
    _checked(model["fingerprint"], str, name="fingerprint")
    training = model["training"]
    about = {"folder": path.parent, "name": name, "model": model, "settings": settings, "tasks": tasks}
    if training is None:
        base = _checked(model["source"], str, name="source")
        return Run(**about, base=base, method="base", languages=(), seed=None, pivot=None)
    pivot = _pivot(training)
    language = _checked(training["language"], str, name="language")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,35}(,[A-Za-z0-9_-]{1,35})*", language):  # it names files
        raise ValueError(f"language is {language!r:.60}")
    return Run(
        **about,
        base=_checked(training["base_model"], str, name="base_model"),
        method=_method(training, pivot),
        languages=tuple(language.split(",")),
        seed=_checked(training["seed"], int, name="seed"),
        pivot=pivot,
    )


def _checked(value, *kinds: type, name: str):
    if type(value) not in kinds:
        raise ValueError(f"{name} is {value!r:.60}")
    return value


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _method(training: dict, pivot: Pivot | None) -> str:
    method = _checked(training["method"], str, name="method")
    if method == "prom" and training.get("regulate") == "never":
        # λ = 0 by configuration trains what Bactrian+(t) trains.
        method = "unregulated" if pivot else "bactrian"
    return method


def _pivot(training: dict) -> Pivot | None:
    if training["method"] != "prom" or not training.get("pivot.weight"):
        return None
    keys = {key.removeprefix("pivot."): training[key] for key in training if key.startswith("pivot.")}
    known = {name: keys.pop(name) for name in Pivot._fields if name in keys}
    for name, value in known.items():
        _checked(value, *{"layer": (int,), "norm": (str,)}.get(name, (int, float)), name=f"pivot.{name}")
    return Pivot(**known, others=tuple((name, str(keys[name])) for name in sorted(keys)))


def base_names(models: set[str]) -> dict[str, str]:
    """The names of base models, by what files call them, so that one model has one name.

    An export calls its base model by the last part of its path, others by the path as it was given from
    some folder. 'owner/name' may be a hub id or a path: it is the model that a path ends with if no other
    ends so.

    Args:
      models: hub ids, paths and last parts of paths.
    """
    ends = {model: model.rstrip("/").rpartition("/")[2] or model for model in models}
    ids = {
        model
        for model in models
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not model.endswith(".gguf")
    }
    of_end = collections.defaultdict(set)
    for model in models:
        of_end[ends[model]].add(model if model in ids else "")
    alone = {end for end, found in of_end.items() if len(found - {""}) <= 1 and "" in found}
    return {model: model if model in ids and ends[model] not in alone else ends[model] for model in models}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def differing_settings(first: Run, second: Run) -> list[str]:
    """Settings that may change a score and are not equal, such as 'bos: True and False'."""
    keys = sorted((first.settings.keys() | second.settings.keys()) - HARMLESS)
    return unequal(first.settings, second.settings, keys)


def unequal(first: dict, second: dict, keys) -> list[str]:
    """Keys whose values differ, with both of these."""
    return [
        f"{key}: {first.get(key)} and {second.get(key)}" for key in keys if first.get(key) != second.get(key)
    ]
