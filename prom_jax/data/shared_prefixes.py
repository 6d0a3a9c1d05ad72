"""Prompt prefixes shared by many examples, computed once per row.

A prefix is what comes in a prompt before all that is an example's own: the preamble of a template, a system
prompt.
"""

import numpy as np

from prom_jax.data.tokens import EncodedText, common_prefix

SHORTEST = 16  # tokens in which texts must agree to share a prefix, and so the fewest that are shared
NONE = -1


class PrefixIndex:
    """The prefixes that texts of one stream share: found by their first tokens, as long as all agree."""

    def __init__(self):
        self._ids: dict[bytes, int] = {}
        self._prefixes: list[np.ndarray] = []

    def add(self, text: EncodedText | None) -> int:
        """Takes a text into account; returns the id of its prefix, or NONE."""
        return NONE if text is None else self._add(text.tokens[: prompt_length(text)])

    def merge(self, other: "PrefixIndex") -> np.ndarray:
        """Takes all texts of another index into account; returns the ids that its prefixes have here."""
        return np.array([self._add(prefix) for prefix in other._prefixes], np.int64)

    def lengths(self) -> np.ndarray:
        """Tokens of each prefix, int64 [prefixes]."""
        return np.array([len(prefix) for prefix in self._prefixes], np.int64)

    def _add(self, tokens: np.ndarray) -> int:
        if len(tokens) < SHORTEST:
            return NONE
        number = self._ids.setdefault(tokens[:SHORTEST].tobytes(), len(self._prefixes))
        if number == len(self._prefixes):
            self._prefixes.append(tokens.copy())
        prefix = self._prefixes[number]
        self._prefixes[number] = prefix[: common_prefix(prefix, tokens)]
        return number


def prompt_length(text: EncodedText) -> int:
    """Leading tokens that neither bear a loss nor predict one that does."""
    return max(0, int(text.loss.argmax()) - 1) if text.loss.any() else len(text.tokens)


def common_prompt(primary: EncodedText, secondary: EncodedText) -> int:
    """Leading tokens of an example's prompt that both of its texts have."""
    shared = common_prefix(primary.tokens, secondary.tokens)
    return min(shared, prompt_length(primary), prompt_length(secondary))
