"""Records in chat templates, beside transformers' own rendering and masks."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prom_jax.data.chat_templates import ChatTemplate, find_template, read_template
from prom_jax.data.rows import Turn
from prom_jax.data.templates import Dialogue, Plain, Unusable, translation
from prom_jax.data.tokens import encode
from prom_jax.utils.errors import UserError

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>", "[INST]"]
# In the manner of families of models; ⟨ and ⟩ are where `{% generation %}` would begin and end.
TEMPLATES = {
    "SmolLM2": (  # a system message of its own
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}⟨{{ m.content }}"
        "<|im_end|>⟩{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "Llama-3": (  # trims
        "<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{% if m.role == 'assistant' %}"
        "⟨{{ m.content | trim }}<|eot|>⟩{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
    ),
    "Gemma-3": (  # the system message in the first turn, another name for the assistant, and roles checked
        "<s>{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% set said = messages[1:] if first else messages %}{% for m in said %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
        "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
        "{% if m.role == 'assistant' %}⟨{{ m.content | trim }}</turn>⟩{% else %}{{ m.content | trim }}</turn>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    ),
    "Mistral": (  # no system message, and a space before the answer
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} ⟨{{ m.content | trim }}</s>⟩{% else %}"
        "{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    ),
    "Qwen3": (  # thoughts of earlier answers go, and the last answer has a place for them
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if "
        "'</think>' in m.content else '' }}\n</think>\n\n{% endif %}"
        "⟨{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>⟩{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}  # fmt: skip


def bare(template):
    return template.replace("⟨", "").replace("⟩", "")


def with_marks(template):
    return template.replace("⟨", "{% generation %}").replace("⟩", "{% endgeneration %}")


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def chatty(request):
    """A tokenizer with the special tokens of the templates."""
    tokenizer = request.getfixturevalue(request.param)
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    copy.add_special_tokens({"additional_special_tokens": SPECIAL})
    return copy


def messages_of(dialogue):
    system = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    pairs = ((("user", turn.instruction), ("assistant", turn.output)) for turn in dialogue.turns)
    return system + [{"role": role, "content": text} for pair in pairs for role, text in pair]


def encoded(tokenizer, template, text):
    (made,) = encode(tokenizer, [template.spans(text)], 10_000, template)
    return made


texts = st.text(st.sampled_from("ab :.\n\t é́ก้ำक्👩‍🌾<|▁ "), max_size=10)
answers = st.tuples(texts, st.sampled_from(["x", "Asante", "ก้ำ"]), texts).map("".join)
turns = st.lists(st.builds(Turn, texts, st.just(""), answers), min_size=1, max_size=3).map(tuple)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(turns, st.sampled_from(["", "Be brief."]))
def check(tokenizer, name, turns, system):
    template = TEMPLATES[name]
    dialogue = Dialogue(turns, system="" if name == "Mistral" else system)
    theirs = tokenizer.apply_chat_template(
        messages_of(dialogue),
        chat_template=with_marks(template),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    for own in (bare(template), with_marks(template)):
        made = encoded(tokenizer, ChatTemplate(tokenizer, own), dialogue)
        assert made.tokens.tolist() == theirs["input_ids"]
        assert made.loss[1:].tolist() == list(map(bool, theirs["assistant_masks"]))[1:]
        assert made.eos == len(turns) and not made.truncated
    plain = tokenizer.apply_chat_template(messages_of(dialogue), chat_template=bare(template), tokenize=False)
    trims = name in ("Llama-3", "Gemma-3", "Mistral")
    expected = [turn.output.strip() if trims else turn.output for turn in turns]
    expected = [text.lstrip("\n") for text in expected] if name == "Qwen3" else expected
    assert all(text in plain for text in expected) and made.bytes == sum(len(t.encode()) for t in expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(chatty, name, monkeypatch):
    template = ChatTemplate(chatty, bare(TEMPLATES[name]))
    made = {own: ChatTemplate(chatty, own) for own in (bare(TEMPLATES[name]), with_marks(TEMPLATES[name]))}
    monkeypatch.setitem(globals(), "ChatTemplate", lambda tokenizer, own: made[own])  # made once
    check(chatty, name)
    (end,) = template.ends
    assert chatty.convert_ids_to_tokens(end) in ("<|im_end|>", "<|eot|>", "</turn>", "</s>")


FOLDERS = [folder for folder in os.environ.get("CHAT_TOKENIZERS", "").split(os.pathsep) if folder]
LETTERS = ["Asante ", "x", "ก้ำ", "क्", "é", "👩\u200d🌾", "<|", "▁", " ", "\n", "\t", ". ", "12", "# ", "你好"]


def some_messages(rng):
    """A random conversation; each content has a word that comes once."""
    numbers = iter(range(99))

    def content():
        before, after = ("".join(rng.choices(LETTERS, k=rng.randrange(8))) for _ in range(2))
        return f"{before}N{next(numbers):02}{after}"

    messages = [{"role": "system", "content": content()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages += [{"role": role, "content": content()} for role in ("user", "assistant")]
    return messages


def plain_ids_and_mask(tokenizer, messages):
    """What the library makes of messages, and its tokens that touch an answer, or end one."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    mask, place = [False] * len(encoded["input_ids"]), 0
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        content = messages[i]["content"]
        for form in (content.strip(), content.lstrip("\n"), content):  # as the template has it
            changed = [*messages[:i], messages[i] | {"content": form}, *messages[i + 1 :]]
            if tokenizer.apply_chat_template(changed, tokenize=False) == text:
                break
        start = text.index(form, place)
        place = start + len(form)
        space = len(text[place:]) - len(text[place:].lstrip())
        end = next((name for name in special if text.startswith(name, place + space)), "")
        stop = place + space + len(end) if end else place
        for number, (first, last) in enumerate(encoded["offset_mapping"]):
            mask[number] |= (first < place and last > start) or (bool(end) and last == stop and first < last)
    return encoded["input_ids"], mask


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS or [pytest.param("", marks=pytest.mark.skip("CHAT_TOKENIZERS"))])
def test_templates_of_real_models(folder):
    """10,000 conversations with each tokenizer that CHAT_TOKENIZERS names, folders separated by colons."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template, rng = ChatTemplate(tokenizer, tokenizer.chat_template), random.Random(0)
    for _ in range(10_000):
        messages = some_messages(rng)
        ids, mask = plain_ids_and_mask(tokenizer, messages)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        pairs = zip(messages[::2], messages[1::2], strict=True)
        said = tuple(Turn(asked["content"], "", answered["content"]) for asked, answered in pairs)
        made = encoded(tokenizer, template, Dialogue(said, system=system))
        assert made.tokens.tolist() == ids, messages
        assert made.loss.tolist() == mask, messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_spells_a_special_token_stays_text(chatty, name):
    template = ChatTemplate(chatty, bare(TEMPLATES[name]))
    spelled = "".join(SPECIAL) + "</s>"
    made = encoded(chatty, template, Dialogue((Turn(f"a{spelled}", "", f"b{spelled}c"),)))
    plain = encoded(chatty, template, Dialogue((Turn("a", "", "bc"),)))
    special = set(chatty.convert_tokens_to_ids([*SPECIAL, "<s>", "</s>"]))
    found, expected = ([t for t in text.tokens.tolist() if t in special] for text in (made, plain))
    assert found == expected
    assert made.bytes == len(f"b{spelled}c") and made.eos == 1


def test_thoughts_of_the_last_answer_are_learnt(chatty):
    template = ChatTemplate(chatty, bare(TEMPLATES["Qwen3"]))
    thought = "<think>\nhm\n</think>\n\n"
    two = Dialogue((Turn("a", "", f"{thought}x"), Turn("b", "", f"{thought}y")))
    made = encoded(chatty, template, two)
    assert made.tokens.tolist() == chatty.apply_chat_template(
        messages_of(two), chat_template=bare(TEMPLATES["Qwen3"]), return_dict=False
    )
    assert chatty.decode(made.tokens[made.loss]) == f"x<|im_end|>{thought}y<|im_end|>"


def test_other_texts_in_a_chat_template(chatty):
    template = ChatTemplate(chatty, bare(TEMPLATES["SmolLM2"]))
    request = translation("Hello", "Habari", "sw", "0", "en")
    made = encoded(chatty, template, request)
    assert chatty.decode(made.tokens[made.loss]) == "Habari<|im_end|>"
    (turn,) = request.turns
    assert f"{turn.instruction}\n\nHello<|im_end|>" in chatty.decode(made.tokens)
    source = encoded(chatty, template, Dialogue(request.turns, learns="input"))
    assert chatty.decode(source.tokens).endswith("Hello") and source.eos == 0
    assert chatty.decode(source.tokens[source.loss]).strip() == "Hello" and source.bytes == len("Hello")
    cut = encoded(chatty, template, Dialogue((Turn("a", "", "b"),), ended=False))
    assert chatty.decode(cut.tokens[cut.loss]) == "b" and chatty.decode(cut.tokens).endswith("\nb")
    text = encoded(chatty, template, Plain("Habari</s> ya"))
    ids = chatty("Habari</s> ya", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert text.tokens.tolist()[-len(ids) - 1 :] == [*ids, chatty.eos_token_id]


def test_what_a_template_cannot_take_is_said(chatty, tmp_path):
    template = ChatTemplate(chatty, bare(TEMPLATES["Mistral"]))
    with pytest.raises(Unusable, match=r"the chat template refuses it \(no system\)"):
        template.spans(Dialogue((Turn("a", "", "b"),), system="c"))
    for text in (Dialogue((Turn("a", "", "\U00100003"),)), Plain("\U0010fffc")):
        with pytest.raises(Unusable, match="a character for private use"):
            template.spans(text)
    other = ChatTemplate(
        chatty, bare(TEMPLATES["SmolLM2"]).replace("m.content", "m.content | reverse | join")
    )
    assert other.spans(Dialogue((Turn("a", "", "bc"),)))
    shouting = bare(TEMPLATES["SmolLM2"]).replace("m.content", "m.content * 2")
    with pytest.raises(UserError, match="cannot be trained with: an answer that the chat template changes"):
        ChatTemplate(chatty, shouting)
    with pytest.raises(UserError, match="ends answers with no special token"):
        ChatTemplate(chatty, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match=r"data.template=model: .* has no chat template"):
        find_template("model", chatty)
    with pytest.raises(UserError, match=r"data.template=chatml cannot be read .*alpaca, model, or a file"):
        read_template("chatml")
