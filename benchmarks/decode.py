"""python -m benchmarks.decode --model=MODEL --data=xquad.el.json [--paragraphs=8] [--new=64]
    [--repetitions=3]

Answers all questions about some paragraphs, as an evaluation does: seconds, answers and new
tokens a second, and peak memory, beside transformers' `generate` at batch 8 on the same prompts (sorted by
length, padded on the left), dtype and cores, both up to a newline. Each side is a process of its own; they
take turns, and a first run of each, which compiles, is not counted. For a CPU; needs requirements-dev.txt.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
from pathlib import Path

from benchmarks import measure
from prom_jax.checkpoints import pretrained as models
from prom_jax.evaluation.decode import decode
from prom_jax.evaluation.lm import tokens_with
from prom_jax.utils import cli

BATCH = 8  # of the peer, as in the paper


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    prompts = read(arguments.data, arguments.paragraphs)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = models.load(arguments.model, compute_dtype="float32")
        models.save_hf(model, tokenizer, folder, dtype="float32")
        sides = {
            name: measure.Worker(side, folder, prompts, arguments.new)
            for name, side in (("ours", Ours), ("peer", Peer))
        }
        answers = {}

        def run(name):
            answers[name] = sides[name].call("answer")

        runs = {name: lambda name=name: run(name) for name in sides}
        seconds = measure.interleaved(runs, arguments.repetitions)
        memory = {name: side.call("peak") for name, side in sides.items()}
    median = {name: measure.median(times) for name, times in seconds.items()}
    made = {name: sum(map(len, each)) for name, each in answers.items()}
    equal = sum(ours == theirs for ours, theirs in zip(answers["ours"], answers["peer"]))
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    row = lambda what, values: {"what": what, **values, "ratio": values["ours"] / values["peer"]}
    rows = [
        row("seconds", median),
        row("answers a second", {name: len(prompts) / median[name] for name in sides}),
        row("new tokens a second", {name: made[name] / median[name] for name in sides}),
        row("peak memory (GiB)", memory),
    ]
    title = (
        f"Decoding: {len(prompts)} prompts of {statistics.mean(lengths):.0f} tokens from "
        f"{Path(arguments.data).name}, up to {arguments.new} new; {equal} answers equal"
    )
    measure.report(title, rows, arguments.out)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a file in SQuAD's format")
    parser.add_argument("--paragraphs", type=int, default=8, help="spread over the file")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out")
    return parser.parse_args(argv)


def read(path: str, number: int) -> list[str]:
    """The questions about some paragraphs, spread over the file, each under its paragraph."""
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [
        f"{paragraph['context']}\n\n{question['question']}\n\n"
        for paragraph in paragraphs[:: -(-len(paragraphs) // number)]
        for question in paragraph["qas"]
    ]


class Side:
    """A process that answers all prompts, in token ids without what ends them."""

    def __init__(self, tokenizer):
        self.stops = {tokenizer.eos_token_id} | tokens_with(tokenizer, ["\n"])

    def up_to_stop(self, tokens: list[int]) -> list[int]:
        """What comes before the first token that ends an answer."""
        end = next((place for place, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[:end]

    def peak(self) -> float:
        """GiB of resident memory that this process has taken at most."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Ours(Side):
    """prom_jax, as `prom_jax.evaluate` decodes."""

    def __init__(self, folder: str, prompts: list[str], new: int):
        self.model, tokenizer = models.load(folder, compute_dtype="float32")
        super().__init__(tokenizer)
        self.prompts, self.new = [tokenizer(prompt)["input_ids"] for prompt in prompts], new

    def answer(self) -> list[list[int]]:
        """All answers."""
        answers = dict(decode(self.model, self.prompts, self.new, self.stops))
        return [self.up_to_stop(answers[number]) for number in range(len(self.prompts))]


class Peer(Side):
    """transformers."""

    def __init__(self, folder: str, prompts: list[str], new: int):
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        super().__init__(self.tokenizer)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompts, self.new = prompts, new

    def answer(self) -> list[list[int]]:
        """All answers."""
        import torch

        order = sorted(range(len(self.prompts)), key=lambda number: len(self.prompts[number]))
        answers = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            texts = [self.prompts[number] for number in batch]
            given = self.tokenizer(texts, padding=True, return_tensors="pt")
            with torch.inference_mode():
                made = self.model.generate(
                    **given,
                    max_new_tokens=self.new,
                    do_sample=False,
                    eos_token_id=sorted(self.stops),
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            for number, tokens in zip(batch, made[:, given["input_ids"].shape[1] :].tolist()):
                answers[number] = self.up_to_stop(tokens)
        return [answers[number] for number in range(len(self.prompts))]


if __name__ == "__main__":
    cli.guard(main)
