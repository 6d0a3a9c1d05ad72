"""What every source of weights looks like, whatever its format."""

from pathlib import Path
from typing import Protocol

import numpy as np

from prom_jax.models.config import LlamaConfig


class Reader(Protocol):
    """A model's weights where they are stored: a folder, a file, a checkpoint, or arrays on devices.

    Attributes:
      source: the path it reads, or words for it.
      config: the model's architecture.
      dtype: that holds its tensors; float32 where they are quantised or of several kinds.
      pivot_layer: the layer of the pivot head that is stored with the weights; 0 if none is.
      details: how the model was made, as its model card says it; {} if it was not made here.
      names: the set of its tensors, by their Hugging Face names, without the pivot head: that one is read as
        `names.PIVOT_NAME` where `pivot_layer` is above 0.
    """

    source: Path | str
    config: LlamaConfig
    dtype: np.dtype
    pivot_layer: int
    details: dict

    @property
    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def where(self, name: str) -> Path | str:
        """The file that holds a tensor, for messages."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor, one slice an axis; no other part is read or dequantised."""
