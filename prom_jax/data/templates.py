"""What the model reads: the Alpaca prompt and translation prompts, worded in `resources/prompts/`.

An example is rendered into *spans*, each tokenised on its own; a conversation has one a turn.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import langcodes

from prom_jax.data.rows import Turn
from prom_jax.utils.errors import UserError

VERSION = 2  # part of the records' fingerprint, as the tables are: raise it whenever a prompt's form changes
TABLES = Path(__file__).parents[1] / "resources" / "prompts"


@dataclass(frozen=True)
class Wording:
    """The words of prompts in one language.

    name: the language's in English; preamble, preamble_input: what an instruction without and with an
    input begins with; instruction, input, response: headings; translate: requests to translate from
    English, in the English table with the place `{language}`.
    """

    name: str
    preamble: str
    preamble_input: str
    instruction: str
    input: str
    response: str
    translate: tuple[str, ...]

    def prompt(self, instruction: str, input: str = "", first: bool = True, system: str = "") -> str:
        """The Alpaca prompt; a conversation's later turns leave the preamble out, and a system message stands
        in place of it."""
        preamble = (system or (self.preamble_input if input else self.preamble)) if first else ""
        asked = self.before_instruction + instruction + (self.before_input + input if input else "")
        return preamble + asked + self.before_response

    @property
    def before_instruction(self) -> str:
        """The heading with its white space, to the letter of Stanford Alpaca's; so the next two."""
        return f"\n\n{self.instruction}\n"

    @property
    def before_input(self) -> str:
        return f"\n\n{self.input}\n"

    @property
    def before_response(self) -> str:
        return f"\n\n{self.response}"


@functools.cache
def wording(language: str) -> Wording:
    """The words of `language`.

    Raises:
      UserError: none are there.
    """
    path = TABLES / f"{language}.json"
    if not path.is_file():
        known = ", ".join(sorted(table.stem for table in TABLES.glob("*.json")))
        raise UserError(
            f"There are no prompts in language '{language}' (there are in {known}): set "
            f"data.prompts=english, or write {path} like en.json in the same folder."
        )
    table = json.loads(path.read_text("utf-8"))
    return Wording(**table | {"translate": tuple(table["translate"])})


def language_name(language: str) -> str:
    """The English name of a language by its code, such as 'th'.

    Raises:
      UserError: for no language's code.
    """
    if (TABLES / f"{language}.json").is_file():
        return wording(language).name
    name = langcodes.get(language).display_name() if langcodes.tag_is_valid(language) else "Unknown"
    if name.startswith("Unknown"):
        raise UserError(f"Language '{language}' is not known: give its ISO 639 code, such as 'th'.")
    return name


@dataclass(frozen=True)
class Span:
    """Text to be tokenised at once. The tokens that cover `text[start:stop]` have a loss and what
    follows `stop` is cut off; `eos` appends the end-of-sequence token, which has one too."""

    text: str
    start: int
    stop: int
    eos: bool = True


def conversation(turns: tuple[Turn, ...], words: Wording, eos: bool = True, system: str = "") -> list[Span]:
    """A prompt and an answer a turn; only the answers have a loss, and with `eos` the end of each."""
    spans = []
    for number, turn in enumerate(turns):
        asked = words.prompt(turn.instruction, turn.input, first=number == 0, system=system)
        text = asked + turn.output
        spans.append(Span(text, len(asked), len(text), eos))
    return spans


def translation(english: str, target: str, language: str, variant: str, words: Wording) -> list[Span]:
    """A request to translate into `language`; which of the wordings depends on `variant` alone."""
    digest = hashlib.sha256(variant.encode()).digest()
    request = words.translate[int.from_bytes(digest[:8]) % len(words.translate)]
    turn = Turn(request.replace("{language}", language_name(language)), english, target)
    return conversation((turn,), words)


def translation_source(english: str, target: str, language: str, variant: str, words: Wording) -> list[Span]:
    """The text of `translation` up to the end of the English sentence, which has the loss."""
    (span,) = translation(english, target, language, variant, words)
    stop = span.start - len(words.before_response)
    return [Span(span.text, stop - len(english), stop, eos=False)]


def plain(text: str) -> list[Span]:
    """Text without a prompt."""
    return [Span(text, 0, len(text))]
