"""Which examples an update takes, and where each lies: a pure function of lengths, seed and epoch.

Nothing here knows of hosts or of the mesh, so that a run continues exactly on any number of them.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WINDOW = 512  # examples that may wait for a later update because they fit nowhere in this one


@dataclass(frozen=True)
class Plan:
    """Updates and their target sides. Update u takes the examples `slice(*ends[u:u + 2])` of the
    arrays, which have one entry an example: its index in the records and its place in the batch.
    """

    examples: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray  # [updates + 1], from 0

    @property
    def updates(self) -> int:
        return len(self.ends) - 1


def plan_epoch(
    target_lengths: np.ndarray,
    english_lengths: np.ndarray,
    *,
    sequences: int,
    seq_len: int,
    seed: int | None,
    epoch: int,
) -> Plan:
    """Pack every example once into updates of `sequences` rows of `seq_len` tokens.

    The examples are shuffled (`seed` None: left in order), those with an English side spread evenly
    among the others, and each goes to the fullest row that has room. One that fits nowhere waits
    for the next update, where it comes first; when WINDOW examples wait, or none is left, the
    update is closed. The last one may be partly filled.

    Raises:
      ValueError: an example longer than `seq_len`.
    """
    lengths = np.asarray(target_lengths)
    if len(lengths) and lengths.max() > seq_len:
        raise ValueError(f"An example of {lengths.max()} tokens is longer than a row of {seq_len}.")
    order = np.arange(len(lengths))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        order = _spread(order, np.asarray(english_lengths)[order] > 0)
    coming = zip(order.tolist(), lengths[order].tolist(), strict=True)
    waiting: list[tuple[int, int]] = []
    places: list[tuple[int, int, int]] = []
    ends = [0]
    while len(places) < len(lengths):
        waiting = _fill_update(waiting, coming, sequences, seq_len, places)
        ends.append(len(places))
    examples, rows, offsets = np.array(places, np.int64).reshape(-1, 3).T
    return Plan(examples, rows, offsets, np.array(ends))


def _spread(order: np.ndarray, english: np.ndarray) -> np.ndarray:
    """Interleave the two kinds of examples evenly, each in its own order: English rows have one
    size for the whole run, so that an update with more of them than the others costs all."""
    rank = np.where(english, np.cumsum(english), np.cumsum(~english)) - 0.5
    return order[np.argsort(rank / np.where(english, english.sum(), (~english).sum()), kind="stable")]


def _fill_update(
    waiting: list, coming: Iterator, sequences: int, seq_len: int, places: list
) -> list[tuple[int, int]]:
    """Append to `places` the (example, row, offset) of one update; return those left waiting."""
    free = [(seq_len, row) for row in range(sequences)]  # room, ascending
    passed = []

    def place(example: int, length: int) -> None:
        slot = bisect.bisect_left(free, (length, 0))
        if slot == len(free):
            passed.append((example, length))
            return
        room, row = free.pop(slot)
        bisect.insort(free, (room - length, row))
        places.append((example, row, seq_len - room))

    for example, length in waiting:
        place(example, length)
    while len(passed) < WINDOW and (following := next(coming, None)):
        place(*following)
    return passed


def join(plans: list[Plan]) -> Plan:
    """The plans of successive epochs as one."""
    starts = np.cumsum([0] + [len(plan.examples) for plan in plans[:-1]])
    ends = [plan.ends[1:] + start for plan, start in zip(plans, starts, strict=True)]
    return Plan(
        *(np.concatenate([getattr(p, name) for p in plans]) for name in ("examples", "rows", "offsets")),
        ends=np.concatenate([[0], *ends]),
    )


# The English side ------------------------------------------------------------------------------


class Layout(NamedTuple):
    """English rows of a run: their number and length, and the place of each of the plan's examples
    ([examples] arrays; without meaning for one that has no English side)."""

    num_rows: int
    length: int
    rows: np.ndarray
    offsets: np.ndarray


def layout_english(plan: Plan, english_lengths: np.ndarray, *, sequences: int, seq_len: int) -> Layout | None:
    """Pack the English sides of every update of a whole run into one shape; None without any.

    Of the numbers of rows whose fill is within 10 % of the best one's, the most often even is taken,
    as it spreads over most devices. The length is the least multiple of 32 (of 8 when `seq_len` <
    128), at most `seq_len`, with which best-fit decreasing succeeds in every update.
    """
    lengths = np.asarray(english_lengths)[plan.examples]
    if not lengths.any():
        return None
    order, table = _descending_by_update(plan, lengths)
    most, shapes = sequences, []
    while not shapes:  # English may need more room than the target language
        shapes = [(rows, _least_length(table, rows, seq_len)) for rows in range(1, most + 1)]
        shapes = [(rows, length) for rows, length in shapes if length]
        most *= 2
    least = min(rows * length for rows, length in shapes)
    near = (shape for shape in shapes if 0.9 * shape[0] * shape[1] <= least)
    num_rows, length = max(near, key=lambda shape: (shape[0] & -shape[0], shape[0]))
    placed = _best_fit_decreasing(table, num_rows, length)
    rows, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    real = order >= 0
    rows[order[real]], offsets[order[real]] = placed[0][real], placed[1][real]
    return Layout(num_rows, length, rows, offsets)


def _descending_by_update(plan: Plan, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[updates, most examples] arrays: positions in the plan by falling length (-1: none), and
    these lengths (0: none)."""
    sizes = np.diff(plan.ends)
    update = np.repeat(np.arange(plan.updates), sizes)
    sorted_ = np.lexsort((-lengths, update))
    column = np.arange(len(lengths)) - np.repeat(plan.ends[:-1], sizes)
    order = np.full((plan.updates, sizes.max()), -1)
    order[update, column] = sorted_
    return order, np.where(order >= 0, lengths[order], 0)


def _least_length(table: np.ndarray, num_rows: int, seq_len: int) -> int | None:
    multiple = 32 if seq_len >= 128 else 8
    length = max(table.max(), -(-table.sum(axis=1).max() // num_rows))
    while length <= seq_len:
        length = int(min(-(-length // multiple) * multiple, seq_len))
        if _best_fit_decreasing(table, num_rows, length):
            return length
        length += 1
    return None


def _best_fit_decreasing(table: np.ndarray, num_rows: int, length: int):
    """(rows, offsets), both shaped like `table`, or None if an update does not fit; all updates
    are packed side by side, one example of each at a time."""
    free = np.full((len(table), num_rows), length)
    updates = np.arange(len(table))
    rows, offsets = np.zeros_like(table), np.zeros_like(table)
    for column, lengths in enumerate(table.T):
        room = np.where(free >= lengths[:, None], free, length + 1)
        rows[:, column] = row = room.argmin(axis=1)
        chosen = room[updates, row]
        if (chosen > length).any():
            return None
        offsets[:, column] = length - chosen
        free[updates, row] -= lengths
    return rows, offsets
