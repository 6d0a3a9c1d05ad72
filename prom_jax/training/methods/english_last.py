"""A control for PROM's exit: English with PROM's weight and smoothing, but at the last layer."""

import dataclasses

from prom_jax.training.methods.prom import PROM
from prom_jax.training.objective import L


@dataclasses.dataclass(frozen=True)
class EnglishLast(PROM):
    """PROM without an exit of its own for English: it leaves after the last block through the main head.

    λ, α and regulation are PROM's, so that block and head alone differ; `pivot.layer`, which is still where
    the probe of regulation looks, `pivot.norm` and `pivot.head` do not matter. Unlike xLLaMA2(t+e), each
    language has a mean of its own.
    """

    name = "english_last"
    label = "PROM, English at the last layer"
    colour = "tab:cyan"
    compared = ()

    @property
    def loss(self):
        """L = λ · L(N, English) + L(N, target)."""
        λ, α = self.weight, self.label_smoothing
        if λ == 0:
            return L("target")
        return λ * L("english", label_smoothing=α) + L("target")

    def trains(self, path):
        """See `Method`."""
        return True

    def details(self):
        """See `Method`."""
        return {key: value for key, value in super().details().items() if key in MATTER}


MATTER = ("pivot.weight", "pivot.label_smoothing")
METHOD = EnglishLast
