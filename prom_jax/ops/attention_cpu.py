"""Attention for a CPU: block by block, without blocks in which no query attends to any key.

The online softmax and its gradient are those of FlashAttention-2 (Dao 2023, algorithms 1 and 2).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Queries, and keys, of a block at most: small ones skip more, large ones cost fewer steps. Of examples packed
# into rows a query attends to few keys, of a cache to most.
BLOCK, CACHE_BLOCK = 48, 256
OUTPUT = "attention"  # the name of what a gradient needs of it
MASKED_SCORE = -1e30  # finite, so that a row of them has no NaN
_VECTOR = 16  # floats that a CPU computes at once, at most
_FLOAT32 = {"preferred_element_type": jnp.float32}


def attention(q_BTHD, k, v, mask_BTS, layer=None, softcap: float | None = None):
    """`ops.attention.attention` under a mask [B, T, S]."""
    B, T, H, D = q_BTHD.shape
    K, spare = k.shape[2], -T % _block_size(T, layer)
    mask_BTS = jnp.pad(mask_BTS, [(0, 0), (0, spare), (0, 0)])
    q = jnp.pad(q_BTHD / math.sqrt(D), [(0, 0), (0, spare), (0, 0), (0, 0)])
    q = q.reshape(B, T + spare, K, H // K, D).transpose(0, 2, 3, 1, 4)
    if layer is None:
        out = _blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask_BTS, softcap)
    else:
        out, _ = _forward(q, k, v, mask_BTS, softcap, layer)
    return out[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q, k, v, mask, softcap):
    """Attention of scaled queries [B, K, G, T, D], T of whole blocks, with keys and values [B, K, S, D] under
    a mask [B, T, S]; the shape of the queries."""
    return _forward(q, k, v, mask, softcap)[0]


def _forward(q, k, v, mask, softcap, layer=None):
    """The output, and what the gradient needs."""
    schedule = _block_schedule(mask, layer)

    def of_queries(i, outputs):
        q_slice, num_kv, kv_block = schedule.q_block(i)
        q_here = q_slice(q)

        def of_keys(n, carry):
            out, largest, total = carry
            tile, kv_slice = kv_block(n)
            scores = jnp.einsum("bkgtd,bksd->bkgts", q_here, kv_slice(k), **_FLOAT32)
            scores = jnp.where(tile, _capped(scores, softcap), MASKED_SCORE)
            now = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            parts, keep = jnp.exp(jnp.where(tile, scores - now, MASKED_SCORE)), jnp.exp(largest - now)
            values = jnp.einsum("bkgts,bksd->bkgtd", parts.astype(v.dtype), kv_slice(v), **_FLOAT32)
            return out * keep + values, now, total * keep + parts.sum(axis=-1, keepdims=True)

        one = (*q_here.shape[:-1], 1)
        start = (
            jnp.zeros(q_here.shape, jnp.float32),
            jnp.full(one, MASKED_SCORE),
            jnp.zeros(one, jnp.float32),
        )
        out, largest, total = lax.fori_loop(0, num_kv, of_keys, start)
        total = jnp.where(total == 0, 1, total)
        here = (out / total).astype(q.dtype), largest + jnp.log(total)
        return [q_slice.update(x, part) for x, part in zip(outputs, here)]

    outputs = [jnp.zeros_like(q), jnp.zeros((*q.shape[:-1], 1), jnp.float32)]
    outputs = lax.fori_loop(0, schedule.num_q_blocks, of_queries, outputs)
    out, normalizer = (checkpoint_name(x, OUTPUT) for x in outputs)
    return out, (q, k, v, mask, out, normalizer)


def _backward(softcap, saved, d_out):
    q, k, v, mask, out, normalizer = saved
    schedule = _block_schedule(mask)
    # A product, as XLA's sum over so few numbers takes a CPU ten times as long.
    delta = jnp.einsum("bkgtd,bkgtd->bkgt", out, d_out, **_FLOAT32)[..., None]

    def of_queries(i, gradients):
        q_slice, num_kv, kv_block = schedule.q_block(i)
        q_here, d_out_here, normalizer_here, delta_here = map(q_slice, (q, d_out, normalizer, delta))

        def of_keys(n, carry):
            d_q, d_k, d_v = carry
            tile, kv_slice = kv_block(n)
            scores = jnp.einsum("bkgtd,bksd->bkgts", q_here, kv_slice(k), **_FLOAT32)
            capped = _capped(scores, softcap)
            parts = jnp.exp(jnp.where(tile, capped - normalizer_here, MASKED_SCORE))
            d_parts = jnp.einsum("bkgtd,bksd->bkgts", d_out_here, kv_slice(v), **_FLOAT32)
            d_scores = parts * (d_parts - delta_here)
            if softcap is not None:
                d_scores *= 1 - (capped / softcap) ** 2
            d_scores = d_scores.astype(q.dtype)
            return (
                d_q + jnp.einsum("bkgts,bksd->bkgtd", d_scores, kv_slice(k), **_FLOAT32),
                kv_slice.accumulate(d_k, _transposed(q_here, d_scores), axis=-1),
                kv_slice.accumulate(d_v, _transposed(d_out_here, parts.astype(q.dtype)), axis=-1),
            )

        d_q, *of_all = gradients
        start = jnp.zeros(q_here.shape, jnp.float32), *of_all
        d_q_here, *of_all = lax.fori_loop(0, num_kv, of_keys, start)
        return [q_slice.update(d_q, d_q_here.astype(q.dtype)), *of_all]

    start = [jnp.zeros_like(q), *(jnp.zeros(x.swapaxes(-2, -1).shape, jnp.float32) for x in (k, v))]
    d_q, d_k, d_v = lax.fori_loop(0, schedule.num_q_blocks, of_queries, start)
    return d_q, d_k.swapaxes(-2, -1).astype(k.dtype), d_v.swapaxes(-2, -1).astype(v.dtype), None


_blocks.defvjp(_forward, _backward)


def _capped(scores, softcap):
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _transposed(x, weights):
    """Sums over queries [B, K, D, S]: so the queries, not the scores, are transposed for the product."""
    return jnp.einsum("bkgtd,bkgts->bkds", x, weights, **_FLOAT32)


class _Schedule(NamedTuple):
    """Which blocks are computed.

    Attributes:
      num_q_blocks: of queries.
      q_block: i → its `_Slice`, num_kv: the number of blocks of keys to which it attends in any row of the
        batch, and kv_block: n → the n-th tile of the mask, [B, 1, 1, t, s], and its `_Slice`.
    """

    num_q_blocks: int
    q_block: Callable


def _block_schedule(mask_BTS, layer=None) -> _Schedule:
    _, T, S = mask_BTS.shape
    t, s = _block_size(T, layer), _block_size(S, layer)
    whole = jnp.pad(mask_BTS.any(axis=0), [(0, 0), (0, -S % s)])
    whole = whole.reshape(T // t, t, -(-S // s), s).any(axis=(1, 3))
    numbers, order = whole.sum(axis=1), jnp.argsort(~whole, axis=1, stable=True)

    def q_block(i):
        def kv_block(n):
            j = order[i, n]
            start = jnp.minimum(j * s, S - s)
            tile = lax.dynamic_slice(mask_BTS, (0, i * t, start), (len(mask_BTS), t, s))
            # The last block ends where the array does, and leaves out what the one before it had.
            tile &= start + jnp.arange(s) >= j * s
            return tile[:, None, None], _Slice(start, s, layer)

        return _Slice(i * t, t), numbers[i], kv_block

    return _Schedule(len(whole), q_block)


def _block_size(length: int, layer) -> int:
    """Of blocks that cover a length with little to spare, the same for the length that they cover; whole
    vectors, or a CPU takes number by number. With a `layer` of a cache they are larger."""
    most = BLOCK if layer is None else CACHE_BLOCK
    even = -(-length // -(-length // most))
    return min(length, -(-even // _VECTOR) * _VECTOR)


class _Slice:
    """The part [start, start + size) of arrays [B, …, T, D], or along another axis of arrays; or of one layer
    of [N, B, …, T, D]."""

    def __init__(self, start, size: int, layer=None):
        self._start, self._size, self._layer = start, size, layer

    def __call__(self, x, axis=-2):
        if self._layer is None:
            return lax.dynamic_slice_in_dim(x, self._start, self._size, axis=axis)
        start = (self._layer, *[0] * (x.ndim - 3), self._start, 0)
        return lax.dynamic_slice(x, start, (1, *x.shape[1:-2], self._size, x.shape[-1]))[0]

    def update(self, x, part, axis=-2):
        """The array with this part replaced."""
        return lax.dynamic_update_slice_in_dim(x, part, self._start, axis=axis)

    def accumulate(self, x, part, axis=-2):
        """The array with `part` added there."""
        return self.update(x, self(x, axis) + part, axis)
