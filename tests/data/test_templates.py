import dataclasses
import unicodedata

import pytest

from prom_jax.data import templates as prompts
from prom_jax.data.rows import Turn
from prom_jax.data.templates import Alpaca, Dialogue, wording
from prom_jax.utils.errors import UserError

LANGUAGES = {
    "ar": "ARABIC", "bn": "BENGALI", "el": "GREEK", "en": "LATIN", "ml": "MALAYALAM", "mr": "DEVANAGARI",
    "sw": "LATIN", "ta": "TAMIL", "te": "TELUGU", "th": "THAI",
}  # fmt: skip
ENGLISH = wording("en")
ALPACA = Alpaca(None)


def test_alpaca_prompt_to_the_letter():
    assert ENGLISH.prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:"
    )
    assert ENGLISH.prompt("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )
    assert wording("sw").prompt("Fanya.", "1", first=False) == (
        "\n\n### Maagizo:\nFanya.\n\n### Ingizo:\n1\n\n### Jibu:"
    )


def test_a_system_message_stands_in_place_of_the_preamble():
    turns = (Turn("Do it.", "", "Done"), Turn("Again", "", "Yes"))
    first, second = ALPACA.spans(Dialogue(turns, system="Be brief."))
    assert first.text == "Be brief.\n\n### Instruction:\nDo it.\n\n### Response:Done"
    assert second == ALPACA.spans(Dialogue(turns))[1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_wording(language):
    words = wording(language)
    assert len(words.translate) >= (20 if language == "en" else 5)
    assert len(set(words.translate)) == len(words.translate)
    texts = [words.preamble, words.preamble_input, words.instruction, words.input, words.response]
    assert len(set(texts)) == 5
    for text in (*texts, *words.translate):
        assert text == text.strip() == unicodedata.normalize("NFC", text)
        letters = [c for c in text.replace("{language}", "") if c.isalpha()]
        assert all(unicodedata.name(c).startswith(LANGUAGES[language]) for c in letters)
    for heading in texts[2:]:
        assert heading.startswith("### ") and heading.endswith(":")
    slots = {text.count("{language}") for text in words.translate}
    assert slots == ({1} if language == "en" else {0})


def test_translation_wording_depends_on_the_variant_alone():
    def text(variant, words="en"):
        return ALPACA.spans(prompts.translation("Hello", "Habari", "sw", variant, words))[0].text

    assert text("0:a") == text("0:a")
    assert len({text(f"0:{i}") for i in range(400)}) == len(ENGLISH.translate)
    assert "Swahili" in text("0:a") and "Hello" in text("0:a")
    target = wording("sw")
    assert len({text(f"0:{i}", "sw") for i in range(100)}) == len(target.translate)
    assert "Hapa chini" in text("0:a", "sw") and "Jibu:Habari" in text("0:a", "sw")


def test_any_language_has_a_name():
    assert prompts.language_name("sw") == "Swahili" and prompts.language_name("bn") == "Bengali"
    assert prompts.language_name("yo") == "Yoruba" and prompts.language_name("pt-BR").startswith("Portuguese")
    with pytest.raises(UserError, match="Language 'xx' is not known"):
        prompts.language_name("xx")
    with pytest.raises(UserError, match=r"no prompts in language 'yo'.*data.prompts=english"):
        wording("yo")


def test_translation_source_ends_with_the_english_sentence():
    for words in ("en", "th"):
        request = prompts.translation("Hello", "Habari", "sw", "v", words)
        (span,) = ALPACA.spans(dataclasses.replace(request, learns="input"))
        assert span.text == ALPACA.spans(request)[0].text
        assert learnt(span) == "Hello" and not span.eos


def learnt(span):
    """The text of its only range that has a loss."""
    ((start, stop),) = span.learnt
    return span.text[start:stop]


def test_conversation_repeats_headings_alone():
    first, second = ALPACA.spans(Dialogue((Turn("a", "", "b"), Turn("c", "d", "e"))))
    assert first.text.startswith(ENGLISH.preamble) and learnt(first) == "b"
    assert second.text == "\n\n### Instruction:\nc\n\n### Input:\nd\n\n### Response:e"
