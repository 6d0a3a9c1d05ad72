"""Batches by step number: there is no iterator state, the data position *is* the step.

A batch is one update: {"target": Rows, "english": Rows}, "english" left out when no record has an
English side. Rows is a dict of [rows, length] arrays:

  tokens     int32
  positions  int32, from 0 in each example
  segments   int32, as `attention.segment` numbers them within a row; 0 for padding
  labels     int32, the next token of the same example
  weights    float32, 1 where `labels` bears loss, else 0

Prompts that begin alike are computed once. A row has what its texts of a kind begin with as a segment that
they continue; and where the batches are `joined`, row i of "english" lies behind row i of "target", and its
texts continue the prompts of the target texts there.
"""

import math
from collections.abc import Iterator

import grain
import numpy as np

from prom_jax.data import packing
from prom_jax.data.records import SIDES, Records
from prom_jax.ops.attention import segment
from prom_jax.utils.errors import UserError


class Batches:
    """The batches of a run, as a random-access sequence: `batches[step]`, `len(batches)`.

    Training takes `epochs` (a fraction is that part of the last epoch's updates) or, when `steps`
    is not 0, so many updates, running into further epochs. `Batches.once` is for evaluation.
    `share_prompts`: whether prompts that begin alike are computed once, else every text is whole;
    `join`: whether English rows may continue target rows, so that neither is of use alone.

    Attributes:
      num_steps: updates in all; `steps_per_epoch`: the first epoch's.
      examples: indices into `records`, in the order in which the steps take them.
      shapes: {"target": (rows, length), "english": …}; the latter only where there is an English side.
      joined: whether English rows continue the target rows.
      fill: places taken per place over all steps, by the same keys.
      saved: share of the examples' tokens that need no place, as others have them.

    Raises:
      UserError: neither epochs nor steps.
    """

    def __init__(
        self,
        records: Records,
        *,
        sequences: int,
        seq_len: int,
        seed: int | None,
        epochs: float = 0.0,
        steps: int = 0,
        share_prompts: bool = False,
        join: bool = True,
    ):
        if not (steps > 0 or epochs > 0):
            raise UserError(f"steps is {steps} and epochs is {epochs}: one of them must be more than 0.")
        self._records, self.share_prompts = records, share_prompts
        target, english = (_texts(records, side, share_prompts) for side in SIDES)
        self._prompts = np.zeros_like(target.lengths)  # tokens that English has of its target text
        prompts = None
        if share_prompts and join:
            prompts = np.where(records.common_prompts >= target.shared, records.common_prompts, 0)
        layout = packing.choose_layout(target, english, (sequences, seq_len), prompts)
        self.joined = layout.joined
        if self.joined:
            self._prompts, english = prompts, packing.continuing(english, prompts)
        self._texts = {"target": target, "english": english}
        self.shapes = {side: shape for side, shape in zip(SIDES, layout) if shape}
        plans: list[packing.Plan] = []
        planned = 0
        while planned < steps if steps else len(plans) < epochs:
            plan = packing.plan_epoch(target, english, layout, seed=seed, epoch=len(plans))
            plans.append(plan)
            planned += plan.updates
        last = plans[-1].updates
        self.num_steps = steps or planned - last + max(1, round((epochs % 1 or 1) * last))
        self.steps_per_epoch = plans[0].updates
        self._plan = packing.join(plans)
        self.examples = self._plan.examples[: self._plan.ends[self.num_steps]]
        taken = {side: getattr(self._plan, side).lengths[: len(self.examples)].sum() for side in self.shapes}
        self.fill = {
            side: float(taken[side] / (self.num_steps * math.prod(shape)))
            for side, shape in self.shapes.items()
        }
        self.saved = 1 - float(sum(taken.values()) / self._tokens_of(self.examples))

    @classmethod
    def once(
        cls, records: Records, *, sequences: int, seq_len: int, share_prompts: bool = False
    ) -> "Batches":
        """Every example once and in order, for evaluation; either side alone."""
        shape = {"sequences": sequences, "seq_len": seq_len}
        return cls(records, **shape, seed=None, epochs=1.0, share_prompts=share_prompts, join=False)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        return self.read(step)

    def read(
        self, step: int, wanted: dict[str, np.ndarray] | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """The batch of a step; of the rows that are `wanted` (bool [rows] a side) where a host needs
        no others: these stay empty, and examples that lie in none but these are not read."""
        places = {side: self.places(step, side) for side in self.shapes}
        if wanted:
            places = {side: [x[wanted[side][of[1]]] for x in of] for side, of in places.items()}
        needed = np.unique(np.concatenate([examples for examples, *_ in places.values()]))
        records = dict(zip(needed.tolist(), self._records.read(needed), strict=True))
        numbers = _Numbers()
        return {
            side: self._rows(records, side, places[side], numbers if self.joined else _Numbers())
            for side in self.shapes
        }

    def places(self, step: int, side: str) -> tuple[np.ndarray, ...]:
        """The examples of a step that have this side, and the row and offset of each, and how many of its
        last tokens lie there."""
        taken = np.arange(*self._plan.ends[step : step + 2])
        places = getattr(self._plan, side)
        taken = taken[places.lengths[taken] > 0]
        return self._plan.examples[taken], *(column[taken] for column in places)

    def tokens(self, step: int) -> int:
        """Tokens of a step's examples, whether they share them or not."""
        return self._tokens_of(self._plan.examples[slice(*self._plan.ends[step : step + 2])])

    def _tokens_of(self, examples: np.ndarray) -> int:
        return int(sum(getattr(self._records, f"{side}_lengths")[examples].sum() for side in SIDES))

    def iterate(self, start: int = 0, wanted: dict[str, np.ndarray] | None = None) -> Iterator[dict]:
        """What `read` gives from step `start` to the last, assembled ahead in threads."""
        steps = grain.MapDataset.range(start, len(self)).map(lambda step: self.read(step, wanted))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))

    def _rows(self, records: dict, side: str, places, numbers: "_Numbers") -> dict[str, np.ndarray]:
        """Lay what takes room of one side of each example at its row and offset."""
        shape = self.shapes[side]
        names = ("tokens", "positions", "segments", "labels")
        rows = {name: np.zeros(shape, np.int32) for name in names}
        rows["weights"] = np.zeros(shape, np.float32)
        for example, row, offset, length in zip(*(column.tolist() for column in places), strict=True):
            tokens, loss = records[example][f"{side}_tokens"], records[example][f"{side}_loss"]
            first = len(tokens) - length
            here = slice(offset, offset + length)
            predicting = slice(offset, offset + length - 1)  # the last token has no next
            rows["tokens"][row, here] = tokens[first:]
            rows["positions"][row, here] = np.arange(first, len(tokens))
            prompt = self._prompts[example]
            continued = "target" if prompt else side
            texts = self._texts[continued].take(example)
            kind = (continued, int(texts.kinds)) if texts.shared else None
            segments = _segments(numbers.of(row, example, side, kind), (texts.shared, prompt, len(tokens)))
            rows["segments"][row, here] = segments[first:]
            rows["labels"][row, predicting] = tokens[first + 1 :]
            rows["weights"][row, predicting] = loss[first + 1 :]
        return rows


