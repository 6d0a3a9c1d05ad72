"""Which examples an update takes, and where each side lies: a pure function of lengths, seed and epoch.

Nothing here knows of hosts or of the mesh, so that a run continues exactly on any number of them.
"""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prom_jax.ops.attention import MOST_SEGMENTS

WINDOW = 512  # examples besides an update's own that may fill its gaps
OWN = 0.95  # share of an update's target places that its own examples, the next in order, take
TRIAL = 8192  # examples on which shapes of the English rows are tried
TOLERANCE = (
    0.015,
    0.05,
)  # more places than needed, in all and on the English side, for rows that divide better
MULTIPLE = 16  # of which the English rows' length is one
SHARDS = 8  # devices among which English rows should divide; fewer where there are few target rows


class Texts(NamedTuple):
    """One side of examples, an int64 array each [examples].

    lengths: tokens; 0 where an example lacks the side.
    kinds: texts of a kind begin alike, and a row has that beginning once; shared: its tokens, 0 where a text
      shares nothing.
    """

    lengths: np.ndarray
    kinds: np.ndarray
    shared: np.ndarray

    @classmethod
    def alone(cls, lengths) -> "Texts":
        """Texts that share nothing."""
        lengths = np.asarray(lengths, np.int64)
        return cls(lengths, np.full_like(lengths, -1), np.zeros_like(lengths))

    def take(self, examples) -> "Texts":
        """Those of some examples."""
        return Texts(*(column[examples] for column in self))


class Layout(NamedTuple):
    """The rows of every update of a run, as (number, length).

    english: None without English.
    joined: an English text lies behind the row that has its target text, and of its prompt has only what that
      does not have.
    """

    target: tuple[int, int]
    english: tuple[int, int] | None
    joined: bool = False


class Places(NamedTuple):
    """Where one side of each example lies: row, offset, and the tokens that take room there, its last ones; 0
    for an example that lacks the side."""

    rows: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


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


def plan_epoch(target: Texts, english: Texts, layout: Layout, *, seed: int | None, epoch: int) -> Plan:
    """Pack every example once into updates with rows of the layout.

    The examples are shuffled (`seed` None: left in order), those with an English side spread evenly
    among the others. An update takes the next ones, and fills its gaps from the WINDOW that follow;
    of either the longest comes first, and each goes to the fullest row that has room on both sides,
    of those with the beginning that it shares if it can.
    The others wait, and are first in the next update. The last one may be partly filled.

    Raises:
      ValueError: an example longer than a row.
    """
    for texts, shape in ((target, layout.target), (english, layout.english or (0, 0))):
        if texts.lengths.max(initial=0) > shape[1]:
            raise ValueError(
                f"An example of {texts.lengths.max()} tokens is longer than a row of {shape[1]}."
            )
    order = np.arange(len(target.lengths))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(order))
        order = _spread(order, english.lengths[order] > 0)
    sides = (map(Text, *(column.tolist() for column in texts.take(order))) for texts in (target, english))
    coming = map(Candidate, order.tolist(), *sides)
    waiting: list[Candidate] = []
    placed: list[tuple[int, ...]] = []
    ends = [0]
    while len(placed) < len(order):
        waiting = _fill_update(waiting, coming, layout, placed)
        ends.append(len(placed))
    examples, *places = np.array(placed, np.int64).reshape(-1, 7).T
    return Plan(examples, Places(*places[:3]), Places(*places[3:]), np.array(ends))


def _spread(order: np.ndarray, english: np.ndarray) -> np.ndarray:
    """Interleave the two kinds of examples evenly, each in its own order, so that updates need
    about as much room for English as each other."""
    rank = np.where(english, np.cumsum(english), np.cumsum(~english)) - 0.5
    return order[np.argsort(rank / np.where(english, english.sum(), (~english).sum()), kind="stable")]


class Text(NamedTuple):
    """As `Texts`, of one example."""

    length: int
    kind: int
    shared: int

    @property
    def own(self) -> int:
        """Tokens that no other text has."""
        return self.length - self.shared


