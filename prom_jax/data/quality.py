"""What is suspicious in data: texts in another language, pairs that are none, duplicates, odd characters.

Nothing is left out for it. The numbers are in the data card with three examples each, and a warning says
where one is much: a file that was given for another one, or shuffled, shows at once.
"""

import importlib.util
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prom_jax.data.templates import Dialogue, Plain
from prom_jax.data.translation.checks import FLAWS, in_script

SAMPLE = 1000  # texts of a role that are looked at, evenly spread; duplicates are looked for in all
SHOWN, LONGEST = 3, 80  # examples of a check, and characters of each
JOINERS = {*"\u200b\u200c\u200d\u2060\ufeff\u00ad"}  # characters that do not show


@dataclass
class Found:
    """What a check finds: `rows` of the `of` that were looked at, and the first of these as `examples`."""

    rows: int = 0
    of: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, wrong: bool, text: str) -> None:
        """Enters a text."""
        self.of += 1
        self.rows += wrong
        if wrong and len(self.examples) < SHOWN:
            line = " ".join(text.split())
            self.examples.append(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")


def look(
    texts: dict[str, tuple[str, list]], pairs: dict[str, list[tuple]], holdout: Iterable, same: str
) -> dict[str, dict[str, dict]]:
    """Looks at the texts that are trained on.

    Args:
      texts: by role, the language that its texts should be in, and the texts (`Dialogue` or `Plain`).
      pairs: by role, (English text, target text) that should say the same.
      holdout: held-out texts, which should not be among those of the role `same`.
    Returns:
      {role: {check: {"rows", "of", "examples"}}}, only checks that found something.
    """
    held = {_said(text, same) for text in holdout}
    found: dict[str, dict[str, Found]] = {}
    for role, (language, of_role) in texts.items():
        of = found.setdefault(role, {})
        for text in _spread(of_role):
            learnt = answer(text)
            for name, is_wrong in OF_TEXT.items():
                of.setdefault(name, Found()).add(is_wrong(learnt, language), learnt)
        seen: set = set()
        for text in of_role:
            said = _said(text, role)
            of.setdefault("duplicate", Found()).add(said in seen, answer(text))
            seen.add(said)
            if role == same and held:
                of.setdefault("held out too", Found()).add(said in held, answer(text))
    for role, of_role in pairs.items():
        for english, target in _spread(of_role):
            for name in OF_PAIR:
                wrong, both = FLAWS[name](english, target, ""), f"{target} ({english})"
                found.setdefault(role, {}).setdefault(name, Found()).add(wrong, both)
    return {
        role: {name: vars(check) for name, check in of.items() if check.rows}
        for role, of in found.items()
        if any(check.rows for check in of.values())
    }


def answer(text: Dialogue | Plain) -> str:
    """What is learnt of a text."""
    return text.text if isinstance(text, Plain) else "\n".join(turn.output for turn in text.turns)


def warnings(found: dict[str, dict[str, dict]]) -> Iterator[str]:
    """Sentences on what `look` found much of."""
    for role, of in found.items():
        for name, check in of.items():
            if check["rows"] > MUCH[name] * check["of"]:
                yield (
                    f"{check['rows'] / check['of']:.1%} of {check['of']:,} texts of {role} are "
                    f"{MEANING[name]}, such as {check['examples'][0]!r}"
                )


def _said(text: Dialogue | Plain, role: str):
    """What makes two texts the same: of a translation not in which words it is asked for."""
    if role == "translation" and isinstance(text, Dialogue):
        return tuple((turn.input, turn.output) for turn in text.turns)
    return text


def _spread(texts: list) -> list:
    """At most SAMPLE of them, from first to last."""
    return texts[:: -(-len(texts) // SAMPLE)] if texts else []


def _other_language(text: str, language: str) -> bool:
    if not in_script(text, language):
        return True
    # Without the extra `translate` scripts alone are told apart.
    return importlib.util.find_spec("py3langid") is not None and FLAWS["language"]("", text, language)


def _not_composed(text: str, language: str) -> bool:
    return not unicodedata.is_normalized("NFC", text)


def _joiners(text: str, language: str) -> bool:
    return not JOINERS.isdisjoint(text)


OF_TEXT: dict[str, Callable[[str, str], bool]] = {
    "other language": _other_language,
    "not NFC": _not_composed,
    "invisible": _joiners,
}
OF_PAIR = ("numbers", "length")  # of `translation.checks`
MEANING = {
    "other language": "not in the language",
    "not NFC": "not in Unicode's composed form, NFC",
    "invisible": "with joiners or other characters that do not show",
    "duplicate": "there twice",
    "held out too": "in the held-out examples too",
    "numbers": "of other numbers than the English counterpart",
    "length": "far longer or shorter than the English counterpart",
}
# Shares from which on a warning says so. Human translations have other numbers in up to 2.6 % of sentences.
MUCH = dict.fromkeys(MEANING, 0.1) | {"duplicate": 0.05, "held out too": 0.0, "invisible": 0.5}
