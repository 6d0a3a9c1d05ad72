"""xLLaMA2(t+e): English and target language in one loss at the last layer."""

import dataclasses
from typing import ClassVar

from prom_jax.training.objective import L, Method, Texts


@dataclasses.dataclass(frozen=True)
class XLLaMA2(Method):
    """xLLaMA2(t+e), the paper's baseline that mixes the languages."""

    name = "xllama2"
    label = "xLLaMA2(t+e)"
    colour = "tab:red"
    compared: ClassVar[tuple[Texts, ...]] = (
        Texts("English", "english", ("target",), "data.english"),
        Texts("target", "target", ("target", "translation"), "data.target"),
    )

    @property
    def loss(self):
        """L = L(N, English and target), over the loss tokens of both."""
        return L("target", "english")


METHOD = XLLaMA2
