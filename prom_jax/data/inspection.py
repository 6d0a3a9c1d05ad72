"""Packed rows as a person reads them: whose text, where examples begin, and what bears loss."""

from itertools import groupby, islice

import numpy as np
from rich.text import Text

from prom_jax.data.records import ROLES
from prom_jax.utils.console import console

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
        examples, rows_of, offsets, lengths = batches.places(step, side)
        here = np.flatnonzero(rows_of == row)
        here = here[np.argsort(offsets[here])]
        count, length = batches.shapes[side]
        console.rule(
            f"update {step + 1}, {side} row {row + 1} of {count}: {len(here)} examples, "
            f"{lengths[here].sum():,} of {length:,} places",
            style=HEADING,
        )
        for i, record in zip(here, records.read(examples[here])):
            role = ROLES[records.roles[examples[i]]]
            role = role if side == "target" else ENGLISH_ROLES[role]
            console.print(_example(record, side, role, int(offsets[i]), int(lengths[i]), tokenizer))


def _example(record: dict, side: str, role: str, offset: int, length: int, tokenizer) -> Text:
    """An example's text, but for what lies elsewhere as others begin with it too."""
    tokens, loss = (record[f"{side}_{name}"] for name in ("tokens", "loss"))
    shared = len(tokens) - length
    text = Text(f"[{role} {record['id']}, from place {offset:,}: {length:,} tokens, ", HEADING)
    text.append(f"{loss.sum():,} bear loss{f', behind {shared:,} shared ones' * bool(shared)}]\n")
    for bears, run in groupby(zip(tokens[shared:].tolist(), loss[shared:].tolist()), key=lambda of: of[1]):
        piece = tokenizer.decode([token for token, _ in run])
        text.append(f"⟦{piece}⟧" if bears else piece, LOSS if bears else PROMPT)
    return text.append("\n")
