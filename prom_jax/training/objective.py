"""What an update minimises: a sum of terms over named streams, and the method that has them.

A batch is {stream: rows}; rows hold tokens, positions, segments, labels int32 and weights float32, each
[R, T], with R and T of their own for each stream. Which streams there are, and what becomes of them, is known
in `training.methods` alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from prom_jax.data.examples import PRIMARY
from prom_jax.models.inputs import Exit, Rows
from prom_jax.ops.cross_entropy import choose_chunk, cross_entropy

MAIN_HEAD = "lm_head"


class Term(Protocol):
    """A part of a loss: what is summed over parts of a batch, and what the whole update's sum is divided by.

    Most terms are a `TokenLoss`; any other object with these members will do.

    Attributes:
      weight: what the term is multiplied by.
      streams: those that it reads.
      names: of its sums, which are those of metrics: `loss_<name>`.
    """

    @property
    def weight(self) -> float: ...

    @property
    def streams(self) -> tuple[str, ...]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def __rmul__(self, weight: float) -> "Term":
        """The term with a weight that is `weight` times as large."""
        ...

    def sums(self, model, batch) -> dict[str, jax.Array]:
        """Float32 scalars by name, each a sum over the batch."""
        ...

    def divisors(self, batch) -> dict[str, jax.Array]:
        """Float32 scalars by the same names: the term is all its sums over all its divisors."""
        ...


@dataclasses.dataclass(frozen=True)
class Loss:
    """A sum of terms."""

    terms: tuple[Term, ...]

    def __add__(self, other: "Term | Loss") -> "Loss":
        return Loss((*self.terms, *(other.terms if isinstance(other, Loss) else (other,))))

    def __rmul__(self, weight: float) -> "Loss":
        return Loss(tuple(weight * term for term in self.terms))


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Streams leave after a block through a head: their cross-entropy, per loss token of the whole update.

    Attributes:
      streams: one or several, which then share the divisor.
      layer: the number of blocks that they go through; None for all.
      head: that reads the hidden states there.
      norm: whether the model's final norm comes before the head.
      label_smoothing: α.
      weight: what the term is multiplied by.
      trains_head: whether the head learns from the term, or is only read by it.
    """

    streams: tuple[str, ...]
    layer: int | None = None
    head: str = MAIN_HEAD
    norm: bool = True
    label_smoothing: float = 0.0
    weight: float = 1.0
    trains_head: bool = True

    def __rmul__(self, weight: float) -> "TokenLoss":
        return dataclasses.replace(self, weight=weight * self.weight)

    def __add__(self, other: "Term | Loss") -> Loss:
        return Loss((self,)) + other

    @property
    def names(self) -> tuple[str, ...]:
        """Each stream's loss is a sum of its own."""
        return self.streams

    def read(self, model, states_BTD, rows: Mapping, chunk: int | None = None):
        """The sum of token losses, float32, of rows whose hidden states are these."""
        hidden, head = model.head_products(self.head, model.head_input(states_BTD, self.norm))
        return cross_entropy(
            hidden,
            head if self.trains_head else jax.lax.stop_gradient(head),
            rows["labels"],
            rows["weights"],
            self.label_smoothing,
            chunk,
            model.config.logit_softcap,
        )

    def sums(self, model, batch) -> dict[str, jax.Array]:
        """See `Term`."""
        return token_losses(model, batch, [self])

    def divisors(self, batch) -> dict[str, jax.Array]:
        """See `Term`."""
        return {stream: batch[stream]["weights"].sum() for stream in self.streams}


def L(*streams: str, **settings) -> TokenLoss:
    """L(N, streams), or L(layer, streams) with `layer`, as the paper writes it; the settings are
    `TokenLoss`'s."""
    return TokenLoss(streams, **settings)


def token_losses(model, batch, terms, appended: str | None = None, chunks: Mapping | None = None) -> dict:
    """The sums of several token losses by stream, in one pass over the layers.

    Args:
      model: a `models.decoder.Decoder`.
      batch: {stream: rows}.
      terms: of which each stream is in one.
      appended: the stream whose rows continue those of the primary one, which has as many.
      chunks: the chunk of each stream, as in `ops.cross_entropy`; see `head_chunks`.

    Returns:
      {stream: float32 scalar}.
    """
    chunks, term_of = chunks or {}, {stream: term for term in terms for stream in term.streams}
    streams = [stream for stream in _primary_first(term_of) if stream in batch]
    groups: list[tuple[str, ...]] = [(stream,) for stream in streams]
    if appended in streams:
        groups = [(streams[0], appended), *((s,) for s in streams[1:] if s != appended)]
    states = model.forward(*(_rows(batch, group, term_of) for group in groups)).states
    left = {stream: x for group, exits in zip(groups, states) for stream, x in zip(group, exits)}
    return {
        stream: term_of[stream].read(model, left[stream], batch[stream], chunks.get(stream))
        for stream in streams
    }


