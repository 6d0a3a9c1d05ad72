"""Tokenizers against transformers, the tokenizers library and SentencePiece itself."""

import contextlib
import json
import shutil

import gguf
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from prom_jax.checkpoints.pretrained import load_tokenizer
from prom_jax.tokenization import folder as tokenizer
from prom_jax.utils.errors import UserError
from tests.tiny import sentencepiece_model

TEXTS = [
    "",
    "hi",
    "hi there",
    "Below is an instruction that describes a task.\n\n### Response:\n",
    "a  b   c    d\t\te\n\n\n  f ",
    "It's we'LL they'VE don't",
    "12 345 6789 3.14159 1,000,000 2024-01-02 in 1999",
    "  2018:  19 holes",
    "นี่คือประโยคภาษาไทยที่ไม่มีช่องว่าง ๑๒๓",
    "مرحبا بالعالم ١٢٣، كيف الحال؟",
    "Καλημέρα κόσμε · Habari ya dunia · నమస్తే ప్రపంచం · ওহে বিশ্ব ১৮",
    "naïve café — “quotes” … ½ ① Ⅷ",
    "😀 👩‍👩‍👧 🇹🇭 e\u0301 \u200b \u00a0 end",
    "def f(x):\n    return x**2  # σ\r\n",
    "一二三 日本語 한국어",
    "x" * 70 + "!" * 9,
]
CORPUS = [text for text in TEXTS for _ in range(3)] + ["the lazy dog jumps over the 12 brown foxes"] * 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TEXTS = ["<|im_start|>user\nhi<|im_end|>\n", "a<think>b </think> c"]


def write_gguf(path, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_string("tokenizer.chat_template", "the base model's own")
    # What transformers' reader asks for.
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{name}", 1)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def train_byte_level(split):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "</think>"])
    return backend


def byte_level_fields(backend, pre, **fields):
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if t in SPECIAL else 4 if t in ("<think>", "</think>") else 1 for t in tokens]
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "eos_token_id": 2,
        "bos_token_id": 1,
        **fields,
    }


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


@pytest.mark.parametrize(("pre", "split"), [("gpt-2", GPT2), ("default", GPT2), ("smollm", SMOLLM)])
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


@pytest.fixture(scope="module")
def llama_model():
    return sentencepiece_model([line for text in CORPUS for line in text.split("\n")], 600)


def llama_fields(proto):
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.fixture(params=["gguf", "tokenizer.model", "tokenizer.model and config"])
def llama_source(request, tmp_path, llama_model):
    if request.param == "gguf":
        return write_gguf(tmp_path / "m.gguf", **llama_fields(llama_model))
    (tmp_path / "tokenizer.model").write_bytes(llama_model.SerializeToString())
    if request.param == "tokenizer.model and config":
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_llama_equals_sentencepiece(llama_source, llama_model):
    loaded = load_tokenizer(llama_source)
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_model.SerializeToString())
    spaces = ["a" + " " * n + "b" for n in range(1, 20)]
    # A leading space stays one space here, as in transformers; SentencePiece puts its prefix before it.
    for text in [text for text in TEXTS + spaces if text and not text.startswith(" ")]:
        ids = loaded(text).input_ids
        assert ids == [1, *reference.encode(text)]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    assert loaded("a</s>").input_ids[-1] == 2


def test_llama_flags(tmp_path, llama_model):
    fields = {**llama_fields(llama_model), "add_bos_token": False, "add_space_prefix": False}
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    first = loaded.convert_ids_to_tokens(loaded("hi").input_ids)[0]
    assert not first.startswith(("<s>", "▁"))


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_saved_folder_loads_everywhere_alike(tmp_path, llama_source, model_type):
    loaded, out = load_tokenizer(llama_source), tmp_path / "out"
    out.mkdir()
    tokenizer.save(loaded, out, "our template")
    if model_type:
        (out / "config.json").write_text(json.dumps({"model_type": model_type}))
    for again in (load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        assert again.chat_template == "our template"
        assert again.bos_token_id == loaded.bos_token_id == 1
        assert again.eos_token_id == loaded.eos_token_id == 2
        for text in [*TEXTS, *SPECIAL_TEXTS, "a</s>b", "  x"]:
            assert again(text).input_ids == loaded(text).input_ids
    assert loaded.chat_template != "our template"
    # What transformers 4 cannot read.
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config


def test_saved_byte_level_folder_loads_alike(tmp_path):
    fields = byte_level_fields(train_byte_level(SMOLLM), "smollm")
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    tokenizer.save(loaded, tmp_path, "our template")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS + SPECIAL_TEXTS:
            assert again(text).input_ids == loaded(text).input_ids


def test_bad_tokenizers_are_refused(tmp_path, llama_model):
    byte_level = byte_level_fields(train_byte_level(GPT2), "gpt-2")

    def gguf_with(**fields):
        return write_gguf(tmp_path / "m.gguf", **fields)

    with pytest.raises(UserError, match=r"'qwen2'.*smollm"):
        load_tokenizer(gguf_with(**{**byte_level, "pre": "qwen2"}))
    with pytest.raises(UserError, match="pre=None"):
        load_tokenizer(gguf_with(**{k: v for k, v in byte_level.items() if k != "pre"}))
    with pytest.raises(UserError, match="'bert'"):
        load_tokenizer(gguf_with(**{**byte_level, "model": "bert"}))
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(gguf_with(**{k: v for k, v in byte_level.items() if k != "eos_token_id"}))
    with pytest.raises(UserError, match="white space"):
        load_tokenizer(gguf_with(**llama_fields(llama_model), remove_extra_whitespaces=True))

    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's own format
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(folder)


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


@pytest.fixture
def folder(tmp_path):
    loaded = load_tokenizer(
        write_gguf(tmp_path / "m.gguf", **byte_level_fields(train_byte_level(GPT2), "gpt-2"))
    )
    (tmp_path / "folder").mkdir()
    tokenizer.save(loaded, tmp_path / "folder", None)
    return tmp_path / "folder"


def test_a_panic_below_is_an_error_like_others(folder):
    """Of Rust's, which is no Exception: here a table of characters that points beyond itself."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAAYQA="}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cannot be read .*index out of bounds"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_that_name_other_files_are_refused(tmp_path, folder, name):
    """transformers would take the tokenizer from there."""
    other = str(shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.json"))
    path = folder / name
    for settings in (
        {"tokenizer_file": other},
        {"vocab_file": other},
        {"fast_tokenizer_files": ["../tokenizer.4.0.json"]},
        {"init_inputs": [other]},
    ):
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | settings))
        with pytest.raises(UserError, match=rf"{name} sets {next(iter(settings))}=.*another file"):
            load_tokenizer(folder)
        path.write_text(json.dumps(content))
    path.write_text(json.dumps(content | {"special_tokens_map_file": "/not/here.json"}))  # in many folders
    load_tokenizer(folder)


def test_code_beside_a_tokenizer_is_never_run(tmp_path, folder):
    (folder / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= {
            "auto_map": {"AutoTokenizer": ["tokenization_x.X", None], "AutoConfig": "tokenization_x.X"}
        }
        path.write_text(json.dumps(content | {"tokenizer_class": "X", "trust_remote_code": True}))
        with contextlib.suppress(UserError):
            load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
