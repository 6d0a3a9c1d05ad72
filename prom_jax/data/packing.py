"""Which examples an update takes, and which slots their texts get: a function of lengths, seed and epoch.

Texts come in named streams. The first is the primary one, whose rows are given; each of the others has rows
of its own, of a number and length that are chosen here, or is appended to the primary rows. Nothing here
knows of hosts or of the mesh, so that a run continues exactly on any number of them.
"""

import bisect
import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prom_jax.ops.attention import MAX_SEGMENTS

AT_ONCE = 65_536  # examples that are made into candidates at a time
LOOKAHEAD = 512  # examples besides an update's own that may fill gaps in its primary rows
FILL_TARGET = 0.95  # share of an update's primary slots that its own examples, the next in order, fill
SAMPLE_SIZE = 8192  # examples on which row shapes of the secondary streams are tried
TOLERANCE = (0.015, 0.05)  # more slots than needed, in all and in the stream, for rows that divide better
LENGTH_MULTIPLE = 16  # of which the length of secondary rows is one
SHARDS = 8  # devices among which secondary rows should divide; fewer where there are few primary rows


class Texts(NamedTuple):
    """One stream's texts, an int64 array each [examples].

    lengths: tokens; 0 where an example lacks the stream.
    prefix_ids: texts with the same id begin with the same prefix, which a row has once.
    shared: tokens of that prefix; 0 where a text shares none.
    """

    lengths: np.ndarray
    prefix_ids: np.ndarray
    shared: np.ndarray

    @classmethod
    def unshared(cls, lengths) -> "Texts":
        """Texts that share no prefix."""
        lengths = np.asarray(lengths, np.int64)
        return cls(lengths, np.full_like(lengths, -1), np.zeros_like(lengths))

    @property
    def own(self) -> np.ndarray:
        """Tokens that no other text has."""
        return self.lengths - self.shared

    def take(self, examples) -> "Texts":
        """Those of some examples."""
        return Texts(*(column[examples] for column in self))


class Layout(NamedTuple):
    """The rows of every update of a run.

    shapes: (rows, length) by stream, the primary one first; a stream without any text is left out.
    appended: the stream whose texts are appended to the rows that have the same examples' primary texts, and
      have of their prompts only what these do not have; None without one.
    """

    shapes: dict[str, tuple[int, int]]
    appended: str | None = None

    @property
    def primary(self) -> str:
        """The primary stream."""
        return next(iter(self.shapes))


