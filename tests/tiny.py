"""Small things to test with: a random model with data to train it on and a configuration for both, and a
SentencePiece model."""

import io
import json
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from prom_jax.config import default
from tests.reference import hf_model

WORDS = {
    "en": "the cow eats grass and gives milk every morning on a small farm near our river".split(),
    "sw": "ng'ombe anakula nyasi na hutoa maziwa kila asubuhi katika shamba dogo karibu na mto".split(),
}


def make(root, tokenizer):
    """Writes a model of 4 layers, 40 instruction pairs and 12 translations into the folder; returns it."""
    few_heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # scores take longest
    hf = hf_model("smollm2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **few_heads)
    hf.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    chance = random.Random(0)
    text = lambda language, n: " ".join(chance.choices(WORDS[language], k=n))
    for language in ("en", "sw"):
        rows = [
            {"id": i, "instruction": text(language, 4), "output": text(language, 3 + i % 7)}
            for i in range(40)
        ]
        (root / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"en": text("en", 5), "sw": text("sw", 5)} for _ in range(12)]
    (root / "parallel.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def tiny_config(root):
    """Eight steps of PROM, as short as they can be."""
    c = default()
    c.model, c.language = str(root / "model"), "sw"
    c.data.english = (str(root / "en.jsonl"),)
    c.data.target = (str(root / "sw.jsonl"),)
    c.data.translation = (str(root / "parallel.jsonl"),)
    c.data.seq_len = 192
    c.batch.sequences = 8
    c.steps = 8
    c.optimizer.learning_rate = 3e-3
    c.pivot.weight = 0.5
    c.pivot.regulate = "never"
    c.eval.every, c.eval.holdout, c.eval.samples = 4, 6, 2
    c.checkpoint.every = 3
    c.compute_dtype = "float32"
    return c


def sentencepiece_model(lines, vocab_size, **settings):
    """A SentencePiece BPE like LLaMA's: byte fallback, runs of spaces as pieces of the lowest score.

    Args:
      lines: to train on.
      vocab_size: the number of pieces.
      settings: further ones of SentencePiece's trainer.

    Returns:
      The model.
    """
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "character_coverage": 0.98,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        num_threads=1,
        minloglevel=2,
        **defaults | settings,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    if settings:
        return proto
    spaces = [piece for piece in proto.pieces if set(piece.piece) == {"▁"}]
    assert len(spaces) > 1
    for piece in spaces:
        piece.score = -1e9
    return proto
