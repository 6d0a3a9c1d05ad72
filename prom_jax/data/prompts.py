"""What the model reads: the Alpaca prompt and translation prompts.

An example is rendered into *spans*, each tokenised on its own; a conversation has one a turn.
"""

import hashlib
from dataclasses import dataclass

from prom_jax.data.sources import Turn
from prom_jax.errors import UserError

VERSION = 1  # part of the records' fingerprint: raise it whenever a rendered text changes

# Stanford Alpaca's wording and white space, to the letter.
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
INSTRUCTION = "\n\n### Instruction:\n"
INPUT = "\n\n### Input:\n"
RESPONSE = "\n\n### Response:"

TRANSLATE = (
    "Translate the following sentences from English to {language}.",
    "What do the following sentences mean in {language}?",
    "Please translate this English text into {language}.",
    "Give the {language} translation of the text below.",
    "Rewrite this English passage in {language}, keeping its meaning.",
    "How would you say the following in {language}?",
)
LANGUAGES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "el": "Greek",
    "ml": "Malayalam",
    "mr": "Marathi",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
}


@dataclass(frozen=True)
class Span:
    """Text to be tokenised at once. The tokens that cover `text[start:stop]` bear loss and what
    follows `stop` is cut off; `eos` appends the end-of-sequence token, which bears loss too."""

    text: str
    start: int
    stop: int
    eos: bool = True


def prompt(instruction: str, input: str = "", first: bool = True) -> str:
    """The Alpaca prompt; a conversation's later turns leave the preamble out."""
    preamble = (PREAMBLE_INPUT if input else PREAMBLE) if first else ""
    return preamble + INSTRUCTION + instruction + (INPUT + input if input else "") + RESPONSE


def conversation(turns: tuple[Turn, ...]) -> list[Span]:
    """A prompt and an answer a turn; only the answers bear loss."""
    spans = []
    for number, turn in enumerate(turns):
        asked = prompt(turn.instruction, turn.input, first=number == 0)
        text = asked + turn.output
        spans.append(Span(text, len(asked), len(text)))
    return spans


def translation(english: str, target: str, language: str, variant: str) -> list[Span]:
    """A request in English to translate into `language`; its wording depends on `variant` alone."""
    return conversation((Turn(_translate(language, variant), english, target),))


def translation_source(english: str, target: str, language: str, variant: str) -> list[Span]:
    """The text of `translation` up to the end of the English sentence, which bears the loss."""
    (span,) = translation(english, target, language, variant)
    stop = span.start - len(RESPONSE)
    return [Span(span.text, stop - len(english), stop, eos=False)]


def plain(text: str) -> list[Span]:
    """Text without a prompt."""
    return [Span(text, 0, len(text))]


def _translate(language: str, variant: str) -> str:
    if language not in LANGUAGES:
        raise UserError(
            f"Language '{language}' has no English name here: expected one of "
            f"{', '.join(LANGUAGES)}; add it to LANGUAGES in prom_jax/data/prompts.py."
        )
    digest = hashlib.sha256(variant.encode()).digest()
    return TRANSLATE[int.from_bytes(digest[:8]) % len(TRANSLATE)].format(language=LANGUAGES[language])
