"""Packed rows as a person reads them: whose text, where examples begin, and what bears loss."""

from itertools import groupby, islice

from rich.text import Text

from prom_jax.console import console
from prom_jax.data.records import ROLES

ENGLISH_ROLES = {"target": "english", "translation": "translation_source", "text": "text"}
LOSS, PROMPT, HEADING = "bold green", "dim", "cyan"


def show(batches, records, tokenizer, number: int) -> None:
    """Prints the first `number` packed rows of a run, target and English ones in turn: text that bears loss
    in ⟦brackets⟧ and in colour."""
    rows = sorted(
        ((row, side) for side, (count, _) in batches.shapes.items() for row in range(count)),
        key=lambda of: (of[0], of[1] != "target"),
    )
    for step, row, side in islice(((s, *of) for s in range(len(batches)) for of in rows), number):
        examples, places, offsets = batches.places(step, side)
        here = sorted(zip(offsets[places == row].tolist(), examples[places == row].tolist()))
        count, length = batches.shapes[side]
        lengths = getattr(records, f"{side}_lengths")
        taken = sum(lengths[example] for _, example in here)
        console.rule(
            f"update {step + 1}, {side} row {row + 1} of {count}: {len(here)} examples, "
            f"{taken:,} of {length:,} places",
            style=HEADING,
        )
        for (offset, example), record in zip(here, records.read([example for _, example in here])):
            console.print(_example(record, side, ROLES[records.roles[example]], offset, tokenizer))


def _example(record: dict, side: str, role: str, offset: int, tokenizer) -> Text:
    tokens, loss = record[f"{side}_tokens"], record[f"{side}_loss"]
    role = role if side == "target" else ENGLISH_ROLES[role]
    text = Text(f"[{role} {record['id']}, from place {offset:,}: {len(tokens):,} tokens, ", HEADING)
    text.append(f"{loss.sum():,} bear loss]\n")
    for bears, run in groupby(zip(tokens.tolist(), loss.tolist()), key=lambda of: of[1]):
        piece = tokenizer.decode([token for token, _ in run])
        text.append(f"⟦{piece}⟧" if bears else piece, LOSS if bears else PROMPT)
    return text.append("\n")
