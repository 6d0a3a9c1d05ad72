"""python -m prom_jax.probe --model=MODEL --languages=th,el --out=DIR [--task=translation] [--compare=BEFORE]

Measures how probable the English and the target word are after each block, where a cloze sentence, a word
of another language, or the word itself asks for it. DIR gets probe.json, a picture of each language, and
grid.png of all; with --compare also pictures of the change from an earlier probe. MODEL is whatever prom_jax
loads.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table as Columns

from prom_jax.analysis.probe import FAINT, SCORINGS, Probe, probe
from prom_jax.analysis.tables import Table, read_sources, read_table
from prom_jax.analysis.tasks import DEMONSTRATIONS, TASKS, NoRows, ask, prompts
from prom_jax.checkpoints import pretrained as models
from prom_jax.parallel import flags
from prom_jax.parallel.sharding import describe as describe_mesh
from prom_jax.reporting.plots import probe_curves
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import make_directory, write_json

# What --compare needs of an earlier probe.
DRAWN = ("scoring", "english_mean", "target_mean", "intervals", "rows")
# Two probes can be compared where these are equal; a file without one of them was made with the value here.
SETTINGS = {
    "task": "cloze",
    "sources": [],
    "scoring": "word",
    "shots": 5,
    "demonstrations": "shared",
    "seed": 0,
    "table": None,
}


class Asked(NamedTuple):
    """What a language is probed with: its table, and those that words are translated from."""

    table: Table
    sources: tuple[Table, ...]


def main(argv=None):
    """Reads the command line and probes."""
    run(parse(argv))


def run(arguments: argparse.Namespace):
    """Probes each language and writes, draws and prints what was found."""
    settings = {name: getattr(arguments, name) for name in SETTINGS if name not in ("table", "sources")}
    tables = read_tables(arguments)
    shared = settings | {"model": arguments.model, "versions": cli.versions()}
    headers = {language: shared | header(asked, arguments.task) for language, asked in tables.items()}
    before = earlier(arguments.compare, headers) if arguments.compare else {}
    out = Path(arguments.out)
    make_directory(out)
    mesh = flags.mesh(arguments)
    model, tokenizer = models.load(arguments.model, mesh, arguments.compute_dtype)
    console.print(
        f"model     {arguments.model}: {model.config.num_hidden_layers} layers, computed in "
        f"{model.compute.dtype}\nmesh      {describe_mesh(mesh)}\n"
        f"probe     {arguments.task}, {arguments.scoring} scoring, {arguments.shots} "
        f"demonstrations ({arguments.demonstrations}), seed {arguments.seed}"
    )
    probes = measure(model, tokenizer, tables, batch=arguments.batch, **settings)
    entries = {language: headers[language] | result.summary() for language, result in probes.items()}
    write_json(out / "probe.json", entries)
    draw(out, entries, before)
    console.print(summary_table(probes))
    if arguments.suggest_layer:
        for result in probes.values():
            suggest(result)
    console.print(f"wrote {out}/probe.json, {out}/grid.png and a picture of each language")


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.probe", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="whatever prom_jax loads")
    add("--languages", metavar="CODES", required=True, help="of the tables, such as th,el")
    add("--out", metavar="DIR", required=True, help="a folder for the results")
    add("--task", choices=tuple(TASKS), default="cloze", help="what is asked: see docs/probe.md")
    sources = "languages to translate from, such as el,ar, in turn (default: all that have a table)"
    add("--sources", metavar="CODES", default="", help=sources)
    add("--scoring", choices=SCORINGS, default="word", help="what counts as a word: see docs/probe.md")
    add("--shots", metavar="N", type=cli.at_least(0), default=5, help="demonstrations in each prompt")
    kinds = "the same for all rows, or each row's own"
    add("--demonstrations", choices=DEMONSTRATIONS, default="shared", help=kinds)
    add("--seed", metavar="N", type=cli.integer, default=0, help="of demonstrations and intervals")
    tables = "folder with <language>/clean.csv (default: the project's own tables)"
    add("--tables", metavar="DIR", help=tables)
    add("--batch", metavar="N", type=cli.at_least(1), default=16, help="rows at a time")
    add("--compare", metavar="DIR", help="folder of an earlier probe, to draw the change")
    add("--suggest_layer", action="store_true", help="tell where English leads")
    flags.add_compute(parser)
    return parser.parse_args(argv)


def read_tables(arguments: argparse.Namespace) -> dict[str, Asked]:
    """The languages' tables; what is wrong with them shows before the model is loaded."""
    languages = list(dict.fromkeys(filter(None, arguments.languages.split(","))))
    if not languages:
        raise UserError(f"--languages={arguments.languages}: expected one or more, such as th,el")
    sources = tuple(filter(None, arguments.sources.split(",")))
    tables = {}
    for language in languages:
        table = read_table(language, arguments.tables)
        needed = sources or TASKS[arguments.task].translates
        others = read_sources(sources, language, arguments.tables) if needed else ()
        tables[language] = Asked(table, others)
        prompts(ask(arguments.task, *tables[language]), arguments.shots, arguments.seed)
    return tables


