"""python -m benchmarks.probe --model=MODEL [--languages=sw,th] [--tables=DIR] [--rows=N]

Times the cloze probe beside the same measurement in torch (whole prompts in batches, hidden states of all
layers, the head for the places that are read alone), and tells how far the two are apart. For a CPU; needs
requirements-dev.txt.
"""

import argparse
import dataclasses
import tempfile
import time

import numpy as np
import torch
import transformers

from prom_jax.analysis.probe import probe
from prom_jax.analysis.tables import read_table
from prom_jax.checkpoints import pretrained as models
from prom_jax.utils import cli
from prom_jax.utils.console import console
from tests.analysis.reference import probabilities


def main(argv=None):
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--languages", default="sw,th")
    parser.add_argument("--scoring", default="word,prefix,byte", help="one or more")
    parser.add_argument("--tables", help="as in prom_jax.probe")
    parser.add_argument("--rows", type=int, help="of each table; default: all")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args(argv)
    model, tokenizer = models.load(arguments.model, compute_dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        models.save_hf(model, tokenizer, folder, dtype="float32")
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for language in arguments.languages.split(","):
        table = read_table(language, arguments.tables)
        table = dataclasses.replace(table, concepts=table.concepts[: arguments.rows])
        for scoring in arguments.scoring.split(","):
            compare(model, tokenizer, hf, table, scoring, arguments.batch)


def compare(model, tokenizer, hf, table, scoring, batch):
    """Prints both times, compiling included in ours, and the largest difference of a row and layer."""
    began = time.perf_counter()
    ours = probe(model, tokenizer, table, scoring=scoring, batch=batch)
    between = time.perf_counter()
    rows = [(prompt, row.english, row.words) for row, prompt in ours.rows]
    english, target = probabilities(hf, tokenizer, rows, scoring, batch)
    seconds, reference = between - began, time.perf_counter() - between
    error = max(np.abs(ours.english - english).max(), np.abs(ours.target - target).max())
    console.print(
        f"{table.language:<4} {scoring:<7} {len(rows):>4} rows  {seconds:7.1f} s  torch {reference:7.1f} s  "
        f"{reference / seconds:5.1f} times  max |Δ| {error:.1e}"
    )


if __name__ == "__main__":
    cli.guard(main)
