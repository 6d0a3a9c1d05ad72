"""LLaMA's tokenizers against SentencePiece itself."""

import sentencepiece

from prom_jax.checkpoints.pretrained import load_tokenizer
from tests.tokenization.made_up import (
    TEXTS,
)


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
