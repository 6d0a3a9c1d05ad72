"""Deep supervision: middle and bottom blocks are asked for English through the main head."""

import dataclasses

from prom_jax.training.objective import L, Method


@dataclasses.dataclass(frozen=True)
class DeepSupervision(Method):
    """DFT-logits of Huo et al. (2025, "Enhancing non-English capabilities of English-centric large language
    models through deep supervision fine-tuning", arXiv 2503.01275).

    After a target-language prompt the last block predicts the target response, a middle block j the English
    response, and a bottom block i the English prompt, all through the main head, which does not learn from
    the last of them. All three weigh the same. Its variant sets `pivot.english_prompt=target`, as the English
    response follows the target prompt.

    What the paper leaves open, and what is chosen here: the norm before the head in lower blocks is the
    model's final one, which the head reads everywhere else; i and j are where the entropy of the logit lens
    falls, in LLaMA-2-7B first at layer 2 and again from 15 of 32 on, and other models have the same shares of
    their depth (`pivot.layer` sets j, and i is 2/15 of it); the English prompt is instruction and input
    without a template, in the place of the response, and without an end-of-sequence token; each loss is a
    mean over its own tokens; translations have the target's term alone.

    Attributes:
      middle: j.
    """

    middle: int

    name = "deep_supervision"
    label = "deep supervision"
    colour = "tab:pink"
    depth = 15 / 32

    @classmethod
    def from_config(cls, config, layer, weight):
        """See `Method`."""
        return cls(layer)

    @property
    def bottom(self) -> int:
        """i."""
        return max(1, round(self.middle * 2 / 15))

    @property
    def loss(self):
        """L = L(N, target) + L(j, English response) + L(i, English prompt)."""
        of_prompt = L("conversion", layer=self.bottom, trains_head=False)
        return L("target") + L("english", layer=self.middle) + of_prompt

    def details(self):
        """See `Method`."""
        return {"deep_supervision.middle": self.middle, "deep_supervision.bottom": self.bottom}


METHOD = DeepSupervision
