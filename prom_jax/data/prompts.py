"""What the model reads: the Alpaca prompt, translation prompts, and the same as a chat template.

An example is rendered into *spans*, each tokenised on its own; a conversation has one a turn.
"""

import hashlib
import logging
from dataclasses import dataclass
from string import Template

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


# The chat template ----------------------------------------------------------------------------

_CHAT_TEMPLATE = Template(
    "$bos"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if loop.first -%}{{- $preamble_input if message['input'] else $preamble -}}{%- endif -%}"
    "{{- $instruction + message['content'] -}}"
    "{%- if message['input'] -%}{{- $input + message['input'] -}}{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- $response + message['content'] + eos_token -}}"
    "{%- if not loop.last -%}{{- $gap -}}{%- endif -%}"
    "{%- else -%}"
    "{{- raise_exception('This model knows the roles user and assistant alone.') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- $response -}}{%- endif -%}"
)


def chat_template(tokenizer) -> str:
    """A jinja template with which `tokenizer.apply_chat_template` gives the ids of training.

    A message may carry an `input` beside its `content`. A template is tokenised in one go with its
    special tokens spelled out, and after one of these some SentencePiece tokenizers leave out the
    word mark that they put at the start of a text: a space, found by trial, stands in for it.
    """
    from prom_jax.data.records import encode

    turns = (Turn("a", "", "b"), Turn("c", "", "d"))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.instruction), ("assistant", turn.output))
    ]
    (expected,) = encode(tokenizer, [conversation(turns)], seq_len=1024)
    adds_bos = expected.tokens[0] == tokenizer.bos_token_id
    for gap in ("", " "):
        template = _render_template(gap, adds_bos)
        ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        if ids == expected.tokens.tolist():
            return template
    logging.getLogger(__name__).warning("The chat template does not give the ids of training.")
    return _render_template("", adds_bos)


def _render_template(gap: str, adds_bos: bool) -> str:
    return _CHAT_TEMPLATE.substitute(
        bos=f"{{{{- bos_token + {gap!r} -}}}}" if adds_bos else "",
        gap=repr(gap),
        preamble=repr(PREAMBLE),
        preamble_input=repr(PREAMBLE_INPUT),
        instruction=repr(INSTRUCTION),
        input=repr(INPUT),
        response=repr(RESPONSE),
    )
