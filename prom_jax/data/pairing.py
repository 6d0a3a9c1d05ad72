"""Which English row and which target row are counterparts."""

from dataclasses import replace
from typing import NamedTuple

from prom_jax.data.rows import Row
from prom_jax.utils.errors import UserError

PAIRINGS = ("id", "order", "none")


def by_id(rows: list[Row], side: str) -> dict[str, Row]:
    """The rows of a `side` ('English', 'target') by id; those of a side without ids are named by their place,
    #1, #2, …

    Raises:
      UserError: some rows have ids and some not; an id occurs twice.
    """
    has_id = [row.id is not None for row in rows]
    if any(has_id) and not all(has_id):
        raise UserError(
            f"The {side} row {has_id.index(False) + 1} has no id, and others have: give all rows of "
            "that side an 'id', or none."
        )
    table: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        name = f"#{number}" if row.id is None else row.id
        if name in table:
            raise UserError(f"Id '{name}' occurs twice on the {side} side: make ids unique.")
        table[name] = row if row.id == name else replace(row, id=name)
    return table


class Pairs(NamedTuple):
    """(English row, target row) of counterparts, and the rows of each side that have none, in order."""

    pairs: list[tuple[Row | None, Row]]
    english: list[Row]
    target: list[Row]


def pair(english: list[Row], target: list[Row], pairing: str = "id") -> Pairs:
    """The counterparts among instruction rows.

    Args:
      pairing: 'id', where a side without ids is numbered, so that without any the rows pair by order;
        'order'; or 'none'.

    Raises:
      UserError: as `by_id`; sides of different lengths that pair by order.
    """
    if pairing not in PAIRINGS:
        raise UserError(f"data.pairing is '{pairing}': expected one of {', '.join(PAIRINGS)}.")
    if pairing == "none" or not (english and target):
        return Pairs([], english, target)
    in_order = pairing == "order" or all(row.id is None for row in english + target)
    if in_order and len(english) != len(target):
        raise UserError(
            f"{len(english)} English and {len(target)} target rows cannot be paired by order: make them "
            "equally many, give every row of both sides an 'id', or set data.pairing=none, for each to train "
            "on its own."
        )
    if pairing == "order":
        return Pairs(list(zip(english, target)), [], [])
    ours, theirs = by_id(english, "English"), by_id(target, "target")
    return Pairs(
        [(ours[key], row) for key, row in theirs.items() if key in ours],
        [row for key, row in ours.items() if key not in theirs],
        [row for key, row in theirs.items() if key not in ours],
    )