def _texts(records: Records, side: str, share: bool) -> packing.Texts:
    """One side of the records, with or without what they share."""
    lengths = getattr(records, f"{side}_lengths")
    if not share:
        return packing.Texts.alone(lengths)
    kinds, beginnings = getattr(records, f"{side}_kinds"), getattr(records, f"{side}_beginnings")
    return packing.Texts(lengths, kinds, np.append(beginnings, 0)[kinds])  # the last is that of kind -1


class _Numbers:
    """Paths of segments in the rows of a batch."""

    def __init__(self):
        self._beginnings: dict[int, dict] = {}
        self._examples: dict[int, dict] = {}

    def of(self, row: int, example: int, side: str, kind) -> tuple[int, int, int]:
        """The path of a text's own part, given the kind with which it shares a beginning, or None. The sides
        of an example are siblings, for where they lie in one row."""
        beginnings, examples = self._beginnings.setdefault(row, {}), self._examples.setdefault(row, {})
        first = beginnings.setdefault(kind, len(beginnings) + 1) if kind else 0
        return first, examples.setdefault(example, len(examples) + 1), 1 + SIDES.index(side)


def _segments(path: tuple[int, int, int], ends: tuple[int, int, int]) -> np.ndarray:
    """Of each token of a text: what it shares with others of its kind ends at the first of `ends`, its prompt
    at the second, if that is not before, and all of it at the last."""
    numbers = segment(path[0]), segment(*path[:2]), segment(*path)
    return np.repeat(numbers, np.diff(np.maximum.accumulate(ends), prepend=0))
