import pytest

from prom_jax.data import prompts
from prom_jax.errors import UserError


def test_alpaca_prompt_to_the_letter():
    assert prompts.prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:"
    )
    assert prompts.prompt("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )


def test_translation_wording_depends_on_the_variant_alone():
    def text(variant):
        return prompts.translation("Hello", "Habari", "sw", variant)[0].text

    assert text("0:a") == text("0:a")
    assert len({text(f"0:{i}") for i in range(60)}) == len(prompts.TRANSLATE)
    assert "Swahili" in text("0:a") and "Hello" in text("0:a")
    with pytest.raises(UserError, match=r"'xx' has no English name"):
        prompts.translation("Hello", "?", "xx", "0:a")


def test_translation_source_ends_with_the_english_sentence():
    (span,) = prompts.translation_source("Hello", "Habari", "sw", "v")
    assert span.text == prompts.translation("Hello", "Habari", "sw", "v")[0].text
    assert span.text[span.start : span.stop] == "Hello" and not span.eos
