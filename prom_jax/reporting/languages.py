"""A table for each language that models were adapted to: all tasks, every setting next to the base model.

A setting is a training, whatever its seed, evaluated in one way. The base model's tasks that no adapted
model has are in a table of their own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from prom_jax.data.templates import language_name
from prom_jax.reporting.cells import (
    Cell,
    Column,
    Example,
    Row,
    Table,
    describe_seeds,
    measured,
    num_documents,
)
from prom_jax.reporting.comparisons import Comparison, adjust, compare
from prom_jax.reporting.grouping import Seeds
from prom_jax.reporting.runs import HARMLESS, METHODS, NotComparable, Run
from prom_jax.utils.errors import UserError

EXAMPLES = 3  # of each task
PERCENT = 100
# What a training records that is no setting of it: the seed, and what follows from the rest.
NO_SETTINGS = ("seed", "regulation", "base_model", "language")


@dataclass
class Setting:
    """Runs that differ in nothing but the seed.

    Attributes:
      method: of them; details: by name, how they were trained and evaluated; label: tells it from others.
      models: by seed, the fingerprint of the model.
      runs: by task and seed.
    """

    method: str
    details: dict
    label: str = ""
    models: dict[int | None, str] = field(default_factory=dict)
    runs: dict[str, Seeds] = field(default_factory=dict)

    def add(self, run: Run, notes: list[str]):
        """Takes a run in; of two evaluations of one model the one of more documents is kept."""
        self.models[run.seed] = run.model["fingerprint"]
        for task in run.tasks:
            seeds = self.runs.setdefault(task, {})
            other = seeds.get(run.seed, run)
            fuller, less = sorted((other, run), key=lambda each: -each.documents(task))
            if other is not run:
                notes.append(
                    f"{less.name}: {task} is left out ({fuller.name} evaluates the same model on it)."
                )
            seeds[run.seed] = fuller

    @property
    def all_runs(self) -> list[Run]:
        """Every run once."""
        return list(dict.fromkeys(run for seeds in self.runs.values() for run in seeds.values()))


def language_label(language: str) -> str:
    """A language's English name, or its code where that is not known."""
    try:
        return language_name(language)
    except UserError:
        return language


def check_reference(reference: str, runs: list[Run]):
    """Raises UserError unless some run is what others are tested against."""
    methods, names = {run.method for run in runs}, {run.name for run in runs}
    if reference not in methods | names | {"base"}:
        raise UserError(
            f"--reference={reference}: expected one of the methods {', '.join(sorted(methods))}, or the "
            "folder of an evaluation below --runs"
        )


def language_tables(runs: list[Run], reference: str, notes: list[str]) -> list[Table]:
    """A table for each language of a base model's runs, and one of what the base model alone has answered.

    Args:
      runs: of one base model.
      reference: a method or the name of a run.
      notes: gets a sentence on each evaluation that is left out, and on each table without a reference.
    """
    adapted = [run for run in runs if run.languages]
    base = settings([run for run in runs if not run.languages], notes)
    found = []
    for language in sorted({language for run in adapted for language in run.languages}):
        others = settings([run for run in adapted if language in run.languages], notes)
        tasks = sorted({task for setting in others for task in setting.runs})
        columns = [each for each in base if each.runs.keys() & set(tasks)] + others
        found.append(language_table(language, tasks, columns, reference, notes))
    alone = sorted(
        {task for each in base for task in each.runs} - {task for run in adapted for task in run.tasks}
    )
    if alone:
        columns = [each for each in base if each.runs.keys() & set(alone)]
        title = "Tasks of the base model alone" if adapted else "All tasks"
        heads, rows = _grid(alone, columns)
        examples = _examples(alone, columns)
        found.append(Table("base", title, heads, rows, notes=[], examples=examples, is_papers=False))
    return found


def settings(runs: list[Run], notes: list[str]) -> list[Setting]:
    """Runs by setting, in the order of the paper's rows. Two models of one seed are two settings."""
    found: list[Setting] = []
    for run in sorted(runs, key=lambda run: run.name):
        details = _details(run)
        fits = (
            each
            for each in found
            if (each.method, each.details) == (run.method, details)
            and each.models.get(run.seed, run.model["fingerprint"]) == run.model["fingerprint"]
        )
        setting = next(fits, None)
        if setting is None:
            found.append(setting := Setting(run.method, details))
        setting.add(run, notes)
    order = [*METHODS]
    found.sort(key=lambda each: order.index(each.method) if each.method in order else len(order))
    _label(found)
    return found


def _details(run: Run) -> dict:
    training = {
        name: value for name, value in (run.model["training"] or {}).items() if name not in NO_SETTINGS
    }
    evaluated = {name: value for name, value in run.settings.items() if name not in HARMLESS}
    return {name: json.dumps(value) for name, value in (training | evaluated).items()}


