"""PROM: each language has an exit of its own, English after block n through a head of its own."""

import dataclasses
import math

from prom_jax.training.objective import L, Method, Texts
from prom_jax.utils.errors import UserError

NORMS = ("none", "final")


@dataclasses.dataclass(frozen=True)
class PROM(Method):
    """Pivoted and Regulated Optimization (paper, section on PROM).

    Attributes:
      layer: n, the block after which English leaves.
      weight: λ; 0 drops the English stream.
      label_smoothing: α.
      norm: before the pivot head: 'none' (the raw residual stream) or 'final' (the model's last norm).
    Raises:
      UserError: for a value that cannot be used.
    """

    layer: int
    weight: float = 0.1
    label_smoothing: float = 0.1
    norm: str = "none"

    name = "prom"
    label = "PROM"
    colour = "tab:blue"
    regulated = True
    compared = (
        Texts("English", "english", ("target", "translation"), "data.english"),
        Texts("target", "target", ("target", "translation"), "data.target"),
    )

    def __post_init__(self):
        if self.norm not in NORMS:
            raise UserError(f"pivot.norm={self.norm!r}: expected one of {', '.join(NORMS)}")
        if not (0 <= self.weight < math.inf and 0 <= self.label_smoothing < 1):
            raise UserError(
                f"pivot.weight={self.weight}, pivot.label_smoothing={self.label_smoothing}: "
                "expected a weight of 0 or more and a smoothing in [0, 1)"
            )

    @classmethod
    def from_config(cls, config, layer, weight):
        """See `Method`."""
        return cls(layer, weight, config.pivot.label_smoothing, config.pivot.norm)

    @property
    def loss(self):
        """L = λ · L(n, English) + L(N, target)."""
        λ, n, α = self.weight, self.layer, self.label_smoothing
        if λ == 0:
            return L("target")
        pivot = {"head": "pivot_head", "norm": self.norm == "final", "label_smoothing": α}
        return λ * L("english", layer=n, **pivot) + L("target")

    def details(self):
        """See `Method`."""
        if self.weight == 0:
            return {}
        return {
            "pivot.layer": self.layer,
            "pivot.weight": self.weight,
            "pivot.label_smoothing": self.label_smoothing,
            "pivot.norm": self.norm,
        }


METHOD = PROM
