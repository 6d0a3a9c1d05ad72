"""Bactrian+(t): target-language instructions and translations alone, in one loss at the last layer."""

import dataclasses

from prom_jax.training.objective import L, Method, Texts


@dataclasses.dataclass(frozen=True)
class Bactrian(Method):
    """Bactrian+(t), the paper's baseline without English."""

    name = "bactrian"
    label = "Bactrian+(t)"
    colour = "tab:green"
    compared = (
        Texts("instructions", "target", ("target",), "data.target"),
        Texts("translations", "target", ("translation",), "data.translation"),
    )

    @property
    def loss(self):
        """L = L(N, target)."""
        return L("target")


METHOD = Bactrian
