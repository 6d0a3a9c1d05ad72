"""Tables out of runs, one section a base model: of each language, and the paper's, next to its numbers."""

import collections
import statistics
from dataclasses import dataclass
from typing import cast

from prom_jax.reporting.cells import Cell, Column, Row, Table, Value, describe_seeds, measured, num_documents
from prom_jax.reporting.comparisons import Comparison, adjust, compare
from prom_jax.reporting.grouping import Runs, arrange, is_papers
from prom_jax.reporting.languages import check_reference, language_label, language_tables
from prom_jax.reporting.runs import METHODS, Pivot, Run

METRICS = {"exact_match": "EM", "f1": "F1", "accuracy": "acc"}
OF_TABLE = {"qa": ("exact_match", "f1"), "mgsm": ("accuracy",)}
AVERAGE = "average"
REFERENCES = ("xllama2", "base")  # the paper's, and the base model
PAPERS = ("base", "bactrian", "xllama2", "unregulated", "prom")  # rows that are there without runs too


@dataclass(frozen=True)
class Section:
    """All tables of one base model."""

    base: str
    tables: list[Table]


def sections(runs: list[Run], paper: dict, reference: str = "base") -> tuple[list[Section], list[str]]:
    """All tables, and a sentence on each evaluation that found no place in them.

    Args:
      runs: as `runs.find` gives them.
      paper: the content of resources/paper.json.
      reference: what the tables of languages are tested against: a method, or the name of a run.

    Raises:
      UserError: if no run is the reference.
    """
    check_reference(reference, runs)
    notes, found = [], []
    bases = sorted({run.base for run in runs}, key=lambda base: (not is_papers(base), base))
    for base in bases:
        of_base = [run for run in runs if run.base == base]
        tables = language_tables(of_base, reference, notes)
        found.append(Section(base, tables + papers_tables(base, of_base, paper, notes)))
    return found, list(dict.fromkeys(notes))


def papers_tables(base: str, runs: list[Run], paper: dict, notes: list[str]) -> list[Table]:
    """Those of the paper's tables that have a number of ours, or stand next to the paper's own model."""
    arranged = arrange(base, runs, paper, notes)
    scores = [score_table(kind, arranged, paper) for kind in OF_TABLE]
    tables = [*scores, wins_table(arranged, scores, paper), *ablation_tables(arranged, paper)]
    return [table for table in tables if is_papers(base) or _has_numbers(table)]


def _has_numbers(table: Table) -> bool:
    return any(value.ours is not None for row in table.rows for cell in row.cells for value in cell.values)


# Tables 1 and 2: scores of all methods.


def score_table(kind: str, runs: Runs, paper: dict) -> Table:
    """Table 1 ('qa') or 2 ('mgsm'): methods against tasks."""
    metrics = OF_TABLE[kind]
    tasks = [task for task, about in paper["tasks"].items() if about["table"] == kind]
    comparisons = adjust(
        [
            compare((METHODS[method], METHODS[reference]), runs.of(method, task)[0], seeds, task, metric)
            for reference in REFERENCES
            for method in METHODS
            if method not in (reference, "base")
            for task in tasks
            for metric in metrics
            for seeds in [runs.of(reference, task)[0]]
            if seeds and runs.of(method, task)[0] and not runs.of(method, task)[1]
        ]
    )
    title = {"qa": "Table 1. Question answering", "mgsm": "Table 2. Mathematics (MGSM)"}[kind]
    rows = []
    for method in (m for m in METHODS if m in PAPERS or any(runs.methods[m].get(task) for task in tasks)):
        cells = [score_cell(runs, method, task, metrics, paper, comparisons) for task in tasks]
        cells.append(average_cell(runs, method, tasks, metrics, paper, cells))
        rows.append(Row(METHODS[method], cells, seeds=describe_seeds(cells)))
    return Table(
        key=kind,
        title=title,
        columns=_columns([*((task, metrics) for task in tasks), (AVERAGE, metrics)], rows, paper),
        rows=rows,
        notes=[f"PROM here is {runs.main}."] if runs.main else [],
        references={reference: METHODS[reference] for reference in REFERENCES},
        comparisons=comparisons,
    )


