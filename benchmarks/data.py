"""python -m benchmarks.data --model=MODEL --source=alpaca.json [--repetitions=5] [--out=FILE]
python -m benchmarks.data --model=MODEL --pairs=1000000

Two questions: how long tokenising and writing an instruction file takes, beside `datasets.map` with the same
tokenizer on the same cores; and how many tokens a second the loader gives, beside what training takes. With
--pairs another one: what so many made-up pairs take, in seconds and memory, and the start of a run on them.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np

from benchmarks import measure
from prom_jax.checkpoints import pretrained as models
from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import prepare
from prom_jax.data.templates import wording
from prom_jax.utils import cli

SEQ_LEN = 1024
NEEDED = 8 * 12_000  # tokens a second of eight devices at 12,000 each


def main(argv=None):
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--model", required=True, help="for its tokenizer")
    parser.add_argument("--source", help=".json list of instruction, input, output")
    parser.add_argument("--pairs", type=int, help="of sentences, made up, in place of a source")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--training", type=float, default=115.0, help="tokens a second that training takes")
    parser.add_argument("--out")
    arguments = parser.parse_args(argv)
    _, tokenizer = models.open_source(arguments.model)
    if arguments.pairs:
        return many(tokenizer, arguments.pairs)
    with tempfile.TemporaryDirectory() as folder:
        rows = preparation(tokenizer, arguments.source, Path(folder), arguments.repetitions)
        rows += loading(tokenizer, arguments.source, Path(folder), arguments)
    measure.report("Data: examples and tokens a second", rows, arguments.out)


def preparation(tokenizer, source: str, folder: Path, repetitions: int) -> list[dict]:
    """Read, tokenise with the response's mask, write; both sides cut at SEQ_LEN, nothing is cached."""
    recipe = Recipe("en", target=(source,), streams=("target",), seq_len=SEQ_LEN)

    def fresh():
        return tempfile.mkdtemp(dir=folder)

    cores = len(os.sched_getaffinity(0))
    sides = {
        "ours": lambda: prepare(recipe, tokenizer, fresh()),
        "one process": lambda: peer(tokenizer, source, fresh(), None),
        "all cores": lambda: peer(tokenizer, source, fresh(), cores),
    }
    seconds = measure.interleaved(sides, repetitions)
    ours = measure.median(seconds.pop("ours"))
    best = min(seconds, key=lambda name: measure.median(seconds[name]))
    theirs = measure.median(seconds[best])
    number = len(json.loads(Path(source).read_text(encoding="utf-8")))
    what = f"prepare {number:,} examples (s); datasets.map, {best}"
    return [{"what": what, "ours": ours, "peer": theirs, "ratio": theirs / ours}]


def peer(tokenizer, source: str, folder: str, processes: int | None) -> None:
    """The same with `datasets`: batched map, fast tokenizer with offsets, Arrow file."""
    words, eos = wording("en"), tokenizer.eos_token_id

    def encode(batch):
        prompts = [words.prompt(i, x) for i, x in zip(batch["instruction"], batch["input"])]
        texts = [prompt + output for prompt, output in zip(prompts, batch["output"])]
        encoded = tokenizer(texts, return_offsets_mapping=True, truncation=True, max_length=SEQ_LEN - 1)
        loss = [
            [*(np.array(offsets)[:, 1] > len(prompt)), True]
            for prompt, offsets in zip(prompts, encoded["offset_mapping"])
        ]
        return {"tokens": [[*ids, eos] for ids in encoded["input_ids"]], "loss": loss}

    rows = datasets.Dataset.from_list(json.loads(Path(source).read_text(encoding="utf-8")))
    rows.map(
        encode,
        batched=True,
        num_proc=processes,
        remove_columns=rows.column_names,
        cache_file_name=f"{folder}/tokens.arrow",
        load_from_cache_file=False,
    )


def loading(tokenizer, source: str, folder: Path, arguments) -> list[dict]:
    """Real tokens a second of assembled batches, English and target texts alike."""
    recipe = Recipe("en", target=(source,), english=(source,), seq_len=SEQ_LEN)
    records = prepare(recipe, tokenizer, folder / "records").train
    batches = Batches(records, sequences=32, seq_len=SEQ_LEN, seed=0, epochs=1.0)
    tokens = sum(map(batches.tokens, range(len(batches))))

    def run():
        for _ in batches.iterate():
            pass

    rate = tokens / measure.median(measure.interleaved({"ours": run}, arguments.repetitions)["ours"])
    needs = {"training here": arguments.training, "8 devices × 12,000": float(NEEDED)}
    return [
        {"what": f"loader (tokens/s); {name}", "ours": rate, "peer": need, "ratio": rate / need}
        for name, need in needs.items()
    ]


def many(tokenizer, pairs: int) -> None:
    """Prints what pairs of short texts take to be prepared, and then a run on them to start and to go on."""
    words = "the cow eats grass and gives milk every morning on a small farm near our river".split()
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Path(folder, f"{name}.jsonl") for name in ("english", "target")}
        for number, path in enumerate(sides.values()):
            chance = random.Random(number)
            with path.open("w") as file:
                for _ in range(pairs):
                    asked, answered = (
                        " ".join(chance.choices(words, k=k)) for k in (5, chance.randint(3, 12))
                    )
                    file.write(json.dumps({"instruction": asked, "output": answered}) + "\n")
        recipe = Recipe("sw", **{name: (str(path),) for name, path in sides.items()}, seq_len=SEQ_LEN)
        for what in ("prepare, plan", "again"):
            start = time.perf_counter()
            records = prepare(recipe, tokenizer, Path(folder, "records")).train
            prepared = time.perf_counter()
            settings = {"sequences": 32, "seq_len": SEQ_LEN, "seed": 0, "epochs": 3.0, "share_prompts": True}
            batches = Batches(records, **settings, plans=Path(folder, "records"))
            planned = time.perf_counter()
            memory = [
                resource.getrusage(who).ru_maxrss / 2**20
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            ]
            print(
                f"{pairs:,} pairs, {what}: {prepared - start:.1f} s and {planned - prepared:.1f} s for "
                f"{len(batches):,} updates, at most {memory[0]:.2f} GiB, a worker {memory[1]:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    datasets.disable_progress_bars()
    cli.guard(main)
