"""What is suspicious in data: texts in another language, pairs that are none, duplicates, odd characters.

Nothing is left out for it. The numbers are in the data card with three examples each, and a warning says
where one is much: a file that was given for another one, or shuffled, shows at once.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prom_jax.data.examples import CONVERSION, ENGLISH, PRIMARY, Example, Recipe, role_in
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

    def add(self, wrong: bool, text: str | Dialogue | Plain) -> None:
        """Enters a text."""
        self.of += 1
        self.rows += wrong
        if wrong and len(self.examples) < SHOWN:
            line = " ".join((text if isinstance(text, str) else answer(text)).split())
            self.examples.append(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")


class Look:
    """What is found while the examples to train on go by.

    Args:
      recipe: of the examples.
      holdout: the held-out examples, whose target texts should not be among those of their role.
    """

    def __init__(self, recipe: Recipe, holdout: Sequence[Example] = ()):
        self._recipe = recipe
        self._same = holdout[0].role if holdout else ""
        held = [example.texts[PRIMARY] for example in holdout if PRIMARY in example.texts]
        self._held = {_said(text, self._same) for text in held}
        self._samples: dict[str, tuple[str, Sample]] = {}  # by role, the language and the learnt text
        self._pairs: dict[str, Sample] = {}  # by role, (English text, target text) that should say the same
        self._seen: dict[str, set[int]] = {}  # by role, hashes of what was said
        self._found: dict[str, dict[str, Found]] = {}

    def at(self, example: Example) -> Example:
        """Looks at an example; returns it."""
        for stream, text in example.texts.items():
            role = role_in(stream, example.role)
            if role not in (CONVERSION, "translation_source"):
                self._look(role, self._recipe.language if stream == PRIMARY else "en", text)
        target, english = (example.texts.get(stream) for stream in (PRIMARY, ENGLISH))
        if example.role == "translation" and isinstance(target, Dialogue):
            for turn in target.turns:
                self._pairs.setdefault("translation", Sample()).add((turn.input, turn.output))
        elif example.role == "target" and target and english and not self._recipe.shuffled:
            self._pairs.setdefault("target", Sample()).add((answer(english), answer(target)))
        return example

    def _look(self, role: str, language: str, text: Dialogue | Plain) -> None:
        self._samples.setdefault(role, (language, Sample()))[1].add(text)
        of, seen, said = (
            self._found.setdefault(role, {}),
            self._seen.setdefault(role, set()),
            _said(text, role),
        )
        of.setdefault("duplicate", Found()).add(said in seen, text)
        seen.add(said)
        if role == self._same and self._held:
            of.setdefault("held out too", Found()).add(said in self._held, text)

    def found(self) -> dict[str, dict[str, dict]]:
        """{role: {check: {"rows", "of", "examples"}}}, only checks that found something."""
        for role, (language, sample) in self._samples.items():
            for text in sample.taken:
                learnt = answer(text)
                for name, is_wrong in OF_TEXT.items():
                    self._found[role].setdefault(name, Found()).add(is_wrong(learnt, language), learnt)
        for role, sample in self._pairs.items():
            for english, target in sample.taken:
                for name in OF_PAIR:
                    wrong, both = bool(FLAWS[name](english, target, "")), f"{target} ({english})"
                    self._found.setdefault(role, {}).setdefault(name, Found()).add(wrong, both)
        return {
            role: {name: vars(check) for name, check in of.items() if check.rows}
            for role, of in self._found.items()
            if any(check.rows for check in of.values())
        }


class Sample:
    """At most SAMPLE of the things that are added, as `taken`, evenly spread."""

    def __init__(self):
        self.taken: list = []
        self._number, self._step = 0, 1

    def add(self, thing) -> None:
        """Takes every so many."""
        if self._number % self._step == 0:
            self.taken.append(thing)
            if len(self.taken) > SAMPLE:
                self.taken, self._step = self.taken[::2], 2 * self._step
        self._number += 1


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


def _said(text: Dialogue | Plain, role: str) -> int:
    """A hash of what makes two texts the same: of a translation not in which words it is asked for."""
    if role == "translation" and isinstance(text, Dialogue):
        return hash(tuple((turn.input, turn.output) for turn in text.turns))
    return hash(text)


def _other_language(text: str, language: str) -> bool:
    return not in_script(text, language) or FLAWS["language"]("", text, language)


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