class Slots(NamedTuple):
    """Which slots one stream's texts take: row, offset, and how many, for a text's last tokens; 0 for an
    example that lacks the stream."""

    rows: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Updates: number u takes the examples `slice(*ends[u:u + 2])` of the arrays, which have one
    entry an example: its index in the records and its slots in each stream of the batch.
    """

    examples: np.ndarray
    slots: dict[str, Slots]
    ends: np.ndarray  # [updates + 1], from 0

    @property
    def updates(self) -> int:
        return len(self.ends) - 1


def plan_epoch(
    texts: dict[str, Texts],
    layout: Layout,
    *,
    seed: int | None,
    epoch: int,
    groups: np.ndarray | int = 0,
    examples: np.ndarray | None = None,
) -> Plan:
    """Packs the examples of an epoch into updates with rows of the layout.

    The examples are shuffled (`seed` None: left in order), those of one group with the same streams spread
    evenly among the others. An update takes the next ones, and fills the gaps in its primary rows from the
    LOOKAHEAD that follow. Each group is placed longest-first; each text goes to the fullest row that has
    capacity, of those with its prefix if it can, and an example waits where one of its streams has no such
    row. Those that wait are first in the next update. The last one may be partly filled.

    Args:
      texts: by stream, of the same examples.
      groups: a number for each example, such as that of its language.
      examples: indices of those that the epoch takes, of which one may come several times; None for each
        once.

    Raises:
      ValueError: a text longer than a row.
    """
    for stream, of_stream in texts.items():
        capacity, longest = layout.shapes.get(stream, (0, 0))[1], of_stream.lengths.max(initial=0)
        if longest > capacity:
            raise ValueError(f"An example of {longest} tokens is longer than a row of {capacity}.")
    wanted = [texts[stream] for stream in layout.shapes]
    order = np.arange(len(wanted[0].lengths)) if examples is None else examples
    if seed is not None:
        order = order[np.random.default_rng([seed, epoch]).permutation(len(order))]
        present = np.stack([of_stream.lengths > 0 for of_stream in wanted])
        kinds = 2 ** np.arange(len(wanted)) @ present + 2 ** len(wanted) * groups
        order = _spread(order, kinds[order])
    coming = _candidates(wanted, order)
    waiting: list[Candidate] = []
    placed = array("q")  # of each example its index, and row, offset and length in each stream
    width = 1 + 3 * len(wanted)
    ends = [0]
    while ends[-1] < len(order):
        waiting = _fill_update(waiting, coming, layout, placed)
        ends.append(len(placed) // width)
    examples, *columns = np.array(placed, np.int64).reshape(-1, width).T
    slots = {stream: Slots(*columns[3 * i : 3 * i + 3]) for i, stream in enumerate(layout.shapes)}
    return Plan(examples, slots, np.array(ends))


def _candidates(texts: list[Texts], order: np.ndarray) -> Iterator["Candidate"]:
    """The examples in this order, some at a time, as millions of them would fill the memory."""
    for first in range(0, len(order), AT_ONCE):
        part = order[first : first + AT_ONCE]
        taken = [of_stream.take(part) for of_stream in texts]
        columns = (map(Text, *(column.tolist() for column in (*each, each.own))) for each in taken)
        yield from map(
            Candidate, itertools.count(first), part.tolist(), zip(*columns), _sizes(taken).tolist()
        )


def _spread(order: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Interleaves the examples of different kinds evenly, each kind in its own order, so that updates need
    about as much capacity in each stream as each other.

    Args:
      order, kinds: int [examples].
    """
    when = np.empty(len(order))
    for kind in np.unique(kinds):
        of_kind = kinds == kind
        number = of_kind.sum()
        when[of_kind] = (np.arange(1, number + 1) - 0.5) / number
    return order[np.argsort(when, kind="stable")]


def _sizes(texts: list[Texts]) -> np.ndarray:
    """By which examples are placed longest-first, int64 [examples]: the primary text's own tokens, or those
    of the longest text where there is none."""
    longest = np.max([of_stream.own for of_stream in texts], axis=0)
    return np.where(texts[0].lengths > 0, texts[0].own, longest)


class Text(NamedTuple):
    """As `Texts`, of one example."""

    length: int
    prefix_id: int
    shared: int
    own: int


class Candidate(NamedTuple):
    """An example by its place in the epoch and its index, its texts by stream, the primary one first, and its
    size."""

    number: int
    example: int
    texts: tuple[Text, ...]
    size: int


class Rows:
    """The rows of one stream of an update: free capacity per row (best-fit bins)."""

    def __init__(self, shape: tuple[int, int]):
        number, self._length = shape
        self._capacity = [self._length] * number
        self._prefixes: list[list[int]] = [[] for _ in range(number)]
        self._texts = [0] * number
        # (capacity, row) in ascending order: of all rows, and of those with a prefix
        self._free = [(self._length, row) for row in range(number)]
        self._free_with_prefix: dict[int, list] = defaultdict(list)

    def find(self, text: Text, suits: Callable[[int], bool] | None = None) -> int | None:
        """The fullest row that has capacity and that suits, of those with the text's prefix or else of all;
        None where none has."""
        with_prefix = self._free_with_prefix.get(text.prefix_id, ())
        for free, length in ((with_prefix, text.own), (self._free, text.length)):
            first = bisect.bisect_left(free, (length, 0))
            if suits is None:
                if first < len(free):
                    return free[first][1]
                continue
            for _, row in itertools.islice(free, first, None):
                if suits(row):
                    return row
        return None

    def needed(self, text: Text, row: int) -> int:
        """Slots that a text takes in a row."""
        return text.own if text.prefix_id in self._prefixes[row] else text.length

    def fits(self, text: Text, row: int) -> bool:
        """Whether a text fits into a row."""
        return self.needed(text, row) <= self._capacity[row] and self._texts[row] < MAX_SEGMENTS

    def place(self, text: Text, row: int) -> tuple[int, int, int]:
        """Takes the capacity; returns row, offset and length."""
        length, capacity = self.needed(text, row), self._capacity[row]
        if text.shared and text.prefix_id not in self._prefixes[row]:
            self._prefixes[row].append(text.prefix_id)
            bisect.insort(self._free_with_prefix[text.prefix_id], (capacity, row))
        self._capacity[row] -= length
        self._texts[row] += 1
        for free in (self._free, *(self._free_with_prefix[prefix] for prefix in self._prefixes[row])):
            free.pop(bisect.bisect_left(free, (capacity, row)))
            if self._texts[row] < MAX_SEGMENTS:
                bisect.insort(free, (self._capacity[row], row))
        return row, self._length - capacity, length


