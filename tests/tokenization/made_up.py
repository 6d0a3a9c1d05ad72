"""Texts, and tokenizers trained on them, as GGUF has them."""

import json

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
