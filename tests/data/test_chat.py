import pytest
from jinja2.exceptions import TemplateError

from prom_jax.data import templates as prompts
from prom_jax.data.chat import chat_template
from prom_jax.data.rows import Turn
from prom_jax.data.templates import Alpaca, Dialogue
from prom_jax.data.tokens import encode


@pytest.mark.parametrize("language", ["en", "th", "sw"])
@pytest.mark.parametrize(
    "turns",
    [
        (Turn("Say hi", "", "Habari ya asubuhi"),),
        (Turn("Add", "1, 2", "3"),),
        (Turn("Say hi", "", "Hi"), Turn("Again", "", "Hi"), Turn(" spaced ", "", " \nout\n")),
    ],
)
def test_chat_template_gives_the_ids_of_training(tokenizer, turns, language):
    template = chat_template(tokenizer, language)
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.instruction, "input": turn.input})
        messages.append({"role": "assistant", "content": turn.output})
    ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
    (trained,) = encode(tokenizer, [Alpaca(tokenizer).spans(Dialogue(turns, language))], 1000)
    assert ids == trained.tokens.tolist()


def test_generation_prompt_is_the_prompt(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hi"}],
        chat_template=chat_template(tokenizer),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == tokenizer(prompts.wording("en").prompt("Say hi"))["input_ids"]


def test_a_system_message_stands_in_place_of_the_preamble(tokenizer):
    words = prompts.wording("th")
    system = {"role": "system", "content": "Answer in Thai."}
    asked = {"role": "user", "content": "Say hi", "input": "now"}
    template = chat_template(tokenizer, "th")
    render = lambda *messages: tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    expected = render(asked).replace(words.preamble_input, system["content"])
    assert render(system, asked) == expected != render(asked)
    with pytest.raises(TemplateError, match="a system message, if it is the first"):
        render(asked, system)


def test_content_may_be_a_list_of_texts(tokenizer):
    """As chat programs send it to `transformers serve` and others."""
    template = chat_template(tokenizer)
    render = lambda content: tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False
    )
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": " hi\n"}]
    assert render(parts) == render("Say  hi\n")
    with pytest.raises(TemplateError, match="text alone"):
        render([{"type": "image", "url": "x"}])
