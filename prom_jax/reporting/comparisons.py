"""Paired tests between two rows of a table, over the documents that both have answered."""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from prom_jax.analysis.comparison import clustered_bootstrap, holm, mcnemar
from prom_jax.reporting.runs import NotComparable, Run, differing_settings, finite

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """One test, or why there is none.

    Attributes:
      first, second: names of the rows; task, metric: what is compared.
      test: 'McNemar' where all scores are 0 or 1 and there is one seed, else 'bootstrap'.
      documents: how many both have; seeds: how many pairs of runs.
      difference: first minus second, times 100, the mean over seeds: percentage points of a share.
      low, high: ends of its 95 % interval (bootstrap).
      first_only, second_only: documents that one alone has right (McNemar).
      p, adjusted: before and after Holm's correction; None if `refused` says why there is no test.
    """

    first: str
    second: str
    task: str
    metric: str
    test: str = ""
    documents: int = 0
    seeds: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    first_only: int | None = None
    second_only: int | None = None
    p: float | None = None
    adjusted: float | None = None
    higher_is_better: bool = True
    refused: str = ""

    @property
    def verdict(self) -> int:
        """1 if the first is significantly better, -1 if worse, else 0."""
        significant = self.adjusted is not None and self.adjusted < LEVEL
        return int(np.sign(self.difference)) * (1 if self.higher_is_better else -1) if significant else 0


def compare(names: tuple[str, str], first: dict, second: dict, task: str, metric: str) -> Comparison:
    """Tests two rows of a table on one metric of a task, over the documents that all of their runs have.

    With several seeds equal ones are paired (a run without a seed is paired with every one).

    Args:
      names: of the rows.
      first, second: their runs by seed.
    """
    higher = all(run.higher_is_better(task, metric) for run in (*first.values(), *second.values()))
    result = Comparison(*names, task, metric, higher_is_better=higher)
    pairs = [
        (first[a], second[b])
        for a, b in itertools.product(first, second)
        if a == b or None in (a, b)
    ]  # fmt: skip
    try:
        if not pairs:
            raise NotComparable(f"no seed in common: {_names(first)} and {_names(second)}")
        scores, clusters = _scores(pairs, task, metric)
    except NotComparable as error:
        return dataclasses.replace(result, refused=str(error))
    result = dataclasses.replace(
        result,
        documents=len(clusters),
        seeds=len(pairs),
        difference=100 * float(np.mean(scores[:, 0] - scores[:, 1])),
    )
    if len(pairs) == 1 and np.isin(scores, (0, 1)).all():
        return dataclasses.replace(result, test="McNemar", **mcnemar(*scores[0].astype(bool))._asdict())
    test = clustered_bootstrap(scores[:, 0] - scores[:, 1], clusters)
    return dataclasses.replace(result, test="bootstrap", low=100 * test.low, high=100 * test.high, p=test.p)


def adjust(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons of one table with Holm's correction over all of them that could be made."""
    made = [number for number, comparison in enumerate(comparisons) if comparison.p is not None]
    adjusted = dict(zip(made, holm([comparisons[number].p for number in made])))
    return [
        dataclasses.replace(comparison, adjusted=float(adjusted[number]))
        if number in adjusted
        else comparison
        for number, comparison in enumerate(comparisons)
    ]


def _scores(pairs: list[tuple[Run, Run]], task: str, metric: str) -> tuple[np.ndarray, list[str]]:
    """The scores of each pair of runs, float64 [pairs, 2, documents], and the cluster of each document.

    Raises:
      NotComparable: if they were not evaluated alike, or have no document in common.
    """
    for first, second in pairs:
        if differing := differing_settings(first, second):
            raise NotComparable(f"evaluated under other settings ({', '.join(differing)})")
    sides = [run.samples[task] for pair in pairs for run in pair]
    common = [
        doc
        for doc in sorted(set.intersection(*(set(side) for side in sides)))
        if all(metric in side[doc].scores for side in sides)
    ]
    if not common:
        raise NotComparable("no document in common")
    changed = [doc for doc in common if len({side[doc].asked for side in sides}) > 1]
    if changed:
        raise NotComparable(f"{len(changed)} documents ask different things under one number")
    scores = [[finite(side[doc].scores[metric]) for doc in common] for side in sides]
    if any(None in of_side for of_side in scores):
        raise NotComparable("it has no score of one document alone, or some are not numbers")
    clusters = [sides[0][doc].cluster for doc in common]
    return np.array(scores, float).reshape(len(pairs), 2, len(common)), clusters


def _names(runs: dict) -> str:
    return ", ".join(str(seed) for seed in runs)