def score_cell(runs: Runs, method: str, task: str, metrics, paper: dict, comparisons) -> Cell:
    """A method on a task."""
    seeds, borrowed = runs.of(method, task)
    row = METHODS["prom" if borrowed else method]
    papers = paper["results"].get(method, {}).get(task, {})
    values = tuple(
        measured(seeds, task, metric, papers.get(metric), verdicts(comparisons, row, task, metric))
        for metric in metrics
    )
    return Cell(
        values,
        seeds=len(seeds),
        documents=num_documents(seeds, task),
        zeroed=method == "prom" and any(run.pivot is None for run in seeds.values()),
        paper_zeroed=method == "prom" and paper["tasks"][task]["language"] in paper["zeroed"],
        borrowed=borrowed,
    )


def verdicts(comparisons: list[Comparison], row: str, task: str, metric: str) -> dict[str, int]:
    """By reference, whether a row is significantly better (1) or worse (-1)."""
    of_reference = {METHODS[reference]: reference for reference in REFERENCES}
    return {
        of_reference.get(comparison.second, comparison.second): comparison.verdict
        for comparison in comparisons
        if (comparison.first, comparison.task, comparison.metric) == (row, task, metric)
        and comparison.verdict
    }


def average_cell(runs: Runs, method: str, tasks, metrics, paper: dict, cells: list[Cell]) -> Cell:
    """The mean over tasks, of rows alone that lack none; its spread where all tasks have the same seeds."""
    papers = paper["results"].get(method, {}).get(AVERAGE, {})
    values = []
    for number, metric in enumerate(metrics):
        means = [cell.values[number].ours for cell in cells]
        scores = [mean for mean in means if mean is not None]
        if len(scores) < len(means):
            values.append(Value(paper=papers.get(metric)))
            continue
        of_tasks = [(runs.of(method, task)[0], task) for task in tasks]
        seeds = of_tasks[0][0].keys()
        spread = None
        if len(seeds) > 1 and all(of_task.keys() == seeds for of_task, _ in of_tasks):
            of_seeds = [  # none lacks a score, or its task would have no mean
                statistics.fmean(cast(float, of_task[seed].value(task, metric)) for of_task, task in of_tasks)
                for seed in seeds
            ]
            spread = 100 * statistics.stdev(of_seeds)
        values.append(Value(statistics.fmean(scores), spread, papers.get(metric)))
    return Cell(tuple(values))


def _columns(columns, rows, paper: dict) -> list[Column]:
    """The columns of tasks, each with its metrics."""
    fullest = [max(cell.documents for cell in column) for column in zip(*(row.cells for row in rows))]
    return [
        Column(
            paper["tasks"].get(task, {"name": task})["name"],
            tuple(METRICS[metric] for metric in metrics),
            most,
        )
        for (task, metrics), most in zip(columns, fullest)
    ]


# Table 3: wins and losses.


def wins_table(runs: Runs, scores: list[Table], paper: dict) -> Table:
    """Table 3: how many tasks a method wins and loses against xLLaMA2(t+e)."""
    tasks = [cells for table in scores for cells in _by_column(table)]
    rows = []
    for method in ("bactrian", "unregulated", "prom"):
        counts = collections.Counter()
        for cells in tasks:
            cell, reference = cells[METHODS[method]], cells[METHODS["xllama2"]]
            counts.update(outcome(cell, reference))
        papers = paper["wins"].get(method, {})
        numbers = [
            Value(counts[column] if counts["compared"] else None, paper=papers.get(column)) for column in WINS
        ]
        rows.append(Row(METHODS[method], [Cell((number,)) for number in numbers]))
    labels = [Column(label.format(of=len(tasks))) for label in WINS.values()]
    return Table("wins", f"Table 3. Against {METHODS['xllama2']}", labels, rows, [WINS_RULE], digits=0)


WINS = {
    "won": "won",
    "lost": "lost",
    "tied": "tied",
    "mixed": "mixed",
    "compared": "of {of}",
    "significantly won": "significantly better",
    "significantly lost": "significantly worse",
}
WINS_RULE = (
    "A task is won where no metric is lower and one is higher, lost the other way round, tied where all are "
    "equal, and mixed where EM and F1 disagree. By the paper's own tables PROM wins 8 so, and the ninth that "
    "it counts is a tie. Significantly better: a triangle up in table 1 or 2, and none down."
)