def _fill_update(
    waiting: list[Candidate], coming: Iterator[Candidate], layout: Layout, placed: array
) -> list[Candidate]:
    """Appends to `placed` the examples of one update and their slots; returns those left waiting."""
    rows = [Rows(shape) for shape in layout.shapes.values()]
    appended = list(layout.shapes).index(layout.appended) if layout.appended else None
    enough = FILL_TARGET * math.prod(layout.shapes[layout.primary])
    own, tokens = [], 0
    following = itertools.chain(waiting, coming)
    while tokens < enough and (candidate := next(following, None)):
        own.append(candidate)
        tokens += candidate.texts[0].own
    others = list(itertools.islice(following, max(LOOKAHEAD, len(waiting) - len(own))))
    fillers = [candidate for candidate in others if candidate.texts[0].length]  # the rest keeps its turn
    taken = set()
    for candidates in (own, fillers):
        for candidate in sorted(candidates, key=lambda candidate: -candidate.size):
            found = _find_rows(candidate.texts, rows, appended)
            if found is None:
                continue
            placed.append(candidate.example)
            for text, of_stream, row in zip(candidate.texts, rows, found):
                placed.extend((0, 0, 0) if row is None else of_stream.place(text, row))
            taken.add(candidate.number)
    return [candidate for candidate in own + others if candidate.number not in taken]


def _find_rows(texts: tuple[Text, ...], rows: list[Rows], appended: int | None) -> list[int | None] | None:
    """The row in each stream of an example, None in those that it lacks; None where one has no capacity.

    Args:
      appended: the index of the stream whose texts go into the same row as the primary ones.
    """
    found: list[int | None] = []
    last = appended or 0
    together = (0, last) if last and texts[last].length else ()
    for i, text in enumerate(texts):
        row = None
        if i in together:
            # An empty primary text has a row here too: it counts among the texts that are numbered.
            row = found[0] if i else rows[0].find(text, lambda row: rows[last].fits(texts[last], row))
        elif text.length:
            row = rows[i].find(text)
        else:
            found.append(None)
            continue
        if row is None:
            return None
        found.append(row)
    return found


def join(plans: list[Plan]) -> Plan:
    """The plans of successive epochs as one."""
    starts = np.cumsum([0] + [len(plan.examples) for plan in plans[:-1]])
    ends = [plan.ends[1:] + start for plan, start in zip(plans, starts, strict=True)]
    return Plan(
        np.concatenate([plan.examples for plan in plans]),
        {
            stream: Slots(*map(np.concatenate, zip(*(plan.slots[stream] for plan in plans))))
            for stream in plans[0].slots
        },
        ends=np.concatenate([[0], *ends]),
    )


def choose_layout(
    texts: dict[str, Texts],
    primary_shape: tuple[int, int],
    prompts: dict[str, np.ndarray] | None = None,
    examples: np.ndarray | None = None,
) -> Layout:
    """That which takes the fewest slots: each secondary stream in rows of its own, or one of them, the first
    that gains by it, appended to the primary rows.

    Args:
      texts: by stream, the primary one first.
      primary_shape: its rows and their length.
      prompts: by secondary stream that may be appended, int64 [examples], tokens of an example's prompt that
        the primary text has too: they are left out where the stream is appended (`without_prompts`).
      examples: those of an epoch, as in `plan_epoch`.
    """
    (primary, primary_texts), *others = texts.items()
    shapes, appended = {primary: primary_shape}, None
    examples = np.arange(len(primary_texts.lengths)) if examples is None else examples
    sample = examples[np.random.default_rng(0).permutation(len(examples))[:SAMPLE_SIZE]]
    for stream, of_stream in others:
        if not of_stream.lengths.any():
            continue
        trial = _Trial(primary_texts.take(sample), of_stream.take(sample), primary_shape)
        shapes[stream], slots = _choose_rows(trial, of_stream.lengths.max())
        of_prompts = (prompts or {}).get(stream)
        if appended is None and of_prompts is not None and of_prompts.any():
            rest = without_prompts(of_stream, of_prompts)
            trial = _Trial(primary_texts.take(sample), rest.take(sample), primary_shape, append=True)
            joint = _choose_length(trial, rest.lengths.max())
            if joint is not None and joint[1] < slots:
                shapes[stream], appended = joint[0], stream
    return Layout(shapes, appended)


