"""Packed rows as a person reads them: whose text, where examples begin, and which tokens have a loss."""

from itertools import groupby, islice

import numpy as np
from rich.text import Text

from prom_jax.data.examples import role_in
from prom_jax.utils.console import console

LOSS, PROMPT, HEADING = "bold green", "dim", "cyan"


def show(batches, records, tokenizer, number: int) -> None:
    """Prints the first `number` packed rows of a run, those of all streams in turn: loss tokens in ⟦brackets⟧
    and in colour."""
    streams = list(batches.shapes)
    rows = sorted(
        ((row, stream) for stream, (count, _) in batches.shapes.items() for row in range(count)),
        key=lambda of: (of[0], streams.index(of[1])),
    )
    for step, row, stream in islice(((s, *of) for s in range(len(batches)) for of in rows), number):
        examples, rows_of, offsets, lengths = batches.slots(step, stream)
        here = np.flatnonzero(rows_of == row)
        here = here[np.argsort(offsets[here])]
        count, length = batches.shapes[stream]
        console.rule(
            f"update {step + 1}, {stream} row {row + 1} of {count}: {len(here)} examples, "
            f"{lengths[here].sum():,} of {length:,} slots",
            style=HEADING,
        )
        for i, record in zip(here, records.read(examples[here])):
            role = role_in(stream, records.roles[examples[i]])
            console.print(_example(record, stream, role, int(offsets[i]), int(lengths[i]), tokenizer))


def _example(record: dict, stream: str, role: str, offset: int, length: int, tokenizer) -> Text:
    """An example's text, without what it shares with others, which is elsewhere."""
    tokens, loss = (record[f"{stream}_{name}"] for name in ("tokens", "loss"))
    shared = len(tokens) - length
    text = Text(f"[{role} {record['id']}, from slot {offset:,}: {length:,} tokens, ", HEADING)
    text.append(f"{loss.sum():,} loss tokens{f', after {shared:,} shared ones' * bool(shared)}]\n")
    for has_loss, run in groupby(zip(tokens[shared:].tolist(), loss[shared:].tolist()), key=lambda of: of[1]):
        piece = tokenizer.decode([token for token, _ in run])
        text.append(f"⟦{piece}⟧" if has_loss else piece, LOSS if has_loss else PROMPT)
    return text.append("\n")
