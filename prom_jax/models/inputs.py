"""What goes through the blocks of a decoder, and what comes out."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prom_jax.ops.attention import LayerMasks


class Exit(NamedTuple):
    """Where columns of a batch leave.

    Attributes:
      layer: the number of blocks that they go through; None for all.
      start, stop: the columns [start, stop); None for the first and the last.
    """

    layer: int | None = None
    start: int | None = None
    stop: int | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "positions", "segments", "keys"],
    meta_fields=["exits"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch as the model sees it.

    Attributes:
      tokens: int32 [B, T].
      positions: int32 [B, T]; None for 0 … T-1.
      segments: int32 [B, T], `ops.attention.segment_id`; None for one segment.
      keys: uint32 [B, T], which decide what adapters' dropout takes; None for no dropout.
      exits: where its columns leave. A column must not attend to one that leaves before it, unless one that
        leaves later stands between that and the end of the row.
    """

    tokens: jax.Array
    positions: jax.Array | None = None
    segments: jax.Array | None = None
    keys: jax.Array | None = None
    exits: tuple[Exit, ...] = (Exit(),)


class Context(NamedTuple):
    """What the blocks need to know of a batch, made once for all layers.

    Attributes:
      angles: rotary angles of each different rotary embedding, float32 [B, T, F] where there is one, else
        [R, B, T, F].
      masks: those of each different window.
      keys: of the rows' dropout; None for none.
    """

    angles: jax.Array
    masks: LayerMasks
    keys: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stacks", "positions", "segments"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of tokens that went through the model, in slots.

    Attributes:
      stacks: keys and values of each stack, [n, B, K, S, D] each.
      positions, segments: int32 [B, S], of the tokens in the slots; an empty slot is padding, segment 0.
    """

    stacks: tuple[tuple[jax.Array, jax.Array], ...]
    positions: jax.Array
    segments: jax.Array

    def write(self, slot, positions_BT, segments_BT) -> "Cache":
        """The cache whose slots from `slot` on say that they hold these tokens."""

        def put(old, new):
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, slot))

        return dataclasses.replace(
            self, positions=put(self.positions, positions_BT), segments=put(self.segments, segments_BT)
        )

    def grow(self, slots: int) -> "Cache":
        """The cache with more empty slots at its end."""

        def pad(x, axis):
            return jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)])

        return Cache(
            jax.tree.map(functools.partial(pad, axis=3), self.stacks),
            pad(self.positions, 1),
            pad(self.segments, 1),
        )


class Output(NamedTuple):
    """What `Decoder.forward` gives.

    Attributes:
      states: of each batch, at each of its exits: the residual stream, without a norm, [B, columns, D].
      collected: what `collect` made of every block's output, stacked, [N, …]; None without it.
      cache: the updated cache; None without one.
    """

    states: tuple[tuple[jax.Array, ...], ...]
    collected: object = None
    cache: Cache | None = None


def with_defaults(rows: Rows) -> Rows:
    tokens, positions, segments = rows.tokens, rows.positions, rows.segments
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        segments = jnp.ones(tokens.shape, jnp.int32)
    return dataclasses.replace(rows, positions=positions, segments=segments)


def append_slots(before, after):
    """Along the slots; `before` may have one row for all."""
    return jnp.concatenate([jnp.broadcast_to(before, (len(after), before.shape[1])), after], axis=1)
