"""python -m prom_jax.prepare --config=configs/th.py [--workdir=DIR] [--translate=google|nllb] [--inspect=K]

Makes the packed records of a run without training, and its data card: data_card.md, data_card.json and
lengths.png in the work directory. With --translate it first writes data.target, the machine translation of
data.english; with --dry_run it tells what that would cost, and stops.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from datetime import timedelta
from pathlib import Path

from rich.prompt import Confirm

from prom_jax import config as configuration
from prom_jax.analysis import regulation
from prom_jax.data import card, inspection, sources
from prom_jax.data.examples import NoStream
from prom_jax.data.pairing import by_id
from prom_jax.data.rows import Row
from prom_jax.data.templates import language_name
from prom_jax.data.translation import engines, translate
from prom_jax.reporting.card import write as write_card
from prom_jax.training.regulation import decide
from prom_jax.training.setup import open_base, resolve
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import write_text

ENGINES = ("google", "nllb")
CACHE = Path("~/.cache/prom_jax/translations.sqlite").expanduser()


def prepare(config, workdir: Path, inspect: int = 0, run: str = "") -> dict:
    """Makes records and card without reading weights.

    Args:
      config: see `prom_jax.config`.
      workdir: where they go.
      inspect: how many packed rows are shown.
      run: the flags of a command for the same configuration and work directory.

    Returns:
      The content of the card.

    Raises:
      UserError: for input that cannot be used.
    """
    base = open_base(config, workdir, weights=False)
    measured = regulation.recorded(config, base, workdir)
    undecided = any(
        decide(configuration.of_language(config, code), base.config, found).open
        for code, found in measured.items()
    )
    decides = f"python -m prom_jax.regulate {run or f'--config=… --workdir={workdir}'}"
    try:
        experiment = resolve(config, workdir, base, measured)
    except NoStream as error:
        if not undecided:
            raise
        raise UserError(
            f"{error} λ is not decided yet, and no English is needed where a probe finds that it is 0: "
            f"{decides} asks it."
        ) from None
    if undecided:
        console.print(
            "regulate  λ is not decided yet, so both streams are prepared; this decides, or else training "
            f"does: {decides}"
        )
    made = write_card(experiment)
    console.print(card.as_markdown(made))
    for sentence in card.warnings(made):
        console.print(f"WARNING   {sentence}")
    if inspect:
        inspection.show(experiment.batches, experiment.records, experiment.base.tokenizer, inspect)
    console.print(f"card: {workdir}/data_card.md")
    return made


def translate_sources(config, engine: engines.Engine, cache: translate.Cache, agreed, dry_run: bool) -> bool:
    """Writes data.target from data.english; what cannot be used goes into a second file.

    Args:
      config: see `prom_jax.config`, of one language.
      engine: what translates.
      cache: the translations made so far.
      agreed: a function that is asked before anything that costs money.
      dry_run: tell the cost alone.

    Returns:
      Whether it was written.

    Raises:
      UserError: data.target is not one new .jsonl file; what `translate.translate` raises.
    """
    configuration.check(config)
    language_name(config.language)
    path = _destination(config)
    english = sources.read_instructions(tuple(config.data.english), "en")
    rows = list(by_id(english, "English").values())
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
        rejected = path.with_suffix(".rejected.jsonl")
        write_text(rejected, "".join(map(_line, map(dataclasses.asdict, result.rejected))))
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in result.counts.items())
        left_out = len(rows) - len(result.rows)
        console.print(f"          {left_out:,} rows left out ({reasons}): {rejected}")
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


def _as_dict(row: Row) -> dict:
    if len(row.turns) == 1 and not row.system:
        return {"id": row.id} | dataclasses.asdict(row.turns[0])
    system = [{"role": "system", "content": row.system}] if row.system else []
    messages = system + [
        {"role": role, "content": text}
        for turn in row.turns
        for role, text in (("user", turn.instruction), ("assistant", turn.output))
    ]
    return {"id": row.id, "messages": messages}


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _engine(arguments: argparse.Namespace, language: str) -> engines.Engine:
    """The translator into a language that the command line asks for; for a dry run its price and rate, unless
    only a trial of a local model tells these."""
    if arguments.dry_run and not arguments.nllb:
        if arguments.translate == "nllb":
            return engines.Unconnected("nllb", engines.NLLB.price, math.inf)
        return engines.Unconnected("google", engines.Google.price, arguments.characters_per_minute / 60)
    if arguments.translate == "nllb":
        if not arguments.nllb:
            raise UserError("--nllb is missing: the folder or hub id of an NLLB-200 model for CTranslate2.")
        return engines.NLLB(language, arguments.nllb, device=arguments.device)
    return engines.Google(
        language,
        project=arguments.project,
        endpoint=arguments.endpoint,
        characters_per_minute=arguments.characters_per_minute,
    )


def _agrees(yes: bool) -> bool:
    """Whether the user agrees to the cost: by --yes, or asked now."""
    if yes:
        return True
    if not console.is_terminal:
        raise UserError("This would cost money: add --yes to agree, or --dry_run to stop here.")
    return Confirm.ask("Send it?", console=console)


def main(argv=None):
    """Reads the command line, translates where asked, and prepares."""
    arguments = parse(argv)
    config, dry_run = arguments.config, arguments.dry_run
    if arguments.translate:
        configuration.check(config)
        agreed = functools.partial(_agrees, arguments.yes)
        with contextlib.closing(translate.Cache(arguments.cache)) as cache:
            for language in configuration.languages(config):
                part, engine = configuration.of_language(config, language), _engine(arguments, language)
                if not translate_sources(part, engine, cache, agreed, dry_run) and not dry_run:
                    return
        if dry_run:
            return
    elif dry_run:
        raise UserError("--dry_run tells the cost of a translation: add --translate, or use train --dry_run.")
    prepare(config, arguments.workdir, arguments.inspect, arguments.run)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.prepare", __doc__)
    parser.add_run()
    inspect = "show the first N packed rows"
    parser.add_argument("--inspect", metavar="K", type=cli.at_least(0), default=0, help=inspect)
    add = parser.add_argument_group("translation").add_argument
    add("--translate", choices=ENGINES, help="translate data.english into data.target with this engine")
    add("--dry_run", action="store_true", help="tell what the translation would cost, and stop")
    add("--yes", action="store_true", help="agree to the cost of the translation")
    add("--cache", metavar="FILE", default=str(CACHE), help="SQLite file of the translations made so far")
    add("--nllb", metavar="MODEL", help="folder or hub id of an NLLB-200 model converted by CTranslate2")
    add("--device", choices=("cpu", "cuda", "auto"), default="auto", help="of NLLB")
    add("--project", metavar="NAME", help="Google Cloud project (default: that of the credentials)")
    add("--endpoint", metavar="HOST", help="of the service, such as translate-eu.googleapis.com")
    number, quota = cli.at_least(1), engines.CHARACTERS_PER_MINUTE
    about = "the quota of the Google Cloud project"
    add("--characters_per_minute", metavar="N", type=number, default=quota, help=about)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.guard(main)
