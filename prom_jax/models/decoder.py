"""The decoder: blocks in scanned stacks, and exits where hidden states leave.

Parameters keep Hugging Face's own orientation ([out, in]), stacked over layers. There is a stack for each
part between two exits, `stack0` (blocks 1 … n), `stack1` (n+1 …) and so on, as slicing one stack inside jit
would copy it. Which parameters there are is in the family's table (`models.family`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from prom_jax.models import layers
from prom_jax.models.auto import family_of
from prom_jax.models.blocks import Blocks, Compute
from prom_jax.models.config import DecoderConfig
from prom_jax.models.family import HEAD_AXES, HEAD_SHAPE, Tensor
from prom_jax.models.inputs import Cache, Context, Output, Rows, append_slots, with_defaults
from prom_jax.models.lora import DOWN, SCALES, UP, LoRA
from prom_jax.ops.attention import layer_masks, packed_masks
from prom_jax.ops.norm import rms_norm
from prom_jax.ops.quantised import KINDS
from prom_jax.parallel.sharding import BATCH, constrain, make_mesh, param_spec, unshard_fsdp
from prom_jax.utils.errors import UserError


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
      config: the architecture.
      compute: how it is computed.
      heads: further LM heads next to the model's own, untied: their names, which end in `_head`, and after
        which block each reads; None for the last one.
      exits: further numbers of blocks after which hidden states may leave; after all of them they always may.
      rngs: randomness of the initial values (normal, σ = 0.02).
      param_dtype: of the parameters.
      lora: adapters, and further heads of low rank; None for none.

    Raises:
      UserError: if an exit is not in 1 … N-1.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        compute: Compute = Compute(),
        heads: Mapping[str, int | None] = MappingProxyType({}),
        exits: Sequence[int] = (),
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        lora: LoRA | None = None,
    ):
        after = {name: layer or config.num_hidden_layers for name, layer in heads.items()}
        if wrong := [name for name in heads if not re.fullmatch(r"\w+_head", name) or name == "lm_head"]:
            raise UserError(
                f"a head is called {wrong[0]!r}: expected a name that ends in '_head', not 'lm_head'"
            )
        early = sorted({*exits, *after.values()} - {config.num_hidden_layers})
        for layer in early:
            check_exit(layer, config.num_hidden_layers)

        self.config, self.compute, self.lora = config, compute, lora
        self.exits, self._heads = tuple(early), tuple(after.items())
        sizes = config.sizes | (lora.sizes(config.sizes) if lora else {})

        def init(row: Tensor, *layers: int):
            shape = (*layers, *(sizes[size] for size in row.shape))
            dtype = self._dtype(row) or param_dtype
            if len(row.shape) == 1:  # a norm's weight, or a bias
                one = row.name.endswith("norm") and not config.unit_offset_norms
                return jnp.full(shape, float(one), dtype)
            return (0.02 * jax.random.normal(rngs.params(), shape)).astype(dtype)

        table = tensors(config, heads, lora)
        for row in (row for row in table if not row.in_layers):
            setattr(self, row.name, nnx.Param(init(row)))
        in_layers = tuple(row for row in table if row.in_layers)
        for i, (first, last) in enumerate(stack_bounds(config.num_hidden_layers, self.exits)):
            setattr(self, stack_name(i), Blocks(config, compute, in_layers, first, last, init, lora))

    @property
    def stacks(self) -> list[Blocks]:
        """The stacks, from the lowest on."""
        return [getattr(self, stack_name(i)) for i in range(len(self.exits) + 1)]

    @property
    def heads(self) -> dict[str, int]:
        """The further heads, and after which block each reads."""
        return dict(self._heads)

    @property
    def mesh(self):
        """The mesh of the parameters; of one device where they are on one."""
        sharding = self.embed_tokens[...].sharding
        named = isinstance(sharding, NamedSharding)
        return sharding.mesh if named else make_mesh(devices=list(sharding.device_set))

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter is the model's own and adapters are trained in its place."""
        own = (row.name for row in family_of(self.config).tensors)
        return self.lora is not None and not self.lora.trains_base and name.removesuffix(SCALES) in own

    def _dtype(self, row: Tensor):
        """Of a parameter that is kept in another dtype than those that are trained; None of others."""
        if not (self.lora and self.is_frozen(row.name)):
            return None
        if row.name.endswith(SCALES):
            return jnp.float32
        is_map = row.in_layers and len(row.shape) == 2
        return KINDS[self.lora.quantised].dtype if is_map and self.lora.quantised else self.lora.base_dtype

    def head(self, name: str = "lm_head"):
        """A head's matrix [V, D]; 'lm_head' is the embedding where they are tied."""
        tied = name == "lm_head" and self.config.tie_word_embeddings
        return (self.embed_tokens if tied else getattr(self, name))[...]

    def head_products(self, name: str, hidden_BTD) -> tuple[tuple, tuple]:
        """What a head's logits are made of: inputs, and for each of them a matrix; the logits are the sum of
        their products. A head of low rank is the main one, which does not learn from it, and a difference."""
        if self.lora is None or name not in self.lora.targets:
            return (hidden_BTD,), (self.head(name),)
        down, up = (getattr(self, name + end)[...] for end in (DOWN, UP))
        down = unshard_fsdp(down, (None, "fsdp"), hidden_BTD.dtype)
        low_BTR = jnp.einsum("btd,rd->btr", hidden_BTD, down)
        return (hidden_BTD, low_BTR), (jax.lax.stop_gradient(self.head()), self.lora.scale * up)

    def final_norm(self, x_BTD):
        """The norm before the main head."""
        weight = unshard_fsdp(self.norm[...], ("fsdp",), x_BTD.dtype)
        return rms_norm(x_BTD, weight, self.config.rms_norm_eps, self.config.unit_offset_norms)

    def embed(self, tokens_BT):
        """Token embeddings [B, T, D] in the compute dtype."""
        axis = "fsdp" if "fsdp" in param_spec(HEAD_AXES, self.embed_tokens.shape) else None
        # Every device looks up its columns for all rows, and these then go where they belong: they are
        # smaller than the table, and so is what comes back.
        columns = jnp.take(self.embed_tokens[...], constrain(tokens_BT, "data"), axis=0)
        columns = constrain(columns.astype(self.compute.dtype), "data", None, axis)
        x_BTD = constrain(columns, BATCH)
        scale = self.config.embedding_scale
        return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    def context(self, rows: Rows, cache: Cache | None = None, slot=None) -> Context:
        """What the blocks need to know of a batch; with a cache, whose slots already say what they hold from
        `slot` on, or which is read before the rows (slot None)."""
        rows = with_defaults(rows)
        positions, segments = rows.positions, rows.segments
        windows, backend = self.config.windows, self.compute.attention
        if cache is None:
            masks = packed_masks(positions, segments, windows, backend)
        else:
            kv = cache.positions, cache.segments
            if slot is None:
                kv = append_slots(kv[0], positions), append_slots(kv[1], segments)
            masks = layer_masks(positions, kv[0], segments, kv[1], windows)
        return Context(self._angles(positions), masks, rows.keys)

    def _angles(self, positions_BT):
        share = next((rope.share for rope in self.config.ropes if rope), 1.0)
        frequencies = [
            layers.rope_frequencies(rope, self.config.head_dim, share) for rope in self.config.ropes
        ]
        angles = [positions_BT[..., None].astype(jnp.float32) * of_rope for of_rope in frequencies]
        return angles[0] if len(angles) == 1 else jnp.stack(angles)

    def forward(
        self, *batches: Rows, cache: Cache | None = None, slot=None, collect: Callable | None = None
    ) -> Output:
        """The one way through the blocks, for training, caches and looking inside.

        Several batches go through together; each may have several exits, and blocks above the last exit of a
        batch are not computed for it.

        Args:
          batches: one or several; with `cache` or `collect` one, which leaves after the last block.
          cache: of tokens that come before. With `slot` the new tokens' keys and values go into it there;
            without, it is only read, and may have one row for all.
          slot: int32.
          collect: a function of hidden states [B, T, D]. What it leaves out of them is never kept.

        Returns:
          See `Output`.
        """
        left = [with_defaults(rows) for rows in batches]
        if cache is not None and slot is not None:
            cache = cache.write(slot, left[0].positions, left[0].segments)
        xs = {i: self.embed(rows.tokens) for i, rows in enumerate(left)}
        contexts = {i: self.context(rows, cache, slot) for i, rows in enumerate(left)}
        states = [[None] * len(rows.exits) for rows in left]
        collected, caches = [], []
        for number, (stack, bounds) in enumerate(zip(self.stacks, self._bounds)):
            if not xs:
                break
            kv = None if cache is None else cache.stacks[number]
            outputs, of_blocks, kv = stack.scan(xs.values(), contexts.values(), kv, slot, collect)
            xs = dict(zip(xs, outputs))
            collected.append(of_blocks)
            caches.append(kv)
            for i in list(xs):
                self._leave(i, bounds[1], left, xs, contexts, states)
        return Output(
            tuple(map(tuple, states)),
            jnp.concatenate(collected) if collect else None,
            cache if cache is None or slot is None else dataclasses.replace(cache, stacks=tuple(caches)),
        )

    @property
    def _bounds(self) -> list[tuple[int, int]]:
        return stack_bounds(self.config.num_hidden_layers, self.exits)

    def _leave(self, i: int, layer: int, batches: list, xs: dict, contexts: dict, states: list):
        """Takes what leaves batch `i` after a number of blocks, and drops the columns that are done."""
        rows, width, going_on = batches[i], xs[i].shape[1], 0
        for number, leaves in enumerate(rows.exits):
            if (leaves.layer or self.config.num_hidden_layers) == layer:
                states[i][number] = xs[i][:, leaves.start : leaves.stop]
            elif states[i][number] is None:
                going_on = max(going_on, width if leaves.stop is None else leaves.stop)
        if not going_on:
            del xs[i], contexts[i]
        elif going_on < width:
            batches[i] = jax.tree.map(lambda column: column[:, :going_on], rows)
            xs[i], contexts[i] = xs[i][:, :going_on], self.context(batches[i])

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of `length` slots a row in the compute dtype."""
        config = self.config
        shape = (batch, config.num_key_value_heads, length, config.head_dim)

        def zeros(number):
            return jnp.zeros((number, *shape), self.compute.dtype)

        slots = jnp.zeros((batch, length), jnp.int32)
        numbers = [last - first for first, last in self._bounds]
        return Cache(tuple((zeros(number), zeros(number)) for number in numbers), slots, slots)

    def cache_bytes(self, length: int) -> int:
        """Of keys and values in a row of `length` slots."""
        row = jax.eval_shape(lambda: self.empty_cache(1, length).stacks)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))

    @jax.jit
    def __call__(self, tokens_BT, positions_BT=None, segments_BT=None):
        """Next-token logits.

        Args:
          tokens_BT: int32 [B, T].
          positions_BT: int32 [B, T], default 0 … T-1.
          segments_BT: int32 [B, T]; tokens attend to their own segment, and to those that it continues
            (`ops.attention.segment_id`). Default: one segment.

        Returns:
          Float32 [B, T, V].
        """
        ((states,),) = self.forward(Rows(tokens_BT, positions_BT, segments_BT)).states
        return self.logits(states)

    def head_input(self, x_BTD, norm: bool = True):
        """What a head multiplies of the residual stream: normed or as it is, times the scale of logits."""
        hidden, scale = self.final_norm(x_BTD) if norm else x_BTD, self.config.logit_scale
        return hidden if scale == 1 else hidden * jnp.asarray(scale, hidden.dtype)

    def logits(self, x_BTD):
        """Logits of the main head, float32 [..., V], of the residual stream after any block (below the last
        one: the logit lens)."""
        hidden = self.head_input(x_BTD)
        head = self.head().astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def hidden_states(self, tokens_BT, positions_BT=None, segments_BT=None, layers=None):
        """The residual stream without final norm: 0 the embeddings, i the output of block i.

        Args:
          tokens_BT, positions_BT, segments_BT: as in `__call__`.
          layers: which of 0 … N, default all of them.

        Returns:
          [len(layers), B, T, D] in the compute dtype.

        Raises:
          UserError: for a layer that the model has not.
        """
        deepest = self.config.num_hidden_layers
        layers = tuple(range(deepest + 1) if layers is None else layers)
        if any(not 0 <= layer <= deepest for layer in layers):
            raise UserError(f"layers={layers}: expected each in 0 to {deepest}")
        return self._hidden_states(Rows(tokens_BT, positions_BT, segments_BT), layers)

    @functools.partial(jax.jit, static_argnames="layers")
    def _hidden_states(self, rows, layers):
        outputs = self.forward(rows, collect=_identity).collected
        return jnp.concatenate([self.embed(rows.tokens)[None], outputs])[np.asarray(layers)]


def _identity(x):
    return x


# Of models in general.


def tensors(config: DecoderConfig, heads: Iterable[str] = (), lora: LoRA | None = None) -> tuple[Tensor, ...]:
    """The rows of the family's table that a model has, one for each further head, and those of adapters."""
    own = family_of(config).tensors_of(config)
    more = tuple(Tensor(name, HEAD_SHAPE, HEAD_AXES, f"{name}.weight", "") for name in heads)
    if lora is None:
        return (*own, *more)
    whole = (head for head in more if head.name not in lora.targets)
    return (*lora.kept(own), *whole, *lora.rows((*own, *more)))


