"""The probe that decides λ (see `prom_jax.training.regulation`): asked once for a work directory, whose
`regulation.json` keeps what it found while model, tokenizer, tables and settings are the same."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from prom_jax.analysis.probe import Probe, averaged, probe
from prom_jax.analysis.statistics import effective_rows
from prom_jax.analysis.tables import Table, read_sources, read_table
from prom_jax.analysis.tasks import TASKS, NoRows
from prom_jax.checkpoints import pretrained as models
from prom_jax.config import languages, of_language
from prom_jax.tokenization.folder import fingerprint
from prom_jax.training.regulation import KNOWN, can_do, file_name, is_probed
from prom_jax.training.setup import BaseModel
from prom_jax.utils.console import console
from prom_jax.utils.workdir import write_json


class Rule(NamedTuple):
    """What a way to regulate asks.

    Attributes:
      tasks: in this order, until the model can do one.
      sets: with how many sets of demonstrations each.
    """

    tasks: tuple[str, ...]
    sets: int


RULES = {"auto": Rule(("cloze", "translation"), 3), "mean": Rule(("cloze",), 1)}


def recorded(config, base: BaseModel, workdir: Path) -> dict[str, dict | None]:
    """What probes found for this configuration, as kept in a work directory.

    Args:
      config: see `prom_jax.config`.
      base: the base model. Where it was opened without weights, all else must be the same, and so must the
        dtype of computing if the configuration sets it (if not, it is the machine's).
      workdir: the work directory.

    Returns:
      By language the content of its file; None where λ is not for a probe to decide, or none that holds is
      there.

    Raises:
      UserError: as `tables.read_table`.
    """

    def find(part, path):
        settings = _settings(part, base, *_tables(part))
        if base.reader is None and not config.compute_dtype:
            del settings["compute_dtype"]
        return _read(path, settings)

    return _by_language(find, config, workdir)


def measured(config, base: BaseModel, workdir: Path, mesh) -> dict[str, dict | None]:
    """As `recorded`, but where nothing that holds is there, the base model is probed and the file written.

    Args:
      config, base, workdir: as for `recorded`; `base` with its weights.
      mesh: to probe on.

    Returns:
      By language what the probe found; None where λ is not for it to decide.

    Raises:
      UserError: as `tables.read_table` and `probe.probe`.
    """

    def find(part, path):
        table, sources = _tables(part)
        settings = _settings(part, base, table, sources)
        found = _read(path, settings)
        if not found:
            console.print(f"probe     {part.model} in {part.language!r}, once for {workdir}")
            found = {"model": part.model} | settings | _measure(base, mesh, table, sources, settings)
            write_json(path, found)
        return found

    return _by_language(find, config, workdir)


def _by_language(find, config, workdir: Path) -> dict[str, dict | None]:
    """What `find` gives of each language's configuration and file; None where no probe decides."""
    codes = languages(config)
    paths = {code: workdir / file_name(code, codes) for code in codes}
    probed = is_probed(config)
    return {code: find(of_language(config, code), path) if probed else None for code, path in paths.items()}


def _tables(config) -> tuple[Table, tuple[Table, ...]]:
    """The language's, and those that its words are translated from, where the rule has a task that does."""
    directory = config.probe.tables or None
    table = read_table(config.language, directory)
    if not any(TASKS[task].translates for task in RULES[config.pivot.regulate].tasks):
        return table, ()
    return table, read_sources(config.probe.sources, config.language, directory)


def _settings(config, base: BaseModel, table: Table, sources: tuple[Table, ...]) -> dict:
    """What a probe's result depends on."""
    # The model's name where nothing else is known of it: it may have moved.
    seen = {"model": config.model} if base.reader is None else {"weights": base.fingerprint}
    return {
        "regulate": config.pivot.regulate,
        **seen,
        "tokenizer": fingerprint(base.tokenizer),
        "layer": base.layer,
        "language": config.language,
        "table": table.fingerprint,
        "sources": {source.language: source.fingerprint for source in sources},
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


def _measure(base: BaseModel, mesh, table: Table, sources: tuple[Table, ...], settings: dict) -> dict:
    """The numbers of the task that decides, and under `tasks` those of each that was asked.

    The first task that the model can do decides; where it can do none, the first that was measured is told.
    """
    model = models.build(base.reader, mesh, settings["compute_dtype"])
    rule = RULES[settings["regulate"]]
    found = {}
    for task in rule.tasks:
        ask = functools.partial(
            probe,
            model,
            base.tokenizer,
            table,
            task=task,
            sources=sources if TASKS[task].translates else (),
            scoring=settings["scoring"],
            shots=settings["shots"],
            layers=(base.layer, base.config.num_hidden_layers),
        )
        try:
            sets = _sets(ask, rule.sets, settings["seed"])
        except NoRows:
            if task == rule.tasks[-1] and not found:
                raise
            continue
        found[task] = _numbers(averaged(sets)) | {"sets": [{"seed": s.seed} | _numbers(s) for s in sets]}
        if found[task]["can_do"]:
            break
    decides = next((task for task in found if found[task]["can_do"]), next(iter(found)))
    return {"task": decides} | found[decides] | {"tasks": found}


def _sets(ask, number: int, seed: int) -> list[Probe]:
    """A probe for each set of demonstrations; other seeds of a run have other sets.

    Where the model is far from doing the task with the first set, the others would tell nothing, and are not
    asked.
    """
    sets = []
    for of_set in range(number * seed, number * (seed + 1)):
        sets.append(ask(seed=of_set))
        if sets[0].target[:, -1].mean() < KNOWN / 10:
            break
    return sets


def _numbers(result: Probe) -> dict:
    """Means of P_en and P_target after block n, and of their difference with its 95 % interval; and whether
    the model can do the task, by P_target after the last block."""
    layer, last = result.layers
    english, target = (values[:, result.column(layer)] for values in (result.english, result.target))
    known = result.target[:, result.column(last)]
    mean, low, high = result.difference(layer)
    effective = float(effective_rows(known))
    return {
        "english": float(english.mean()),
        "target": float(target.mean()),
        "difference": mean,
        "interval": [low, high],
        "effective_rows": {
            "english": float(effective_rows(english)),
            "target": float(effective_rows(target)),
        },
        "english_leads": result.lead(layer).share,
        "last": {"target": float(known.mean()), "effective_rows": effective},
        "can_do": can_do(float(known.mean()), effective),
        "unreliable": result.unreliable(layer),
        "rows": len(result.rows),
        "dropped": result.dropped,
    }