def without_prompts(texts: Texts, prompts: np.ndarray) -> Texts:
    """Texts without the prompts that the primary texts have too; those that have none in common stay."""
    apart = prompts == 0
    return Texts(texts.lengths - prompts, np.where(apart, texts.prefix_ids, -1), texts.shared * apart)


class _Trial:
    """An epoch of a sample of the examples, in the primary and one other stream, packed with different
    layouts."""

    def __init__(self, primary: Texts, other: Texts, primary_shape: tuple[int, int], append: bool = False):
        some = primary.lengths + other.lengths > 0  # the others have further streams alone
        self._texts = {"primary": primary.take(some), "other": other.take(some)}
        self._append, self.primary_shape = append, primary_shape
        # as if the other stream had capacity for all
        self.fewest = self.updates((primary_shape[0], max(1, int(other.lengths.sum()))))
        self.average = other.own.sum() / max(1, self.fewest)

    def updates(self, shape: tuple[int, int]) -> int:
        """How many an epoch has with such rows of the other stream."""
        layout = Layout({"primary": self.primary_shape, "other": shape}, "other" if self._append else None)
        return plan_epoch(self._texts, layout, seed=0, epoch=0).updates

    def lengths(self, rows: int, longest: int, most: int) -> Iterator[tuple[int, int]]:
        """Lengths of `rows` rows of the other stream, from an average update's need on, and how many updates
        each makes; the last makes fewest."""
        length = max(longest, self.average / rows)
        while length <= most:
            length = min(-int(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, most)
            number = self.updates((rows, length))
            yield length, number
            if number == self.fewest:
                break
            length = 1.02 * length + 1


def _choose_rows(trial: _Trial, longest: int) -> tuple[tuple[int, int], int]:
    """The shape of rows of the other stream's own, and the slots that an epoch takes with them.

    Few long rows fill best, and a number that is often even divides among many devices. So powers of two
    and three times these are tried, and counted with the empty rows that SHARDS devices would add; of those
    that take at most TOLERANCE more slots than the best, the most often even number of rows wins.
    """
    # English takes about a quarter of the rows
    shards = math.gcd(SHARDS, max(1, trial.primary_shape[0] // 4))
    needs: dict[tuple[int, int], tuple[int, int]] = {}  # slots in all, of the other stream
    for rows in _row_numbers():
        if needs and rows * longest >= 2 * trial.average:
            break
        for length, updates in trial.lengths(rows, longest, trial.primary_shape[1]):
            other = updates * (rows + -rows % shards) * length
            needs[rows, length] = updates * math.prod(trial.primary_shape) + other, other
    for kind, tolerance in enumerate(TOLERANCE):
        least = min(need[kind] for need in needs.values())
        needs = {shape: need for shape, need in needs.items() if need[kind] <= (1 + tolerance) * least}
    best = max(needs, key=lambda shape: (shape[0] & -shape[0], shape[0], -needs[shape][0]))
    return best, needs[best][0]


def _choose_length(trial: _Trial, longest: int) -> tuple[tuple[int, int], int] | None:
    """The shape of what is appended to the primary rows, and the slots that an epoch then takes; None where
    twice their length is too little."""
    rows, length = trial.primary_shape
    needs = {
        appended: updates * rows * (length + appended)
        for appended, updates in trial.lengths(rows, longest, 2 * length)
    }
    if not needs:
        return None
    best = min(needs, key=lambda appended: needs[appended])
    return (rows, best), needs[best]


def _row_numbers() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, …"""
    yield 1
    for k in itertools.count():
        yield from (2 * 2**k, 3 * 2**k)
