"""Batches by step number: there is no iterator state, the data position *is* the step.

A batch is one update: {"target": Rows, "english": Rows}, "english" left out when no record has an
English side. Rows is a dict of [rows, length] arrays:

  tokens     int32
  positions  int32, from 0 in each example
  segments   int32, 1, 2, … within a row; 0 for padding
  labels     int32, the next token of the same example
  weights    float32, 1 where `labels` bears loss, else 0
"""

import math
from collections.abc import Iterator

import grain
import numpy as np

from prom_jax.data import packing
from prom_jax.data.records import Records
from prom_jax.errors import UserError


class Batches:
    """The batches of a run, as a random-access sequence: `batches[step]`, `len(batches)`.

    Training takes `epochs` (a fraction is that part of the last epoch's updates) or, when `steps`
    is not 0, so many updates, running into further epochs. `Batches.once` is for evaluation.

    Attributes:
      num_steps: updates in all; `steps_per_epoch`: the first epoch's.
      examples: indices into `records`, in the order in which the steps take them.
      shapes: {"target": (rows, length), "english": …}; the latter only where there is an English side.
      fill: real tokens per place over all steps, by the same keys.

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
    ):
        if not (steps > 0 or epochs > 0):
            raise UserError(f"steps is {steps} and epochs is {epochs}: one of them must be more than 0.")
        self._records = records
        self._lengths = {"target": records.target_lengths, "english": records.english_lengths}
        shape = (sequences, seq_len)
        english_shape = packing.choose_english_shape(*self._lengths.values(), shape)
        self.shapes = {"target": shape} | ({"english": english_shape} if english_shape else {})
        plans: list[packing.Plan] = []
        planned = 0
        while planned < steps if steps else len(plans) < epochs:
            plan = packing.plan_epoch(
                *self._lengths.values(),
                target_shape=shape,
                english_shape=english_shape,
                seed=seed,
                epoch=len(plans),
            )
            plans.append(plan)
            planned += plan.updates
        last = plans[-1].updates
        self.num_steps = steps or planned - last + max(1, round((epochs % 1 or 1) * last))
        self.steps_per_epoch = plans[0].updates
        self._plan = packing.join(plans)
        self.examples = self._plan.examples[: self._plan.ends[self.num_steps]]
        self.fill = {
            side: float(self._lengths[side][self.examples].sum() / (self.num_steps * math.prod(shape)))
            for side, shape in self.shapes.items()
        }

    @classmethod
    def once(cls, records: Records, *, sequences: int, seq_len: int) -> "Batches":
        """Every example once and in order, for evaluation."""
        return cls(records, sequences=sequences, seq_len=seq_len, seed=None, epochs=1.0)

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
        needed = np.unique(np.concatenate([examples for examples, _, _ in places.values()]))
        records = dict(zip(needed.tolist(), self._records.read(needed), strict=True))
        return {side: _rows(records, side, *places[side], shape) for side, shape in self.shapes.items()}

    def places(self, step: int, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The examples of a step that have this side, and the row and offset of each."""
        taken = np.arange(*self._plan.ends[step : step + 2])
        taken = taken[self._lengths[side][self._plan.examples[taken]] > 0]
        rows, offsets = getattr(self._plan, side)
        return self._plan.examples[taken], rows[taken], offsets[taken]

    def tokens(self, step: int) -> int:
        """Real tokens of a step's batch."""
        examples = self._plan.examples[slice(*self._plan.ends[step : step + 2])]
        return int(sum(lengths[examples].sum() for lengths in self._lengths.values()))

    def iterate(self, start: int = 0, wanted: dict[str, np.ndarray] | None = None) -> Iterator[dict]:
        """What `read` gives from step `start` to the last, assembled ahead in threads."""
        steps = grain.MapDataset.range(start, len(self)).map(lambda step: self.read(step, wanted))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def _rows(records: dict, side: str, examples, rows, offsets, shape: tuple[int, int]) -> dict:
    """Lay one side of each example at its row and offset."""
    names = ("tokens", "positions", "segments", "labels")
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    segments = [0] * shape[0]
    for example, row, offset in zip(examples.tolist(), rows.tolist(), offsets.tolist(), strict=True):
        tokens, loss = records[example][f"{side}_tokens"], records[example][f"{side}_loss"]
        segments[row] += 1
        here = slice(offset, offset + len(tokens))
        predicting = slice(offset, offset + len(tokens) - 1)  # the last token has no next
        batch["tokens"][row, here] = tokens
        batch["positions"][row, here] = np.arange(len(tokens))
        batch["segments"][row, here] = segments[row]
        batch["labels"][row, predicting] = tokens[1:]
        batch["weights"][row, predicting] = loss[1:]
    return batch
