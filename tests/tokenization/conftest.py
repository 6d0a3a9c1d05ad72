"""LLaMA's kind of tokenizer, in each of the files that it comes in."""

import json

import pytest

from tests.tiny import sentencepiece_model
from tests.tokenization.made_up import CORPUS, llama_fields, write_gguf


@pytest.fixture(scope="module")
def llama_model():
    return sentencepiece_model([line for text in CORPUS for line in text.split("\n")], 600)


@pytest.fixture(params=["gguf", "tokenizer.model", "tokenizer.model and config"])
def llama_source(request, tmp_path, llama_model):
    if request.param == "gguf":
        return write_gguf(tmp_path / "m.gguf", **llama_fields(llama_model))
    (tmp_path / "tokenizer.model").write_bytes(llama_model.SerializeToString())
    if request.param == "tokenizer.model and config":
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path
