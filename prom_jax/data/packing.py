"""Which examples an update takes, and where each side lies: a pure function of lengths, seed and epoch.

Nothing here knows of hosts or of the mesh, so that a run continues exactly on any number of them.
"""

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WINDOW = 512  # examples besides an update's own that may fill its gaps
OWN = 0.95  # share of an update's target places that its own examples, the next in order, take
TRIAL = 8192  # examples on which shapes of the English rows are tried
TOLERANCE = (
    0.015,
    0.05,
)  # more places than needed, in all and on the English side, for rows that divide better
MULTIPLE = 16  # of which the English rows' length is one
SHARDS = 8  # devices among which English rows should divide; fewer where there are few target rows


class Places(NamedTuple):
    """Where one side of each example lies; without meaning for an example that lacks the side."""

    rows: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Updates: number u takes the examples `slice(*ends[u:u + 2])` of the arrays, which have one
    entry an example: its index in the records and the place of either side in the batch.
    """

    examples: np.ndarray
    target: Places
    english: Places
    ends: np.ndarray  # [updates + 1], from 0

    @property
    def updates(self) -> int:
        return len(self.ends) - 1


def plan_epoch(
    target_lengths: np.ndarray,
    english_lengths: np.ndarray,
    *,
    target_shape: tuple[int, int],
    english_shape: tuple[int, int] | None,
    seed: int | None,
    epoch: int,
) -> Plan:
    """Pack every example once into updates with target and English rows of the shapes (rows, length).

    The examples are shuffled (`seed` None: left in order), those with an English side spread evenly
    among the others. An update takes the next ones, and fills its gaps from the WINDOW that follow;
    of either the longest comes first, and each goes to the fullest row that has room on both sides.
    The others wait, and are first in the next update. The last one may be partly filled.

    Raises:
      ValueError: an example longer than a row.
    """
    target_lengths, english_lengths = np.asarray(target_lengths), np.asarray(english_lengths)
    for lengths, shape in ((target_lengths, target_shape), (english_lengths, english_shape or (0, 0))):
        if lengths.max(initial=0) > shape[1]:
            raise ValueError(f"An example of {lengths.max()} tokens is longer than a row of {shape[1]}.")
    order = np.arange(len(target_lengths))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(order))
        order = _spread(order, english_lengths[order] > 0)
    columns = (order, target_lengths[order], english_lengths[order])
    coming = map(Candidate, *(column.tolist() for column in columns))
    waiting: list[Candidate] = []
    placed: list[tuple[int, int, int, int, int]] = []
    ends = [0]
    while len(placed) < len(order):
        waiting = _fill_update(waiting, coming, Rows(target_shape), Rows(english_shape or (0, 0)), placed)
        ends.append(len(placed))
    examples, *places = np.array(placed, np.int64).reshape(-1, 5).T
    return Plan(examples, Places(*places[:2]), Places(*places[2:]), np.array(ends))


def _spread(order: np.ndarray, english: np.ndarray) -> np.ndarray:
    """Interleave the two kinds of examples evenly, each in its own order, so that updates need
    about as much room for English as each other."""
    rank = np.where(english, np.cumsum(english), np.cumsum(~english)) - 0.5
    return order[np.argsort(rank / np.where(english, english.sum(), (~english).sum()), kind="stable")]


class Candidate(NamedTuple):
    """An example by its index, and the tokens of its sides."""

    example: int
    target: int
    english: int


class Rows:
    """The rows of one side of an update, and the room that is left in them."""

    def __init__(self, shape: tuple[int, int]):
        rows, self.length = shape
        self.places = rows * self.length
        self._free = [(self.length, row) for row in range(rows)]  # ascending by room

    def find(self, length: int) -> int | None:
        """The fullest row that has room, as a number for `place`; None where none has."""
        slot = bisect.bisect_left(self._free, (length, 0))
        return slot if slot < len(self._free) else None

    def place(self, slot: int, length: int) -> tuple[int, int]:
        """Takes the room; returns row and offset."""
        room, row = self._free.pop(slot)
        bisect.insort(self._free, (room - length, row))
        return row, self.length - room


def _fill_update(
    waiting: list[Candidate], coming: Iterator[Candidate], target: Rows, english: Rows, placed: list
) -> list[Candidate]:
    """Append to `placed` the examples of one update and their places; return those left waiting."""
    own, tokens = [], 0
    following = itertools.chain(waiting, coming)
    while tokens < OWN * target.places and (candidate := next(following, None)):
        own.append(candidate)
        tokens += candidate.target
    others = list(itertools.islice(following, max(WINDOW, len(waiting) - len(own))))
    taken = set()
    for candidates in (own, others):
        for candidate in sorted(candidates, key=lambda c: -c.target):
            row = target.find(candidate.target)
            beside = english.find(candidate.english) if candidate.english else 0
            if row is None or beside is None:
                continue
            places = english.place(beside, candidate.english) if candidate.english else (0, 0)
            placed.append((candidate.example, *target.place(row, candidate.target), *places))
            taken.add(candidate.example)
    return [candidate for candidate in own + others if candidate.example not in taken]


def join(plans: list[Plan]) -> Plan:
    """The plans of successive epochs as one."""
    starts = np.cumsum([0] + [len(plan.examples) for plan in plans[:-1]])
    ends = [plan.ends[1:] + start for plan, start in zip(plans, starts, strict=True)]
    side = lambda name: Places(*map(np.concatenate, zip(*(getattr(plan, name) for plan in plans))))
    return Plan(
        np.concatenate([plan.examples for plan in plans]),
        side("target"),
        side("english"),
        ends=np.concatenate([[0], *ends]),
    )


def choose_english_shape(
    target_lengths: np.ndarray, english_lengths: np.ndarray, target_shape: tuple[int, int]
) -> tuple[int, int] | None:
    """(rows, length) of the English side of every update of a run; None without English.

    Few long rows fill best, and a number that is often even divides among many devices. So powers of two
    and three times these are tried on an epoch of (a part of) the examples, each with lengths from an
    average update's need on, and counted with the empty rows that SHARDS devices would add; of those that
    take at most TOLERANCE more places than the best, the most often even number of rows wins.
    """
    target_lengths, english_lengths = np.asarray(target_lengths), np.asarray(english_lengths)
    if not english_lengths.any():
        return None
    sample = np.random.default_rng(0).permutation(len(english_lengths))[:TRIAL]
    lengths = target_lengths[sample], english_lengths[sample]
    fixed = {"target_shape": target_shape, "seed": 0, "epoch": 0}
    updates = lambda shape: plan_epoch(*lengths, **fixed, english_shape=shape).updates
    longest, longest_row = english_lengths.max(), target_shape[1]
    shards = math.gcd(SHARDS, max(1, target_shape[0] // 4))  # English takes about a quarter of the rows
    fewest = updates((len(sample), longest_row))  # English has room for all
    average = lengths[1].sum() / fewest
    needs: dict[tuple[int, int], tuple[int, int]] = {}  # places in all, of English
    for rows in _row_numbers():
        if needs and rows * longest >= 2 * average:
            break
        length = max(longest, average / rows)
        while length <= longest_row:
            length = min(-int(-length // MULTIPLE) * MULTIPLE, longest_row)
            number, spread = updates((rows, length)), rows + -rows % shards
            english = number * spread * length
            needs[rows, length] = number * math.prod(target_shape) + english, english
            if number == fewest:
                break
            length = 1.02 * length + 1
    for kind, tolerance in enumerate(TOLERANCE):
        least = min(need[kind] for need in needs.values())
        needs = {shape: need for shape, need in needs.items() if need[kind] <= (1 + tolerance) * least}
    return max(needs, key=lambda shape: (shape[0] & -shape[0], shape[0], -needs[shape][0]))


def _row_numbers() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, …"""
    yield 1
    for k in itertools.count():
        yield from (2 * 2**k, 3 * 2**k)
