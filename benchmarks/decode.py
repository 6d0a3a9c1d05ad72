"""python -m benchmarks.decode --model=MODEL --data=xquad.el.json [--prompts=32] [--new=64] [--repetitions=3]

Answers questions about paragraphs, several to a paragraph, as an evaluation does: seconds, answers and new
tokens a second, beside transformers' `generate` at batch 8 on the same prompts (sorted by length, padded on
the left), dtype and cores, both up to a newline. Each side runs once before, so that nothing is compiled in
what counts. The peak of memory is that of a process which answers all prompts once. For a CPU; needs
requirements-dev.txt.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
from pathlib import Path

from benchmarks import measure
from prom_jax import cli, models
from prom_jax.evaluation.decode import decode
from prom_jax.evaluation.lm import tokens_with

BATCH = 8  # of the peer, as in the paper


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = models.load(arguments.model, compute_dtype="float32")
        models.save_hf(model, tokenizer, folder, dtype="float32")
        prompts = read(arguments.data, arguments.prompts)
        memory = {side: peak(side, folder, prompts, arguments.new) for side in SIDES}
        runs = {name: side(folder, prompts, arguments.new) for name, side in SIDES.items()}
        seconds = measure.interleaved(runs, arguments.repetitions)
        answers = {name: run() for name, run in runs.items()}
    median = {name: measure.median(times) for name, times in seconds.items()}
    made = {name: sum(map(len, each)) for name, each in answers.items()}
    equal = sum(ours == theirs for ours, theirs in zip(answers["ours"], answers["peer"]))
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    row = lambda what, values: {"what": what, **values, "ratio": values["ours"] / values["peer"]}
    rows = [
        row("seconds", median),
        row("answers a second", {name: len(prompts) / median[name] for name in runs}),
        row("new tokens a second", {name: made[name] / median[name] for name in runs}),
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
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out")
    return parser.parse_args(argv)


def read(path: str, number: int) -> list[str]:
    """The first questions, each under its paragraph."""
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    return [
        f"{paragraph['context']}\n\n{question['question']}\n\n"
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ][:number]


def ours(folder: str, prompts: list[str], new: int):
    """A function that answers all prompts with prom_jax, in token ids without what ends them."""
    model, tokenizer = models.load(folder, compute_dtype="float32")
    stops = {tokenizer.eos_token_id} | tokens_with(tokenizer, ["\n"])
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]

    def run() -> list[list[int]]:
        answers = dict(decode(model, tokens, new, stops))
        return [_up_to(answers[number], stops) for number in range(len(tokens))]

    return run


def peer(folder: str, prompts: list[str], new: int):
    """The same with transformers."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = {tokenizer.eos_token_id} | tokens_with(tokenizer, ["\n"])
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))

    def run() -> list[list[int]]:
        answers = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            given = tokenizer([prompts[number] for number in batch], padding=True, return_tensors="pt")
            with torch.inference_mode():
                made = model.generate(
                    **given,
                    max_new_tokens=new,
                    do_sample=False,
                    eos_token_id=sorted(stops),
                    pad_token_id=tokenizer.pad_token_id,
                )
            for number, tokens in zip(batch, made[:, given["input_ids"].shape[1] :].tolist()):
                answers[number] = _up_to(tokens, stops)
        return [answers[number] for number in range(len(prompts))]

    return run


SIDES = {"ours": ours, "peer": peer}


def _up_to(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def peak(side: str, *arguments) -> float:
    """GiB of resident memory that a process takes at most which answers all prompts once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (side, *arguments))


def _peak(side: str, *arguments) -> float:
    SIDES[side](*arguments)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    cli.guard(main)
