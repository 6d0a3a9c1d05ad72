"""PROM and its baselines: which rows leave where, through which head, and the weighted sum.

The one room that knows what English is. With h_i the hidden state after block i:

  prom      λ · smoothed CE(pivot_head(h_n), English) + CE(lm_head(h_N), target)
  xllama2   CE(lm_head(h_N), English and target together)
  bactrian  CE(lm_head(h_N), target)
"""

import dataclasses
import math

import jax.numpy as jnp

from prom_jax.ops.cross_entropy import cross_entropy
from prom_jax.utils.errors import UserError

METHODS = ("prom", "bactrian", "xllama2")
NORMS = ("none", "final")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an update minimises.

    method: one of METHODS.
    weight: λ of the pivot loss; 0 drops the English rows and makes `prom` the same as `bactrian`.
    label_smoothing: α of the pivot loss.
    norm: before the pivot head, 'none' (the raw residual stream) or 'final' (the model's last norm).
    joined: whether English rows continue the target rows, as `data.loader.Batches.joined` tells.
    chunk: as in `losses.cross_entropy`.
    """

    method: str = "prom"
    weight: float = 0.1
    label_smoothing: float = 0.1
    norm: str = "none"
    joined: bool = False
    chunk: int | None = None

    def __post_init__(self):
        for name, value, allowed in (("method", self.method, METHODS), ("pivot.norm", self.norm, NORMS)):
            if value not in allowed:
                raise UserError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        if not (0 <= self.weight < math.inf and 0 <= self.label_smoothing < 1):
            raise UserError(
                f"pivot.weight={self.weight}, pivot.label_smoothing={self.label_smoothing}: "
                "expected a weight of 0 or more and a smoothing in [0, 1)"
            )

    @property
    def has_pivot(self) -> bool:
        """Whether English leaves through a pivot head of its own."""
        return self.method == "prom" and self.weight > 0

    @property
    def uses_english(self) -> bool:
        """Whether English rows are trained on at all."""
        return self.has_pivot or self.method == "xllama2"

    def loss_sums(self, model, batch) -> dict:
        """Sums of token losses by role, float32: 'target' and, where it is used, 'english' (smoothed).

        Args: batch: {'target': rows, 'english': rows}; rows hold tokens, positions, segments, labels int32
          and weights float32, each [R, T], with R and T of their own for either role.
        """
        target, english = batch["target"], batch.get("english") if self.uses_english else None
        if english is None:
            return {"target": main_loss(model, target, self.chunk)}
        if self.joined:
            target_states, english_states = self._joined_states(model, target, english)
        else:
            states = model.final_and_pivot_states if self.has_pivot else model.each_final_states
            target_states, english_states = states(_texts(target), _texts(english))
        if self.has_pivot:
            english_loss = self.pivot_exit(model, english_states, english, self.label_smoothing)
        else:
            english_loss = main_exit(model, english_states, english, self.chunk)
        return {"target": main_exit(model, target_states, target, self.chunk), "english": english_loss}

    def _joined_states(self, model, target, english):
        """What the heads read of the target rows and of the English ones behind them."""
        rows = [jnp.concatenate(pair, axis=1) for pair in zip(_texts(target), _texts(english))]
        width = target["tokens"].shape[1]
        if self.has_pivot:
            return model.states_at_two_exits(*rows, width)
        return jnp.split(model.final_states(*rows), [width], axis=1)

    def pivot_loss(self, model, rows, label_smoothing=0.0):
        """Sum of token losses at h_n through the pivot head (L_{n,e} before its division)."""
        return self.pivot_exit(model, model.pivot_states(*_texts(rows)), rows, label_smoothing)

    def pivot_exit(self, model, states_BTD, rows, label_smoothing=0.0):
        """The same from h_n."""
        if self.norm == "final":
            states_BTD = model.final_norm(states_BTD)
        return cross_entropy(
            states_BTD, model.pivot_head[...], rows["labels"], rows["weights"], label_smoothing, self.chunk
        )

    def coefficients(self, weights: dict) -> dict:
        """What each role's sum is multiplied with, given the whole update's sums of weights by role.

        Dividing by global sums, never by a micro-batch's or a device's, makes the loss of an update the
        same however it is split.
        """
        safe = {role: jnp.maximum(weight, 1.0) for role, weight in weights.items()}
        if self.method == "xllama2":
            total = jnp.maximum(sum(weights.values()), 1.0)
            return dict.fromkeys(weights, 1.0 / total)
        scale = {"target": 1.0, "english": self.weight}
        return {role: scale[role] / weight for role, weight in safe.items()}


def main_loss(model, rows, chunk=None):
    """Sum of token losses at h_N through the main head, float32."""
    return main_exit(model, model.final_states(*_texts(rows)), rows, chunk)


def main_exit(model, states_BTD, rows, chunk=None):
    """The same from h_N after the final norm."""
    return cross_entropy(states_BTD, model.output_embedding, rows["labels"], rows["weights"], chunk=chunk)


def _texts(rows) -> list:
    """What a model is given of rows."""
    return [rows[name] for name in ("tokens", "positions", "segments")]


def weight_sums(batch) -> dict:
    """The number of loss-bearing tokens by role, float32."""
    return {role: rows["weights"].sum() for role, rows in batch.items()}
