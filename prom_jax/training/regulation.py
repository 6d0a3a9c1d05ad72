"""Regulation: λ, the weight of the pivot loss, is 0 where the base model does not pivot through English.

It does where the cloze probe finds the English word at least as probable as the target-language one after
block n (paper, section on regulation).
"""

import dataclasses
import json
from pathlib import Path

from prom_jax.analysis.cloze import Table, read_table
from prom_jax.analysis.probe import probe
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.parallel import sharding
from prom_jax.tokenization.folder import fingerprint
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import write_json

# What the paper's probe of LLaMA-2-7B decided (its tables' asterisks): does the model pivot through English?
PIVOTS_THROUGH_ENGLISH = {
    "ar": False, "bn": True, "el": True, "ml": False, "mr": True,
    "sw": True, "ta": False, "te": False, "th": True,
}  # fmt: skip

FILE = "regulation.json"
FAINT = 0.01  # mean probability below which a word is as good as unknown


@dataclasses.dataclass(frozen=True)
class Regulation:
    """What was decided: λ, the sentence that says why, what to be wary of, and with 'auto' what was measured,
    as in `FILE`."""

    weight: float
    decision: str
    warnings: tuple[str, ...] = ()
    measured: dict | None = None

    @property
    def reason(self) -> str:
        """Decision and warnings in one line."""
        return "; WARNING: ".join((self.decision, *self.warnings))


def decide(config, reader, tokenizer, layer: int, workdir: Path) -> Regulation:
    """λ for a configuration whose model is that of `reader` and `tokenizer`, with n = `layer`.

    With pivot.regulate = 'auto' the base model is probed, once for a work directory: `FILE` in there is taken
    while model, table and settings are the same.

    Raises:
      UserError: for 'paper' with a language that the paper has not, and for 'auto' as `cloze.read_table` and
        `probe.probe`.
    """
    weight, language = config.pivot.weight, config.language
    if config.method != "prom":
        return Regulation(weight, "no pivot loss to regulate")
    if config.pivot.regulate == "never" or not weight:
        return Regulation(weight, f"λ = {weight:g} as configured")
    if config.pivot.regulate == "paper":
        return _as_in_the_paper(weight, language, reader.config)
    table = read_table(language, config.probe.tables or None)
    settings = {
        "model": config.model,
        "weights": weights.fingerprint(reader),
        "tokenizer": fingerprint(tokenizer),
        "layer": layer,
        "language": language,
        "table": table.fingerprint,
        "scoring": config.probe.scoring,
        "shots": config.probe.shots,
        "seed": config.seed,
        "compute_dtype": config.compute_dtype or models.default_compute_dtype(),
    }
    path = workdir / FILE
    measured = _recorded(path, settings)
    if not measured:
        console.print(f"probe     {config.model} in {language!r}, once for {workdir}")
        mesh = sharding.make_mesh(**config.mesh)
        measured = settings | _measure(reader, tokenizer, mesh, table, settings)
        write_json(path, measured)
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


def _recorded(path: Path, settings: dict) -> dict | None:
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(recorded, dict) and settings.items() <= recorded.items()
    return recorded if same and "difference" in recorded else None


def _measure(reader, tokenizer, mesh, table: Table, settings: dict) -> dict:
    """What the probe finds after one block: means of P_en and P_target, and of their difference with its 95 %
    interval."""
    model = models.build(reader, mesh, settings["compute_dtype"])
    result = probe(model, tokenizer, table, **{name: settings[name] for name in ("scoring", "shots", "seed")})
    layer = settings["layer"]
    mean, low, high = result.difference(layer)
    return {
        "english": float(result.english[:, layer - 1].mean()),
        "target": float(result.target[:, layer - 1].mean()),
        "difference": mean,
        "interval": [low, high],
        "unreliable": result.unreliable(layer),
        "rows": len(result.rows),
        "dropped": result.dropped,
    }


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
