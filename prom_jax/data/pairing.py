"""Which English row and which target row are counterparts."""

from dataclasses import replace

from prom_jax.data.rows import Row
from prom_jax.utils.errors import UserError


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
        row = row if row.id is not None else replace(row, id=f"#{number}")
        if row.id in table:
            raise UserError(f"Id '{row.id}' occurs twice on the {side} side: make ids unique.")
        table[row.id] = row
    return table


def pair(english: list[Row], target: list[Row]) -> tuple[list[tuple[Row, Row]], int]:
    """(English row, target row) pairs by id, and how many rows found no partner.

    A side without ids is numbered, so that without any the rows pair by order.

    Raises:
      UserError: as `by_id`; no id on both sides; without ids, sides of different lengths.
    """
    ours, theirs = by_id(english, "English"), by_id(target, "target")
    if len(english) != len(target) and all(row.id is None for row in english + target):
        raise UserError(
            f"{len(english)} English and {len(target)} target rows cannot be paired by order: make "
            "them equally many, or give every row of both sides an 'id'."
        )
    pairs = [(ours[key], row) for key, row in theirs.items() if key in ours]
    if not pairs:
        raise UserError(
            f"No English row has the id of a target row (such as '{next(iter(ours))}' and "
            f"'{next(iter(theirs))}', where #n is the n-th row of a side without ids): give counterparts "
            "the same id."
        )
    return pairs, len(english) + len(target) - 2 * len(pairs)
