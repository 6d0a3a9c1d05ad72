"""Batches by step number: there is no iterator state, the data position *is* the step.

A batch is one update: {stream: Rows}, the primary stream first; a stream that no record has is left out. Rows
is a dict of [rows, length] arrays, of a shape of its own for each stream:

  tokens     int32
  positions  int32, from 0 in each example
  segments   int32, as `ops.attention.segment_id` numbers them within a row; 0 for padding
  labels     int32, the next token of the same example
  weights    float32, 1 where `labels` has a loss, else 0
  keys       uint32, where asked for: a hash of the example's tokens up to this one, of seed and step, and
             of which copy it is in this update

Prompt prefixes that texts share are computed once: a row has such a prefix as a segment that its texts
continue. Where a stream is `appended`, its row i is appended to row i of the primary stream, and its texts
continue the prompts of the primary texts there.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prom_jax.data import packing
from prom_jax.data.mixture import Mixture
from prom_jax.data.plans import Request, plan_run
from prom_jax.data.records import Records, Stream
from prom_jax.data.shared_prefixes import NONE
from prom_jax.data.shares import fit
from prom_jax.ops.attention import segment_id
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs

with needs("data"):
    import grain

COPY = 0x9E3779B9  # tells the keys of an example's copies apart


class Batches:
    """The batches of a run, as a random-access sequence: `batches[step]`, `len(batches)`.

    Training takes `epochs` (a fraction is that part of the last epoch's updates) or, when `steps`
    is not 0, that number of updates, running into further epochs. `Batches.once` is for evaluation.

    Args:
      sequences, seq_len: rows of the primary stream, and their length.
      share_prompts: whether prompts and prefixes that texts share are computed once, or every text is whole.
      keys: whether rows have `keys`, which no packing changes.
      shares: by stream and language, of the examples of an epoch those that are of it; else as the records
        repeat them.
      append: whether a stream may be appended to the primary rows, so that neither is of use alone.
      plans: the folder that keeps the plans of many examples; None to keep none.

    Attributes:
      num_steps: updates in all; `steps_per_epoch`, `examples_per_epoch`: the first epoch's.
      examples: indices into `records`, in the order in which the steps take them.
      shapes: {stream: (rows, length)}, the primary stream first; only those with any text.
      appended: the stream whose rows are appended to the primary rows; None without one.
      fill: {stream: share of the slots that are taken, over all steps}.
      saved: share of the examples' tokens that need no slot, as others have them.

    Raises:
      UserError: neither epochs nor steps.
    """

    def __init__(
        self,
        records: Records | Mixture,
        *,
        sequences: int,
        seq_len: int,
        seed: int | None,
        epochs: float = 0.0,
        steps: int = 0,
        share_prompts: bool = False,
        append: bool = True,
        keys: bool = False,
        shares: dict[str, float] | None = None,
        plans: Path | None = None,
    ):
        if not (steps > 0 or epochs > 0):
            raise UserError(f"steps is {steps} and epochs is {epochs}: one of them must be more than 0.")
        self._records, self.share_prompts = records, share_prompts
        self._seed = seed if keys else None
        texts = {stream: _texts(records.streams[stream], share_prompts) for stream in records.names}
        primary, *_ = records.names
        prompts = {}
        if share_prompts and append:
            prompts = {
                stream: np.where(common >= texts[primary].shared, common, 0)
                for stream, common in records.common_prompts.items()
            }
        present = {stream: of_stream.lengths > 0 for stream, of_stream in records.streams.items()}
        present |= {code: records.groups == i for i, code in enumerate(records.languages)}
        times = None if seed is None else fit(present, records.repeats, shares or {}, records.languages)
        shape = sequences, seq_len
        request = Request(texts, shape, prompts, times, records.groups, seed, float(epochs), steps)
        layout, self._plan, updates, examples = plan_run(request, plans)
        self.shapes, self.appended = layout.shapes, layout.appended
        # tokens of the primary text that an appended one continues
        self._prompts = np.zeros_like(texts[primary].lengths)
        if self.appended:
            self._prompts = prompts[self.appended]
            texts[self.appended] = packing.without_prompts(texts[self.appended], self._prompts)
        self._texts, self._primary = texts, primary
        last = int(updates[-1])
        self.num_steps = steps or int(updates.sum()) - last + max(1, round((epochs % 1 or 1) * last))
        self.steps_per_epoch, self.examples_per_epoch = int(updates[0]), int(examples[0])
        self.examples = self._plan.examples[: self._plan.ends[self.num_steps]]
        taken = {
            stream: slots.lengths[: len(self.examples)].sum() for stream, slots in self._plan.slots.items()
        }
        self.fill = {
            stream: float(taken[stream] / (self.num_steps * math.prod(shape)))
            for stream, shape in self.shapes.items()
        }
        self.saved = 1 - float(sum(taken.values()) / self._tokens_of(self.examples))

    @classmethod
    def once(
        cls, records: Records, *, sequences: int, seq_len: int, share_prompts: bool = False
    ) -> "Batches":
        """Every example once and in order, for evaluation; no stream is appended."""
        return cls(
            records, sequences=sequences, seq_len=seq_len, seed=None, epochs=1.0, share_prompts=share_prompts,
            append=False,
        )  # fmt: skip

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        return self.read(step)

    def read(
        self, step: int, wanted: dict[str, np.ndarray] | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """The batch of a step.

        Args:
          wanted: the rows that a host needs, bool [rows] by stream: the others stay empty, and examples that
            are in none but these are not read.
        """
        slots = {stream: self._slots(step, stream) for stream in self.shapes}
        if wanted:
            slots = {stream: tuple(x[wanted[stream][of[1]]] for x in of) for stream, of in slots.items()}
        needed = np.unique(self._plan.examples[np.concatenate([taken for taken, *_ in slots.values()])])
        records = dict(zip(needed.tolist(), self._records.read(needed), strict=True))
        salt = None if self._seed is None else np.random.SeedSequence((self._seed, step)).generate_state(1)[0]
        salts = None if salt is None else self._salts(step, salt)
        joint = _SegmentPaths()  # of the primary rows and of what is appended to them
        return {
            stream: self._rows(
                records, stream, slots[stream], joint if self._is_joint(stream) else _SegmentPaths(), salts
            )
            for stream in self.shapes
        }

    def _salts(self, step: int, salt: np.uint32) -> dict[int, tuple[np.uint32, np.uint32]]:
        """By place in the plan what the keys of a step are mixed with: those of the prefix that an example
        shares, and of all else, which is another for each copy of an example."""
        copies: Counter = Counter()
        found = {}
        for place, example in enumerate(self.examples_of(step).tolist(), int(self._plan.ends[step])):
            found[place] = salt, salt ^ np.uint32(copies[example] * COPY & 0xFFFFFFFF)
            copies[example] += 1
        return found

    def _is_joint(self, stream: str) -> bool:
        """Whether texts of the stream are in one row with those of another."""
        return self.appended is not None and stream in (self._primary, self.appended)

    def slots(self, step: int, stream: str) -> tuple[np.ndarray, ...]:
        """Where a step has a stream: the examples that have this stream, the row and offset of each, and how
        many of its last tokens are there, int64 [examples] each."""
        taken, *columns = self._slots(step, stream)
        return self._plan.examples[taken], *columns

    def _slots(self, step: int, stream: str) -> tuple[np.ndarray, ...]:
        """The same with the places of the examples in the plan, in which one may come several times."""
        taken = np.arange(*self._plan.ends[step : step + 2])
        slots = self._plan.slots[stream]
        taken = taken[slots.lengths[taken] > 0]
        return taken, *(column[taken] for column in slots)

    @property
    def first_epoch(self) -> np.ndarray:
        """Indices into the records of the examples of the first epoch, int64."""
        return self._plan.examples[: self.examples_per_epoch]

    def examples_of(self, step: int) -> np.ndarray:
        """Indices into the records of the examples that a step takes, int64."""
        return self._plan.examples[slice(*self._plan.ends[step : step + 2])]

    @property
    def steps_of_examples(self) -> np.ndarray:
        """The step that takes each of `examples`, int64."""
        return np.repeat(np.arange(self.num_steps), np.diff(self._plan.ends[: self.num_steps + 1]))

    def loss_tokens(self, stream: str) -> np.ndarray:
        """The loss tokens of a stream in each step, int64 [steps]."""
        ends = self._plan.ends[: self.num_steps + 1]
        total = np.append(0, np.cumsum(self._records.streams[stream].weights[self._plan.examples]))
        return np.diff(total[ends])

    def tokens(self, step: int) -> int:
        """Tokens of a step's examples, whether they share them or not."""
        return self._tokens_of(self.examples_of(step))

    def _tokens_of(self, examples: np.ndarray) -> int:
        return int(sum(stream.lengths[examples].sum() for stream in self._records.streams.values()))

    def iterate(self, start: int = 0, wanted: dict[str, np.ndarray] | None = None) -> Iterator[dict]:
        """What `read` gives from step `start` to the last, assembled ahead in threads."""
        steps = grain.MapDataset.range(start, len(self)).map(lambda step: self.read(step, wanted))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))

    def _rows(
        self, records: dict, stream: str, slots, paths: "_SegmentPaths", salts: dict | None
    ) -> dict[str, np.ndarray]:
        """The rows of one stream, with each text in its slots."""
        shape, is_joint = self.shapes[stream], self._is_joint(stream)
        number = 1 + self._records.names.index(stream)
        names = ("tokens", "positions", "segments", "labels")
        rows = {name: np.zeros(shape, np.int32) for name in names}
        rows["weights"] = np.zeros(shape, np.float32)
        rows |= {} if salts is None else {"keys": np.zeros(shape, np.uint32)}
        for place, row, offset, length in zip(*(column.tolist() for column in slots), strict=True):
            example = int(self._plan.examples[place])
            tokens, loss = records[example][f"{stream}_tokens"], records[example][f"{stream}_loss"]
            first = len(tokens) - length
            here = slice(offset, offset + length)
            predicting = slice(offset, offset + length - 1)  # the last token has no next
            rows["tokens"][row, here] = tokens[first:]
            rows["positions"][row, here] = np.arange(first, len(tokens))
            prompt = int(self._prompts[example]) if is_joint else 0
            continued = self._primary if prompt else stream
            _, prefix_ids, sharing = self._texts[continued]
            shared = int(sharing[example])
            prefix = (continued, int(prefix_ids[example])) if shared else None
            path = paths.of(row, place, number, prefix)
            segments = _segments(path, (shared, prompt, len(tokens)))
            rows["segments"][row, here] = segments[first:]
            rows["labels"][row, predicting] = tokens[first + 1 :]
            rows["weights"][row, predicting] = loss[first + 1 :]
            if salts is not None:
                own = np.arange(first, len(tokens)) >= self._shared(stream, example)
                rows["keys"][row, here] = (
                    prefix_hashes(tokens)[first:] ^ np.array(salts[place])[own.astype(int)]
                )
        return rows

    def _shared(self, stream: str, example: int) -> int:
        """Leading tokens of a text that other examples may share, whether they are computed once or not."""

        def prefix(stream: str) -> int:
            of_stream = self._records.streams[stream]
            number = of_stream.prefix_ids[example]
            return 0 if number == NONE else int(of_stream.prefix_lengths[number])

        common = self._records.common_prompts.get(stream, {example: 0})[example]
        return prefix(self._primary if common and common >= prefix(self._primary) else stream)