def param_axes(
    config: DecoderConfig, heads: Iterable[str] = (), lora: LoRA | None = None
) -> dict[str, tuple]:
    """The mesh axes of each parameter's last dimensions, by its name."""
    return {row.name: row.axes for row in tensors(config, heads, lora)}


def stack_name(number: int) -> str:
    """The name of a stack of blocks in the parameters."""
    return f"stack{number}"


def stack_bounds(num_layers: int, exits: Sequence[int]) -> list[tuple[int, int]]:
    """Of each stack the number of blocks below it, and with it."""
    return list(zip((0, *exits), (*exits, num_layers)))


def check_exit(layer: int, num_layers: int, name: str = "exit"):
    """Raises UserError, in which an exit has this name, unless there is a block on either side of it."""
    if not 0 < layer < num_layers:
        raise UserError(
            f"{name}={layer}: expected 1 to {num_layers - 1} for a model of {num_layers} layers "
            "(0 for three quarters of them)"
        )


def abstract(config: DecoderConfig, **kwargs) -> Decoder:
    """A `Decoder` of shapes and dtypes alone.

    Args:
      kwargs: those of `Decoder`, without `rngs`.
    """
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **kwargs))


def with_params(model: Decoder, params: dict) -> Decoder:
    """A model (often abstract) with its parameters replaced by a nested dict as `to_params` gives it."""
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def to_params(model: Decoder) -> dict:
    """The parameters as a nested dict: {'embed_tokens': …, 'stack0': {'q_proj': …}, …}."""
    return nnx.to_pure_dict(nnx.state(model))


def num_parameters(model: Decoder) -> int:
    """The number of parameters, those of further heads included."""
    values = {jnp.dtype(kind.dtype): kind.values for kind in KINDS.values()}  # that a code has
    leaves = jax.tree_util.tree_leaves_with_path(to_params(model))
    return sum(
        leaf.size * values.get(leaf.dtype, 1) for path, leaf in leaves if not path[-1].key.endswith(SCALES)
    )
