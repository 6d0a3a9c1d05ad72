"""An adapter and the model that it is for: apart, to train on, or merged, to be read as any other model."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from prom_jax.checkpoints.params import check_tensors, hf_shapes, is_of_head, main_head_tensor
from prom_jax.checkpoints.reader import Reader
from prom_jax.models.config import DecoderConfig
from prom_jax.models.lora import LoRA, is_of_adapter, peft_names
from prom_jax.utils.errors import UserError


class AdapterReader(Protocol):
    """An adapter where it is stored.

    Attributes:
      source: the path it reads, or words for it.
      lora: which tensors there are.
      heads: further LM heads that are stored with it, and after which block each reads: those in
        `lora.heads` as differences to the main head, others whole.
      details: how it was made, as its model card says it; {} if it was not made here.
      tensors: the names of all that it has: PEFT's, and those of heads.
    """

    @property
    def source(self) -> Path | str: ...

    @property
    def lora(self) -> LoRA: ...

    heads: dict[str, int]
    details: dict

    @property
    def tensors(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def where(self, name: str) -> Path | str:
        """The file that holds a tensor, for messages."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor, one slice an axis."""


class NewAdapter:
    """An adapter before its training, which changes nothing yet: B is 0, and A uniform in ±1/√I, as PEFT has
    them. The values depend on seed and name alone. An `AdapterReader`.

    Args:
      config: of the model.
      lora: which tensors there are.
      heads: after which block each further head of the model reads.
      seed: of A.
    """

    def __init__(self, config: DecoderConfig, lora: LoRA, heads: Mapping[str, int], seed: int):
        self.source, self.lora, self.details = "the new adapter", lora, {}
        self.heads = {head: heads[head] for head in lora.heads}
        self._shapes = {name: shape for name, shape in hf_shapes(config, lora).items() if is_of_adapter(name)}
        self._seed, self.tensors = seed, set(self._shapes)

    def shape(self, name) -> tuple[int, ...]:
        return self._shapes[name]

    def where(self, name) -> str:
        return self.source

    def read(self, name, index) -> np.ndarray:
        shape = self._shapes[name]
        if ".lora_B." in name:
            return np.zeros(shape, np.float32)[index]
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:16], "little")
        bound = 1 / math.sqrt(shape[-1])
        return np.random.default_rng(seed).uniform(-bound, bound, shape).astype(np.float32)[index]


class Adapted:
    """The tensors of a model and of an adapter as one reader, which `params.lazy_params` takes.

    Args:
      base: reader of the model.
      adapter: of the adapter; where both have a tensor, the adapter's counts.
    """

    def __init__(self, base: Reader, adapter: AdapterReader):
        self.source, self.config, self.dtype, self.details = (
            base.source,
            base.config,
            base.dtype,
            base.details,
        )
        self.heads = base.heads | adapter.heads
        self.names = base.names | {name for name in adapter.tensors if not is_of_head(name)}
        self._base, self._adapter = base, adapter

    def _holder(self, name):
        return self._adapter if name in self._adapter.tensors else self._base

    def shape(self, name) -> tuple[int, ...]:
        return self._holder(name).shape(name)

    def where(self, name) -> Path | str:
        return self._holder(name).where(name)

    def read(self, name, index) -> np.ndarray:
        return self._holder(name).read(name, index)


class Merged:
    """A model with its adapter merged into it, W + s · B A: a reader of an ordinary model.

    Args:
      base: reader of the model; what it has of the adapter itself is left out.
      adapter: of the adapter.

    Raises:
      UserError: if the adapter is not one for the model.
    """

    def __init__(self, base: Reader, adapter: AdapterReader):
        self.base, self.adapter = base, adapter
        self.source, self.config, self.dtype = adapter.source, base.config, base.dtype
        self.heads, self.details = adapter.heads, adapter.details
        self.names = {name for name in base.names if name not in adapter.tensors}
        check_tensors(Adapted(base, adapter), hf_shapes(base.config, adapter.lora))

    def _main(self, name):
        """The reader of what an adapter is added to, and the name there."""
        if not is_of_head(name):
            return self.base, name
        is_whole = name in self.adapter.tensors
        return (self.adapter, name) if is_whole else (self.base, main_head_tensor(self.config))

    def shape(self, name) -> tuple[int, ...]:
        reader, name = self._main(name)
        return reader.shape(name)

    def where(self, name) -> Path | str:
        reader, name = self._main(name)
        return reader.where(name)

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor, in float32 where something is added to it."""
        reader, main = self._main(name)
        part, (down, up) = reader.read(main, index), peft_names(name)
        if down not in self.adapter.tensors:
            return part
        rows, columns = index
        up = np.asarray(self.adapter.read(up, (rows, slice(None))), np.float32)
        down = np.asarray(self.adapter.read(down, (slice(None), columns)), np.float32)
        return np.asarray(part, np.float32) + np.float32(self.adapter.lora.scale) * (up @ down)


def with_adapter(reader: Reader, lora: LoRA | None, heads: Mapping[str, int], seed: int) -> Reader:
    """A reader of a model and of its adapter, to train on: a new one, or what the reader has of it merged.

    Args:
      reader: of the model.
      lora: the adapter that is wanted; None for none, which leaves the reader as it is.
      heads: after which block each further head of the model reads.
      seed: of a new adapter's values.

    Raises:
      UserError: if the reader has an adapter merged that is not of this kind.
    """
    if lora is None:
        return reader
    new, base = NewAdapter(reader.config, lora, heads, seed), base_of(reader, lora)
    if base is reader:
        return Adapted(base, new)
    assert isinstance(reader, Merged)  # others are their own base
    check_same_kind(reader.adapter, lora)
    return Adapted(Adapted(base, new), reader.adapter)


def base_of(reader: Reader, lora: LoRA | None) -> Reader:
    """The reader of the model that an adapter, if any, is trained for: without the adapter that goes on."""
    if lora is None or lora.trains_base or not isinstance(reader, Merged):
        return reader
    return reader if reader.adapter.lora.trains_base else reader.base


def check_same_kind(adapter: AdapterReader, lora: LoRA):
    """Raises UserError unless an adapter's blocks are what a configuration asks for."""
    for key in ("rank", "alpha", "rslora", "targets"):
        theirs, ours = (getattr(kind, key) for kind in (adapter.lora, lora))
        if key == "targets":
            theirs, ours = (
                tuple(sorted(set(kind.targets) - set(kind.heads))) for kind in (adapter.lora, lora)
            )
        if theirs != ours:
            raise UserError(
                f"{adapter.source} has an adapter with {key}={theirs!r}, and adapter.{key} is {ours!r}: "
                "expected the same to go on with it; change the configuration, or merge the adapter first "
                "(python -m prom_jax.convert merge)"
            )
