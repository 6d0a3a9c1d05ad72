"""What the model reads of a dialogue: the Alpaca prompt and translation prompts, worded in
`resources/prompts/`. (The chat template of a model is in `chat_templates`.)

A text is rendered into *spans*, each tokenised on its own; a conversation in Alpaca's prompt has one a turn.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a text says, before a template puts it into the words that the model reads.

    turns, system: as in `rows.Row`.
    words: the language in which Alpaca's prompts are worded.
    learns: what has a loss: every 'output', or the 'input' of the only turn, at whose end the text then ends.
    ended: whether answers are ended; if not, the text stops with the last one.
    """

    turns: tuple[Turn, ...]
    words: str = "en"
    system: str = ""
    learns: str = "output"
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Plain:
    """Text without a prompt. One that is longer than a row is cut; where it `continues` the rest follows in
    further texts."""

    text: str
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """Text to be tokenised at once. The tokens that cover `text[start:stop]` of any range that is `learnt`
    have a loss. What follows the last of these is cut off, and `eos` appends the end-of-sequence token, which
    has a loss too; but not if the text is `whole`: then it has its own beginning and the `ends` of its turns,
    ranges of special tokens that have a loss. `continues` as in `Plain`."""

    text: str
    learnt: tuple[tuple[int, int], ...]
    eos: bool = True
    ends: tuple[tuple[int, int], ...] = ()
    whole: bool = False
    continues: bool = False


class Unusable(ValueError):
    """A text that a template cannot take, and why."""


class Template(Protocol):
    """What puts a dialogue into words. `alpaca` is one, a model's own chat template another."""

    def spans(self, text: Dialogue | Plain) -> list[Span]:
        """What the model reads of a text.

        Raises:
          Unusable: the template cannot take it.
        """

    def tokenise(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """The ids and the character offsets of each text, without BOS and EOS."""


def plain(text: Plain) -> list[Span]:
    """What the model reads of text without a prompt."""
    return [Span(text.text, ((0, len(text.text)),), continues=text.continues)]


def translation(english: str, target: str, language: str, variant: str, words: str) -> Dialogue:
    """A request to translate into `language`; which of the wordings depends on `variant` alone."""
    digest = hashlib.sha256(variant.encode()).digest()
    requests = wording(words).translate
    request = requests[int.from_bytes(digest[:8]) % len(requests)]
    turn = Turn(request.replace("{language}", language_name(language)), english, target)
    return Dialogue((turn,), words)


class Alpaca:
    """The prompt of Stanford Alpaca, in any language that has the words."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def spans(self, text: Dialogue | Plain) -> list[Span]:
        """A prompt and an answer a turn; only the answers have a loss, and the end of each."""
        return plain(text) if isinstance(text, Plain) else self._conversation(text)

    def _conversation(self, dialogue: Dialogue) -> list[Span]:
        words = wording(dialogue.words)
        spans = []
        for number, turn in enumerate(dialogue.turns):
            first = number == 0
            asked = words.prompt(turn.instruction, turn.input, first=first, system=dialogue.system)
            learnt, is_source = (len(asked), len(asked) + len(turn.output)), dialogue.learns == "input"
            if is_source:
                stop = len(asked) - len(words.before_response)
                learnt = stop - len(turn.input), stop
            spans.append(Span(asked + turn.output, (learnt,), dialogue.ended and not is_source))
        return spans

    def tokenise(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """See `Template`. Text that spells a special token stays text."""
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # longer than the model takes? it is cut afterwards
        )
        return encoded["input_ids"], encoded["offset_mapping"]
