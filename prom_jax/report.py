"""python -m prom_jax.report --runs=DIR --out=DIR [--reference=NAME]

Makes tables out of every evaluation below --runs (prom_jax.evaluate's results.json, and samples.jsonl next
to it): for each language all tasks, with paired tests of adapted models against the base model, and the
paper's tables where they apply. --out gets report.html, report.md, tables/*.csv, and the pictures of the
probe and of interference found below --runs.
"""

import argparse
import json
from pathlib import Path

from prom_jax.reporting import figures, output, tables
from prom_jax.reporting import runs as evaluations
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.errors import printable

PAPER = Path(__file__).parent / "resources" / "paper.json"


def main(argv=None):
    """Reads the command line and reports."""
    arguments = parse(argv)
    report(Path(arguments.runs), Path(arguments.out), arguments.reference)


def report(root: Path, out: Path, reference: str = "base"):
    """Finds the evaluations below `root` and writes what the module promises into `out`; adapted models are
    tested against a reference, a method or the folder of an evaluation."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    runs, notes = evaluations.find(root)
    sections, left_out = tables.sections(runs, paper, reference)
    notes += left_out
    output.write(out, sections, runs, figures.find(root), notes, paper)
    for section in sections:
        console.print(f"base      {printable(section.base)}")
        for table in section.tables:
            console.print(f"          {printable(summary(table))}")
    for note in notes:
        console.print(f"WARNING   {printable(note)}")
    console.print(f"wrote {out}/report.html, {out}/report.md and {out}/tables")


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.report", __doc__)
    runs = "folder with evaluations anywhere below it"
    parser.add_argument("--runs", metavar="DIR", required=True, help=runs)
    parser.add_argument("--out", metavar="DIR", required=True, help="a folder for the report")
    parser.add_argument(
        "--reference",
        metavar="NAME",
        default="base",
        help="what adapted models are tested against: a method (bactrian), or the folder of an evaluation "
        "below --runs",
    )
    return parser.parse_args(argv)


def summary(table: tables.Table) -> str:
    """How full a table is, and how many comparisons it holds."""
    values = [value for row in table.rows for cell in row.cells for value in cell.values]
    there = sum(value.ours is not None for value in values)
    tests = [comparison for comparison in table.comparisons if not comparison.refused]
    significant = sum(comparison.verdict != 0 for comparison in tests)
    tested = f"; {len(tests)} comparisons, {significant} significant" if table.comparisons else ""
    return f"{table.title}: {there} of {len(values)} numbers{tested}"


if __name__ == "__main__":
    cli.guard(main)
