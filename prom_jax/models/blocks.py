"""Decoder blocks in a scanned stack, and how they are computed."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from prom_jax.models import layers
from prom_jax.models.config import DecoderConfig
from prom_jax.models.inputs import Context
from prom_jax.models.lora import SCALES, UP, LoRA
from prom_jax.ops.attention import BACKENDS, has_tokamax
from prom_jax.ops.attention_cpu import OUTPUT
from prom_jax.ops.quantised import Quantised
from prom_jax.parallel.sharding import BATCH, constrain, unshard_fsdp
from prom_jax.utils.errors import UserError


def _all_but_cheap(primitive, *_, **__):
    # Weights that were gathered for a block are gathered again, and its mask is chosen, cut and padded again,
    # or those of all layers would be kept.
    return primitive.name not in ("sharding_constraint", "dynamic_slice", "slice", "squeeze", "pad")


# What is kept of a block for the backward pass.
REMAT = {
    "none": _all_but_cheap,
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(OUTPUT),
    ),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is computed, none of which changes what it computes but for rounding.

    Attributes:
      dtype: of activations and of the weights as they are used ('float32' or 'bfloat16').
      remat: what the backward pass recomputes: 'none', 'dots' (all but matrix products), 'full' (all).
      attention: the backend, one of `ops.attention.BACKENDS`.

    Raises:
      UserError: for another value.
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

    def check_platform(self):
        """Raises UserError if the attention backend is not available here."""
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


class Blocks(nnx.Module):
    """A stack of decoder blocks; every parameter has the layer as its first axis.

    Under `jax.lax.scan` one layer's slice is itself a `Blocks` without that axis.

    Args:
      config: of the model.
      compute: how it is computed.
      tensors: the rows of the family's table that each layer has.
      first, last: the stack has blocks first + 1 … last of the model.
      init: of a parameter, from its row of the table and the number of layers.
      lora: of the adapters that are among the tensors; None without any.
    """

    def __init__(
        self,
        config: DecoderConfig,
        compute: Compute,
        tensors,
        first: int,
        last: int,
        init,
        lora: LoRA | None = None,
    ):
        self.config, self.compute, self.tensors, self.lora = config, compute, tensors, lora
        kinds = [config.kinds.index(kind) for kind in config.layers[first:last]]
        self.kinds, self.first = tuple(kinds), first
        for row in tensors:
            setattr(self, row.name, nnx.Param(init(row, last - first)))

    def __len__(self):
        return len(self.kinds)

    def unsharded(self, dtype) -> dict:
        """The weights of one block, by name, as a device computes with them: B of an adapter times its
        scale, quantised matrices as they are."""
        names = {row.name for row in self.tensors}

        def unshard(row):
            weight = getattr(self, row.name)[...]
            weight = self.lora.scale * weight if row.name.endswith(UP) else weight
            is_quantised = row.name + SCALES in names or row.name.endswith(SCALES)
            return unshard_fsdp(weight, row.axes, weight.dtype if is_quantised else dtype)

        weights = {row.name: unshard(row) for row in self.tensors}
        for name in (name.removesuffix(SCALES) for name in names if name.endswith(SCALES)):
            weights[name] = Quantised(weights[name], weights.pop(name + SCALES))
        return weights

    def run(self, weights: dict, x_BTD, context: Context, kind, cache=None, number=0):
        """One block.

        Args:
          weights: of `unsharded`, which serve several batches.
          kind: the layer's number in `config.kinds`, an int or a traced int32.
          cache: a `layers.LayerCache` or None.
          number: of the block in the stack, on which dropout depends.

        Returns:
          Its output [B, T, D] and the cache.
        """
        mask = context.masks.of(self._choice("windows", "window", kind))
        rope = self._rope(context.angles, kind)
        drop = None
        if self.lora and self.lora.dropout and context.keys is not None:
            drop = layers.Dropout(context.keys, self.first + number, self.lora.dropout)
        x, cache = layers.block(self.config, weights, x_BTD, rope, mask, self.compute.attention, cache, drop)
        return constrain(x, BATCH), cache

    def _rope(self, angles, kind):
        """The rotary angles of a kind of layer, and what their cosines and sines are multiplied by."""
        scales = [rope.scale if rope else 1.0 for rope in self.config.ropes]
        if len(scales) == 1:
            return angles, scales[0]
        choice = self._choice("ropes", "rope", kind)
        angles = jax.lax.dynamic_index_in_dim(angles, choice, keepdims=False)
        return angles, scales[0] if len(set(scales)) == 1 else jnp.asarray(scales, jnp.float32)[choice]

    def _choice(self, several: str, one: str, kind):
        """Which of the model's different windows, or ropes, a kind of layer has."""
        options = getattr(self.config, several)
        return jnp.asarray([options.index(getattr(of, one)) for of in self.config.kinds])[kind]

    def scan(self, xs, contexts, cache=None, slot=None, collect=None):
        """One pass over the layers for several batches [B, T, D], with B and T of their own, so that each
        layer's all-gather happens once, and so do the sums of its gradients.

        Args:
          cache: the stack's keys and values, for a single batch; slot: see `layers.LayerCache`.
          collect: a function of a block's output, for a single batch.

        Returns:
          Their outputs, `collect` of each block's stacked, and the cache.
        """

        def body(carry, layer):
            xs, kv = carry
            block, kind, number = layer
            weights = block.unsharded(xs[0].dtype)
            outputs = []
            for x, context in zip(xs, contexts):
                layer_cache = None if kv is None else layers.LayerCache(*kv, number, slot)
                output, layer_cache = block.run(weights, x, context, kind, layer_cache, number)
                kv = None if kv is None else (layer_cache.keys, layer_cache.values)
                outputs.append(output)
            return (outputs, kv), (collect(outputs[0]) if collect else None)

        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.compute.remat])
        numbers = (jnp.asarray(self.kinds), jnp.arange(len(self)))
        (xs, cache), collected = jax.lax.scan(body, (list(xs), cache), (self, *numbers))
        return xs, collected, cache
