"""Low-rank adapters (Hu et al., 2021, "LoRA"): a matrix W [O, I] is computed as W + s · B A.

Which matrices there are is in the family's table (`models.family.Tensor`); the rows of their adapters, with
shapes, mesh axes and PEFT's names, are made from it.
"""

import dataclasses
import math
from typing import Any

from prom_jax.models.family import Tensor
from prom_jax.ops.quantised import KINDS, block_size

ALL_LINEAR = "all-linear"
# What the names of an adapter's two matrices end with, here and in PEFT's files.
DOWN, UP = "_lora_a", "_lora_b"
SCALES = "_scales"  # what a quantised matrix's scales are called after it
CODES, BLOCKS = " codes", " blocks"  # what sizes that count these of a row of values are called after it
_PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which matrices of a model have an adapter, and of which kind.

    Attributes:
      rank: r.
      alpha: s is alpha / r.
      targets: names of matrices of the blocks, and of further heads, which then are the main head and a
        difference of low rank.
      dropout: the share of an adapter's inputs that are 0 where rows have keys (`models.inputs.Rows`).
      rslora: whether s is alpha / √r (Kalajdzievski, 2023, "rsLoRA").
      trains_base: whether the model's own parameters are trained too; otherwise they are frozen.
      base_dtype: of the model's own parameters where they are frozen; '' for that of the others.
      quantised: how the blocks' own matrices are kept, one of `ops.quantised.KINDS`; '' for as the others.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False
    trains_base: bool = False
    base_dtype: str = ""
    quantised: str = ""

    @classmethod
    def from_dict(cls, fields: dict) -> "LoRA":
        """The inverse of `dataclasses.asdict`, of what a file may hold; raises TypeError for other kinds."""
        lora = cls(**fields | {"targets": tuple(fields["targets"])})
        for field in dataclasses.fields(cls):
            value = getattr(lora, field.name)
            kinds: dict[str, Any] = {"rank": int, "alpha": (int, float), "targets": tuple}
            expected = kinds.get(field.name, type(field.default))
            if not isinstance(value, expected) or (field.name == "rank" and value < 1):
                raise TypeError(f"{field.name} is {value!r:.100}")
        if not all(isinstance(name, str) for name in lora.targets):
            raise TypeError(f"targets is {lora.targets!r:.100}")
        return lora

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def heads(self) -> tuple[str, ...]:
        """The further heads among the targets."""
        return tuple(name for name in self.targets if name.endswith("_head"))

    def rows(self, table) -> tuple[Tensor, ...]:
        """The rows A [r, I] and B [O, r] of each target that is in a table."""
        return tuple(row for target in table if target.name in self.targets for row in _rows(target))

    def kept(self, table) -> tuple[Tensor, ...]:
        """The rows of a table as they are kept: codes and scales of a matrix that is quantised."""
        maps = linear_maps(table) if self.quantised else ()
        return tuple(kept for row in table for kept in (_quantised(row) if row.name in maps else (row,)))

    def sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """Further sizes that the shapes of `rows` and `kept` are made of, from those of a model."""
        further = {"rank": self.rank}
        for name, size in sizes.items():
            further[name + BLOCKS] = size // block_size(size)
            further[name + CODES] = size // (KINDS[self.quantised].values if self.quantised else 1)
        return further


def _quantised(row: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = row.shape
    return (
        row._replace(shape=(outputs, inputs + CODES)),
        row._replace(name=row.name + SCALES, shape=(outputs, inputs + BLOCKS)),
    )


def _rows(target: Tensor) -> tuple[Tensor, Tensor]:
    (outputs, inputs), (out_axis, in_axis) = target.shape, target.axes
    down, up = peft_names(target.hf)
    return (
        Tensor(target.name + DOWN, ("rank", inputs), (None, in_axis), down, ""),
        Tensor(target.name + UP, (outputs, "rank"), (out_axis, None), up, ""),
    )


def peft_names(name: str) -> tuple[str, str]:
    """PEFT's names of A and B of the matrix that has this Hugging Face name; a further head, which PEFT knows
    nothing of, has no prefix."""
    stem = (_PEFT_PREFIX if name.startswith("model.") else "") + name.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def is_of_adapter(name: str) -> bool:
    """Whether a tensor's name is one of `peft_names`."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def linear_maps(table) -> tuple[str, ...]:
    """The matrices of the blocks in a family's table: what may have an adapter."""
    return tuple(row.name for row in table if row.in_layers and len(row.shape) == 2)
