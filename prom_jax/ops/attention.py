"""Grouped-query attention with one rule for who sees whom, over several backends."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from prom_jax.parallel.sharding import BATCH, num_batch_shards

# 'xla' and 'cudnn' are jax.nn.dot_product_attention's own, 'splash' is Pallas's for TPU, 'tokamax' are that
# package's for GPU, 'blocks' is below.
BACKENDS = ("auto", "xla", "blocks", "splash", "cudnn", "tokamax")

# Bits of a segment's number for each level of its path.
_LEVEL = 10
MOST_SEGMENTS = (1 << _LEVEL) - 1  # that continue the same segment

# Queries, and keys, of a block at most: small ones skip more, large ones cost fewer steps. Of examples packed
# into rows a query sees few keys, of a cache most.
BLOCK, CACHE_BLOCK = 48, 256
SPLASH_BLOCKS = (512, 256, 128)  # queries, and keys, of a block of 'splash': the first that divides a row
OUTPUT = "attention"  # the name of what a gradient needs of it
TOKAMAX_BLOCK = 128  # queries, and keys: its kernels for Hopper take whole blocks where there is a mask
_VECTOR = 16  # floats that a CPU computes at once, at most
_UNSEEN = -1e30  # a score, finite so that a row of them has no NaN
_FLOAT32 = {"preferred_element_type": jnp.float32}


def segment(first: int = 0, second: int = 0, third: int = 0) -> int:
    """The number of a segment of a row, by its path in a tree of three levels.

    Text that others begin with alike is a segment of its own, which theirs continue: `segment(2, 1)`
    continues `segment(2)`, and `segment(2, 1, 3)` both. Levels may be left out: `segment(2, 0, 3)` continues
    `segment(2)`, and `segment(0, 0, 3)`, which is 3, nothing. Each is at most MOST_SEGMENTS.
    """
    return (first << 2 * _LEVEL) | (second << _LEVEL) | third


# What all texts of a row continue, where there is but one such beginning.
SHARED = segment(1)


def visible(q_positions, kv_positions, q_segments, kv_segments, window=None):
    """Which keys each query may attend to, bool [B, 1, T, S].

    A query sees the keys of its own segment, and of those that it continues (`segment`), at its own position
    or before, and with a sliding `window` only the last `window` of them (itself included). This one rule
    serves packed rows, beginnings that are computed once for several texts, padding (segment 0, which no real
    token sees) and a key-value cache, where the places of tokens still to come have later positions.

    Args: positions and segments int32, [B, T] for queries and [B, S] for keys.
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    q_segments, kv_segments = q_segments[:, :, None], kv_segments[:, None, :]
    continued = [kv_segments == q_segments >> bits << bits for bits in (_LEVEL, 2 * _LEVEL)]
    seen = (kv_segments == q_segments) | ((continued[0] | continued[1]) & (kv_segments != 0))
    mask = (distance >= 0) & seen
    if window is not None:
        mask &= distance < window
    return mask[:, None]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["segments"], meta_fields=["window"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of whole examples one after the other, none of which continues another, whose queries and keys are
    the same places: all that is to be known of who sees whom in them. segments: int32 [B, T]."""

    segments: jax.Array
    window: int | None


def visible_in_rows(positions, segments, window, backend):
    """What `attention` takes as a mask for packed rows, `visible` or its short form.

    Args: positions, counted in each example, and segments: int32 [B, T], where `continues(backend)` is false
      of whole examples; backend: as in `attention`.
    """
    if resolve(backend) == "splash" and segments.shape[1] % SPLASH_BLOCKS[-1] == 0:
        return Packed(segments, window)
    return visible(positions, positions, segments, segments, window)


def resolve(backend: str) -> str:
    """The backend that 'auto' stands for on this machine; any other name as it is."""
    if backend != "auto":
        return backend
    on_gpu = "tokamax" if has_tokamax() else "xla"
    return {"cpu": "blocks", "tpu": "splash", "gpu": on_gpu}.get(jax.default_backend(), "xla")


def has_tokamax() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("tokamax") is not None


def continues(backend: str) -> bool:
    """Whether segments of packed rows may continue others: the kernel of 'splash' only tells them apart."""
    return resolve(backend) != "splash"


def attention(q_BTHD, k, v, mask, backend="auto", layer=None):
    """softmax(q·k/√D)·v under a mask; [B, T, H, D] in the dtype of `q`, softmax in float32.

    `K` key-value heads serve `H` query heads in consecutive groups. What a query that sees nothing gets is
    finite: such places are padding and never bear loss.

    Args:
      k, v: [B, S, K, D]; or with `layer` caches of all layers, [N, B, K, S, D], of which that one is read.
      mask: bool [B, 1, T, S], or `Packed`.
      backend: 'xla' holds all scores at once. 'blocks' goes through blocks of queries and keys, skips those
        in which nobody sees anybody, and computes scores again for the gradient: fast where a core has little
        memory near it and steps of a loop cost little. 'splash': Pallas's kernel for TPU, of `Packed` rows;
        others go to 'xla'. 'cudnn': NVIDIA's. 'tokamax': kernels that hold no scores, the first for this
        GPU, dtype and shape of those that the package has; a cache goes to 'xla'. 'auto': 'blocks' on a CPU,
        'splash' on a TPU, 'tokamax' on a GPU where it is installed, else 'xla'.
    """
    backend = resolve(backend)
    k, v = k.astype(q_BTHD.dtype), v.astype(q_BTHD.dtype)
    if isinstance(mask, Packed):
        return _on_each_device(functools.partial(_splash, mask.window), q_BTHD, k, v, mask.segments)
    mask_B1TS = jnp.broadcast_to(mask, (*q_BTHD.shape[:1], 1, *mask.shape[2:]))
    if backend == "blocks":
        return _in_blocks(q_BTHD, k, v, mask_B1TS[:, 0], layer)
    if backend == "tokamax" and layer is None:
        return _on_each_device(_tokamax, q_BTHD, k, v, mask_B1TS)
    if layer is not None:
        k, v = k[layer].swapaxes(1, 2), v[layer].swapaxes(1, 2)
    implementation = "cudnn" if backend == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q_BTHD, k, v, mask=mask_B1TS, implementation=implementation)


def _on_each_device(kernel, q_BTHD, k, v, seen):
    """A kernel that XLA cannot split, with each device's rows and heads; `seen` [B, …] is of rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q_BTHD, k, v, seen)
    rows = BATCH if len(q_BTHD) % num_batch_shards(mesh) == 0 else None
    heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, None, heads)
    return jax.shard_map(
        kernel, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False
    )(q_BTHD, k, v, seen)


