"""The training prompt as a chat template, for those who use the adapted model elsewhere."""

import logging
from collections.abc import Mapping
from string import Template

from prom_jax.data.rows import Turn
from prom_jax.data.templates import Alpaca, Dialogue, Wording, wording
from prom_jax.data.tokens import encode

_CHAT_TEMPLATE = Template(
    # Content is a text, or a list of parts that are texts.
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- else -%}{{- raise_exception('This model reads text alone.') -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "$bos"
    "{%- set turns = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set preamble = text(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if loop.first -%}"
    "{%- if preamble is defined -%}{{- preamble -}}"
    "{%- elif message['input'] -%}{{- $preamble_input -}}{%- else -%}{{- $preamble -}}{%- endif -%}"
    "{%- endif -%}"
    "{{- $instruction + text(message['content']) -}}"
    "{%- if message['input'] -%}{{- $input + message['input'] -}}{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- $response + text(message['content']) + eos_token -}}"
    "{%- if not loop.last -%}{{- $gap -}}{%- endif -%}"
    "{%- else -%}"
    "{{- raise_exception('This model knows a system message, if it is the first, user and assistant.') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- $response -}}{%- endif -%}"
)


def chat_template(tokenizer, language: str = "en") -> str:
    """A jinja template with which `tokenizer.apply_chat_template` gives the ids of training with prompts
    worded in `language`.

    A message may have an `input` besides its `content`. A system message stands in place of the preamble. A
    template is tokenised in one go with its
    special tokens spelled out, and after one of these some SentencePiece tokenizers leave out the
    word mark that they put at the start of a text: a space, found by trial, stands in for it.
    """
    words = wording(language)
    turns = (Turn("a", "", "b"), Turn("c", "", "d"))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.instruction), ("assistant", turn.output))
    ]
    (expected,) = encode(tokenizer, [Alpaca(tokenizer).spans(Dialogue(turns, language))], seq_len=1024)
    adds_bos = expected.tokens[0] == tokenizer.bos_token_id
    for gap in ("", " "):
        template = _render_template(words, gap, adds_bos)
        ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        if ids == expected.tokens.tolist():
            return template
    logging.getLogger(__name__).warning("The chat template does not give the ids of training.")
    return _render_template(words, "", adds_bos)


def template_of(tokenizer, details: Mapping[str, object]):
    """The chat template of a model: the prompt of training where it was trained here, else the tokenizer's
    own, by name where there are several; None where there is none.

    Args:
      details: how the model was made (`checkpoints.reader.Reader`).
    """
    if "prompts" in details:
        first, *_ = str(details["prompts"]).split(",")  # of several languages
        return chat_template(tokenizer, first)
    return tokenizer.chat_template


def _render_template(words: Wording, gap: str, adds_bos: bool) -> str:
    return _CHAT_TEMPLATE.substitute(
        bos=f"{{{{- bos_token + {gap!r} -}}}}" if adds_bos else "",
        gap=repr(gap),
        preamble=repr(words.preamble),
        preamble_input=repr(words.preamble_input),
        instruction=repr(words.before_instruction),
        input=repr(words.before_input),
        response=repr(words.before_response),
    )
