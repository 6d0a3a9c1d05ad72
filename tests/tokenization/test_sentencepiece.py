"""SentencePiece models of all kinds against the sentencepiece library itself."""

import json
import pickle

import pytest
import sentencepiece
from transformers import AutoTokenizer

from prom_jax.checkpoints.pretrained import load_tokenizer
from prom_jax.tokenization import folder
from prom_jax.utils.errors import UserError
from tests.tiny import sentencepiece_model
from tests.tokenization.made_up import CORPUS, TEXTS, llama_fields, write_gguf

LINES = [line for text in CORPUS for line in text.split("\n")]
RUNS = [f"a{character * n}b" for character in " \n\t=" for n in range(1, 40)]
ODD = [
    " x",
    "  x ",
    "▁x▁",
    "ﬁ ① Ａ",
    "e\u0301 \u00e9",
    "a\u200bb",
    "banana bananana nananana",
    "<0x41> <s> </s>",
]


def extended(base, number=200):
    """A vocabulary that was extended in the usual way: pieces of a second model, at score 0."""
    have = {piece.piece for piece in base.pieces}
    for piece in sentencepiece_model(LINES[::-1], 600, split_digits=False, max_sentencepiece_length=6).pieces:
        if piece.piece not in have and number:
            base.pieces.add(piece=piece.piece, score=0)
            number -= 1
    for piece in ("an", "na", "ana", "nan", "banan", "ba", "nana", "▁ba"):  # overlap in many ways
        if piece not in {piece.piece for piece in base.pieces}:
            base.pieces.add(piece=piece, score=0)
    return base


def with_normalizer(base, **settings):
    for name, value in settings.items():
        setattr(base.normalizer_spec, name, value)
    return base


def trained(size=600, lines=LINES, **settings):
    return sentencepiece_model(lines, size, **settings)


# Of each the model, and whether a tokenizer.json can say it.
VARIANTS = {
    "llama": (lambda: trained(600), True),
    "extended": (lambda: extended(trained(600)), False),
    "unigram": (
        lambda: trained(
            lines=[*LINES, "a < b > c / ABCDEF"],
            model_type="unigram",
            hard_vocab_limit=False,
            character_coverage=1.0,
        ),
        True,
    ),
    "unigram of few characters": (lambda: trained(model_type="unigram", hard_vocab_limit=False), False),
    "without bytes": (lambda: trained(byte_fallback=False), True),
    "no prefix": (lambda: with_normalizer(trained(600), add_dummy_prefix=False), True),
    "single spaces": (lambda: with_normalizer(trained(600), remove_extra_whitespaces=True), True),
    "extended, single spaces": (
        lambda: with_normalizer(extended(trained(600)), remove_extra_whitespaces=True),
        False,
    ),
    "user-defined": (lambda: trained(user_defined_symbols=["<td>", "xyz", "  "]), False),
    "user-defined, no prefix": (
        lambda: trained(user_defined_symbols=["<td>", "xyz"], add_dummy_prefix=False),
        True,
    ),
}


def write_model(path, proto, **config):
    (path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | config))
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_equals_the_library(tmp_path, name):
    make, serializable = VARIANTS[name]
    proto = make()
    loaded = load_tokenizer(write_model(tmp_path, proto, legacy=False))
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [*TEXTS, *RUNS, *ODD, "a<td>b <td>xyz  xyz<t"]
    for text in texts:
        encoded = loaded(
            text, return_offsets_mapping=True, split_special_tokens=True, add_special_tokens=False
        )
        assert encoded.input_ids == reference.encode(text), text
        ends = [end for _, end in encoded["offset_mapping"]]
        assert ends == sorted(ends)
        assert not ends or ends[-1] <= len(text)
        if proto.trainer_spec.byte_fallback:
            assert loaded.decode(encoded.input_ids) == reference.decode(encoded.input_ids)
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    assert loaded("hi").input_ids == [1, *reference.encode("hi")]
    assert loaded("hi</s>").input_ids[-1] == 2
    # Saved, it is the same, in a tokenizer.json where one can say it.
    out = tmp_path / "out"
    out.mkdir()
    folder.save(loaded, out, "our template")
    assert (out / "tokenizer.json").exists() == serializable
    assert (out / "tokenizer.model").read_bytes() == loaded.model_file
    others = [load_tokenizer(out)] + [AutoTokenizer.from_pretrained(out)] * serializable
    for again in others:
        for text in texts:
            assert again(text).input_ids == loaded(text).input_ids
    assert folder.fingerprint(others[0]) == folder.fingerprint(loaded)
    sent = pickle.loads(pickle.dumps(loaded))  # to processes that tokenise with it
    for text in texts:
        assert sent(text).input_ids == loaded(text).input_ids


def test_fingerprints_tell_extended_models_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = extended(trained(600)), extended(trained(600))
    second.pieces[-1].score = -0.5
    digests = {
        folder.fingerprint(load_tokenizer(write_model(tmp_path / name, proto)))
        for name, proto in (("a", first), ("b", second))
    }
    assert len(digests) == 2


@pytest.mark.parametrize("prefix", [True, False])
def test_an_extended_gguf_equals_the_library(tmp_path, prefix):
    proto = with_normalizer(extended(trained(600)), add_dummy_prefix=prefix)
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **llama_fields(proto), add_space_prefix=prefix))
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in [*TEXTS, *RUNS, *ODD]:
        assert loaded(text, split_special_tokens=True).input_ids == [1, *reference.encode(text)]
    # The file of the model is made again.
    again = sentencepiece.SentencePieceProcessor(model_proto=loaded.model_file)
    assert [again.encode(text) for text in TEXTS] == [reference.encode(text) for text in TEXTS]


def test_settings_that_cannot_be_honoured_are_named(tmp_path):
    for settings in (
        {"model_type": "word", "hard_vocab_limit": False},
        {"normalization_rule_name": "nmt_nfkc"},
    ):
        proto = trained(byte_fallback=False, **settings)
        (setting,) = [f"{name}={value}" for name, value in settings.items() if name != "hard_vocab_limit"]
        with pytest.raises(UserError, match=setting):
            load_tokenizer(write_model(tmp_path, proto))
    proto = with_normalizer(trained(600), escape_whitespaces=False)
    with pytest.raises(UserError, match="escape_whitespaces=False"):
        load_tokenizer(write_model(tmp_path, proto))
    proto = trained(600)
    proto.trainer_spec.treat_whitespace_as_suffix = True
    with pytest.raises(UserError, match="treat_whitespace_as_suffix=True"):
        load_tokenizer(write_model(tmp_path, proto))


def test_llama_equals_sentencepiece(llama_source, llama_model):
    loaded = load_tokenizer(llama_source)
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_model.SerializeToString())
    for text in [*TEXTS, *RUNS, " x", "  x "]:
        ids = loaded(text).input_ids
        assert ids == [1, *reference.encode(text)]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    assert loaded("a</s>").input_ids[-1] == 2
