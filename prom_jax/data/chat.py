"""The training prompt as a chat template, for those who use the adapted model elsewhere."""

import logging
from string import Template

from prom_jax.data.prompts import INPUT, INSTRUCTION, PREAMBLE, PREAMBLE_INPUT, RESPONSE, conversation
from prom_jax.data.sources import Turn
from prom_jax.data.tokens import encode

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
