"""Two small tokenizers: byte-level BPE without BOS, and a SentencePiece-like one with BOS that
marks the start of a text alone with a space, as LLaMA-2's does."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Below is an instruction that describes a task, paired with an input.",
    "Write a response that appropriately completes the request. ### Instruction: Response: Input:",
    "Habari ya asubuhi? Nzuri sana, asante. สวัสดีครับ ภาษาไทย ภาษาไทย",
] * 3


def train(model, pre_tokenizer, alphabet):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_level():
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = train(models.BPE(), split, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def metaspace():
    split = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = [chr(c) for c in range(33, 127)] + ["\n", "▁"]
    tokenizer = train(models.BPE(unk_token="<unk>"), split, alphabet)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["byte_level", "metaspace"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def jsonl(tmp_path):
    """Write rows as JSON lines; return the path as a source."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write