class Candidate(NamedTuple):
    """An example by its index, and its sides."""

    example: int
    target: Text
    english: Text


class Rows:
    """The rows of one side of an update, and the room that is left in them."""

    def __init__(self, shape: tuple[int, int]):
        number, self._length = shape
        self.places = number * self._length
        self._room = [self._length] * number
        self._kinds: list[list[int]] = [[] for _ in range(number)]
        self._texts = [0] * number
        # (room, row) in ascending order: of all rows, and of those with a kind's beginning
        self._free = [(self._length, row) for row in range(number)]
        self._free_of_kind: dict[int, list] = defaultdict(list)

    def find(self, text: Text, also: Callable[[int], bool]) -> int | None:
        """The fullest row that has room and for which `also` holds, of those with the text's beginning or
        else of all; None where none has."""
        for free, length in ((self._free_of_kind.get(text.kind, ()), text.own), (self._free, text.length)):
            for slot in range(bisect.bisect_left(free, (length, 0)), len(free)):
                if also(free[slot][1]):
                    return free[slot][1]
        return None

    def needs(self, text: Text, row: int) -> int:
        """Places that a text takes in a row."""
        return text.own if text.kind in self._kinds[row] else text.length

    def has_room(self, text: Text, row: int) -> bool:
        """Whether a text fits into a row."""
        return self.needs(text, row) <= self._room[row] and self._texts[row] < MOST_SEGMENTS

    def place(self, text: Text, row: int) -> tuple[int, int, int]:
        """Takes the room; returns row, offset and length."""
        length, room = self.needs(text, row), self._room[row]
        if text.shared and text.kind not in self._kinds[row]:
            self._kinds[row].append(text.kind)
            bisect.insort(self._free_of_kind[text.kind], (room, row))
        self._room[row] -= length
        self._texts[row] += 1
        for free in (self._free, *(self._free_of_kind[kind] for kind in self._kinds[row])):
            free.pop(bisect.bisect_left(free, (room, row)))
            if self._texts[row] < MOST_SEGMENTS:
                bisect.insort(free, (self._room[row], row))
        return row, self._length - room, length


def _fill_update(
    waiting: list[Candidate], coming: Iterator[Candidate], layout: Layout, placed: list
) -> list[Candidate]:
    """Append to `placed` the examples of one update and their places; return those left waiting."""
    target, english = Rows(layout.target), Rows(layout.english or (0, 0))
    own, tokens = [], 0
    following = itertools.chain(waiting, coming)
    while tokens < OWN * target.places and (candidate := next(following, None)):
        own.append(candidate)
        tokens += candidate.target.own
    others = list(itertools.islice(following, max(WINDOW, len(waiting) - len(own))))
    taken = set()
    for candidates in (own, others):
        for candidate in sorted(candidates, key=lambda c: -c.target.own):
            rows = _find(candidate, target, english, layout.joined)
            if rows is None:
                continue
            places = english.place(candidate.english, rows[1]) if candidate.english.length else (0, 0, 0)
            placed.append((candidate.example, *target.place(candidate.target, rows[0]), *places))
            taken.add(candidate.example)
    return [candidate for candidate in own + others if candidate.example not in taken]


def _find(candidate: Candidate, target: Rows, english: Rows, joined: bool) -> tuple[int, int | None] | None:
    """The rows of both sides of an example, or None where they have no room."""
    anywhere = lambda row: True
    if joined and candidate.english.length:
        row = target.find(candidate.target, lambda row: english.has_room(candidate.english, row))
        return None if row is None else (row, row)
    beside = english.find(candidate.english, anywhere) if candidate.english.length else None
    if candidate.english.length and beside is None:
        return None
    row = target.find(candidate.target, anywhere)
    return None if row is None else (row, beside)


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


