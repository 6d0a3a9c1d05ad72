"""Grouped-query attention with one masking rule for all backends."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from prom_jax.ops import attention_cpu
from prom_jax.parallel.sharding import BATCH, num_batch_shards
from prom_jax.utils.errors import UserError
from prom_jax.utils.temporary import absl_flags_parsed

# 'xla' and 'cudnn' are jax.nn.dot_product_attention's own, 'splash' is Pallas's for TPU, 'tokamax' are that
# package's for GPU, 'blocks' is attention_cpu.py.
BACKENDS = ("auto", "xla", "blocks", "splash", "cudnn", "tokamax")

_LEVEL_BITS = 10  # of a segment id, for each level of its path
MAX_SEGMENTS = (1 << _LEVEL_BITS) - 1  # that continue the same segment

SPLASH_BLOCKS = (512, 256, 128)  # queries, and keys, of a block of 'splash': the first that divides a row
TOKAMAX_BLOCK = 128  # queries, and keys: its kernels for Hopper take whole blocks where there is a mask


# The masking rule.


def segment_id(prefix: int = 0, example: int = 0, side: int = 0) -> int:
    """The id of a segment of a row, by its path in a tree of three levels.

    A token attends to its own segment and to the ancestors of it. A prefix that several texts share is a
    segment of its own, which theirs continue: `segment_id(2, 1)` continues `segment_id(2)`, and
    `segment_id(2, 1, 3)` both. Levels may be left out: `segment_id(2, 0, 3)` continues `segment_id(2)`, and
    `segment_id(0, 0, 3)`, which is 3, nothing.

    Args:
      prefix, example, side: the path, each 0 to MAX_SEGMENTS; ints or arrays of them.
    """
    return (prefix << 2 * _LEVEL_BITS) | (example << _LEVEL_BITS) | side


# What all texts of a row continue, where there is but one shared prefix.
SHARED_PREFIX = segment_id(1)


def attention_mask(q_positions, kv_positions, q_segments, kv_segments, window=None):
    """Which keys each query attends to.

    A query attends to the keys of its own segment and of those that it continues (`segment_id`), at its own
    position or before, and with a sliding window only to the last `window` of them, itself included. This one
    rule serves packed rows, prefixes that are computed once for several texts, padding (segment 0, which no
    real token attends to) and a key-value cache, whose empty slots are padding.

    Args:
      q_positions, q_segments: int32 [B, T].
      kv_positions, kv_segments: int32 [B, S].
      window: of keys; None for all.

    Returns:
      Bool [B, 1, T, S].
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    q_segments, kv_segments = q_segments[:, :, None], kv_segments[:, None, :]
    continued = [kv_segments == q_segments >> bits << bits for bits in (_LEVEL_BITS, 2 * _LEVEL_BITS)]
    same = (kv_segments == q_segments) | ((continued[0] | continued[1]) & (kv_segments != 0))
    mask = (distance >= 0) & same
    if window is not None:
        mask &= distance < window
    return mask[:, None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["segments", "choice"], meta_fields=["windows"]
)
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """The mask of rows of whole examples, none of which continues another, whose queries are their keys: all
    that the kernel of 'splash' needs to know.

    Attributes:
      segments: int32 [B, T].
      choice: int32, which of the windows; None where there is one.
      windows: sliding windows, None for none.
    """

    segments: jax.Array
    choice: jax.Array | None
    windows: tuple[int | None, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["masks"], meta_fields=["windows"])
@dataclasses.dataclass(frozen=True)
class LayerMasks:
    """The masks of a model's layers, one for each different window, made once for all layers.

    Attributes:
      masks: bool [B, 1, T, S] where there is one window, else [W, B, 1, T, S]; or a `PackedMask`.
      windows: the different windows, in this order.
    """

    masks: "jax.Array | PackedMask"
    windows: tuple[int | None, ...]

    def of(self, choice):
        """The mask of a layer whose window is number `choice` of the windows, an int32 that may be traced."""
        if len(self.windows) == 1:
            return self.masks
        if isinstance(self.masks, PackedMask):
            return dataclasses.replace(self.masks, choice=choice)
        return jax.lax.dynamic_index_in_dim(self.masks, choice, keepdims=False)


