"""A control for PROM's pairs: each target text is with the English text of another one."""

import dataclasses

from prom_jax.training.methods.prom import PROM


@dataclasses.dataclass(frozen=True)
class Shuffled(PROM):
    """PROM whose English texts are dealt out anew among the instruction pairs (`data.examples.shuffle`).

    An update has the texts of the same pairs as PROM's on average, and no English text of a target text's own
    pair but by chance. Loss, λ and settings are PROM's.
    """

    name = "shuffled"
    label = "PROM, English shuffled"
    colour = "tab:olive"
    compared = ()
    shuffles_english = True


METHOD = Shuffled
