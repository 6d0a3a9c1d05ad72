"""The command that answers one prompt."""

import json
import shutil

import pytest

import prom_jax
from prom_jax import generate
from prom_jax.checkpoints.pretrained import load_tokenizer
from prom_jax.data.templates import wording
from prom_jax.evaluation.decode import greedy
from prom_jax.utils.errors import UserError
from tests.tiny import sentencepiece_model


def expected(model, tokenizer, prompt, length):
    (answer,) = greedy(model, [tokenizer(prompt)["input_ids"]], length, [tokenizer.eos_token_id])
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_streams_the_greedy_answer(tiny, tmp_path, capsys):
    model, tokenizer = prom_jax.load(tiny / "model")
    for flags, prompt in ((["--raw"], "maziwa"), ([], wording("en").prompt("maziwa"))):
        generate.main(["maziwa", f"--model={tiny / 'model'}", "--max_new_tokens=21", *flags])
        assert capsys.readouterr().out == expected(model, tokenizer, prompt, 21).rstrip("\ufffd") + "\n"

    # A model that was trained here is asked in the language of its prompts.
    shutil.copytree(tiny / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prom_jax": {"prompts": "sw"}}))
    generate.main(["maziwa", f"--model={tmp_path / 'model'}", "--max_new_tokens=9"])
    answer = expected(model, tokenizer, wording("sw").prompt("maziwa"), 9)
    assert capsys.readouterr().out == answer.rstrip("\ufffd") + "\n"


def test_half_a_character_waits(byte_level, capsys):
    show = generate.Stream(byte_level)
    tokens = byte_level("สวัสดี ใช่")["input_ids"]
    for end in range(1, len(tokens) + 1):
        assert show(0, tokens[:end]) is False
    assert capsys.readouterr().out == "สวัสดี ใช่"


def test_nothing_is_printed_again(tmp_path, capsys):
    """Bytes of half a character make those of whole ones before it unreadable."""
    model = sentencepiece_model(["a b ab", "b a"] * 9, 300, hard_vocab_limit=False)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    for text in ("తెలుగు భాష", "ab 😀👩‍👧 é", "a\ufffdb"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for step in (1, 2, 4):
            show = generate.Stream(tokenizer)
            for end in (*range(step, len(tokens), step), len(tokens)):
                show(0, tokens[:end])
            assert capsys.readouterr().out == text


def test_a_prompt_never_ends_with_eos(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    (eos,) = (token for token in content["added_tokens"] if token["content"] == "</s>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos["content"], "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            eos["content"]: {"id": eos["content"], "ids": [eos["id"]], "tokens": [eos["content"]]}
        },
    }
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "model")("maziwa")["input_ids"][-1] == eos["id"]
    answers = set()
    for model in (tiny / "model", tmp_path / "model"):
        generate.main(["maziwa", f"--model={model}", "--raw", "--max_new_tokens=9"])
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["", "--raw"], "has 0 tokens: expected 1 to 768"),
        (["a " * 900, "--raw"], "expected 1 to 768, which leaves 256"),
        (["a", "--max_new_tokens=0"], "--max_new_tokens=0"),
    ],
)
def test_bad_input(tiny, flags, message):
    with pytest.raises(UserError, match=message):
        generate.main([*flags, f"--model={tiny / 'model'}"])