def _by_column(table: Table):
    """The cells of each task, by row."""
    for number, column in enumerate(table.columns):
        if column.label != AVERAGE:
            yield {row.label: row.cells[number] for row in table.rows}


def outcome(cell: Cell, reference: Cell) -> list[str]:
    """Which columns of WINS a task counts in (see WINS_RULE)."""
    signs = set()
    for value, other in zip(cell.values, reference.values):
        if value.ours is None or other.ours is None:
            return []
        ours, theirs = round(value.ours, 9), round(other.ours, 9)
        signs.add((ours > theirs) - (ours < theirs))
    found = ["compared", _verdict(signs) or "tied"]
    significant = _verdict({value.verdicts.get("xllama2", 0) for value in cell.values})
    return found + ([f"significantly {significant}"] if significant in ("won", "lost") else [])


def _verdict(signs: set[int]) -> str:
    signs = signs - {0}
    return {frozenset(): "", frozenset({1}): "won", frozenset({-1}): "lost"}.get(frozenset(signs), "mixed")


# Table 4: the ablation.


def ablation_tables(runs: Runs, paper: dict) -> list[Table]:
    """Table 4, for each language with several settings of the pivot; with the paper's model Thai always."""
    by_language = collections.defaultdict(set)
    for pivot, tasks in runs.pivots.items():
        for task in tasks:
            by_language[paper["tasks"][task]["language"]].add(pivot)
    languages = {language for language, pivots in by_language.items() if len(pivots) > 1}
    languages |= {"th"} if is_papers(runs.base) else set()
    return [ablation_table(language, by_language[language], runs, paper) for language in sorted(languages)]


def ablation_table(language: str, pivots: set[Pivot], runs: Runs, paper: dict) -> Table:
    """Settings of the pivot against the tasks of a language; the reference is the one that is called PROM."""
    papers = {}
    if is_papers(runs.base) and language == "th":
        norm = paper["pivot"]["norm"]
        papers = {
            Pivot(row["layer"], row["label_smoothing"], row["weight"], norm): row for row in paper["ablation"]
        }
    tasks = [task for task, about in paper["tasks"].items() if about["language"] == language]
    columns = [(task, OF_TABLE[paper["tasks"][task]["table"]]) for task in reversed(tasks)]
    settings = [*papers, *sorted(pivots - papers.keys(), key=lambda pivot: pivot.order)]
    main = runs.main or Pivot(**paper["pivot"])
    comparisons = adjust(
        [
            compare((str(pivot), str(main)), seeds, reference, task, metric)
            for pivot in settings
            if pivot != main
            for task, metrics in columns
            for metric in metrics
            for seeds in [runs.pivots.get(pivot, {}).get(task)]
            for reference in [runs.pivots.get(main, {}).get(task)]
            if seeds and reference
        ]
    )
    bactrian = [score_cell(runs, "bactrian", task, metrics, paper, []) for task, metrics in columns]
    rows = [Row("Bactrian+(t): λ = 0", bactrian, seeds=describe_seeds(bactrian))]
    for pivot in settings:
        cells = []
        for task, metrics in columns:
            seeds = runs.pivots.get(pivot, {}).get(task, {})
            values = tuple(
                measured(
                    seeds, task, m, papers.get(pivot, {}).get(m), verdicts(comparisons, str(pivot), task, m)
                )
                for m in metrics
            )
            cells.append(Cell(values, seeds=len(seeds), documents=num_documents(seeds, task)))
        rows.append(Row(str(pivot), cells, seeds=describe_seeds(cells)))
    notes = []
    if not papers:
        notes = ["The paper's settings are of another model or language, and not compared with these."]
    return Table(
        key=f"ablation_{language}",
        title=f"Table 4. Ablation of n, α and λ, {language_label(language)}",
        columns=_columns(columns, rows, paper),
        rows=rows,
        notes=notes,
        references={str(main): str(main)},
        comparisons=comparisons,
    )
