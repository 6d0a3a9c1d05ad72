"""Tokenizers in GGUF metadata against transformers and the tokenizers library."""

import json
import unicodedata

import pytest
import sentencepiece
from transformers import AutoTokenizer, Qwen2Tokenizer

from prom_jax.checkpoints.pretrained import load_tokenizer
from prom_jax.utils.errors import UserError
from tests.tiny import sentencepiece_model
from tests.tokenization.made_up import (
    CORPUS,
    GPT2,
    SMOLLM,
    SPECIAL_TEXTS,
    TEXTS,
    byte_level_fields,
    llama_fields,
    train_byte_level,
    write_gguf,
)


@pytest.mark.parametrize(
    ("pre", "split"), [("gpt-2", GPT2), ("default", GPT2), ("smollm", SMOLLM), ("refact", SMOLLM)]
)
def test_byte_level_gguf_equals_the_tokenizer_it_was_made_of(tmp_path, pre, split):
    original = train_byte_level(split)
    path = write_gguf(tmp_path / "m.gguf", **byte_level_fields(original, pre))
    loaded = load_tokenizer(path)
    for text in TEXTS + SPECIAL_TEXTS:
        ids = loaded(text).input_ids
        assert ids == original.encode(text).ids
        assert loaded.decode(ids) == text
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.bos_token == "<|im_start|>"
    assert loaded.unk_token is None
    assert len(loaded) == original.get_vocab_size()
    ids = loaded("<think>hi<|im_end|>").input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == "<think>hi"
    # One (start, end) a token, of characters: which tokens bear loss is told by it.
    offsets = loaded("hi 12", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[0][0] == 0
    assert offsets[-1][1] == 5


# Digits, contractions, ends of lines, and letters that are one code point or two.
HARD_TEXTS = [
    "1 12 123 1234 12345 ١٢٣ ১২৩ ½ ²",
    "'s 'S 'Re 'VE don'T it'Ll x'd 'tis ''s '",
    "a\n\nb\r\n  c\n \n\td \r e   \n",
    "e\u0301 \u00e9 A\u030a \u212b \u1100\u1161\u11a8 \u0e01\u0e33 \u0928\u093c \u0929 \ufb01",
    " !!\n?x ,y\t.z  (a) -1 +2",
]


def test_qwen2_equals_transformers_own_tokenizer(tmp_path):
    trained = json.loads(train_byte_level(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer).to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    original = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, unk_token=None)
    fields = byte_level_fields(original.backend_tokenizer, "qwen2")
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    for text in TEXTS + HARD_TEXTS:
        ids = loaded(text).input_ids
        assert ids == original(text).input_ids
        assert loaded.decode(ids) == unicodedata.normalize("NFC", text)
    assert loaded("e\u0301").input_ids == loaded("\u00e9").input_ids
    assert len(loaded("7654").input_ids) == 4


def test_dbrx_is_llama3_by_its_merges_alone(tmp_path):
    fields = byte_level_fields(train_byte_level(GPT2), "llama-bpe", add_bos_token=False)
    llama3 = load_tokenizer(write_gguf(tmp_path / "llama3.gguf", **fields))
    fields["pre"] = "dbrx"
    dbrx = load_tokenizer(write_gguf(tmp_path / "dbrx.gguf", **fields))
    for text in TEXTS + HARD_TEXTS + SPECIAL_TEXTS:
        assert dbrx(text).input_ids == llama3(text).input_ids
    del fields["add_bos_token"]
    fields["tokens"] = [*fields["tokens"], "zqx"]  # in the vocabulary, but no merge leads to it
    fields["token_type"] = [*fields["token_type"], 1]
    dbrx = load_tokenizer(write_gguf(tmp_path / "dbrx.gguf", **fields))
    assert dbrx.convert_ids_to_tokens(dbrx("zqx").input_ids) == ["z", "q", "x"]


def test_an_unknown_split_is_named(tmp_path):
    fields = byte_level_fields(train_byte_level(GPT2), "viking")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre='viking': expected one of .*qwen2"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_byte_level_gguf_equals_transformers(tmp_path, pre):
    fields = byte_level_fields(train_byte_level(GPT2), pre)
    path = write_gguf(tmp_path / "m.gguf", add_bos_token=False, **fields)
    loaded, reference = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS + SPECIAL_TEXTS:
        assert loaded(text).input_ids == reference(text).input_ids


def test_llama3_adds_bos_and_keeps_whole_words(tmp_path):
    fields = byte_level_fields(train_byte_level(GPT2), "llama-bpe")
    fields["tokens"] = [*fields["tokens"], "zqx"]  # in the vocabulary, but no merge leads to it
    fields["token_type"] = [*fields["token_type"], 1]
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    assert loaded("zqx").input_ids == [1, len(fields["tokens"]) - 1]
    assert loaded("zqx", add_special_tokens=False).input_ids == [len(fields["tokens"]) - 1]


def test_bos_and_eos_flags(tmp_path):
    fields = byte_level_fields(train_byte_level(GPT2), "gpt-2", add_bos_token=True, add_eos_token=True)
    ids = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))("hi").input_ids
    assert (ids[0], ids[-1]) == (1, 2)


