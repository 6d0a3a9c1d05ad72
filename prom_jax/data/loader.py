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
      target_shape, english_shape: (rows, length); the latter None without an English side.
      target_fill, english_fill: real tokens per place, over all steps.

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
        plans: list[packing.Plan] = []
        planned = 0
        while planned < steps if steps else len(plans) < epochs:
            plan = packing.plan_epoch(
                records.target_lengths,
                records.english_lengths,
                sequences=sequences,
                seq_len=seq_len,
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
        self._english = packing.layout_english(
            self._plan, records.english_lengths, sequences=sequences, seq_len=seq_len
        )
        self.target_shape = (sequences, seq_len)
        self.english_shape = self._english and (self._english.num_rows, self._english.length)
        self.target_fill = self._fill(records.target_lengths, self.target_shape)
        self.english_fill = self._fill(records.english_lengths, self.english_shape)

    @classmethod
    def once(cls, records: Records, *, sequences: int, seq_len: int) -> "Batches":
        """Every example once and in order, for evaluation."""
        return cls(records, sequences=sequences, seq_len=seq_len, seed=None, epochs=1.0)

    def _fill(self, lengths: np.ndarray, shape: tuple[int, int] | None) -> float:
        return lengths[self.examples].sum() / (self.num_steps * math.prod(shape)) if shape else 0.0

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        taken = slice(*self._plan.ends[step : step + 2])
        examples = self._records.read(self._plan.examples[taken])
        batch = {
            "target": _rows(
                [(example["target_tokens"], example["target_loss"]) for example in examples],
                self._plan.rows[taken],
                self._plan.offsets[taken],
                self.target_shape,
            )
        }
        if self._english:
            batch["english"] = _rows(
                [(example["english_tokens"], example["english_loss"]) for example in examples],
                self._english.rows[taken],
                self._english.offsets[taken],
                self.english_shape,
            )
        return batch

    def iterate(self, start: int = 0) -> Iterator[dict]:
        """Batches from step `start` to the last, assembled ahead in threads."""
        steps = grain.MapDataset.source(self)[start:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def _rows(sides: list, rows: np.ndarray, offsets: np.ndarray, shape: tuple[int, int]) -> dict:
    """Lay (tokens, loss) of each example at its row and offset."""
    names = ("tokens", "positions", "segments", "labels")
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    segments = [0] * shape[0]
    for (tokens, loss), row, offset in zip(sides, rows.tolist(), offsets.tolist(), strict=True):
        if not len(tokens):
            continue
        segments[row] += 1
        here = slice(offset, offset + len(tokens))
        predicting = slice(offset, offset + len(tokens) - 1)  # the last token has no next
        batch["tokens"][row, here] = tokens
        batch["positions"][row, here] = np.arange(len(tokens))
        batch["segments"][row, here] = segments[row]
        batch["labels"][row, predicting] = tokens[1:]
        batch["weights"][row, predicting] = loss[1:]
    return batch
