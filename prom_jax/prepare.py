"""python -m prom_jax.prepare --config=configs/th.py [--workdir=DIR] [--translate=google|nllb] [--inspect=K]

Makes the packed records of a run without training, and its data card: data_card.md, data_card.json and
lengths.png in the work directory. With --translate it first writes data.target, the machine translation of
data.english; with --dry_run it tells what that would cost, and stops.
"""

import contextlib
import dataclasses
import json
import math
from datetime import timedelta
from pathlib import Path

from absl import flags
from rich.prompt import Confirm

from prom_jax import config as configuration
from prom_jax.data import card, inspection, sources
from prom_jax.data.templates import language_name
from prom_jax.data.translation import engines, translate
from prom_jax.reporting.card import write as write_card
from prom_jax.training.setup import resolve
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import write_text

ENGINES = ("google", "nllb")
CACHE = Path("~/.cache/prom_jax/translations.sqlite").expanduser()


def prepare(config, workdir: Path, inspect: int = 0) -> dict:
    """Records, card and, for `inspect` packed rows, a look at them; returns the card."""
    experiment = resolve(config, workdir)
    made = write_card(experiment)
    console.print(card.as_markdown(made))
    if inspect:
        inspection.show(experiment.batches, experiment.data.train, experiment.tokenizer, inspect)
    console.print(f"card: {workdir}/data_card.md")
    return made


def translate_sources(config, engine: engines.Engine, cache: translate.Cache, agreed, dry_run: bool) -> bool:
    """Writes data.target from data.english; what cannot be used goes into a file beside it.

    Args: agreed: a function that is asked before anything that costs money; dry_run: tell the cost alone.
    Returns: whether it was written.
    Raises:
      UserError: data.target is not one new .jsonl file; what `translate.translate` raises.
    """
    configuration.check(config)
    language_name(config.language)
    path = _destination(config)
    english = sources.read_instructions(tuple(config.data.english), "en")
    rows = list(sources.by_id(english, "English").values())
    estimate = translate.estimate(rows, engine, cache, config.language)
    console.print(
        f"translate {len(rows):,} rows into {config.language!r} with {engine.name}: {estimate.texts:,} texts "
        f"and {estimate.characters:,} characters to go, {estimate.cached_characters:,} already there\n"
        f"          at least {timedelta(seconds=math.ceil(estimate.seconds))}, about ${estimate.dollars:,.2f}"
    )
    if dry_run or (estimate.dollars and not agreed()):
        return False
    result = translate.translate(rows, engine, cache, config.language)
    if not result.rows:
        raise UserError(
            f"No translation of the {len(rows):,} rows can be used ({result.counts}): try another engine."
        )
    text = "".join(map(_line, map(_as_dict, result.rows)))
    if path.exists() and path.read_text("utf-8") != text:
        raise UserError(
            f"{path} exists and differs from the translation: remove it, or name another data.target."
        )
    write_text(path, text)
    console.print(f"translate {len(result.rows):,} rows: {path}")
    if result.rejected:
        beside = path.with_suffix(".rejected.jsonl")
        write_text(beside, "".join(map(_line, map(dataclasses.asdict, result.rejected))))
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in result.counts.items())
        left_out = len(rows) - len(result.rows)
        console.print(f"          {left_out:,} rows left out ({reasons}): {beside}")
    return True


def _destination(config) -> Path:
    if len(config.data.target) != 1 or not config.data.target[0].endswith(".jsonl"):
        raise UserError(
            f"data.target is {tuple(config.data.target)}: --translate needs one .jsonl file to write."
        )
    if Path(config.data.target[0]).is_dir():
        raise UserError(f"data.target {config.data.target[0]} is a folder: name a file.")
    if not config.data.english:
        raise UserError("data.english is empty: --translate needs something to translate.")
    return Path(config.data.target[0])


def _as_dict(row: sources.Row) -> dict:
    if len(row.turns) == 1:
        return {"id": row.id} | dataclasses.asdict(row.turns[0])
    messages = [
        {"role": role, "content": text}
        for turn in row.turns
        for role, text in (("user", turn.instruction), ("assistant", turn.output))
    ]
    return {"id": row.id, "messages": messages}


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _engine(language: str) -> engines.Engine:
    if FLAGS.translate == "nllb":
        if not FLAGS.nllb:
            raise UserError("--nllb is missing: the folder of an NLLB-200 model converted by CTranslate2.")
        return engines.NLLB(language, FLAGS.nllb, device=FLAGS.device)
    return engines.Google(
        language,
        project=FLAGS.project,
        endpoint=FLAGS.endpoint,
        characters_per_minute=FLAGS.characters_per_minute,
    )


def _agreed() -> bool:
    if FLAGS.yes:
        return True
    if not console.is_terminal:
        raise UserError("This would cost money: add --yes to agree, or --dry_run to stop here.")
    return Confirm.ask("Send it?", console=console)


def main():
    """The command."""
    config, workdir = cli.config(), cli.workdir()
    if FLAGS.translate:
        with contextlib.closing(translate.Cache(FLAGS.cache)) as cache:
            if not translate_sources(config, _engine(config.language), cache, _agreed, FLAGS.dry_run):
                return
    elif FLAGS.dry_run:
        raise UserError("--dry_run tells the cost of a translation: add --translate, or use train --dry_run.")
    prepare(config, workdir, FLAGS.inspect)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    cli.define_run_flags()
    flags.DEFINE_enum("translate", None, ENGINES, "Translate data.english into data.target with this engine")
    flags.DEFINE_integer("inspect", 0, "Show so many packed rows", lower_bound=0)
    flags.DEFINE_bool("dry_run", False, "Tell what the translation would cost, and stop")
    flags.DEFINE_bool("yes", False, "Agree to the cost of the translation")
    flags.DEFINE_string("cache", str(CACHE), "SQLite file of the translations made so far")
    flags.DEFINE_string("nllb", None, "Folder of an NLLB-200 model converted by CTranslate2")
    flags.DEFINE_string("device", "auto", "Of NLLB: cpu, cuda or auto")
    flags.DEFINE_string("project", None, "Google Cloud project; default that of the credentials")
    flags.DEFINE_string("endpoint", None, "Host of the service, such as translate-eu.googleapis.com")
    quota = engines.CHARACTERS_PER_MINUTE
    flags.DEFINE_integer("characters_per_minute", quota, "The project's quota", lower_bound=1)
    cli.run(main)