def test_llama_flags(tmp_path, llama_model):
    fields = {**llama_fields(llama_model), "add_bos_token": False, "add_space_prefix": False}
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    first = loaded.convert_ids_to_tokens(loaded("hi").input_ids)[0]
    assert not first.startswith(("<s>", "▁"))


def test_gguf_vocabularies_that_make_no_sense_are_refused(tmp_path, llama_model):
    byte_level, llama = byte_level_fields(train_byte_level(GPT2), "gpt-2"), llama_fields(llama_model)
    for fields in (
        {**byte_level, "merges": ["a b c"]},
        {**byte_level, "merges": ["a qqq"]},
        {**byte_level, "eos_token_id": 10**6},
        {**byte_level, "tokens": "abc"},
        {**byte_level, "token_type": 3},
        {**llama, "scores": [0.5]},
        {**llama, "tokens": [*llama["tokens"][:-1], "▁" * 10**6]},  # halving it would take hours
    ):
        with pytest.raises(UserError, match=r"the tokenizer in .*m\.gguf cannot be read"):
            load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))


RUNS = [character * n for n in range(2, 9) for character in ("▁", "\n", "\t")]


def test_user_defined_pieces_come_first(tmp_path):
    """As in Gemma: runs of spaces, newlines and tabs that are pieces of their own, and no prefix space. GGUF
    files have -1000 for their scores and spell spaces as spaces."""
    lines = [line for text in CORPUS for line in text.split("\n")]
    symbols = ["\n", "\t", *RUNS, "<td>", "<end>"]
    model = sentencepiece_model(lines, 500, user_defined_symbols=symbols, add_dummy_prefix=False)
    fields = {**llama_fields(model), "add_space_prefix": False}
    for i, piece in enumerate(model.pieces):
        if piece.type == piece.USER_DEFINED:
            fields["tokens"][i], fields["scores"][i] = piece.piece.replace("▁", " "), -1000.0
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    runs = [f"{a}a{run * n}b{z}" for run in " \n\t" for n in range(1, 30) for a, z in (("", ""), (run, run))]
    mixed = ["a \n  \n\t b", "<td>hi</td> <end>", "x<td> <td>  <td>", "< td>", "  hi", "<td"]
    for text in [*TEXTS, *runs, *mixed]:
        ids = loaded(text).input_ids
        assert ids == [1, *reference.encode(text)], text
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded("x▁▁▁a▁▁b▁").input_ids == [1, *reference.encode("x▁▁▁a▁▁b▁")]


def test_tekken_keeps_marks_with_letters_and_cuts_at_capitals(tmp_path):
    """Mistral Nemo's expression, in the words of Unicode's categories, by what it makes of single words."""
    fields = byte_level_fields(train_byte_level(GPT2), "tekken")
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    cut = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    spans = lambda text: [text[start:end] for _, (start, end) in cut(text)]
    assert spans("helloWorld IT's 123") == ["hello", "World", " IT", "'s", " ", "1", "2", "3"]
    assert spans("তেলুগু ভাষা") == ["তেলুগু", " ভাষা"]  # vowel signs are marks
    assert loaded("hi").input_ids[0] == 1  # BOS
    fields["pre"] = "gpt-4o"
    cut = load_tokenizer(
        write_gguf(tmp_path / "4o.gguf", **fields)
    ).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert spans("helloWorld IT's 1234") == ["hello", "World", " IT's", " ", "123", "4"]
