"""Records of several languages as one set."""

from collections.abc import Mapping, Sequence

import numpy as np

from prom_jax.data.records import Records, Stream
from prom_jax.data.shared_prefixes import NONE


class Mixture:
    """Sets of records one after the other, with what is known of them as in `records.Records`.

    Args:
      parts: the sets, by language.

    Attributes:
      languages: their codes.
      groups: which of these each example is of, int64 [examples].
      names, streams, roles, repeats, common_prompts: as in `Records`; a set that lacks a stream has no text
        in it.
    """

    def __init__(self, parts: Mapping[str, Records]):
        self.languages, self._parts = tuple(parts), tuple(parts.values())
        sizes = list(map(len, self._parts))
        self.groups = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.cumsum([0, *sizes[:-1]])
        self.names = tuple(dict.fromkeys(name for part in self._parts for name in part.names))
        self.roles = np.concatenate([part.roles for part in self._parts])
        self.repeats = np.concatenate([part.repeats for part in self._parts])
        self.streams = {name: self._stream(name) for name in self.names}
        self.common_prompts = {
            name: np.concatenate(
                [part.common_prompts.get(name, np.zeros(len(part), np.int64)) for part in self._parts]
            )
            for name in self.names[1:]
        }

    def _stream(self, name: str) -> Stream:
        """A stream of all sets, with prefix ids that are each its own."""
        found, prefixes = [], 0
        for part in self._parts:
            stream = part.streams.get(name) or _empty(len(part))
            ids = np.where(stream.prefix_ids == NONE, NONE, stream.prefix_ids + prefixes)
            prefixes += len(stream.prefix_lengths)
            found.append(stream._replace(prefix_ids=ids))
        return Stream(*map(np.concatenate, zip(*found)))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict:
        return self.read([index])[0]

    def read(self, indices) -> list[dict]:
        """See `Records`."""
        wanted = np.asarray(indices, np.int64)
        found: dict[int, dict] = {}
        for number, part in enumerate(self._parts):
            here = np.flatnonzero(self.groups[wanted] == number)
            examples = part.read(wanted[here] - self._starts[number]) if len(here) else []
            found |= {i: _with_all(example, self.names) for i, example in zip(here.tolist(), examples)}
        return [found[i] for i in range(len(wanted))]


def _empty(examples: int) -> Stream:
    """A stream that no example has."""
    zeros = np.zeros(examples, np.int64)
    return Stream(zeros, zeros, zeros, zeros + NONE, zeros[:0])


def _with_all(example: dict, names: Sequence[str]) -> dict:
    """An example with all streams, of those that it lacks nothing."""
    nothing = {f"{name}_tokens": np.zeros(0, np.int32) for name in names}
    nothing |= {f"{name}_loss": np.zeros(0, bool) for name in names}
    return nothing | example
