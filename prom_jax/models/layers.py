"""The parts of a decoder block."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.models.config import DecoderConfig, Rope, RopeScaling
from prom_jax.models.lora import DOWN, UP
from prom_jax.ops.attention import attention
from prom_jax.ops.linear import linear, low_rank
from prom_jax.ops.norm import rms_norm
from prom_jax.ops.random import dropout

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": jax.nn.gelu,  # jax's default is the approximation by tanh
}


def rope_frequencies(rope: Rope | None, head_dim: int, share: float = 1.0) -> np.ndarray:
    """Rotary angles per position, float32 [share · head_dim / 2] (RoFormer eq. 15; Llama-3.1 scaling; YaRN;
    LongRoPE); zeros for a layer without positions, which turn nothing."""
    rotated = int(share * head_dim)
    if rope is None:
        return np.zeros(rotated // 2, np.float32)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / rotated
    frequencies = 1.0 / (np.float32(rope.theta) ** exponents)
    scaling = rope.scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "longrope":
        return frequencies / np.asarray(scaling.short_factor, np.float32)
    if scaling.rope_type == "yarn":
        stretched = _yarn_ramp(scaling, rope.theta, rotated)
        return stretched * frequencies / np.float32(scaling.factor) + (1 - stretched) * frequencies
    # Long waves are stretched by `factor`, short ones kept, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0).astype(np.float32)
    return kept * frequencies + (1 - kept) * frequencies / np.float32(scaling.factor)


def _yarn_ramp(scaling: RopeScaling, theta: float, rotated: int) -> np.ndarray:
    """How much of each frequency is stretched, 0 … 1 (YaRN, section 3.2): none of those that turn more than
    `beta_fast` times in the original context, all that turn less than `beta_slow` times."""

    def dimension(turns):
        waves = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotated * math.log(waves) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    span = last - first or 0.001
    return np.clip((np.arange(rotated // 2, dtype=np.float32) - first) / span, 0, 1).astype(np.float32)


def rotate(x_BTHD, angles_BTF, scale=1.0, interleaved: bool = False):
    """Rotary embedding of the first 2 F dimensions, in float32: in Hugging Face's half-split layout, or of
    neighbouring dimensions; cosines and sines times `scale`."""
    cos, sin = jnp.cos(angles_BTF)[:, :, None] * scale, jnp.sin(angles_BTF)[:, :, None] * scale
    rotated = 2 * angles_BTF.shape[-1]
    x = x_BTHD.astype(jnp.float32)
    turned, rest = x[..., :rotated], x[..., rotated:]
    low, high = (turned[..., ::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, axis=-1)
    parts = [low * cos - high * sin, high * cos + low * sin]
    if interleaved:
        parts = [jnp.stack(parts, axis=-1).reshape(turned.shape)]
    return jnp.concatenate([*parts, rest], axis=-1).astype(x_BTHD.dtype)


class LayerCache(NamedTuple):
    """Keys and values of a stack of layers, and where those of one layer's new tokens go.

    Attributes:
      keys, values: [n, B, K, S, D]; B may be 1 where they are only read, which then serves every row.
      layer: int32, the layer's number in the stack.
      slot: int32, the first slot of the new ones; None where the cache is only read.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    slot: jax.Array | None

    def write(self, k_BTKD, v_BTKD) -> "LayerCache":
        """The cache with the new ones in it: in place, as it is carried through the layers."""

        def put(old, new):
            new = new.astype(old.dtype).swapaxes(1, 2)[None]
            return jax.lax.dynamic_update_slice(old, new, (self.layer, 0, 0, self.slot, 0))

        return self._replace(keys=put(self.keys, k_BTKD), values=put(self.values, v_BTKD))

    def append(self, k_BTKD, v_BTKD):
        """This layer's keys and values, then the new ones, [B, S + T, K, D] each."""

        def after(old, new):
            old = old[self.layer].swapaxes(1, 2)
            return jnp.concatenate([jnp.broadcast_to(old, (len(new), *old.shape[1:])), new], axis=1)

        return after(self.keys, k_BTKD), after(self.values, v_BTKD)


class Dropout(NamedTuple):
    """Of what a block's adapters read.

    Attributes:
      keys: uint32 [B, T], which decide what is dropped.
      layer: the block's number in the model, an int or a traced int32.
      rate: the share of values that are 0.
    """

    keys: jax.Array
    layer: jax.Array | int
    rate: float


class Projections(NamedTuple):
    """The linear maps of a block, with their adapters and biases where there are some.

    Attributes:
      weights: of the block by name.
      training: whether the maps themselves may have gradients.
      dropout: None for none.
    """

    weights: dict
    training: bool
    dropout: Dropout | None

    def __call__(self, x, *names: str) -> list:
        """`x` times the projections of these names."""
        products = linear(x, [self.weights[f"{name}_proj"] for name in names], self.training)
        adapted = [i for i, name in enumerate(names) if f"{name}_proj{DOWN}" in self.weights]
        downs, ups = ([self.weights[f"{names[i]}_proj{end}"] for i in adapted] for end in (DOWN, UP))
        if self.dropout and adapted:  # maps of one input share it
            place = 4 * self.dropout.layer + ("q", "o", "gate", "down").index(names[0])
            x = dropout(x, self.dropout.keys, place, self.dropout.rate)
        for i, difference in zip(adapted, low_rank(x, downs, ups)):
            products[i] += difference
        biases = (self.weights.get(f"{name}_bias") for name in names)
        return [y if bias is None else y + bias for y, bias in zip(products, biases)]