def prefix_hashes(tokens: np.ndarray) -> np.ndarray:
    """Of each token a hash of itself and all before it, uint32: a polynomial modulo 2⁶⁴, whose upper half
    depends on all that came before."""
    base = np.full(len(tokens), 0x9E3779B97F4A7C15, np.uint64)
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * np.cumprod(base)
    return (np.cumsum(terms) >> np.uint64(32)).astype(np.uint32)


def _texts(stream: Stream, share: bool) -> packing.Texts:
    """One stream of the records, with or without what its texts share."""
    if not share:
        return packing.Texts.unshared(stream.lengths)
    lengths = np.append(stream.prefix_lengths, 0)  # the last is that of id -1
    return packing.Texts(stream.lengths, stream.prefix_ids, lengths[stream.prefix_ids])


class _SegmentPaths:
    """Paths of segments in the rows of a batch."""

    def __init__(self):
        self._prefixes: dict[int, dict] = {}
        self._examples: dict[int, dict] = {}

    def of(self, row: int, place: int, stream: int, prefix) -> tuple[int, int, int]:
        """The path of a text's own part (prefix, example, stream): an example's texts are siblings, for where
        they are in one row.

        Args:
          place: of the example in the plan.
          stream: its number, from 1.
          prefix: names the prefix that the text shares; None without one.
        """
        prefixes, examples = self._prefixes.setdefault(row, {}), self._examples.setdefault(row, {})
        first = prefixes.setdefault(prefix, len(prefixes) + 1) if prefix else 0
        return first, examples.setdefault(place, len(examples) + 1), stream


def _segments(path: tuple[int, int, int], ends: tuple[int, int, int]) -> np.ndarray:
    """The segment of each token of a text: its shared prefix ends at the first of `ends`, its prompt at the
    second, if that is not before, and all of it at the last."""
    numbers = segment_id(path[0]), segment_id(*path[:2]), segment_id(*path)
    return np.repeat(numbers, np.diff(np.maximum.accumulate(ends), prepend=0))