def header(asked: Asked, task: str) -> dict:
    """What of a language's probe is known before it."""
    questions = ask(task, *asked)
    return {"sources": list(questions.sources), "table": questions.fingerprint}


def measure(model, tokenizer, tables: dict, **settings) -> dict[str, Probe]:
    """Probes each language; one without a row that can be measured is reported and left out.

    Raises:
      NoRows: if that is so of the last one, and there is no other.
    """
    probes = {}
    for language, (table, sources) in tables.items():
        try:
            probes[language] = probe(model, tokenizer, table, sources=sources, **settings)
        except NoRows as error:
            if not probes and language == list(tables)[-1]:
                raise
            console.print(f"WARNING   {error}")
        else:
            describe(probes[language])
    return probes


def read_entries(path: Path) -> dict[str, dict]:
    """The entries of a probe.json; raises ValueError for one that lacks what is drawn."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError("it is no object")
    for language, entry in entries.items():
        found = entry if isinstance(entry, dict) else {}
        if missing := [key for key in DRAWN if key not in found]:
            raise ValueError(f"{language!r} lacks {', '.join(missing)}")
    return entries


def earlier(folder: str, headers: dict[str, dict]) -> dict[str, dict]:
    """The entries of an earlier probe.

    Raises:
      UserError: if there are none, or they were measured otherwise.
    """
    path = Path(folder) / "probe.json"
    try:
        before = read_entries(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--compare={folder}: {path} cannot be read ({error}); expected an earlier --out"
        ) from error
    for language, header in headers.items():
        if language not in before:
            raise UserError(
                f"--compare={folder} has no {language!r}, only {', '.join(before)}: probe it first"
            )
        for name, default in SETTINGS.items():
            if (then := before[language].get(name, default)) != header[name]:
                raise UserError(
                    f"--compare={folder} was measured with {name}={then!r} for {language!r}, this is with "
                    f"{header[name]!r}: measure both with one setting"
                )
    return before


def describe(result: Probe):
    """Prints how many rows were measured, and what to be wary of."""
    dropped = ", ".join(f"{number} dropped as {reason}" for reason, number in result.dropped.items())
    console.print(f"{result.language:<9} {len(result.rows)} rows{', ' * bool(dropped)}{dropped}")
    layers = result.english.shape[1]
    unreliable = sum(result.unreliable(layer) for layer in range(1, layers + 1))
    if unreliable:
        console.print(
            f"WARNING   {result.language}: at {unreliable} of {layers} layers P_target is mostly that of "
            "tokens which most words of the table begin with; --scoring=word can tell words apart"
        )


def draw(out: Path, entries: dict[str, dict], before: dict[str, dict]):
    """A picture of each language and one of all, and the same again over an earlier probe."""
    alone = {language: [entry] for language, entry in entries.items()}
    over = {language: [before[language], entry] for language, entry in entries.items() if before}
    for panels, suffix in ((alone, ""), (over, ".compare")):
        for language in panels:
            probe_curves({language: panels[language]}, out / f"{language}{suffix}.png")
        if panels:
            probe_curves(panels, out / f"grid{suffix}.png")


def summary_table(probes: dict[str, Probe]) -> Columns:
    """Where English leads in most rows, and what the model says in the end."""
    table = Columns(
        "",
        "layer",
        "English\nleads",
        "English",
        "target",
        "difference [95 %]",
        "English\nat N",
        "target\nat N",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for language, result in probes.items():
        lead = result.strength()
        means = [values.mean(axis=0) for values in (result.english, result.target)]
        at, last = ([f"{mean[i]:.2g}" for mean in means] for i in (result.column(lead.layer), -1))
        difference = _with_interval(*result.difference(lead.layer))
        table.add_row(language, str(lead.layer), f"{lead.share:.0%}", *at, difference, *last)
    return table


def suggest(result: Probe):
    """Prints where English leads in most rows, and where it leads most in the mean."""
    lead = result.strength()
    where = (
        f"layer {lead.layer}, where English leads in {lead.share:.0%} [{lead.low:.0%}, {lead.high:.0%}] of"
    )
    if not lead.share:
        where = f"none: English leads nowhere with {FAINT:g} or more in any of"
    layer, low, high = result.peak()
    mean = _with_interval(*result.difference(layer))
    console.print(
        f"{result.language:<9} {where} {len(result.rows)} rows; the mean of P_en − P_target is largest after "
        f"layer {layer} ({low} to {high} with other rows): {mean}"
    )


def _with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2g} [{low:.2g}, {high:.2g}]"


if __name__ == "__main__":
    cli.guard(main)