def _label(found: list[Setting]):
    """Names settings by their methods, and where that does not tell them apart by what differs, or else by
    their folders."""
    for method in {each.method for each in found}:
        alike = [each for each in found if each.method == method]
        names = sorted({name for each in alike for name in each.details})
        differing = [name for name in names if len({each.details.get(name) for each in alike}) > 1]
        for each in alike:
            each.label = METHODS.get(method, method)
            more = [
                f"{name} {each.details[name].strip(chr(34))}" for name in differing if name in each.details
            ]
            each.label += f" ({', '.join(more)})" * bool(more)
        labels = [each.label for each in alike]
        for each in alike:
            if labels.count(each.label) > 1:
                each.label += f" in {', '.join(run.name for run in each.all_runs)}"


def language_table(
    language: str, tasks: list[str], columns: list[Setting], reference: str, notes: list[str]
) -> Table:
    """Tasks and metrics against settings, with tests against a reference."""
    title = f"{language_label(language)} ({language})"
    comparisons, references = [], {}
    for setting in columns:
        theirs = _reference(reference, setting, columns, notes)
        if theirs is None or setting.method == "base":
            continue
        references[theirs.label] = theirs.label
        comparisons += [
            compare((setting.label, theirs.label), setting.runs[task], theirs.runs[task], task, metric)
            for task in tasks
            if task in setting.runs and task in theirs.runs
            for metric in _metrics(task, [setting, theirs])
        ]
    if not references and len(columns) > 1:
        notes.append(
            f"{title}: nothing is tested, as no evaluation of --reference={reference} has its tasks."
        )
    comparisons = adjust(comparisons)
    heads, rows = _grid(tasks, columns, comparisons)
    return Table(
        key=f"language_{language}",
        title=title,
        columns=heads,
        rows=rows,
        notes=[f"Tested against {', '.join(references)}."] if comparisons else [],
        references=references,
        comparisons=comparisons,
        examples=_examples(tasks, columns),
        is_papers=False,
    )


def _reference(reference: str, setting: Setting, columns: list[Setting], notes: list[str]) -> Setting | None:
    """What a setting is tested against: of several, the first that is evaluated in the same way."""
    found = [
        each
        for each in columns
        if each is not setting and reference in (each.method, *(run.name for run in each.all_runs))
    ]
    evaluated = setting.all_runs[0].settings

    def differences(each: Setting) -> int:
        theirs = each.all_runs[0].settings
        return sum(theirs.get(name) != evaluated.get(name) for name in theirs.keys() | evaluated.keys())

    found.sort(key=differences)
    if len(found) > 1 and differences(found[0]) == differences(found[1]):
        several = ", ".join(each.label for each in found if differences(each) == differences(found[0]))
        notes.append(f"--reference={reference} is any of {several}: tests are against the first.")
    return next(iter(found), None)


def _metrics(task: str, columns: list[Setting]) -> list[str]:
    """Of a task, as its evaluations list them."""
    runs = [run for each in columns for run in each.runs.get(task, {}).values()]
    return list(dict.fromkeys(metric for run in runs for metric in run.tasks[task]["metrics"]))


def _grid(tasks: list[str], columns: list[Setting], comparisons: Sequence[Comparison] = ()):
    """The columns of a table and its rows, one a task and metric."""
    rows = []
    for task in tasks:
        most = max(num_documents(each.runs.get(task, {}), task) for each in columns)
        for metric in _metrics(task, columns):
            values = [run.value(task, metric) for each in columns for run in each.runs.get(task, {}).values()]
            share = all(value is None or 0 <= value <= 1 for value in values) and _higher_is_better(
                task, metric, columns
            )
            cells = []
            for each in columns:
                seeds = each.runs.get(task, {})
                verdicts = {
                    c.second: c.verdict
                    for c in comparisons
                    if (c.first, c.task, c.metric) == (each.label, task, metric) and c.verdict
                }
                value = measured(seeds, task, metric, verdicts=verdicts, scale=PERCENT if share else 1)
                cells.append(Cell((value,), len(seeds), num_documents(seeds, task)))
            rows.append(Row(task, cells, f"{metric}{', %' * share}", documents=most))
    of_column = list(zip(*(row.cells for row in rows)))
    heads = [Column(each.label, seeds=describe_seeds(cells)) for each, cells in zip(columns, of_column)]
    return heads, rows


def _higher_is_better(task: str, metric: str, columns: list[Setting]) -> bool:
    return all(
        run.higher_is_better(task, metric) for each in columns for run in each.runs.get(task, {}).values()
    )


def _examples(tasks: list[str], columns: list[Setting]) -> list[Example]:
    """A few documents of each task, spread over those that all columns have, with the answers of the first
    seed."""
    found = []
    for task in tasks:
        runs = {each.label: next(iter(each.runs[task].values())) for each in columns if task in each.runs}
        try:
            common = sorted(set.intersection(*(set(run.samples[task]) for run in runs.values())))
            chosen = common[:: max(1, -(-len(common) // EXAMPLES))]
            answers = {label: run.answers(task, chosen) for label, run in runs.items()}
        except NotComparable:
            continue  # a comparison says so
        for document in chosen:
            told = [(label, of[document].output) for label, of in answers.items() if document in of]
            if len(told) == len(runs):
                asked = next(iter(answers.values()))[document]
                found.append(Example(task, document, asked, told))
    return found