def _tokamax(q_BTHD, k, v, mask_B1TS):
    import tokamax  # takes a second to read, which no other machine needs to spend

    if not flags.FLAGS.is_parsed():  # or the package reads the arguments of whatever program this is
        flags.FLAGS.mark_as_parsed()
    T, S = mask_B1TS.shape[2:]
    queries, keys = -T % TOKAMAX_BLOCK, -S % TOKAMAX_BLOCK
    pad = lambda x, spare: jnp.pad(x, [(0, 0), (0, spare), (0, 0), (0, 0)])
    # Queries that fill up a block see all, as one that sees nothing may have a gradient that is no number.
    mask = jnp.pad(mask_B1TS, [(0, 0), (0, 0), (0, queries), (0, 0)], constant_values=True)
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, 0), (0, keys)])
    # In a row nobody sees what comes after it: a kernel that knows this leaves out half of the scores.
    out = tokamax.dot_product_attention(
        pad(q_BTHD, queries), pad(k, keys), pad(v, keys), mask=mask, is_causal=T == S
    )
    return out[:, :T]


def _splash(window, q_BTHD, k, v, segments_BT):
    """Skips blocks above the diagonal and outside the window; a query attends to no other segment than its
    own."""
    # Pallas for TPU takes a second to read, which no other machine needs to spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, D = q_BTHD.shape[1:]
    near = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    sizes = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([near] * H), block_sizes=kernels.BlockSizes(**dict.fromkeys(sizes, block))
    )
    q, k, v = (x.swapaxes(1, 2) for x in ((q_BTHD / math.sqrt(D)).astype(q_BTHD.dtype), k, v))
    return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segments_BT, segments_BT)).swapaxes(1, 2)


