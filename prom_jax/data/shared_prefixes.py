"""What texts begin with alike: the words of a prompt that come before all that is an example's own.

Computed once for the texts of a row, they cost nothing more.
"""

import numpy as np

from prom_jax.data.tokens import Side, common_prefix

SHORTEST = 16  # tokens in which texts must agree to be of a kind, and so the fewest that are shared
NONE = -1


class Beginnings:
    """The kinds of one side's texts, by their first tokens, and what all of a kind begin with."""

    def __init__(self):
        self._kinds: dict[bytes, int] = {}
        self._common: list[np.ndarray] = []

    def add(self, side: Side | None) -> int:
        """Takes a text into account; returns the number of its kind, or NONE."""
        return NONE if side is None else self._add(side.tokens[: prompt_length(side)])

    def merge(self, others: "Beginnings") -> np.ndarray:
        """Takes all texts of others into account; returns the number of each of their kinds here."""
        return np.array([self._add(common) for common in others._common], np.int64)

    def lengths(self) -> np.ndarray:
        """Tokens that all texts of a kind begin with, int64 [kinds]."""
        return np.array([len(common) for common in self._common], np.int64)

    def _add(self, tokens: np.ndarray) -> int:
        if len(tokens) < SHORTEST:
            return NONE
        kind = self._kinds.setdefault(tokens[:SHORTEST].tobytes(), len(self._common))
        if kind == len(self._common):
            self._common.append(tokens.copy())
        self._common[kind] = self._common[kind][: common_prefix(self._common[kind], tokens)]
        return kind


def prompt_length(side: Side) -> int:
    """Leading tokens that neither bear loss nor predict one that does."""
    return max(0, int(side.loss.argmax()) - 1) if side.loss.any() else len(side.tokens)


def common_prompt(target: Side, english: Side) -> int:
    """Leading tokens of an example's prompt that both of its sides have."""
    shared = common_prefix(target.tokens, english.tokens)
    return min(shared, prompt_length(target), prompt_length(english))