def choose_layout(target: Texts, english: Texts, target_shape: tuple[int, int], prompts=None) -> Layout:
    """That which takes fewest places: English in rows of its own, or behind those of the target text.

    Args: prompts: int64 [examples], tokens of an example's prompt that both sides have: of the English text
      they are left out where it is joined (`continuing`). None where sides are to be apart.
    """
    if not english.lengths.any():
        return Layout(target_shape, None)
    sample = np.random.default_rng(0).permutation(len(target.lengths))[:TRIAL]
    apart = _Trial(target.take(sample), english.take(sample), target_shape)
    layout, places = _choose_rows(apart, english.lengths.max())
    if prompts is not None and prompts.any():
        short = continuing(english, prompts)
        trial = _Trial(target.take(sample), short.take(sample), target_shape, joined=True)
        joined = _choose_length(trial, short.lengths.max())
        if joined is not None and joined[1] < places:
            layout = joined[0]
    return layout


def continuing(english: Texts, prompts: np.ndarray) -> Texts:
    """English texts without what their target texts have too; those that have nothing in common stay."""
    apart = prompts == 0
    return Texts(english.lengths - prompts, np.where(apart, english.kinds, -1), english.shared * apart)


class _Trial:
    """An epoch of a sample of the examples, packed with different layouts."""

    def __init__(self, target: Texts, english: Texts, target_shape: tuple[int, int], joined: bool = False):
        self._texts, self.target_shape, self._joined = (target, english), target_shape, joined
        self.fewest = self.updates((target_shape[0], int(english.lengths.sum())))  # English has room for all
        self.average = (english.lengths - english.shared).sum() / self.fewest

    def layout(self, shape: tuple[int, int]) -> Layout:
        """That with such English rows."""
        return Layout(self.target_shape, shape, self._joined)

    def updates(self, shape: tuple[int, int]) -> int:
        """How many an epoch then has."""
        return plan_epoch(*self._texts, self.layout(shape), seed=0, epoch=0).updates

    def lengths(self, rows: int, longest: int, most: int) -> Iterator[tuple[int, int]]:
        """Lengths of so many English rows from an average update's need on, and how many updates each makes;
        the last makes fewest."""
        length = max(longest, self.average / rows)
        while length <= most:
            length = min(-int(-length // MULTIPLE) * MULTIPLE, most)
            number = self.updates((rows, length))
            yield length, number
            if number == self.fewest:
                break
            length = 1.02 * length + 1


def _choose_rows(trial: _Trial, longest: int) -> tuple[Layout, int]:
    """Rows for English alone, and the places that an epoch takes with them.

    Few long rows fill best, and a number that is often even divides among many devices. So powers of two
    and three times these are tried, and counted with the empty rows that SHARDS devices would add; of those
    that take at most TOLERANCE more places than the best, the most often even number of rows wins.
    """
    shards = math.gcd(SHARDS, max(1, trial.target_shape[0] // 4))  # English takes about a quarter of the rows
    needs: dict[tuple[int, int], tuple[int, int]] = {}  # places in all, of English
    for rows in _row_numbers():
        if needs and rows * longest >= 2 * trial.average:
            break
        for length, updates in trial.lengths(rows, longest, trial.target_shape[1]):
            english = updates * (rows + -rows % shards) * length
            needs[rows, length] = updates * math.prod(trial.target_shape) + english, english
    for kind, tolerance in enumerate(TOLERANCE):
        least = min(need[kind] for need in needs.values())
        needs = {shape: need for shape, need in needs.items() if need[kind] <= (1 + tolerance) * least}
    best = max(needs, key=lambda shape: (shape[0] & -shape[0], shape[0], -needs[shape][0]))
    return trial.layout(best), needs[best][0]


def _choose_length(trial: _Trial, longest: int) -> tuple[Layout, int] | None:
    """The length of what lies behind the target rows, and the places that an epoch then takes; None where
    twice their length is too little."""
    rows, length = trial.target_shape
    needs = {
        behind: updates * rows * (length + behind)
        for behind, updates in trial.lengths(rows, longest, 2 * length)
    }
    if not needs:
        return None
    best = min(needs, key=needs.get)
    return trial.layout((rows, best)), needs[best]


def _row_numbers() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, …"""
    yield 1
    for k in itertools.count():
        yield from (2 * 2**k, 3 * 2**k)
