"""A few held-out prompts answered by a model, to read with one's own eyes."""

import json
from pathlib import Path

from rich.markup import escape

from prom_jax.checkpoints.generation import stop_tokens
from prom_jax.evaluation.decode import greedy
from prom_jax.utils.console import console

MAX_NEW_TOKENS = 64
CUT = " […]"  # after a text that MAX_NEW_TOKENS ended


def answer(model, tokenizer, records, number: int) -> list[dict]:
    """Greedy answers to the target-language prompts of the first held-out examples.

    Returns:
      For each {'prompt', 'answer', 'reference'}; an answer of MAX_NEW_TOKENS ends in CUT.
    """
    examples = records.read(range(min(number, len(records))))
    prompts, references = [], []
    for example in examples:
        tokens, loss = example["target_tokens"], example["target_loss"]
        first = int(loss.argmax())
        prompts.append(tokens[:first].tolist())
        references.append(tokens[loss].tolist())
    answers = greedy(model, prompts, MAX_NEW_TOKENS, stop_tokens(model.config, tokenizer))

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    return [
        {
            "prompt": decode(prompt),
            "answer": decode(new) + CUT * (len(new) == MAX_NEW_TOKENS),
            "reference": decode(reference),
        }
        for prompt, new, reference in zip(prompts, answers, references)
    ]


def pairs(base: Path, adapted: Path) -> list[dict]:
    """The answers in two files: for each prompt {'language', 'prompt', 'before', 'after', 'reference'}."""
    files = (json.loads(path.read_text(encoding="utf-8")) for path in (base, adapted))
    return [
        {key: before[key] for key in ("language", "prompt", "reference") if key in before}
        | {"before": before["answer"], "after": after["answer"]}
        for before, after in zip(*files)
    ]


def show(rows: list[dict]):
    """Prints what `pairs` gives, prompt by prompt."""
    for row in rows:
        question = row["prompt"].split("### Instruction:")[-1].split("### Response:")[0].strip()
        console.print(f"\n[bold]{escape(question)}[/bold]", markup=True)
        for name in ("before", "after", "reference"):
            console.print(f"  [cyan]{name:<9}[/cyan] {escape(' '.join(row[name].split()))}", markup=True)
