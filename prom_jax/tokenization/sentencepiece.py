"""LLaMA's SentencePiece models."""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import models
from transformers import LlamaTokenizer

from prom_jax.tokenization import PreTrainedTokenizerFast
from prom_jax.tokenization.checks import check_lengths


def read(path: Path) -> PreTrainedTokenizerFast:
    """LLaMA's `tokenizer.model` where there is no tokenizer.json.

    Three things that transformers 5 does otherwise: AutoTokenizer leaves out the prefix space, every class
    leaves out BOS, and merges come in the order of ids, so that runs of spaces are cut unlike in training
    (their pieces have early ids and the lowest scores).
    """
    # As the protocol buffer that it is; the C++ library would know no more of it.
    pieces = sentencepiece_model_pb2.ModelProto.FromString((path / "tokenizer.model").read_bytes()).pieces
    if not pieces:
        raise ValueError("it has no pieces")
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    check_lengths(vocab)
    config = path / "tokenizer_config.json"
    config = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    tokenizer = LlamaTokenizer.from_pretrained(path, add_bos_token=config.get("add_bos_token", True))
    merges = ranked_merges(vocab, [piece.score for piece in pieces])
    tokenizer.backend_tokenizer.model = models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True)
    return tokenizer


def ranked_merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: each way to halve a piece, by falling score.

    Of equal score, the longer left half first.
    """
    halves = (
        (-scores[i], -cut, cut - len(token), i, token)
        for token, i in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    return [(token[:-minus], token[-minus:]) for _, minus, _, _, token in sorted(halves)]
