"""The probe that decides λ (see `prom_jax.training.regulation`): asked once for a work directory, whose
`regulation.json` keeps what it found while model, tokenizer, table and settings are the same."""

import json
from pathlib import Path

from prom_jax.analysis.cloze import Table, read_table
from prom_jax.analysis.probe import probe
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.tokenization.folder import fingerprint
from prom_jax.training.regulation import FILE, is_probed
from prom_jax.training.setup import BaseModel
from prom_jax.utils.console import console
from prom_jax.utils.workdir import write_json


def recorded(config, base: BaseModel, workdir: Path) -> dict | None:
    """What a probe found for this configuration, as kept in a work directory.

    Args:
      config: see `prom_jax.config`.
      base: the base model. Where it was opened without weights, all else must be the same, and so must the
        dtype of computing if the configuration sets it (if not, it is the machine's).
      workdir: the work directory.

    Returns:
      The content of `FILE`; None where λ is not for a probe to decide, or none that holds is there.

    Raises:
      UserError: as `cloze.read_table`.
    """
    if not is_probed(config):
        return None
    settings = _settings(config, base, _table(config))
    if base.reader is None and not config.compute_dtype:
        del settings["compute_dtype"]
    return _read(workdir / FILE, settings)


def measured(config, base: BaseModel, workdir: Path, mesh) -> dict | None:
    """As `recorded`, but where nothing that holds is there, the base model is probed and `FILE` written.

    Args:
      config, base, workdir: as for `recorded`; `base` with its weights.
      mesh: to probe on.

    Returns:
      What the probe found; None where λ is not for it to decide.

    Raises:
      UserError: as `cloze.read_table` and `probe.probe`.
    """
    if not is_probed(config):
        return None
    table = _table(config)
    settings = _settings(config, base, table)
    found = _read(workdir / FILE, settings)
    if not found:
        console.print(f"probe     {config.model} in {config.language!r}, once for {workdir}")
        found = settings | _measure(base, mesh, table, settings)
        write_json(workdir / FILE, found)
    return found


def _table(config) -> Table:
    return read_table(config.language, config.probe.tables or None)


def _settings(config, base: BaseModel, table: Table) -> dict:
    """What a probe's result depends on, the weights where they were opened."""
    seen = {} if base.reader is None else {"weights": weights.fingerprint(base.reader)}
    return {
        "model": config.model,
        **seen,
        "tokenizer": fingerprint(base.tokenizer),
        "layer": base.layer,
        "language": config.language,
        "table": table.fingerprint,
        "scoring": config.probe.scoring,
        "shots": config.probe.shots,
        "seed": config.seed,
        "compute_dtype": config.compute_dtype or models.default_compute_dtype(),
    }


def _read(path: Path, settings: dict) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and settings.items() <= found.items()
    return found if same and "difference" in found else None


def _measure(base: BaseModel, mesh, table: Table, settings: dict) -> dict:
    """What the probe finds after one block: means of P_en and P_target, and of their difference with its 95 %
    interval."""
    model = models.build(base.reader, mesh, settings["compute_dtype"])
    asked = {name: settings[name] for name in ("scoring", "shots", "seed")}
    result = probe(model, base.tokenizer, table, **asked)
    layer = base.layer
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
