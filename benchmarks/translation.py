"""python -m benchmarks.translation --model=NAME=MODEL [--model=NAME=MODEL …] --out=DIR [--languages=ar,el,th]

Does a model translate words through English? Probes each model with the task 'translation' in all pairs of
the languages. DIR gets probe.json by model and pair, and grid.png of all; a table in Markdown is printed, of
the block after which English leads in most rows.
"""

import argparse
import itertools
from pathlib import Path

from prom_jax.analysis.probe import Probe, probe
from prom_jax.analysis.statistics import effective_rows
from prom_jax.analysis.tables import read_sources, read_table
from prom_jax.checkpoints import pretrained as models
from prom_jax.reporting.plots import probe_curves
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.workdir import make_directory, write_json

COLUMNS = (
    "", "rows", "block", "English leads", "P(English)", "of rows", "P(target)", "difference",
    "P(target) at N", "of rows at N",
)  # fmt: skip


def main(argv=None):
    """Reads the command line, probes and draws."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.translation",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", required=True, action="append", help="a name and whatever prom_jax loads")
    parser.add_argument("--languages", default="ar,el,th", help="of the tables")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args(argv)
    out, entries = Path(arguments.out), {}
    make_directory(out)
    console.print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, source in (model.split("=", 1) for model in arguments.model):
        model, tokenizer = models.load(source, compute_dtype="float32")
        for origin, language in itertools.permutations(arguments.languages.split(","), 2):
            sources = read_sources((origin,), language)
            result = probe(model, tokenizer, read_table(language), task="translation", sources=sources)
            pair = f"{name}: {origin} → {language}"
            console.print(f"| {' | '.join((pair, *row(result)))} |")
            entries[pair] = {"model": source} | result.summary()
            write_json(out / "probe.json", entries)
    probe_curves({pair: [entry] for pair, entry in entries.items()}, out / "grid.png")


def row(result: Probe) -> list[str]:
    """What the table says of a pair."""
    lead = result.strength()
    at = result.column(lead.layer)
    mean, low, high = result.difference(lead.layer)
    english, target, last = result.english[:, at], result.target[:, at], result.target[:, -1]
    return [
        f"{len(result.rows)}",
        f"{lead.layer} of {len(result.layers)}",
        f"{lead.share:.2f} [{lead.low:.2f}, {lead.high:.2f}]",
        f"{english.mean():.2g}",
        f"{effective_rows(english):.1f}",
        f"{target.mean():.2g}",
        f"{mean:.2g} [{low:.2g}, {high:.2g}]",
        f"{last.mean():.2g}",
        f"{effective_rows(last):.1f}",
    ]


if __name__ == "__main__":
    cli.guard(main)