def layer_masks(q_positions, kv_positions, q_segments, kv_segments, windows) -> LayerMasks:
    """`attention_mask` for each of the windows."""
    keys = q_positions, kv_positions, q_segments, kv_segments
    masks = [attention_mask(*keys, window) for window in windows]
    return LayerMasks(masks[0] if len(masks) == 1 else jnp.stack(masks), tuple(windows))


def packed_masks(positions, segments, windows, backend) -> LayerMasks:
    """The masks of rows whose queries are their keys, in the form that the backend takes.

    Args:
      positions: int32 [B, T], counted in each example.
      segments: int32 [B, T], of whole examples where `supports_shared_prefixes(backend)` is false.
      windows: the different windows of the layers.
      backend: as in `attention`.
    """
    if resolve(backend) == "splash" and segments.shape[1] % SPLASH_BLOCKS[-1] == 0:
        return LayerMasks(PackedMask(segments, None, tuple(windows)), tuple(windows))
    return layer_masks(positions, positions, segments, segments, windows)


# Dispatch.


def resolve(backend: str) -> str:
    """The backend that 'auto' stands for on this machine; any other name as it is."""
    if backend != "auto":
        return backend
    on_gpu = "tokamax" if has_tokamax() else "xla"
    return {"cpu": "blocks", "tpu": "splash", "gpu": on_gpu}.get(jax.default_backend(), "xla")


def has_tokamax() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("tokamax") is not None


def supports_shared_prefixes(backend: str) -> bool:
    """Whether segments of packed rows may continue others: the kernel of 'splash' only tells them apart."""
    return resolve(backend) != "splash"


def attention(q_BTHD, k, v, mask, backend="auto", layer=None, softcap: float | None = None):
    """softmax(q·k/√D)·v under a mask, with softmax in float32.

    `K` key-value heads serve `H` query heads in consecutive groups. A query that attends to nothing gets a
    finite value: such slots are padding and have no loss.

    Args:
      q_BTHD: [B, T, H, D].
      k, v: [B, S, K, D]; or with `layer` caches of all layers, [N, B, K, S, D], of which that one is read.
      mask: bool [B, 1, T, S], or a `PackedMask`.
      backend: 'xla' holds all scores at once. 'blocks' goes through blocks of queries and keys, skips those
        in which no query attends to any key, and computes scores again for the gradient: fast where a core
        has little memory near it and steps of a loop cost little. 'splash': Pallas's kernel for TPU, of a
        `PackedMask`; others go to 'xla'. 'cudnn': NVIDIA's. 'tokamax': kernels that hold no scores, the first
        for this GPU, dtype and shape of those that the package has; a cache goes to 'xla'. 'auto': 'blocks'
        on a CPU, 'splash' on a TPU, 'tokamax' on a GPU where it is installed, else 'xla'.
      softcap: scores s become softcap · tanh(s / softcap), as in Gemma 2; not with 'cudnn'.

    Returns:
      [B, T, H, D] in the dtype of `q`.
    """
    backend = resolve(backend)
    k, v = k.astype(q_BTHD.dtype), v.astype(q_BTHD.dtype)
    if isinstance(mask, PackedMask):
        return _splash(q_BTHD, k, v, mask, softcap)
    mask_B1TS = jnp.broadcast_to(mask, (*q_BTHD.shape[:1], 1, *mask.shape[2:]))
    if backend == "blocks":
        return attention_cpu.attention(q_BTHD, k, v, mask_B1TS[:, 0], layer, softcap)
    if backend == "tokamax" and layer is None:
        return _on_each_device(functools.partial(_tokamax, softcap), q_BTHD, k, v, mask_B1TS)
    if layer is not None:
        k, v = k[layer].swapaxes(1, 2), v[layer].swapaxes(1, 2)
    if softcap is not None and backend == "cudnn":
        raise UserError("attention='cudnn' has no soft caps, which this model has: use 'auto'")
    if softcap is not None:
        return _softcapped(q_BTHD, k, v, mask_B1TS, softcap)
    implementation = "cudnn" if backend == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q_BTHD, k, v, mask=mask_B1TS, implementation=implementation)


