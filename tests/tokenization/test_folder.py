"""Tokenizers of folders: saved, loaded again, and what is refused."""

import contextlib
import json
import shutil

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer

from prom_jax.checkpoints.pretrained import load_tokenizer
from prom_jax.tokenization import folder as tokenizer
from prom_jax.utils.errors import UserError
from tests.tokenization.made_up import (
    GPT2,
    SMOLLM,
    SPECIAL_TEXTS,
    TEXTS,
    byte_level_fields,
    llama_fields,
    train_byte_level,
    write_gguf,
)


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

    with pytest.raises(UserError, match=r"'viking'.*smollm"):
        load_tokenizer(gguf_with(**{**byte_level, "pre": "viking"}))
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


@pytest.mark.parametrize(
    "named", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizer"]
)
def test_a_tokenizer_json_stands_whatever_class_is_named(tmp_path, named):
    """The classes of transformers 5 put their own steps in place of the file's (transformers#45488)."""
    backend = Tokenizer(
        models.BPE({"▁": 0, "h": 1, "i": 2, "hi": 3, "</s>": 4, "é": 5, "a": 6}, [("h", "i")])
    )
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"tokenizer_class": named, "eos_token": "</s>", "add_bos_token": True, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    for text, ids in (("hi", [3]), (" hi", [0, 3]), ("e\u0301", [5]), ("hi hi", [3, 0, 3])):
        assert loaded(text).input_ids == ids
    # Saved, it does in transformers too.
    tokenizer.save(loaded, tmp_path, None)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(" hi e\u0301").input_ids == [0, 3, 0, 5]


def test_a_tokenizer_json_that_contradicts_its_model_is_told(tmp_path, llama_model, capsys):
    (tmp_path / "tokenizer.model").write_bytes(llama_model.SerializeToString())
    loaded = load_tokenizer(tmp_path)
    tokenizer.save(loaded, tmp_path, None)
    again = load_tokenizer(tmp_path)
    assert "WARNING" not in capsys.readouterr().out
    assert again.model_file == llama_model.SerializeToString()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    load_tokenizer(tmp_path)
    assert "cuts texts otherwise than the tokenizer.model beside it" in " ".join(
        capsys.readouterr().out.split()
    )
