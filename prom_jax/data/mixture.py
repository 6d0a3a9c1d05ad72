"""Records of several languages as one set, of which each has its share."""

import re
from collections.abc import Sequence

import numpy as np

from prom_jax.data.records import Records, Stream
from prom_jax.data.shared_prefixes import NONE
from prom_jax.utils.errors import UserError

SHARE = re.compile(r"([\w-]+)=(\d*\.?\d+)")


class Mixture:
    """Sets of records one after the other, with what is known of them as in `records.Records`.

    Args:
      parts: the sets.
      counts: how many examples each gives: less than once none is taken, and where it is more than the set
        has, some are there once more than others.

    Attributes:
      names, streams, roles, repeats, common_prompts: as in `Records`; a set that lacks a stream has no text
        in it.
      groups: which set each example is of, int64 [examples].
    """

    def __init__(self, parts: Sequence[Records], counts: Sequence[int]):
        self._parts = parts
        indices = [np.arange(count) * len(part) // count for part, count in zip(parts, counts, strict=True)]
        self.groups = np.repeat(np.arange(len(parts)), counts)
        self._indices = np.concatenate(indices)
        self.names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        self.roles = np.concatenate([part.roles[i] for part, i in zip(parts, indices)])
        self.repeats = np.concatenate([part.repeats[i] for part, i in zip(parts, indices)])
        self.streams = {name: self._stream(name, indices) for name in self.names}
        self.common_prompts = {
            name: np.concatenate(
                [
                    part.common_prompts.get(name, 0 * part.streams[self.names[0]].lengths)[i]
                    for part, i in zip(parts, indices)
                ]
            )
            for name in self.names[1:]
        }

    def _stream(self, name: str, indices: list[np.ndarray]) -> Stream:
        """A stream of all sets, with prefix ids that are each its own."""
        found, prefixes = [], 0
        for part, of_part in zip(self._parts, indices):
            stream = part.streams.get(name) or _empty(len(part))
            ids = np.where(stream.prefix_ids == NONE, NONE, stream.prefix_ids + prefixes)
            prefixes += len(stream.prefix_lengths)
            taken = (column[of_part] for column in (stream.lengths, stream.weights, stream.bytes, ids))
            found.append(Stream(*taken, stream.prefix_lengths))
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
            examples = part.read(self._indices[wanted[here]]) if len(here) else []
            found |= {i: _with_all(example, self.names) for i, example in zip(here.tolist(), examples)}
        return [found[i] for i in range(len(wanted))]


def counts(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """How many examples of sets of these sizes make an epoch in which each has its share, and each example is
    there at least once."""
    epoch = max(size / share for size, share in zip(sizes, shares, strict=True))
    return [max(size, round(share * epoch)) for size, share in zip(sizes, shares)]


def read_shares(entries: Sequence[str], languages: Sequence[str]) -> list[float] | None:
    """The weight of each language; None where nothing is said of them.

    Args:
      entries: of data.share, 'sw=1'.
      languages: their codes.

    Raises:
      UserError: an entry is not so, or the entries do not name each language once.
    """
    if not entries:
        return None
    found = [SHARE.fullmatch(entry) for entry in entries]
    shares = {match[1]: float(match[2]) for match in found if match}
    if not all(found) or sorted(match[1] for match in found) != sorted(languages) or not all(shares.values()):
        each = tuple(f"{language}=1" for language in languages)
        raise UserError(
            f"data.share={tuple(entries)}: expected a weight of more than 0 for each language, such as {each}"
        )
    return [shares[language] for language in languages]


def _empty(examples: int) -> Stream:
    """A stream that no example has."""
    zeros = np.zeros(examples, np.int64)
    return Stream(zeros, zeros, zeros, zeros + NONE, zeros[:0])


def _with_all(example: dict, names: Sequence[str]) -> dict:
    """An example with all streams, of those that it lacks nothing."""
    nothing = {f"{name}_tokens": np.zeros(0, np.int32) for name in names}
    nothing |= {f"{name}_loss": np.zeros(0, bool) for name in names}
    return nothing | example
