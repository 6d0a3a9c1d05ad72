"""The model: decoder blocks in scanned stacks, and the places where hidden states leave.

Parameters keep Hugging Face's own orientation ([out, in]), stacked over layers. The blocks live in two
stacks, `lower` (1 … n) and `upper` (n+1 … N), when the model has a pivot layer n, and in `lower` alone
when it has none: slicing one stack inside jit would copy it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from prom_jax.models.config import LlamaConfig
from prom_jax.ops.attention import BACKENDS, OUTPUT, attention, has_tokamax, resolve, visible_in_rows
from prom_jax.parallel.sharding import BATCH, constrain, gathered, make_mesh, param_spec
from prom_jax.utils.errors import UserError


def _all_but_gathered(primitive, *_, **__):
    # Weights that were gathered for a block are gathered again, or all of them would be kept.
    return primitive.name != "sharding_constraint"


# What is kept of a block for the backward pass.
REMAT = {
    "none": _all_but_gathered,
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(OUTPUT),
    ),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is computed, none of which changes what it computes but for rounding.

    dtype: of activations and of the weights as they are used ('float32' or 'bfloat16').
    remat: what the backward pass recomputes: 'none', 'dots' (all but matrix products), 'full' (whole blocks).
    attention: the backend, one of attention.BACKENDS.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        for name, value, allowed in (
            ("compute_dtype", self.dtype, ("float32", "bfloat16")),
            ("remat", self.remat, REMAT),
            ("attention", self.attention, BACKENDS),
        ):
            if value not in allowed:
                raise UserError(f"{name}={value!r}: expected one of {', '.join(allowed)}")

    def on_this_machine(self):
        """Itself.

        Raises:
          UserError: for an attention backend that the devices here do not have.
        """
        platform = jax.default_backend()
        if self.attention == "cudnn" and (self.dtype != "bfloat16" or platform != "gpu"):
            raise UserError(
                f"attention='cudnn' needs compute_dtype='bfloat16' and a GPU, not {self.dtype} on "
                f"{platform}: use 'auto'"
            )
        if self.attention == "splash" and platform != "tpu":
            raise UserError(f"attention='splash' needs a TPU, not {platform}: use 'auto'")
        if self.attention == "tokamax" and not (platform == "gpu" and has_tokamax()):
            raise UserError(
                f"attention='tokamax' needs a GPU (here: {platform}) and its package, which "
                "pip install -e '.[cuda]' brings: use 'auto'"
            )
        return self


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary angles per position, float32 [head_dim / 2] (RoFormer eq. 15; Llama-3.1 scaling)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = 1.0 / (np.float32(config.rope_theta) ** exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Long waves are stretched by `factor`, short ones kept, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0).astype(np.float32)
    return kept * frequencies + (1 - kept) * frequencies / np.float32(scaling.factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, eps):
    """Root-mean-square norm over the last axis, computed in float32, in the dtype of `x`.

    Its sums over that axis are products, in a gradient of its own too: XLA's take a CPU four times as long.
    """
    return _normed(x, eps)[0].astype(x.dtype) * scale.astype(x.dtype)


def _normed(x, eps):
    """`x` over its root mean square, and one over that, in float32."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(_mean_of_products(x, x) + eps)
    return x * inverse, inverse


def _mean_of_products(x, y):
    return jnp.einsum("...d,...d->...", x, y, precision="highest")[..., None] / x.shape[-1]


def _norm_forward(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _norm_backward(eps, saved, d_out):
    x, scale = saved
    normed, inverse = _normed(x, eps)
    d_out = d_out.astype(jnp.float32)
    d_scale = (d_out * normed).sum(axis=tuple(range(x.ndim - 1)))
    d_normed = d_out * scale.astype(jnp.float32)
    d_x = (d_normed - normed * _mean_of_products(d_normed, normed)) * inverse
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_norm_forward, _norm_backward)


def rotate(x_BTHD, angles_BTF):
    """Rotary embedding in Hugging Face's half-split layout, computed in float32; F = D / 2."""
    cos, sin = jnp.cos(angles_BTF)[:, :, None], jnp.sin(angles_BTF)[:, :, None]
    low, high = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x_BTHD.dtype)


