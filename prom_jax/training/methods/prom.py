"""PROM: each language has an exit of its own, English after block n through a head of its own."""

import dataclasses
import math
from typing import ClassVar

from prom_jax.training.objective import MAIN_HEAD, L, Method, Texts
from prom_jax.utils.errors import UserError

NORMS = ("none", "final")
HEADS = ("own", "lora", "frozen", "shared")
PIVOT_HEAD = "pivot_head"


@dataclasses.dataclass(frozen=True)
class PROM(Method):
    """Pivoted and Regulated Optimization (paper, section on PROM).

    Attributes:
      layer: n, the block after which English leaves.
      weight: λ; 0 drops the English stream.
      label_smoothing: α.
      norm: before the pivot head: 'none' (the raw residual stream) or 'final' (the model's last norm).
      head: the pivot head: 'own' (a copy of the main head, trained), 'lora' (the main head, which does not
        learn from it, and a trained difference of low rank), 'frozen' (a copy as it is) or 'shared' (the main
        head itself).

    Raises:
      UserError: for a value that cannot be used.
    """

    layer: int
    weight: float = 0.1
    label_smoothing: float = 0.1
    norm: str = "none"
    head: str = "own"

    name = "prom"
    label = "PROM"
    colour = "tab:blue"
    regulated = True
    compared: ClassVar[tuple[Texts, ...]] = (
        Texts("English", "english", ("target", "translation"), "data.english"),
        Texts("target", "target", ("target", "translation"), "data.target"),
    )

    def __post_init__(self):
        for name, value, allowed in (("norm", self.norm, NORMS), ("head", self.head, HEADS)):
            if value not in allowed:
                raise UserError(f"pivot.{name}={value!r}: expected one of {', '.join(allowed)}")
        if not (0 <= self.weight < math.inf and 0 <= self.label_smoothing < 1):
            raise UserError(
                f"pivot.weight={self.weight}, pivot.label_smoothing={self.label_smoothing}: "
                "expected a weight of 0 or more and a smoothing in [0, 1)"
            )

    @classmethod
    def from_config(cls, config, layer, weight):
        """See `Method`."""
        pivot = config.pivot
        head = pivot.head or ("own" if config.adapter.kind == "none" else "lora")
        return cls(layer, weight, pivot.label_smoothing, pivot.norm, head)

    @property
    def loss(self):
        """L = λ · L(n, English) + L(N, target)."""
        λ, n = self.weight, self.layer
        if λ == 0:
            return L("target")
        return λ * L("english", layer=n, **self.pivot) + L("target")

    @property
    def pivot(self) -> dict:
        """How English is read after block n: settings of its `TokenLoss`."""
        return {
            "head": MAIN_HEAD if self.head == "shared" else PIVOT_HEAD,
            "norm": self.norm == "final",
            "label_smoothing": self.label_smoothing,
            "trains_head": self.head != "frozen",
        }

    @property
    def low_rank_heads(self):
        """See `Method`."""
        return (PIVOT_HEAD,) if self.head == "lora" and PIVOT_HEAD in self.heads else ()

    def trains(self, path):
        """See `Method`."""
        return self.head != "frozen" or path != (PIVOT_HEAD,)

    def details(self):
        """See `Method`."""
        if self.weight == 0:
            return {}
        details = {
            "pivot.layer": self.layer,
            "pivot.weight": self.weight,
            "pivot.label_smoothing": self.label_smoothing,
            "pivot.norm": self.norm,
        }
        return details | ({"pivot.head": self.head} if self.head != "own" else {})


METHOD = PROM
