"""What tables are made of: values, cells, rows and columns."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from prom_jax.reporting.comparisons import Comparison
from prom_jax.reporting.grouping import Seeds
from prom_jax.reporting.runs import Answer


@dataclass(frozen=True)
class Value:
    """A number and what is shown with it.

    Attributes:
      ours: the mean over seeds; spread: their standard deviation; paper: the paper's number.
      verdicts: by reference, 1 if significantly better than it, -1 if worse.
    """

    ours: float | None = None
    spread: float | None = None
    paper: float | None = None
    verdicts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A value for each of a column's metrics.

    Attributes:
      seeds: how many runs are averaged; documents: how many were scored, the fewest of them.
      zeroed, paper_zeroed: whether regulation set λ to 0, in our runs and in the paper.
      borrowed: whether it is PROM's run, from which leaving out regulation would not differ.
    """

    values: tuple[Value, ...]
    seeds: int = 0
    documents: int = 0
    zeroed: bool = False
    paper_zeroed: bool = False
    borrowed: bool = False


class Column(NamedTuple):
    """A label, those of its metrics, and how many documents the fullest of its cells has, where its cells are
    of one task; how many seeds they have, where they are of one setting."""

    label: str
    metrics: tuple[str, ...] = ("",)
    documents: int = 0
    seeds: str = ""


class Row(NamedTuple):
    """A label with a detail, the cells, and as of `Column` documents and seeds."""

    label: str
    cells: list[Cell]
    detail: str = ""
    documents: int = 0
    seeds: str = ""


class Example(NamedTuple):
    """What a document of a task was answered, by column of the table."""

    task: str
    document: int
    asked: Answer
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      key: names its file; digits: after the decimal point.
      references: by key, the name of the row (or column) that others are tested against.
      examples: answers to read.
      is_papers: whether it stands in the paper too.
    """

    key: str
    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    digits: int = 1
    references: dict[str, str] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    is_papers: bool = True


def measured(
    seeds: Seeds, task: str, metric: str, paper: float | None = None, verdicts=None, scale: float = 100
) -> Value:
    """The mean and the spread of some runs, times a scale (100: in percent); without a mean where one of them
    has no number."""
    values = [run.value(task, metric) for run in seeds.values()]
    scores = [scale * value for value in values if value is not None]
    if not scores or len(scores) < len(values):
        return Value(paper=paper)
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return Value(statistics.fmean(scores), spread, paper, verdicts or {})


def num_documents(seeds: Seeds, task: str) -> int:
    """How many documents of a task were scored, the fewest of some runs."""
    return min((run.documents(task) for run in seeds.values()), default=0)


def describe_seeds(cells: Iterable[Cell]) -> str:
    """How many seeds cells are means of, where that is more than one."""
    numbers = sorted({cell.seeds for cell in cells if cell.seeds})
    if numbers[-1:] <= [1]:
        return ""
    return f"{'–'.join(str(n) for n in sorted({numbers[0], numbers[-1]}))} seeds"