class Blocks(nnx.Module):
    """A stack of decoder blocks; every parameter has the layer as its first axis.

    Under `jax.lax.scan` one layer's slice is itself a `Blocks` without that axis: `__call__` is one block.
    """

    def __init__(self, config: LlamaConfig, compute: Compute, num_layers: int, init):
        self.config, self.compute = config, compute
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, inner = config.hidden_size, config.intermediate_size
        matrix = lambda out, into: nnx.Param(init((num_layers, out, into)))
        self.q_proj = matrix(heads * config.head_dim, hidden)
        self.k_proj = matrix(kv_heads * config.head_dim, hidden)
        self.v_proj = matrix(kv_heads * config.head_dim, hidden)
        self.o_proj = matrix(hidden, heads * config.head_dim)
        self.gate_proj = matrix(inner, hidden)
        self.up_proj = matrix(inner, hidden)
        self.down_proj = matrix(hidden, inner)
        self.input_layernorm = nnx.Param(init((num_layers, hidden), ones=True))
        self.post_attention_layernorm = nnx.Param(init((num_layers, hidden), ones=True))

    def __call__(self, x_BTD, angles_BTF, mask_B1TS, cache=None, layer=None, start=None):
        """One block. With the stack's `cache` (keys and values, [n, B, K, S, D] each) the new ones of this
        `layer` go in at `start`.

        Without `start` the cache is only read, and the new ones stand behind it; it may have one row, which
        is then that of all.

        Returns: the block's output [B, T, D] and the cache.
        """
        return self._run(self._gathered(x_BTD.dtype), x_BTD, angles_BTF, mask_B1TS, cache, layer, start)

    def _gathered(self, dtype) -> dict:
        """The weights of one block, as a device computes with them."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        names += ("input_layernorm", "post_attention_layernorm")
        return {name: gathered(getattr(self, name)[...], name, dtype) for name in names}

    def _run(self, weights, x_BTD, angles_BTF, mask_B1TS, cache=None, layer=None, start=None):
        """`__call__` with weights of `_gathered`, which serve several batches."""
        config = self.config
        norm = lambda name, x: rms_norm(x, weights[name], config.rms_norm_eps)
        project = lambda x, *names: _products(x, [weights[name] for name in names], self._joins(cache))
        split = lambda y: y.reshape(*y.shape[:2], -1, config.head_dim)
        h = norm("input_layernorm", x_BTD)
        q, k, v = map(split, project(h, "q_proj", "k_proj", "v_proj"))
        q, k = rotate(q, angles_BTF), rotate(k, angles_BTF)
        if start is not None:  # in place: the cache is carried through the layers, never stacked or sliced
            write = lambda old, new: jax.lax.dynamic_update_slice(
                old, new.astype(old.dtype).swapaxes(1, 2)[None], (layer, 0, 0, start, 0)
            )
            cache = write(cache[0], k), write(cache[1], v)
            h = attention(q, *cache, mask_B1TS, self.compute.attention, layer)
        else:
            if cache is not None:
                k, v = _behind(cache[0][layer], k), _behind(cache[1][layer], v)
            h = attention(q, k, v, mask_B1TS, self.compute.attention)
        (h,) = project(h.reshape(*h.shape[:2], -1), "o_proj")
        x_BTD = x_BTD + h
        h = norm("post_attention_layernorm", x_BTD)
        gate, up = project(h, "gate_proj", "up_proj")
        (h,) = project(jax.nn.silu(gate) * up, "down_proj")
        return x_BTD + h, cache

    def _joins(self, cache) -> bool:
        """Whether weights with the same input are joined into one matrix.

        On a CPU that makes gradients faster: those of weights need the product's gradient transposed. Of a
        joint product it is written first, then copied; else XLA computes it in transposed order, ten times
        slower. A few new tokens beside a cache are not worth a copy of the weights.
        """
        tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
        return cache is None and tensor == 1 and resolve(self.compute.attention) == "blocks"

    def scan(self, x_BTD, angles_BTF, mask_B1TS, cache=None, start=None, collect=None):
        """Runs the whole stack. Returns its output, `collect` of each block's output stacked, the cache."""

        def body(carry, layer):
            x, kv = carry
            block, index = layer
            x, kv = block(x, angles_BTF, mask_B1TS, kv, index, start)
            x = constrain(x, BATCH)
            return (x, kv), (collect(x) if collect else None)

        layers = jnp.arange(len(self.input_layernorm[...]))
        (x_BTD, cache), hiddens = jax.lax.scan(self._remat(body), (x_BTD, cache), (self, layers))
        return x_BTD, hiddens, cache

    def scan_each(self, xs, contexts):
        """Runs several batches [B, T, D], with B and T of their own, through the whole stack side by side: a
        block's weights are gathered, and its gradients stacked, once for all. Returns their outputs."""

        def body(xs, block):
            weights = block._gathered(xs[0].dtype)
            outputs = (block._run(weights, x, *context)[0] for x, context in zip(xs, contexts))
            return [constrain(output, BATCH) for output in outputs], None

        return jax.lax.scan(self._remat(body), xs, self)[0]

    def _remat(self, body):
        return jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.compute.remat])