def block(
    config: DecoderConfig,
    weights: dict,
    x_BTD,
    rope,
    mask,
    backend: str,
    cache=None,
    drop: Dropout | None = None,
):
    """One block. Norms stand before or after attention and MLP, or both, as the weights have them.

    Args:
      weights: of the block by their names in the family's table, as the devices compute with them.
      x_BTD: the residual stream.
      rope: of this layer the rotary angles [B, T, F], and what their cosines and sines are multiplied by.
      mask: of this layer, as `ops.attention.attention` takes it.
      backend: of attention.
      cache: a `LayerCache` or None.
      drop: of adapters; None for none.

    Returns:
      The residual stream after the block [B, T, D], and the cache.
    """

    weights = _unfused(config, weights)
    # With adapters the maps are frozen, and next to a cache nothing is trained.
    training = cache is None and not any(name.endswith(DOWN) for name in weights)
    project = Projections(weights, training, drop)

    def norm(name, x):
        return _norm(config, weights, name, x)

    def add(x, h):
        return x + (h if config.residual_scale == 1 else _scaled(h, config.residual_scale))

    h, cache = _attend(config, weights, project, norm("attention_norm", x_BTD), rope, mask, backend, cache)
    x_BTD = add(x_BTD, norm("attention_out_norm", h))
    h = _mlp(config, project, norm("mlp_norm", x_BTD))
    return add(x_BTD, norm("mlp_out_norm", h)), cache


def _unfused(config, weights: dict) -> dict:
    """Weights in which matrices that a family keeps as one are apart."""
    parts, sizes = {}, config.sizes
    for fused, names, cuts in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj"), [sizes["queries"], sizes["queries"] + sizes["keys"]]),
        ("gate_up_proj", ("gate_proj", "up_proj"), 2),
    ):
        for end in ("", UP):
            if fused + end in weights:
                parts |= zip((name + end for name in names), _split(weights[fused + end], cuts))
        if fused + DOWN in weights:  # the parts of an adapter have the same A
            parts |= {name + DOWN: weights[fused + DOWN] for name in names}
    return weights | parts


def _split(weight, cuts) -> list:
    """Parts of a matrix, which may be quantised, along its outputs."""
    arrays, structure = jax.tree.flatten(weight)
    return [structure.unflatten(parts) for parts in zip(*(jnp.split(x, cuts) for x in arrays))]


def _attend(config, weights, project, x_BTD, rope, mask, backend, cache):
    layer = None

    def split_heads(y):
        return y.reshape(*y.shape[:2], -1, config.head_dim)

    q, k, v = project(x_BTD, "q", "k", "v")
    q, k = _whole_norm(config, weights, "q_norm", q), _whole_norm(config, weights, "k_norm", k)
    q, k, v = map(split_heads, (q, k, v))
    q, k = _head_norm(config, weights, "q_norm", q), _head_norm(config, weights, "k_norm", k)
    q, k = (rotate(y, *rope, interleaved=config.rope_interleaved) for y in (q, k))
    if config.attention_scale is not None:  # `attention` itself divides by √head_dim
        q = _scaled(q, config.attention_scale * math.sqrt(config.head_dim))
    if cache is not None and cache.slot is None:
        k, v = cache.append(k, v)
    elif cache is not None:
        cache = cache.write(k, v)
        k, v, layer = cache.keys, cache.values, cache.layer
    h = attention(q, k, v, mask, backend, layer, config.attention_softcap)
    (h,) = project(h.reshape(*h.shape[:2], -1), "o")
    return h, cache


def _scaled(x, scale: float):
    """`x` times a scale that is not rounded to its dtype before."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _mlp(config, project, x_BTD):
    gate, up = project(x_BTD, "gate", "up")
    (h,) = project(ACTIVATIONS[config.activation](gate) * up, "down")
    return h


def _norm(config, weights, name, x):
    """`x` normed by the weight of that name; as it is where there is none."""
    if name not in weights:
        return x
    return rms_norm(x, weights[name], config.rms_norm_eps, config.unit_offset_norms)


def _whole_norm(config, weights, name, x):
    """A norm over all heads together, whose weight is as wide as they are."""
    return x if len(weights.get(name, ())) == config.head_dim else _norm(config, weights, name, x)


def _head_norm(config, weights, name, x_BTHD):
    """A norm of each head, whose weight is as wide as one."""
    return _norm(config, weights, name, x_BTHD) if len(weights.get(name, ())) == config.head_dim else x_BTHD
