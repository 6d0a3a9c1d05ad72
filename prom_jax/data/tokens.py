"""From spans of text to tokens, and which of them bear loss."""

import itertools
from dataclasses import dataclass

import numpy as np

from prom_jax.data.prompts import Span


@dataclass(frozen=True)
class Side:
    """One side of an example: int32 tokens [T], bool loss [T], and of its loss-bearing tokens how
    many are EOS (`ends`), and the UTF-8 bytes and words (white space between) under the others; what
    was cut off counts among the words alone."""

    tokens: np.ndarray
    loss: np.ndarray
    ends: int
    bytes: int
    words: int
    truncated: bool


def encode(tokenizer, texts: list[list[Span]], seq_len: int) -> list[Side]:
    """Tokenise each list of spans into one side of at most `seq_len` tokens.

    A token bears loss if it covers a loss-bearing character, or is the EOS of a span; the first
    token never does, as nothing predicts it. BOS comes as the tokenizer adds it, EOS by its id.
    Text that spells a special token stays text.
    """
    spans = list(itertools.chain.from_iterable(texts))
    encoded = tokenizer(
        [span.text for span in spans],
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # longer than the model takes? it is cut below
    )
    parts = map(_span, spans, encoded["input_ids"], encoded["offset_mapping"])
    bos, eos = _bos(tokenizer), tokenizer.eos_token_id
    words = [sum(len(span.text[span.start : span.stop].split()) for span in text) for text in texts]
    sides = [list(itertools.islice(parts, len(text))) for text in texts]
    return [_side(side, bos, eos, seq_len, number) for side, number in zip(sides, words, strict=True)]


def _span(span: Span, ids: list[int], offsets: list[tuple[int, int]]):
    """A span's tokens, loss and the bytes under each loss-bearing token; then `span.eos`."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    # A tokenizer may trim white space off the offsets: a token can be empty, at its end.
    beyond = (ends > span.stop) & (starts >= span.stop)
    kept = int(np.argmax(beyond)) if beyond.any() else len(ids)
    ends = ends[:kept]
    return np.array(ids[:kept], np.int32), ends > span.start, _bytes(span, ends), span.eos


def _bytes(span: Span, ends: np.ndarray) -> np.ndarray:
    """Bytes of `text[start:stop]` that each token adds to those before it: [T] int64."""
    text = span.text[span.start : span.stop].encode("utf-32-le", "surrogatepass")
    code = np.frombuffer(text, np.uint32)
    width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(width)])
    return np.diff(upto[np.clip(ends - span.start, 0, len(code))], prepend=0)


def _side(parts: list, bos: list[int], eos: int, seq_len: int, words: int) -> Side:
    tokens, loss, widths = [bos], [np.zeros(len(bos), bool)], [np.zeros(len(bos), np.int64)]
    for ids, bears, width, ends in parts:
        tokens += [ids, [eos] * ends]
        loss += [bears, [True] * ends]
        widths += [width, [0] * ends]
    tokens = np.concatenate(tokens).astype(np.int32)
    loss = np.concatenate(loss).astype(bool)
    loss[:1] = False
    width = np.concatenate(widths)[:seq_len] @ loss[:seq_len]
    kept, loss = tokens[:seq_len], loss[:seq_len]
    ends = int((kept[loss] == eos).sum())
    return Side(kept, loss, ends, int(width), words, len(tokens) > seq_len)


def _bos(tokenizer) -> list[int]:
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []
