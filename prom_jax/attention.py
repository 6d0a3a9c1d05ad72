"""Grouped-query attention with one rule for who sees whom, over several backends."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from prom_jax.sharding import AXES, BATCH, num_batch_shards

# 'xla' and 'cudnn' are jax.nn.dot_product_attention's own, 'blocks' is below.
BACKENDS = ("auto", "xla", "blocks", "cudnn")

# The segment of tokens that all segments of their row continue: a prompt's beginning that others share.
SHARED = -1

BLOCK = 64  # queries, and keys, of a block at most
SCORES = 2**13  # of a head in a block: with few queries a block has more keys
_UNSEEN = -1e30  # a score, finite so that a row of them has no NaN
_FLOAT32 = {"preferred_element_type": jnp.float32}


def visible(q_positions, kv_positions, q_segments, kv_segments, window=None):
    """Which keys each query may attend to, bool [B, 1, T, S].

    A query sees the keys of its own segment, and of segment SHARED, at its own position or before, and with a
    sliding `window` only the last `window` of them (itself included). This one rule serves packed rows,
    padding (segment 0, which no real token sees) and a key-value cache, where the places of tokens still to
    come have later positions.

    Args: positions and segments int32, [B, T] for queries and [B, S] for keys.
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    own = q_segments[:, :, None] == kv_segments[:, None, :]
    mask = (distance >= 0) & (own | (kv_segments == SHARED)[:, None, :])
    if window is not None:
        mask &= distance < window
    return mask[:, None]


def attention(q_BTHD, k_BSKD, v_BSKD, mask_B1TS, backend="auto"):
    """softmax(q·k/√D)·v under a boolean mask; [B, T, H, D] in the dtype of `q`, softmax in float32.

    `K` key-value heads serve `H` query heads in consecutive groups. What a query that sees nothing gets is
    finite: such places are padding and never bear loss.

    Args:
      backend: 'xla' holds all scores at once. 'blocks' goes through blocks of queries and keys, skips those
        in which nobody sees anybody, and computes scores again for the gradient: fast where a core has little
        memory near it and steps of a loop cost little. 'cudnn': NVIDIA's. 'auto': 'blocks' on a CPU, else
        'xla'.
    """
    if backend == "auto":
        backend = "blocks" if jax.default_backend() == "cpu" else "xla"
    k_BSKD, v_BSKD = k_BSKD.astype(q_BTHD.dtype), v_BSKD.astype(q_BTHD.dtype)
    mask_B1TS = jnp.broadcast_to(mask_B1TS, (q_BTHD.shape[0], 1, q_BTHD.shape[1], k_BSKD.shape[1]))
    if backend == "blocks":
        return _on_each_device(_in_blocks, q_BTHD, k_BSKD, v_BSKD, mask_B1TS)
    return jax.nn.dot_product_attention(q_BTHD, k_BSKD, v_BSKD, mask=mask_B1TS, implementation=backend)


def _on_each_device(function, q_BTHD, k_BSKD, v_BSKD, mask_B1TS):
    """The function of the rows and heads that each device of the mesh has, as XLA cannot divide its loops."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(q_BTHD, k_BSKD, v_BSKD, mask_B1TS)
    rows = BATCH if len(q_BTHD) % num_batch_shards(mesh) == 0 else None
    heads = "tensor" if k_BSKD.shape[2] % mesh.shape["tensor"] == 0 else None
    array, mask = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    mapped = jax.shard_map(
        function,
        in_specs=(array, array, array, mask),
        out_specs=array,
        axis_names=set(AXES),
        check_vma=False,
    )
    return mapped(q_BTHD, k_BSKD, v_BSKD, mask_B1TS)


def _in_blocks(q_BTHD, k_BSKD, v_BSKD, mask_B1TS):
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    t = _block(T, BLOCK)
    s = _block(S, max(BLOCK, SCORES // t))
    padding = lambda x, size: jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, size, strict=True)])
    q = (q_BTHD / math.sqrt(D)).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k, v = (padding(x.swapaxes(1, 2), (1, 1, s, 1)) for x in (k_BSKD, v_BSKD))
    out = _blocks(padding(q, (1, 1, 1, t, 1)), k, v, padding(mask_B1TS[:, 0], (1, t, s)), (t, s))
    return out[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _block(length: int, most: int) -> int:
    """The size of blocks that cover a length with little to spare."""
    return -(-length // -(-length // most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q, k, v, mask, sizes):
    """Attention [B, K, G, T, D] of scaled queries of that shape, keys and values [B, K, S, D], under a mask
    [B, T, S]; `sizes` of blocks divide T and S (online softmax and its gradient: FlashAttention-2,
    algorithms 1 and 2)."""
    return _forward(q, k, v, mask, sizes)[0]


def _forward(q, k, v, mask, sizes):
    """The output, and what the gradient needs."""
    number, block = _seen(mask, sizes)

    def body(n, carry):
        out, most, total = carry
        seen, queries, keys = block(n)
        scores = jnp.einsum("kgtd,ksd->kgts", queries(q), keys(k), **_FLOAT32)
        scores = jnp.where(seen, scores, _UNSEEN)
        before = queries(most)
        now = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
        parts, keep = jnp.where(seen, jnp.exp(scores - now), 0), jnp.exp(before - now)
        values = jnp.einsum("kgts,ksd->kgtd", parts.astype(v.dtype), keys(v), **_FLOAT32)
        return (
            queries.put(out, queries(out) * keep + values),
            queries.put(most, now),
            queries.put(total, queries(total) * keep + parts.sum(axis=-1, keepdims=True)),
        )

    one = (*q.shape[:-1], 1)
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(one, _UNSEEN), jnp.zeros(one, jnp.float32)
    out, most, total = lax.fori_loop(0, number, body, start)
    total = jnp.where(total == 0, 1, total)
    out = (out / total).astype(q.dtype)
    return out, (q, k, v, mask, out, most + jnp.log(total))


def _backward(sizes, saved, d_out):
    q, k, v, mask, out, normalizer = saved
    number, block = _seen(mask, sizes)
    delta = (out.astype(jnp.float32) * d_out).sum(axis=-1, keepdims=True)

    def body(n, carry):
        d_q, d_k, d_v = carry
        seen, queries, keys = block(n)
        scores = jnp.einsum("kgtd,ksd->kgts", queries(q), keys(k), **_FLOAT32)
        parts = jnp.where(seen, jnp.exp(scores - queries(normalizer)), 0)
        d_parts = jnp.einsum("kgtd,ksd->kgts", queries(d_out), keys(v), **_FLOAT32)
        d_scores = (parts * (d_parts - queries(delta))).astype(q.dtype)
        of_keys = lambda weights, x: jnp.einsum("kgts,kgtd->ksd", weights, x, **_FLOAT32)
        return (
            queries.add(d_q, jnp.einsum("kgts,ksd->kgtd", d_scores, keys(k), **_FLOAT32)),
            keys.add(d_k, of_keys(d_scores, queries(q))),
            keys.add(d_v, of_keys(parts.astype(q.dtype), queries(d_out))),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    d_q, d_k, d_v = lax.fori_loop(0, number, body, start)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blocks.defvjp(_forward, _backward)


def _seen(mask_BTS, sizes):
    """How many blocks of the mask have anything in them; and a function that gives the n-th of these: its
    part of the mask, of arrays of queries and of arrays of keys."""
    B, T, S = mask_BTS.shape
    t, s = sizes
    shape = (B, T // t, S // s)
    any_seen = mask_BTS.reshape(B, T // t, t, S // s, s).any(axis=(2, 4)).ravel()
    order = jnp.argsort(~any_seen, stable=True)

    def block(n):
        b, i, j = jnp.unravel_index(order[n], shape)
        seen = lax.dynamic_slice(mask_BTS, (b, i * t, j * s), (1, t, s))[0]
        return seen, _Rows(b, i * t, t), _Rows(b, j * s, s)

    return any_seen.sum(), block


class _Rows:
    """Places [start, start + size) of the b-th row of arrays [B, …, places, D]."""

    def __init__(self, b, start, size: int):
        self._b, self._place, self._size = b, start, size

    def _start(self, x):
        return (self._b, *[0] * (x.ndim - 3), self._place, 0)

    def __call__(self, x):
        return lax.dynamic_slice(x, self._start(x), (1, *x.shape[1:-2], self._size, x.shape[-1]))[0]

    def put(self, x, part):
        """The array with these places replaced."""
        return lax.dynamic_update_slice(x, part[None], self._start(x))

    def add(self, x, part):
        """The array with something added there."""
        return self.put(x, self(x) + part)