def _products(x, matrices, joined: bool) -> list:
    """x [..., I] times each matrix [O, I], `joined` into one or not."""
    product = lambda matrix: jnp.einsum("...i,oi->...o", x, matrix)
    if not joined:
        return [product(matrix) for matrix in matrices]
    ends = np.cumsum([len(matrix) for matrix in matrices])
    return jnp.split(product(jnp.concatenate(matrices)), ends[:-1], axis=-1)


def _behind(old_BKSD, new_BTKD):
    """Keys or values [B, S + T, K, D]; the old ones may have one row, which is then that of all."""
    old = old_BKSD.swapaxes(1, 2)
    return jnp.concatenate([jnp.broadcast_to(old, (len(new_BTKD), *old.shape[1:])), new_BTKD], axis=1)


class Llama(nnx.Module):
    """A decoder-only language model with up to two exits.

    Args:
      config: the architecture.
      compute: how it is computed.
      pivot_layer: n, the number of blocks in the lower stack; 0 for one stack of all N.
      pivot_head: whether there is a second LM head, untied, for the hidden state after block n.
      rngs: randomness of the initial values (normal, σ = 0.02).
      param_dtype: of the parameters.
    Raises:
      UserError: if `pivot_layer` is not in 1 … N-1 when given.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        compute: Compute = Compute(),
        pivot_layer: int = 0,
        pivot_head: bool = False,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
    ):
        layers = config.num_hidden_layers
        check_pivot_layer(pivot_layer, layers)

        def init(shape, ones=False):
            if ones:
                return jnp.ones(shape, param_dtype)
            return (0.02 * jax.random.normal(rngs.params(), shape)).astype(param_dtype)

        vocabulary = (config.vocab_size, config.hidden_size)
        self.config, self.compute, self.pivot_layer = config, compute, pivot_layer
        self.embed_tokens = nnx.Param(init(vocabulary))
        self.lower = Blocks(config, compute, pivot_layer or layers, init)
        self.upper = Blocks(config, compute, layers - pivot_layer, init) if pivot_layer else None
        self.norm = nnx.Param(init((config.hidden_size,), ones=True))
        self.lm_head = None if config.tie_word_embeddings else nnx.Param(init(vocabulary))
        self.pivot_head = nnx.Param(init(vocabulary)) if pivot_head else None

    @property
    def mesh(self):
        """The mesh that the parameters lie on; of one device where they are on one."""
        sharding = self.embed_tokens[...].sharding
        named = isinstance(sharding, NamedSharding)
        return sharding.mesh if named else make_mesh(devices=list(sharding.device_set))

    @property
    def output_embedding(self):
        """The main head's matrix [V, D]: `lm_head`, or the embedding where they are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    def final_norm(self, x_BTD):
        """The norm before the main head."""
        return rms_norm(x_BTD, gathered(self.norm[...], "norm", x_BTD.dtype), self.config.rms_norm_eps)

    def embed(self, tokens_BT):
        """Token embeddings [B, T, D] in the compute dtype."""
        axis = "fsdp" if "fsdp" in param_spec("embed_tokens", self.embed_tokens.shape) else None
        # Every device looks up its columns for all rows, and these then go where they belong: they are
        # smaller than the table, and so is what comes back.
        columns = jnp.take(self.embed_tokens[...], constrain(tokens_BT, "data"), axis=0)
        columns = constrain(columns.astype(self.compute.dtype), "data", None, axis)
        return constrain(columns, BATCH)

    def context(self, tokens_BT, positions_BT, segments_BT):
        """What every block needs: rotary angles and attention's mask, for a batch without cache."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segments_BT is None:
            segments_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        window, backend = self.config.sliding_window, self.compute.attention
        return self.angles(positions_BT), visible_in_rows(positions_BT, segments_BT, window, backend)

    def angles(self, positions_BT):
        """Rotary angles, float32 [B, T, head_dim / 2]."""
        return positions_BT[..., None].astype(jnp.float32) * rope_frequencies(self.config)

    def pivot_states(self, tokens_BT, positions_BT=None, segments_BT=None):
        """h_n, the output of block n without a norm [B, T, D]. Blocks above n are not computed."""
        context = self.context(tokens_BT, positions_BT, segments_BT)
        return self.lower.scan(self.embed(tokens_BT), *context)[0]

    def final_states(self, tokens_BT, positions_BT=None, segments_BT=None):
        """h_N after the final norm, what the main head reads [B, T, D]."""
        return self.each_final_states((tokens_BT, positions_BT, segments_BT))[0]

    def each_final_states(self, *batches):
        """`final_states` of several batches (tokens, positions, segments), side by side."""
        xs, contexts = self._begin(batches)
        for stack in filter(None, (self.lower, self.upper)):
            xs = stack.scan_each(xs, contexts)
        return [self.final_norm(x) for x in xs]

    def final_and_pivot_states(self, final, pivot):
        """`final_states` of one batch (tokens, positions, segments) and `pivot_states` of another, side by
        side."""
        xs, contexts = self._begin((final, pivot))
        x, states = self.lower.scan_each(xs, contexts)
        (x,) = self.upper.scan_each([x], contexts[:1])
        return self.final_norm(x), states

    def _begin(self, batches):
        """What the blocks are given of batches (tokens, positions, segments): embeddings, and contexts."""
        xs = [self.embed(tokens_BT) for tokens_BT, _, _ in batches]
        return xs, [self.context(*batch) for batch in batches]

    def states_at_two_exits(self, tokens_BT, positions_BT, segments_BT, width: int):
        """What two heads read of rows whose places from `width` on leave after block n: `final_states` of
        those before [B, width, D], and `pivot_states` of the rest [B, T - width, D].

        Places before `width` must not see those behind it.
        """
        before = [x[:, :width] for x in (tokens_BT, positions_BT, segments_BT)]
        x = self.pivot_states(tokens_BT, positions_BT, segments_BT)
        final, _, _ = self.upper.scan(x[:, :width], *self.context(*before))
        return self.final_norm(final), x[:, width:]

    def cached_states(self, tokens_BT, positions_BT, mask_B1TS, cache, start):
        """As `final_states`, with keys and values kept: those of the new tokens go into the cache at `start`.

        Args: cache: by stack, keys and values [n, B, K, S, D] each; mask_B1TS: over the cache's S places.
        Returns: the states [B, T, D] and the updated cache.
        """
        x, angles, updated = self.embed(tokens_BT), self.angles(positions_BT), {}
        for name, kv in cache.items():
            x, _, updated[name] = getattr(self, name).scan(x, angles, mask_B1TS, kv, start)
        return self.final_norm(x), updated

    def each_layer(self, tokens_BT, angles_BTF, mask_B1TS, collect, cache=None):
        """`collect`, a function of hidden states [B, T, D], of every block's output, stacked: [N, …].

        What it leaves out of them is never kept. A `cache` of `cached_states` is read: what it holds comes
        before the tokens of every row, and it may have one row for all.
        """
        x, collected = self.embed(tokens_BT), []
        for name in ("lower", "upper"):
            if (stack := getattr(self, name)) is not None:
                kv = None if cache is None else cache[name]
                x, outputs, _ = stack.scan(x, angles_BTF, mask_B1TS, kv, collect=collect)
                collected.append(outputs)
        return jnp.concatenate(collected)

    def empty_cache(self, batch: int, length: int):
        """A cache for `cached_states` of `length` places in the compute dtype."""
        config = self.config
        upper = config.num_hidden_layers - self.pivot_layer
        layers = {"lower": self.pivot_layer, "upper": upper} if self.pivot_layer else {"lower": upper}
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        return {
            name: (jnp.zeros((n, *shape), self.compute.dtype), jnp.zeros((n, *shape), self.compute.dtype))
            for name, n in layers.items()
        }

    def cache_bytes(self, length: int) -> int:
        """Of a row of `length` places in a cache."""
        row = jax.eval_shape(lambda: self.empty_cache(1, length))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))

    @jax.jit
    def __call__(self, tokens_BT, positions_BT=None, segments_BT=None):
        """Next-token logits.

        Args:
          tokens_BT: int32 [B, T].
          positions_BT: int32 [B, T], default 0 … T-1.
          segments_BT: int32 [B, T]; tokens see their own segment, and those that it continues
            (`attention.segment`). Default: one segment.
        Returns: float32 [B, T, V].
        """
        return self.logits(self.final_states(tokens_BT, positions_BT, segments_BT))

    def logits(self, hidden_BTD):
        """Main-head logits of final states, float32 [B, T, V]."""
        head = self.output_embedding.astype(hidden_BTD.dtype)
        return jnp.einsum("...d,vd->...v", hidden_BTD, head, preferred_element_type=jnp.float32)

    def hidden_states(self, tokens_BT, positions_BT=None, segments_BT=None, layers=None):
        """The residual stream without final norm: 0 the embeddings, i the output of block i.

        Args: as in `__call__`; layers: which of 0 … N, default all of them.
        Returns: [len(layers), B, T, D] in the compute dtype.
        Raises:
          UserError: for a layer that the model has not.
        """
        deepest = self.config.num_hidden_layers
        layers = tuple(range(deepest + 1) if layers is None else layers)
        if any(not 0 <= layer <= deepest for layer in layers):
            raise UserError(f"layers={layers}: expected each in 0 to {deepest}")
        return self._hidden_states(tokens_BT, positions_BT, segments_BT, layers)

    @functools.partial(jax.jit, static_argnames="layers")
    def _hidden_states(self, tokens_BT, positions_BT, segments_BT, layers):
        context = self.context(tokens_BT, positions_BT, segments_BT)
        outputs = self.each_layer(tokens_BT, *context, collect=lambda x: x)
        return jnp.concatenate([self.embed(tokens_BT)[None], outputs])[np.asarray(layers)]


def check_pivot_layer(pivot_layer: int, num_layers: int):
    """Raises UserError unless n is 0 (no pivot) or leaves at least one block on either side."""
    if not 0 <= pivot_layer < num_layers:
        raise UserError(
            f"pivot.layer={pivot_layer}: expected 1 to {num_layers - 1} for a model of {num_layers} layers "
            "(0 for three quarters of them)"
        )


def abstract(config: LlamaConfig, **kwargs) -> Llama:
    """A `Llama` of shapes and dtypes alone; the keywords are `Llama`'s, without `rngs`."""
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **kwargs))


def with_params(model: Llama, params: dict) -> Llama:
    """A model (often abstract) with its parameters replaced by a nested dict as `to_params` gives it."""
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def to_params(model: Llama) -> dict:
    """The parameters as a nested dict: {'embed_tokens': …, 'lower': {'q_proj': …}, …}."""
    return nnx.to_pure_dict(nnx.state(model))


def num_parameters(model: Llama) -> int:
    """The number of parameters, the pivot head included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(to_params(model)))
