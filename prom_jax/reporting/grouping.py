"""Which row and column each evaluation belongs to, and which of two that claim one place is kept."""

import collections
import re
from dataclasses import dataclass

from prom_jax.reporting.runs import METHODS, Pivot, Run, differing_settings, unequal

Seeds = dict[int | None, Run]
Claims = dict[int | None, Run | None]  # None: of two runs that claim a seed, neither can be kept


@dataclass
class Runs:
    """The runs of one base model: by method and task, and by pivot and task, in either case by seed."""

    base: str
    main: Pivot | None
    methods: dict[str, dict[str, Seeds]]
    pivots: dict[Pivot, dict[str, Seeds]]

    def of(self, method: str, task: str) -> tuple[Seeds, bool]:
        """The runs of a cell, and whether they are borrowed: PROM that was not regulated to λ = 0 is what it
        is without regulation too."""
        runs = self.methods[method].get(task, {})
        if method == "unregulated" and not runs:
            prom = self.methods["prom"].get(task, {})
            if prom and all(run.pivot for run in prom.values()):
                return prom, True
        return runs, False


def is_papers(base: str) -> bool:
    """Whether a model is the paper's, LLaMA-2-7B, by its name."""
    return bool(re.search(r"llama-?2-7b(-hf)?$", base, re.IGNORECASE))


def arrange(base: str, runs: list[Run], paper: dict, notes: list[str]) -> Runs:
    """Gives each evaluation its place; adds to `notes` where one has none."""
    main = _main_pivot(base, runs, paper)
    methods: dict[str, dict[str, Claims]] = {method: {} for method in METHODS}
    pivots: dict[Pivot, dict[str, Claims]] = {}
    for run in sorted(runs, key=lambda run: run.method == "unregulated"):
        tasks = [task for task in run.tasks if task in paper["tasks"]]
        if tasks and run.method not in METHODS:
            notes.append(f"{run.name} is in none of the paper's tables: {run.method!r} is no method of it.")
            continue
        for task in tasks:
            if run.languages and paper["tasks"][task]["language"] not in run.languages:
                notes.append(
                    f"{run.name}: {task} is in none of the paper's tables, as the model is adapted to "
                    f"{','.join(run.languages)!r}."
                )
                continue
            if run.pivot in (None, main):
                _place(methods[run.method].setdefault(task, {}), task, run, notes)
            if run.pivot:
                seeds = pivots.setdefault(run.pivot, {}).setdefault(task, {})
                # With one λ it is the same training, whether or not a probe was asked.
                other = seeds.get(run.seed)
                if not (other and other.method != run.method):
                    _place(seeds, task, run, notes)
    of_methods = {method: _kept(by_task) for method, by_task in methods.items()}
    return Runs(base, main, of_methods, {pivot: _kept(by_task) for pivot, by_task in pivots.items()})


def _kept(by_task: dict[str, Claims]) -> dict[str, Seeds]:
    return {task: {seed: run for seed, run in seeds.items() if run} for task, seeds in by_task.items()}


def _place(seeds: Claims, task: str, run: Run, notes: list[str]):
    """Puts a run into a cell. Of two that claim it, one or neither is kept."""
    if run.seed not in seeds:
        seeds[run.seed] = run
        return
    if (other := seeds[run.seed]) is None:  # two before this one were neither kept
        notes.append(f"{run.name}: {task} is in no cell of the paper's tables either.")
        return
    seeds[run.seed], note = choose(other, run, task)
    notes.append(note)


def _main_pivot(base: str, runs: list[Run], paper: dict) -> Pivot | None:
    """The setting that is called PROM: the paper's α, λ and norm (and n, if it is the paper's model), or
    else what most evaluations have."""
    paper, counts = paper["pivot"], collections.Counter()
    for run in runs:
        if run.pivot:
            counts[run.pivot] += len(run.tasks)

    def rank(pivot: Pivot):
        papers = all(getattr(pivot, name) == paper[name] for name in ("label_smoothing", "weight", "norm"))
        layer = is_papers(base) and pivot.layer == paper["layer"]
        return papers and not pivot.others, layer, counts[pivot], -pivot.layer, pivot.order

    return max(counts, key=rank, default=None)


def choose(first: Run, second: Run, task: str) -> tuple[Run | None, str]:
    """Which of two evaluations that claim one cell is kept, and a sentence on the other.

    None is, if nothing says which.
    """
    fuller, other = sorted((first, second), key=lambda run: -run.documents(task))
    if fuller.documents(task) > other.documents(task):
        why = f"{other.documents(task)} documents, {fuller.name} has {fuller.documents(task)}"
    elif is_same(first, second):
        why = f"the same evaluation as {fuller.name}"
    else:
        seed = "" if first.seed is None else f", seed {first.seed}"
        return None, (
            f"{first.name} and {second.name} claim one cell of the paper's tables, "
            f"{METHODS[first.method]} on {task}{seed}, and neither has it, as they differ in "
            f"{', '.join(_differences(first, second))}: move one of them out of --runs."
        )
    return fuller, f"{other.name}: {task} is left out ({why})."


def is_same(first: Run, second: Run) -> bool:
    """Whether two evaluations are of one model, by its fingerprint, under the same settings."""
    same_model = first.model["fingerprint"] == second.model["fingerprint"]
    return same_model and not differing_settings(first, second)


def _differences(first: Run, second: Run) -> list[str]:
    of_first, of_second = (run.model["training"] or {} for run in (first, second))
    found = unequal(of_first, of_second, sorted(of_first.keys() | of_second.keys()))
    return found + differing_settings(first, second) or ["their weights"]