def head_chunks(batches, shards: int) -> dict[str, int]:
    """The chunk of loss tokens that a head takes at a time, for each stream of batches.

    Args:
      batches: of `data.loader`, whose plan knows the loss tokens of each update.
      shards: into how many parts an update is split, over devices and in time.
    """
    return {
        stream: choose_chunk(-(-batches.loss_tokens(stream) // shards), -(-rows // shards) * length)
        for stream, (rows, length) in batches.shapes.items()
    }


def _rows(batch, streams: tuple[str, ...], term_of: Mapping[str, TokenLoss]) -> Rows:
    """The rows of streams, one appended to the other, and where each leaves."""
    columns = {
        name: jnp.concatenate([batch[stream][name] for stream in streams], axis=1)
        for name in ("tokens", "positions", "segments", "keys")
        if name in batch[streams[0]]
    }
    ends = list(itertools.accumulate(batch[stream]["tokens"].shape[1] for stream in streams))
    exits = (Exit(term_of[s].layer, start, stop) for s, start, stop in zip(streams, [0, *ends], ends))
    return Rows(**columns, exits=tuple(exits))


def _primary_first(streams: Iterable[str]) -> tuple[str, ...]:
    """Each of the streams once. (Their order in a batch is lost in `jax.jit`, which sorts keys.)"""
    return tuple(sorted(dict.fromkeys(streams), key=lambda stream: stream != PRIMARY))


class Texts(NamedTuple):
    """A part of what an update holds: one stream of the examples whose first stream has one of these roles.

    Attributes:
      name: for people.
      stream: of the batch.
      roles: of `data.records.ROLES`.
      source: where the configuration says what they are.
    """

    name: str
    stream: str
    roles: tuple[str, ...]
    source: str


class Method:
    """A method of adaptation: a file in `training.methods`, named as the method is.

    Attributes:
      name: in configurations; that of its file.
      label, colour: in tables and pictures.
      compared: the texts whose gradients `interference` compares; none where another method's are the same.
      regulated: whether its weight λ is for regulation to decide.
      depth: where English leaves if `pivot.layer` does not say: after this share of the blocks.
      shuffles_english: whether the English texts are dealt out anew among the instruction pairs.
      loss: the terms.
    """

    regulated: ClassVar[bool] = False
    depth: ClassVar[float] = 0.75
    shuffles_english: ClassVar[bool] = False
    name: ClassVar[str]
    label: ClassVar[str]
    colour: ClassVar[str]
    compared: ClassVar[tuple[Texts, ...]] = ()
    loss: "Loss | Term"

    @classmethod
    def from_config(cls, config, layer: int, weight: float) -> "Method":
        """The method as configured.

        Args:
          config: see `prom_jax.config`.
          layer: n, the block after which English leaves.
          weight: λ, as regulation has decided.
        """
        return cls()

    def details(self) -> dict:
        """What the model card says of its settings."""
        return {}

    def trains(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at a path, such as ('stack0', 'q_proj'), is trained."""
        return True

    # How the gradients of the terms are combined: a function from {name of a sum: gradients} to gradients,
    # each already multiplied and divided as in the loss. None for their sum.
    combine: Callable[[dict], dict] | None = None

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss.

        Raises:
          ValueError: if two of them have a sum of the same name, such as that of one stream.
        """
        terms = self.loss.terms if isinstance(self.loss, Loss) else (self.loss,)
        names = [name for term in terms for name in term.names]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"{sorted(twice)} are in two terms of {self.name!r}: expected one for each stream"
            )
        return terms

    @property
    def streams(self) -> tuple[str, ...]:
        """What is trained on, the primary stream first."""
        return _primary_first(stream for term in self.terms for stream in term.streams)

    @property
    def heads(self) -> dict[str, int | None]:
        """Heads besides the model's own, and after which block each reads; None for the last."""
        exits = [term for term in self.terms if isinstance(term, TokenLoss)]
        return {term.head: term.layer for term in exits if term.head != MAIN_HEAD}

    @property
    def low_rank_heads(self) -> tuple[str, ...]:
        """Those of `heads` that are the main head and a difference of low rank."""
        return ()

    @property
    def exits(self) -> tuple[int, ...]:
        """Blocks after which streams leave, but for the last."""
        layers = {getattr(term, "layer", None) for term in self.terms}
        return tuple(sorted(layer for layer in layers if layer is not None))

    def sums(self, model, batch, appended: str | None = None, chunks: Mapping | None = None) -> dict:
        """The sums of all terms, float32 scalars by name; those of token losses in one pass over the layers.

        Args:
          model, batch, appended, chunks: as in `token_losses`.
        """
        exits = [term for term in self.terms if isinstance(term, TokenLoss)]
        sums = token_losses(model, batch, exits, appended, chunks)
        for term in (term for term in self.terms if not isinstance(term, TokenLoss)):
            sums |= term.sums(model, batch)
        return sums

    def divisors(self, batch) -> dict:
        """Of all terms, by name: for token losses the numbers of loss tokens."""
        return {name: of for term in self.terms for name, of in term.divisors(batch).items()}

    def coefficients(self, divisors: dict) -> dict:
        """What each sum is multiplied by, given the divisors of the whole update.

        Dividing by global sums, never by a micro-batch's or a device's, makes the loss of an update the same
        however it is split.
        """
        return {
            name: term.weight / jnp.maximum(sum(divisors[name] for name in term.names), 1.0)
            for term in self.terms
            for name in term.names
        }
