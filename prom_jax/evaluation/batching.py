"""Which texts are computed together: those that begin alike share a row, rows of like length a batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prom_jax.attention import SHARED
from prom_jax.data.tokens import common_prefix
from prom_jax.sharding import place_rows

MAX_TEXTS = 8  # in a row
WORTHWHILE = 16  # tokens that are to be saved before a text joins a row


@dataclass(frozen=True)
class Batch:
    """Rows of up to R texts each, which continue what they have in common; padding is on the left.

    tokens, positions, segments: int32 [B, T]; the r-th text's own part is segment r + 1, what it shares with
      others of its row SHARED, padding 0.
    texts: int [B, R], the number of each text, -1 where there is none.
    ends: int32 [B, R], the place of its last token; lengths: int32 [B, R], its number of tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    texts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class _Row:
    texts: list[int]
    shared: int  # leading tokens
    tokens: int  # in all

    @property
    def places(self) -> int:
        """R: texts that it is computed for, one of few so that few shapes are compiled."""
        return next(number for number in (1, MAX_TEXTS // 2, MAX_TEXTS) if len(self.texts) <= number)


def plan(
    texts: Sequence[Sequence[int]], own: Sequence[int], *, extra: int, places: int, shards: int = 1
) -> Iterator[Batch]:
    """Batches of all texts, each once, the longest first; shapes are few, as each is compiled.

    Args:
      texts: token ids, none empty.
      own: of each text, how many of its last tokens may not be shared with others (1 at least).
      extra: places that each text needs besides, such as for its answer.
      places: of a batch in all, what is in memory at a time: rows × (T + R · extra) stay below it where one
        row a shard does.
      shards: divide the number of rows.
    """
    rows = sorted(_rows(texts, own), key=lambda row: (row.places, row.tokens), reverse=True)
    while rows:
        length, number = _bucket(rows[0].tokens), rows[0].places
        fit = max(1, places // (length + number * extra) // shards)
        alike = sum(row.places == number for row in rows)
        batch = shards * min(1 << int(math.log2(fit)), 1 << (-(-alike // shards) - 1).bit_length())
        taken = rows[: min(batch, alike)]
        yield _batch(texts, taken, (batch, length, number), shards)
        rows = rows[len(taken) :]


def placed(model, batch: Batch, **more) -> dict:
    """The arrays that a model needs of a batch, and `more`, on its mesh."""
    rows = {name: getattr(batch, name) for name in ("tokens", "positions", "segments", "ends", "lengths")}
    rows |= more
    return place_rows(model.mesh, rows)


def _rows(texts, own) -> Iterator[_Row]:
    """Texts by row: a text joins those before it, in alphabetical order, where that saves tokens."""
    members, shared = [], 0
    for text in sorted(range(len(texts)), key=texts.__getitem__):
        if members:
            common = min(common_prefix(texts[members[0]], texts[text]), shared, len(texts[text]) - own[text])
            saved = len(members) * common - (len(members) - 1) * shared
            if saved >= WORTHWHILE and len(members) < MAX_TEXTS:
                members.append(text)
                shared = common
                continue
            yield _row(texts, members, shared)
        members, shared = [text], len(texts[text]) - own[text]
    if members:
        yield _row(texts, members, shared)


def _row(texts, members: list[int], shared: int) -> _Row:
    shared = shared if len(members) > 1 else 0
    return _Row(members, shared, shared + sum(len(texts[text]) - shared for text in members))


def _bucket(length: int) -> int:
    """The length that a row is padded to: powers of two and what lies halfway between them."""
    step = max(32, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // step) * step


def _batch(texts, rows: list[_Row], shape: tuple[int, int, int], shards: int) -> Batch:
    """The rows as arrays of B, T, R places; those of like length have the same place in their shards, which
    work through them in step."""
    number, length, places = shape
    tokens, positions, segments = (np.zeros((number, length), np.int32) for _ in range(3))
    ends, lengths = (np.zeros((number, places), np.int32) for _ in range(2))
    batch = Batch(tokens, positions, segments, np.full((number, places), -1), ends, lengths)
    dealt = np.arange(number).reshape(shards, -1).T.ravel()
    for b, row in zip(dealt, rows):
        end = length - row.tokens
        parts = [(SHARED, texts[row.texts[0]][: row.shared], 0)]
        parts += [(r, texts[text][row.shared :], row.shared) for r, text in enumerate(row.texts, 1)]
        for segment, part, first in parts:
            here = slice(end, end + len(part))
            tokens[b, here], segments[b, here] = part, segment
            positions[b, here] = np.arange(first, first + len(part))
            end += len(part)
            if segment != SHARED:
                ends[b, segment - 1], lengths[b, segment - 1] = end - 1, first + len(part)
        batch.texts[b, : len(row.texts)] = row.texts
    return batch
