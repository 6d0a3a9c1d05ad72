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
      test: 'McNemar' where all scores are 0 or 1, else 'bootstrap'.
      documents: how many both have; seeds: how many pairs of runs.
      difference: first minus second, times 100, the mean over seeds: percentage points of a share.
      low, high: ends of its 95 % interval (bootstrap), the widest over seeds.
      first_only, second_only: documents that one alone has right (McNemar), in the least certain seed.
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
    """Tests two rows of a table on one metric of a task.

    With several seeds each pair of equal seeds is tested by itself (a run without a seed is paired with every
    one), and the least certain counts: to be significant, a difference must be so, and have the same sign,
    in every seed.

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
        tests = [_test(*pair, task, metric) for pair in pairs]
    except NotComparable as error:
        return dataclasses.replace(result, refused=str(error))
    least = max(tests, key=lambda test: test["p"])
    signs = {np.sign(test["difference"]) for test in tests}
    ends = {}
    if least["test"] == "bootstrap":
        ends = {"low": min(test["low"] for test in tests), "high": max(test["high"] for test in tests)}
    mean = float(np.mean([test["difference"] for test in tests]))
    p = least["p"] if len(signs) == 1 else 1.0
    return dataclasses.replace(result, **least | ends | {"difference": mean, "p": p, "seeds": len(pairs)})


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


def _test(first: Run, second: Run, task: str, metric: str) -> dict:
    differing = differing_settings(first, second)
    if differing:
        raise NotComparable(f"evaluated under other settings ({', '.join(differing)})")
    theirs, ours = first.samples[task], second.samples[task]
    common = [
        doc
        for doc in sorted(theirs.keys() & ours.keys())
        if metric in theirs[doc].scores and metric in ours[doc].scores
    ]
    if not common:
        raise NotComparable("no document in common")
    changed = [doc for doc in common if theirs[doc].asked != ours[doc].asked]
    if changed:
        raise NotComparable(f"{len(changed)} documents ask different things under one number")
    scores = [[finite(side[doc].scores[metric]) for doc in common] for side in (theirs, ours)]
    if None in (*scores[0], *scores[1]):
        raise NotComparable("it has no score of one document alone, or some are not numbers")
    scores = np.array(scores, float)
    shared = {"documents": len(common), "difference": 100 * float(np.diff(scores[::-1], axis=0).mean())}
    if np.isin(scores, (0, 1)).all():
        test = mcnemar(*scores.astype(bool))
        return shared | {"test": "McNemar", **test._asdict()}
    test = clustered_bootstrap(scores[0] - scores[1], [theirs[doc].cluster for doc in common])
    return shared | {"test": "bootstrap", "low": 100 * test.low, "high": 100 * test.high, "p": test.p}


def _names(runs: dict) -> str:
    return ", ".join(str(seed) for seed in runs)
