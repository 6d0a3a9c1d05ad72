"""Regulation: λ, the weight of the pivot loss, is 0 where the base model does not pivot through English.

It does where the cloze probe finds the English word at least as probable as the target-language one after
block n (paper, section on regulation). What a probe found is kept in a work directory as `FILE`; whoever
probes is `prom_jax.analysis.regulation`.
"""

import dataclasses

from prom_jax.training.methods import find_method
from prom_jax.utils.errors import UserError

# What the paper's probe of LLaMA-2-7B decided (its tables' asterisks): does the model pivot through English?
PIVOTS_THROUGH_ENGLISH = {
    "ar": False, "bn": True, "el": True, "ml": False, "mr": True,
    "sw": True, "ta": False, "te": False, "th": True,
}  # fmt: skip

FILE = "regulation.json"
FAINT = 0.01  # mean probability below which a word is as good as unknown


@dataclasses.dataclass(frozen=True)
class Regulation:
    """What was decided.

    Attributes:
      weight: λ.
      decision: the sentence that says why.
      warnings: what to be wary of.
      measured: with 'auto' what was measured, as in `FILE`.
      open: whether a probe is still to decide.
    """

    weight: float
    decision: str
    warnings: tuple[str, ...] = ()
    measured: dict | None = None
    open: bool = False

    @property
    def reason(self) -> str:
        """Decision and warnings in one line."""
        return "; WARNING: ".join((self.decision, *self.warnings))


def is_probed(config) -> bool:
    """Whether a probe of the base model decides λ."""
    regulated = find_method(config.method).regulated
    return regulated and config.pivot.regulate == "auto" and config.pivot.weight != 0


def decide(config, model, measured: dict | None = None) -> Regulation:
    """λ for a configuration.

    Args:
      config: see `prom_jax.config`.
      model: the architecture of the base model.
      measured: where `is_probed`, what the probe found; None: it has not been asked yet, and λ stays as
        configured until then.

    Returns:
      The decision.

    Raises:
      UserError: for 'paper' with a language that the paper has not.
    """
    weight, language = config.pivot.weight, config.language
    if not find_method(config.method).regulated:
        return Regulation(weight, "no pivot loss to regulate")
    if config.pivot.regulate == "never" or not weight:
        return Regulation(weight, f"λ = {weight:g} as configured")
    if config.pivot.regulate == "paper":
        return _as_in_the_paper(weight, language, model)
    if measured is None:
        return Regulation(weight, f"λ = {weight:g} until a probe decides", open=True)
    return _as_measured(weight, measured)


def _as_in_the_paper(weight: float, language: str, model) -> Regulation:
    if language not in PIVOTS_THROUGH_ENGLISH:
        raise UserError(
            f"pivot.regulate='paper' has no decision for language {language!r}, only for "
            f"{', '.join(PIVOTS_THROUGH_ENGLISH)}: set --config.pivot.regulate=auto, or never to keep λ"
        )
    pivots = PIVOTS_THROUGH_ENGLISH[language]
    weight = weight if pivots else 0.0
    decision = (
        f"λ = {weight:g}: LLaMA-2-7B does {'' if pivots else 'not '}pivot through English for {language!r} "
        "(the paper's probe)"
    )
    other = (
        () if _is_llama2_7b(model) else ("this model is not LLaMA-2-7B, so the decision may not hold for it",)
    )
    return Regulation(weight, decision, other)


def _is_llama2_7b(model) -> bool:
    shape = (model.hidden_size, model.num_hidden_layers, model.num_key_value_heads, model.vocab_size)
    return shape == (4096, 32, 32, 32000)


def _as_measured(weight: float, measured: dict) -> Regulation:
    low, high = measured["interval"]
    weight = weight if measured["difference"] >= 0 else 0.0
    decision = (
        f"λ = {weight:g}: after block {measured['layer']} P(English word) is {measured['english']:.3g} and "
        f"P(target word) {measured['target']:.3g}, difference {measured['difference']:.3g} [{low:.3g}, "
        f"{high:.3g}] ({measured['scoring']} scoring, {measured['rows']} rows)"
    )
    doubts = {
        "both are close to 0: it knows neither word there, and the probe says little": max(
            measured["english"], measured["target"]
        )
        < FAINT,
        "the interval holds 0, so that other rows might decide otherwise": low <= 0 <= high,
        "P(target word) is mostly that of tokens which most words of the script begin with: set "
        "probe.scoring=word": measured["unreliable"],
    }
    return Regulation(weight, decision, tuple(doubt for doubt, holds in doubts.items() if holds), measured)
