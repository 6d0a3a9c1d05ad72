"""Regulation: λ, the weight of the pivot loss, is 0 where the base model does not pivot through English.

With 'mean' it does where the cloze probe finds the English word at least as probable as the target-language
one after block n (paper, section on regulation). Where a model knows neither word that obeys noise, so 'auto'
asks for more: λ is 0 only where the model can do the task, and the whole interval of the difference is below
0. What a probe found is kept in a work directory as `FILE`; whoever probes is `prom_jax.analysis.regulation`.
"""

import dataclasses

from prom_jax.training.methods import find_method
from prom_jax.utils.errors import UserError

# What the paper's probe of LLaMA-2-7B decided (its tables' asterisks): does the model pivot through English?
PIVOTS_THROUGH_ENGLISH = {
    "ar": False, "bn": True, "el": True, "ml": False, "mr": True,
    "sw": True, "ta": False, "te": False, "th": True,
}  # fmt: skip

FILE = "regulation.json"  # of a run in one language; of several each has its own, see `file_name`
# A model can do a task where P(target word) after the last block has this mean, and it rests on so many rows.
KNOWN, ENOUGH_ROWS = 0.01, 20
BY_HAND = (
    ": to decide by hand set pivot.regulate=never, which keeps λ, or pivot.weight=0, which drops English, or "
    "pivot.regulate=mean, which goes by the mean all the same"
)


@dataclasses.dataclass(frozen=True)
class Regulation:
    """What was decided.

    Attributes:
      weight: λ.
      decision: the sentence that says why.
      warnings: what to be wary of.
      measured: where a probe decides, what it found, as in `FILE`.
      open: whether a probe is still to decide.
    """

    weight: float
    decision: str
    warnings: tuple[str, ...] = ()
    measured: dict | None = None
    open: bool = False

    def lines(self, label: str = "") -> str:
        """What a command prints of it; the label goes before the decision, such as a language."""
        return "\nWARNING   ".join([f"regulate  {label}{self.decision}", *self.warnings])

    @property
    def reason(self) -> str:
        """Decision and warnings in one line."""
        return "; WARNING: ".join((self.decision, *self.warnings))


def file_name(language: str, languages: tuple[str, ...]) -> str:
    """Where the probe of one of a run's languages is kept: `FILE`, or 'regulation.sw.json' beside others."""
    return FILE if len(languages) == 1 else f"regulation.{language}.json"


def label_of(language: str, languages: tuple[str, ...]) -> str:
    """What goes before a line about one of a run's languages: 'sw: ', where there are others."""
    return f"{language}: " * (len(languages) > 1)


def is_probed(config) -> bool:
    """Whether a probe of the base model decides λ."""
    regulated = find_method(config.method).regulated
    return regulated and config.pivot.regulate in ("auto", "mean") and config.pivot.weight != 0


def can_do(target: float, effective: float) -> bool:
    """Whether a model can do a task well enough for it to tell anything.

    Args:
      target: mean of P(target word) after the last block.
      effective: the number of rows that this mean rests on.
    """
    return target >= KNOWN and effective >= ENOUGH_ROWS


def decide(config, model, measured: dict | None = None) -> Regulation:
    """λ for a language.

    Args:
      config: see `prom_jax.config`, of one language.
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
    return _as_measured(weight, config.pivot.regulate, measured)


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


def _as_measured(weight: float, rule: str, measured: dict) -> Regulation:
    """By the mean alone, or where the whole interval says so of a model that can do the task."""
    low, high = measured["interval"]
    by_mean, knows = rule == "mean", measured["can_do"]
    drops = measured["difference"] < 0 if by_mean else knows and high < 0
    weight = 0.0 if drops else weight
    decision = (
        f"λ = {weight:g}{'' if knows or by_mean else ' as configured'}: after block {measured['layer']} "
        f"P(English word) is {measured['english']:.3g} and P(target word) {measured['target']:.3g}, "
        f"difference {measured['difference']:.3g} [{low:.3g}, {high:.3g}] ({measured['task']}, "
        f"{measured['scoring']} scoring, {measured['rows']} rows)"
    )
    doubts = {
        _cannot_do(measured["tasks"]) + BY_HAND * (not by_mean): not knows,
        "the interval holds 0, so that other rows might decide otherwise": by_mean and low <= 0 <= high,
        "P(target word) is mostly that of tokens which most words of the script begin with: set "
        "probe.scoring=word": measured["unreliable"],
    }
    return Regulation(weight, decision, tuple(doubt for doubt, holds in doubts.items() if holds), measured)


def _cannot_do(tasks: dict) -> str:
    """How little a model knows in each task."""
    found = " nor ".join(
        f"{task} (P(target word) after the last block is {numbers['last']['target']:.2g}, of "
        f"{numbers['last']['effective_rows']:.1f} effective rows)"
        for task, numbers in tasks.items()
    )
    return (
        f"the model can do no task that would tell, not {found}; it takes {KNOWN:g} and {ENOUGH_ROWS} "
        "effective rows"
    )
