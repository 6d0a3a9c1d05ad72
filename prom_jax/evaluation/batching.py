"""Which texts are computed together: those with a common prefix in a row, rows of like length in a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from prom_jax.data.tokens import common_prefix
from prom_jax.ops.attention import SHARED_PREFIX, segment_id
from prom_jax.parallel.sharding import place_rows

MAX_TEXTS = 8  # in a row
SHORTEST = 32  # tokens of a row
WORTHWHILE = 16  # tokens that are to be saved before a text joins a row

# Cost model of one decode step in token-equivalents: STEP_COST fixed, as it reads all weights, plus attended
# keys / KEYS_PER_TOKEN; a token and PAIRS_PER_TOKEN pairs of a token and a key cost the same. Measured for
# SmolLM2 on two cores; an accelerator computes faster by far than it reads.
STEP_COST, STEP_COST_OF_ACCELERATOR, KEYS_PER_TOKEN, PAIRS_PER_TOKEN = 32, 256, 180, 1000


@dataclass(frozen=True)
class Batch:
    """Rows of up to R texts each, which continue a shared prefix; padding is on the left.

    Attributes:
      tokens, positions, segments: int32 [B, T]; the prefix of a row's texts is segment SHARED_PREFIX, which
        the r-th text's own part, `own_segment(r)`, continues; padding is 0.
      texts: int [B, R], the number of each text, -1 where there is none.
      ends: int32 [B, R], the column of its last token.
      lengths: int32 [B, R], its number of tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    texts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray


def own_segment(text):
    """The segment of the own part of a row's text; an int or an array of them."""
    return segment_id(1, 0, text + 1)


@dataclass(frozen=True)
class _Row:
    texts: list[int]
    shared: int  # leading tokens; of a single text, those that may be
    tokens: int  # in all

    @property
    def capacity(self) -> int:
        """R: texts that it is computed for."""
        return _few(len(self.texts))

    @property
    def pairs(self) -> int:
        """Keys that a step's tokens look at, each at all of the row's."""
        return len(self.texts) * self.tokens


def plan(
    texts: Sequence[Sequence[int]], own: Sequence[int], *, extra: int, slots: int, shards: int = 1
) -> Iterator[Batch]:
    """Batches of all texts, each once, those with many texts a row and the longest first; shapes are few, as
    each is compiled, and chosen so that all batches together cost least.

    Args:
      texts: token ids, none empty.
      own: of each text, how many of its last tokens may not be shared with others (1 at least).
      extra: slots that each text needs besides, such as for its answer.
      slots: of a batch in all, what is in memory at a time: rows × (T + R · extra) stay below it where one
        row a shard does.
      shards: divide the number of rows.
    """
    made = _rows(texts, own, extra, slots // shards)
    rows = sorted(made, key=lambda row: (row.capacity, row.tokens), reverse=True)
    start = 0
    for number, shape in _split(rows, extra, slots, shards):
        yield _batch(texts, rows[start : start + number], shape, shards)
        start += number


def placed(model, batch: Batch, **more) -> dict:
    """The arrays that a model needs of a batch, and `more`, on its mesh."""
    rows = {name: getattr(batch, name) for name in ("tokens", "positions", "segments", "ends", "lengths")}
    rows |= more
    return place_rows(model.mesh, rows)


def _rows(texts, own, extra: int, slots: int) -> Iterator[_Row]:
    """Texts by row of up to so many slots: a text joins those before it, in alphabetical order, where the
    tokens that this saves are worth more than that every step looks at the others' keys too."""
    row = None
    for text in sorted(range(len(texts)), key=texts.__getitem__):
        alone = _row(texts, [text], len(texts[text]) - own[text])
        if row is not None and len(row.texts) < MAX_TEXTS:
            common = min(common_prefix(texts[row.texts[0]], texts[text]), row.shared, alone.shared)
            joined = _row(texts, [*row.texts, text], common)
            saved = row.tokens + alone.tokens - joined.tokens
            looks = extra * (joined.pairs - row.pairs - alone.pairs) / PAIRS_PER_TOKEN
            if saved >= WORTHWHILE + looks and joined.tokens + joined.capacity * extra <= slots:
                row = joined
                continue
        if row is not None:
            yield row
        row = alone
    if row is not None:
        yield row


def _row(texts, members: list[int], shared: int) -> _Row:
    return _Row(members, shared, shared + sum(len(texts[text]) - shared for text in members))


def _split(rows: list[_Row], extra: int, slots: int, shards: int) -> list[tuple[int, tuple]]:
    """The cheapest way to take sorted rows in batches: the number of rows of each, and its shape B, T, R."""
    tokens = np.array([row.tokens for row in rows])
    step = STEP_COST if jax.default_backend() == "cpu" else STEP_COST_OF_ACCELERATOR
    costs = np.zeros(len(rows) + 1)
    taken: list[tuple[int, tuple]] = [(0, ())] * len(rows)
    for start in reversed(range(len(rows))):
        longest = np.maximum.accumulate(tokens[start : start + max(shards, slots // SHORTEST)])
        per_row, options = rows[start].capacity, []
        for number in _numbers(len(longest), shards):
            batch = shards * _few(-(-number // shards))
            length = SHORTEST * _few(-(-int(longest[number - 1]) // SHORTEST))
            size = batch * (length + per_row * extra)
            if batch > shards and size > slots:
                break
            cost = max(1, extra) * (step + (batch * per_row + size / KEYS_PER_TOKEN) / shards)
            options.append((cost + costs[start + number], -number, (batch, length, per_row)))
        costs[start], less, shape = min(options)
        taken[start] = -less, shape
    chosen, start = [], 0
    while start < len(rows):
        chosen.append(taken[start])
        start += taken[start][0]
    return chosen


def _numbers(most: int, shards: int) -> Iterator[int]:
    """Of rows that a batch may have: those that fill it, and at last all there are."""
    number = 0
    while number < most:
        number = min(most, shards * _few(number // shards + 1))
        yield number


def _few(number: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12 … (powers of two and the middles between them): with few sizes, few
    shapes are compiled."""
    step = 1 << max(0, (number - 1).bit_length() - 2)
    return -(-number // step) * step


def _batch(texts, rows: list[_Row], shape: tuple[int, int, int], shards: int) -> Batch:
    """The rows as arrays of B × T columns for R texts; those of similar length have the same index in their
    shards, which work through them in step."""
    number, length, capacity = shape
    tokens, positions, segments = (np.zeros((number, length), np.int32) for _ in range(3))
    ends, lengths = (np.zeros((number, capacity), np.int32) for _ in range(2))
    batch = Batch(tokens, positions, segments, np.full((number, capacity), -1), ends, lengths)
    dealt = np.arange(number).reshape(shards, -1).T.ravel()
    for b, row in zip(dealt, rows):
        end = length - row.tokens
        shared = row.shared if len(row.texts) > 1 else 0
        parts = [(SHARED_PREFIX, texts[row.texts[0]][:shared], 0)]
        parts += [(own_segment(r), texts[text][shared:], shared) for r, text in enumerate(row.texts)]
        for r, (number, part, first) in enumerate(parts, -1):
            here = slice(end, end + len(part))
            tokens[b, here], segments[b, here] = part, number
            positions[b, here] = np.arange(first, first + len(part))
            end += len(part)
            if number != SHARED_PREFIX:
                ends[b, r], lengths[b, r] = end - 1, first + len(part)
        batch.texts[b, : len(row.texts)] = row.texts
    return batch