def _softcapped(q_BTHD, k_BSKD, v_BSKD, mask_B1TS, softcap: float):
    """The formula with soft-capped scores, which jax.nn.dot_product_attention does not have."""
    B, T, _, D = q_BTHD.shape
    q = q_BTHD.reshape(B, T, k_BSKD.shape[2], -1, D)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k_BSKD, preferred_element_type=jnp.float32) / math.sqrt(D)
    scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_B1TS[:, :, None], scores, attention_cpu.MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKD.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v_BSKD).reshape(q_BTHD.shape)


# Kernels for accelerators.


def _on_each_device(kernel, q_BTHD, k, v, mask):
    """A kernel that XLA cannot split, with each device's rows and heads; `mask` [B, …] is split by rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q_BTHD, k, v, mask)
    rows = BATCH if len(q_BTHD) % num_batch_shards(mesh) == 0 else None
    heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, None, heads)
    return jax.shard_map(
        kernel, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False
    )(q_BTHD, k, v, mask)


def _tokamax(softcap, q_BTHD, k, v, mask_B1TS):
    T, S = mask_B1TS.shape[2:]
    spare_q, spare_kv = -T % TOKAMAX_BLOCK, -S % TOKAMAX_BLOCK

    def pad(x, spare):
        return jnp.pad(x, [(0, 0), (0, spare), (0, 0), (0, 0)])

    # Queries that fill up a block attend to all, as one that attends to nothing may have a NaN gradient.
    mask = jnp.pad(mask_B1TS, [(0, 0), (0, 0), (0, spare_q), (0, 0)], constant_values=True)
    mask = jnp.pad(mask, [(0, 0), (0, 0), (0, 0), (0, spare_kv)])
    # In a row no query attends to what comes after it: a kernel that knows it leaves out half of the scores.
    return _tokamax_kernel(pad(q_BTHD, spare_q), pad(k, spare_kv), pad(v, spare_kv), mask, T == S, softcap)[
        :, :T
    ]


def _tokamax_attention(q, k, v, mask, is_causal, softcap):
    import tokamax  # takes a second to read, which no other machine needs to spend

    return tokamax.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, logits_soft_cap=softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tokamax_kernel(q, k, v, mask, is_causal, softcap):
    with absl_flags_parsed():
        return _tokamax_attention(q, k, v, mask, is_causal, softcap)


def _tokamax_forward(q, k, v, mask, is_causal, softcap):
    def kernel(q, k, v):
        return _tokamax_attention(q, k, v, mask, is_causal, softcap)

    with absl_flags_parsed():
        return jax.vjp(kernel, q, k, v)


def _tokamax_backward(is_causal, softcap, backward, d_out):
    with absl_flags_parsed():
        return *backward(d_out), None


# As tokamax does it for its own: what remat computes without a gradient is then traced by the function above,
# and not by tokamax later, outside of `absl_flags_parsed`.
_tokamax_kernel.defvjp(_tokamax_forward, _tokamax_backward, optimize_remat=True)


def _splash(q_BTHD, k, v, mask: PackedMask, softcap):
    """The kernel of the layer's window; of several kinds of layers one is chosen as it runs."""
    kernels = [
        functools.partial(_on_each_device, functools.partial(_splash_kernel, window, softcap))
        for window in mask.windows
    ]
    if mask.choice is None:
        return kernels[0](q_BTHD, k, v, mask.segments)
    return jax.lax.switch(mask.choice, kernels, q_BTHD, k, v, mask.segments)


def _splash_kernel(window, softcap, q_BTHD, k, v, segments_BT):
    """Skips blocks above the diagonal and outside the window; a query attends to its own segment alone."""
    # Pallas for TPU takes a second to read, which no other machine needs to spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, D = q_BTHD.shape[1:]
    near = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    sizes = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([near] * H),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(sizes, block)),
        attn_logits_soft_cap=softcap,
    )
    q, k, v = (x.swapaxes(1, 2) for x in ((q_BTHD / math.sqrt(D)).astype(q_BTHD.dtype), k, v))
    return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segments_BT, segments_BT)).swapaxes(1, 2)