def _in_blocks(q_BTHD, k, v, mask_BTS, layer):
    B, T, H, D = q_BTHD.shape
    K, spare = k.shape[2], -T % _size(T, layer)
    mask_BTS = jnp.pad(mask_BTS, [(0, 0), (0, spare), (0, 0)])
    q = jnp.pad(q_BTHD / math.sqrt(D), [(0, 0), (0, spare), (0, 0), (0, 0)])
    q = q.reshape(B, T + spare, K, H // K, D).transpose(0, 2, 3, 1, 4)
    if layer is None:
        out = _blocks(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask_BTS)
    else:
        out, _ = _forward(q, k, v, mask_BTS, layer)
    return out[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


@jax.custom_vjp
def _blocks(q, k, v, mask):
    """Attention [B, K, G, T, D] of scaled queries of that shape, T of whole blocks, keys and values
    [B, K, S, D], under a mask [B, T, S] (online softmax and its gradient: FlashAttention-2, algorithms 1 and
    2)."""
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask, layer=None):
    """The output, and what the gradient needs."""
    number, block = _seen(mask, layer)

    def of_queries(i, outputs):
        queries, number_seen, seen_block = block(i)
        q_here = queries(q)

        def of_keys(n, carry):
            out, most, total = carry
            seen, keys = seen_block(n)
            scores = jnp.einsum("bkgtd,bksd->bkgts", q_here, keys(k), **_FLOAT32)
            scores = jnp.where(seen, scores, _UNSEEN)
            now = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
            parts, keep = jnp.exp(jnp.where(seen, scores - now, _UNSEEN)), jnp.exp(most - now)
            values = jnp.einsum("bkgts,bksd->bkgtd", parts.astype(v.dtype), keys(v), **_FLOAT32)
            return out * keep + values, now, total * keep + parts.sum(axis=-1, keepdims=True)

        one = (*q_here.shape[:-1], 1)
        start = jnp.zeros(q_here.shape, jnp.float32), jnp.full(one, _UNSEEN), jnp.zeros(one, jnp.float32)
        out, most, total = lax.fori_loop(0, number_seen, of_keys, start)
        total = jnp.where(total == 0, 1, total)
        here = (out / total).astype(q.dtype), most + jnp.log(total)
        return [queries.put(x, part) for x, part in zip(outputs, here)]

    outputs = [jnp.zeros_like(q), jnp.zeros((*q.shape[:-1], 1), jnp.float32)]
    outputs = lax.fori_loop(0, number, of_queries, outputs)
    out, normalizer = (checkpoint_name(x, OUTPUT) for x in outputs)
    return out, (q, k, v, mask, out, normalizer)


def _backward(saved, d_out):
    q, k, v, mask, out, normalizer = saved
    number, block = _seen(mask)
    # A product, as XLA's sum over so few numbers takes a CPU ten times as long.
    delta = jnp.einsum("bkgtd,bkgtd->bkgt", out, d_out, **_FLOAT32)[..., None]

    def of_queries(i, gradients):
        queries, number_seen, seen_block = block(i)
        q_here, d_out_here, normalizer_here, delta_here = map(queries, (q, d_out, normalizer, delta))

        def of_keys(n, carry):
            d_q, d_k, d_v = carry
            seen, keys = seen_block(n)
            scores = jnp.einsum("bkgtd,bksd->bkgts", q_here, keys(k), **_FLOAT32)
            parts = jnp.exp(jnp.where(seen, scores - normalizer_here, _UNSEEN))
            d_parts = jnp.einsum("bkgtd,bksd->bkgts", d_out_here, keys(v), **_FLOAT32)
            d_scores = (parts * (d_parts - delta_here)).astype(q.dtype)
            # Across, as the queries, not the scores, are then transposed for the product.
            across = lambda x, weights: jnp.einsum("bkgtd,bkgts->bkds", x, weights, **_FLOAT32)
            return (
                d_q + jnp.einsum("bkgts,bksd->bkgtd", d_scores, keys(k), **_FLOAT32),
                keys.add(d_k, across(q_here, d_scores), axis=-1),
                keys.add(d_v, across(d_out_here, parts.astype(q.dtype)), axis=-1),
            )

        d_q, *of_all = gradients
        start = jnp.zeros(q_here.shape, jnp.float32), *of_all
        d_q_here, *of_all = lax.fori_loop(0, number_seen, of_keys, start)
        return [queries.put(d_q, d_q_here.astype(q.dtype)), *of_all]

    start = [jnp.zeros_like(q), *(jnp.zeros(x.swapaxes(-2, -1).shape, jnp.float32) for x in (k, v))]
    d_q, d_k, d_v = lax.fori_loop(0, number, of_queries, start)
    return d_q, d_k.swapaxes(-2, -1).astype(k.dtype), d_v.swapaxes(-2, -1).astype(v.dtype), None


_blocks.defvjp(_forward, _backward)


def _seen(mask_BTS, layer=None):
    """How many blocks of queries there are, and a function that gives of the i-th: its places, how many
    blocks of keys it sees anything of, in any row of the batch, and a function that gives of the n-th of
    these: its part of the mask [B, 1, 1, t, s], and its places (in arrays of one `layer`)."""
    _, T, S = mask_BTS.shape
    t, s = _size(T, layer), _size(S, layer)
    whole = jnp.pad(mask_BTS.any(axis=0), [(0, 0), (0, -S % s)])
    whole = whole.reshape(T // t, t, -(-S // s), s).any(axis=(1, 3))
    numbers, order = whole.sum(axis=1), jnp.argsort(~whole, axis=1, stable=True)

    def block(i):
        def seen_block(n):
            j = order[i, n]
            key = jnp.minimum(j * s, S - s)
            seen = lax.dynamic_slice(mask_BTS, (0, i * t, key), (len(mask_BTS), t, s))
            # The last block ends where the array does, and leaves out what the one before it had.
            seen &= key + jnp.arange(s) >= j * s
            return seen[:, None, None], _Places(key, s, layer)

        return _Places(i * t, t), numbers[i], seen_block

    return len(whole), block


def _size(length: int, layer) -> int:
    """Of blocks that cover a length with little to spare, the same for the length that they cover; whole
    vectors, or a CPU takes number by number. With a `layer` of a cache they are larger."""
    most = BLOCK if layer is None else CACHE_BLOCK
    even = -(-length // -(-length // most))
    return min(length, -(-even // _VECTOR) * _VECTOR)


class _Places:
    """Places [start, start + size) of arrays [B, …, places, D], or along another axis of arrays; or of one
    layer of [N, B, …, places, D]."""

    def __init__(self, start, size: int, layer=None):
        self._start, self._size, self._layer = start, size, layer

    def __call__(self, x, axis=-2):
        if self._layer is None:
            return lax.dynamic_slice_in_dim(x, self._start, self._size, axis=axis)
        start = (self._layer, *[0] * (x.ndim - 3), self._start, 0)
        return lax.dynamic_slice(x, start, (1, *x.shape[1:-2], self._size, x.shape[-1]))[0]

    def put(self, x, part, axis=-2):
        """The array with these places replaced."""
        return lax.dynamic_update_slice_in_dim(x, part, self._start, axis=axis)

    def add(self, x, part, axis=-2):
        """The array with something added there."""
        return self.put(x, self(x, axis) + part, axis)
