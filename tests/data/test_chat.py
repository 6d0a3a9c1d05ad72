import pytest

from prom_jax.data import templates as prompts
from prom_jax.data.chat import chat_template
from prom_jax.data.sources import Turn
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
    (trained,) = encode(tokenizer, [prompts.conversation(turns, prompts.wording(language))], 1000)
    assert ids == trained.tokens.tolist()


def test_generation_prompt_is_the_prompt(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hi"}],
        chat_template=chat_template(tokenizer),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == tokenizer(prompts.wording("en").prompt("Say hi"))["input_ids"]
