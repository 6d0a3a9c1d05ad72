"""python -m benchmarks.distinct --model=MODEL --data=xquad.en.json [--prompts=8,32] [--tokens=300] [--new=64]
    [--repetitions=3]

Decodes prompts that share nothing, all of one length, to a fixed number of new tokens: wall time and
processor seconds next to transformers' `generate` at batch 8, same dtype and cores; how much of it is the
prompts, and how long the first run takes longer, in which prom_jax compiles. Each side is a process of its
own; they take turns. For a CPU; needs requirements-dev.txt.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from prom_jax.checkpoints import pretrained as models
from prom_jax.evaluation.decode import decode
from prom_jax.utils import cli

BATCH = 8  # of the peer


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = models.load(arguments.model, compute_dtype="float32")
        models.save_hf(model, tokenizer, folder, dtype="float32")
        del model
        prompts = read(arguments.data, max(arguments.prompts), arguments.tokens, tokenizer)
        sides = {
            name: measure.Worker(side, folder) for name, side in (("prom_jax", Ours), ("transformers", Peer))
        }
        for number in arguments.prompts:
            rows += compare(sides, prompts[:number], arguments.new, arguments.repetitions)
    title = (
        f"Decoding of distinct prompts of {arguments.tokens} tokens from {Path(arguments.data).name}, "
        f"{arguments.new} new tokens"
    )
    measure.report(title, rows, arguments.out)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distinct",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a file in SQuAD's format")
    numbers = "how many at a time, with commas between"
    parser.add_argument(
        "--prompts", type=lambda text: list(map(int, text.split(","))), default=[8, 32], help=numbers
    )
    parser.add_argument("--tokens", type=int, default=300, help="of each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each")
    measure.add_arguments(parser, 3, "runs of each side that are counted")
    return parser.parse_args(argv)


def read(path: str, number: int, length: int, tokenizer) -> list[list[int]]:
    """The first tokens of articles' texts, each from another place, with no beginning in common."""
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    texts = [" ".join(part["context"] for part in article["paragraphs"]) for article in articles]
    found = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    parts = [ids[start : start + length] for start in (0, length, 2 * length) for ids in found]
    prompts = [part for part in parts if len(part) == length][:number]
    if len(prompts) < number:
        raise SystemExit(f"{path} has {len(prompts)} texts of {length} tokens: give fewer --prompts")
    return prompts


def compare(sides: dict, prompts: list[list[int]], new: int, repetitions: int) -> list[dict]:
    """Rows of the table for some prompts."""
    taken = {
        name: {"seconds": [], "processor seconds": [], "of these, to the first token": []} for name in sides
    }
    first, answers = {}, {}
    for repetition in range(repetitions + 1):
        for name, side in sides.items():
            answers[name], wall, processor = side.call("answer", prompts, new)
            _, to_first, _ = side.call("answer", prompts, 1)
            if not repetition:
                first[name] = wall
                continue
            for what, value in zip(taken[name], (wall, processor, to_first)):
                taken[name][what].append(value)
    medians = {
        name: {what: measure.median(values) for what, values in of.items()} for name, of in taken.items()
    }
    equal = sum(ours == theirs for ours, theirs in zip(*answers.values()))
    ours, theirs = medians
    rows = [
        {
            "prompts": len(prompts),
            "what": what,
            ours: medians[ours][what],
            theirs: medians[theirs][what],
            "ratio": medians[theirs][what] / medians[ours][what],
        }
        for what in medians[ours]
    ]
    more = {name: first[name] - medians[name]["seconds"] for name in medians}
    rows.append({"prompts": len(prompts), "what": "more in the first run", **more, "ratio": ""})
    rows.append({"prompts": len(prompts), "what": "answers equal", ours: equal, theirs: equal, "ratio": ""})
    return rows


class Side:
    """A process that answers prompts."""

    def answer(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        """All answers, wall seconds and processor seconds."""
        began, before = time.perf_counter(), _processor()
        answers = self.decode(prompts, new)
        return answers, time.perf_counter() - began, _processor() - before


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Ours(Side):
    """prom_jax, as `prom_jax.evaluate` decodes."""

    def __init__(self, folder: str):
        self.model, _ = models.load(folder, compute_dtype="float32")

    def decode(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """All answers, in full length."""
        answers = dict(decode(self.model, prompts, new, []))
        return [answers[number] for number in range(len(prompts))]


class Peer(Side):
    """transformers."""

    def __init__(self, folder: str):
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # full length

    def decode(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """All answers, in full length."""
        import torch

        answers = []
        for start in range(0, len(prompts), BATCH):
            given = torch.tensor(prompts[start : start + BATCH])
            with torch.inference_mode():
                made = self.model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            answers += made[:, given.shape[1] :].tolist()
        return answers


if __name__ == "__main__":
    cli.guard(main)
