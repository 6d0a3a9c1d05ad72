"""From spans of text to tokens, and which of them have a loss."""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prom_jax.data.templates import Span


@dataclass(frozen=True)
class EncodedText:
    """One stream's text of an example: int32 tokens [T], bool loss [T], and of its loss tokens how many are
    EOS, and the UTF-8 bytes and words (white space between) under the others."""

    tokens: np.ndarray
    loss: np.ndarray
    eos: int
    bytes: int
    words: int
    truncated: bool


def encode(tokenizer, texts: list[list[Span]], seq_len: int) -> list[EncodedText]:
    """Tokenise each list of spans into one text of at most `seq_len` tokens.

    A token has a loss if it covers a character that has one, or is the EOS of a span; the first
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
    parts = zip(spans, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    bos, eos = bos_ids(tokenizer), tokenizer.eos_token_id
    return [_encode_one(list(itertools.islice(parts, len(text))), bos, eos, seq_len) for text in texts]


def _encode_one(parts: list, bos: list[int], eos: int, seq_len: int) -> EncodedText:
    """A text of (span, ids, character offsets) parts. In lists, as these are faster than arrays for texts of
    a few hundred tokens."""
    tokens, loss = list(bos), [False] * len(bos)
    eos_kept = size = words = 0
    for span, ids, offsets in parts:
        ends = [end for _, end in offsets]
        first, stop = bisect_right(ends, span.start), _stop(span, offsets)
        kept = min(stop, seq_len - len(tokens))  # of these tokens, before the cut
        if kept > first:
            begin = span.start if tokens or first else ends[0]  # nothing predicts the first token of all
            learnt = span.text[begin : min(ends[kept - 1], span.stop)]
            size += len(learnt.encode())
            words += len(learnt.split())
        tokens += ids[:stop]
        loss += [False] * first + [True] * (stop - first)
        if span.eos:
            tokens.append(eos)
            loss.append(True)
            eos_kept += len(tokens) <= seq_len
    loss[:1] = [False]
    return EncodedText(
        tokens=np.array(tokens[:seq_len], np.int32),
        loss=np.array(loss[:seq_len], bool),
        eos=eos_kept,
        bytes=size,
        words=words,
        truncated=len(tokens) > seq_len,
    )


def _stop(span: Span, offsets: list[tuple[int, int]]) -> int:
    """The number of tokens before the first that is beyond `span.stop`."""
    if span.stop == len(span.text):
        return len(offsets)
    stop = bisect_left(offsets, (span.stop, -1))
    while stop < len(offsets) and offsets[stop][1] <= span.stop:
        stop += 1  # a tokenizer may trim white space off the offsets: a token can be empty, at its end
    return stop


def bos_ids(tokenizer) -> list[int]:
    """BOS, if the tokenizer puts it in front of a text."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the prefix that two texts share."""
    length = min(len(a), len(b))
    differ = np.not_equal(a[:length], b[:length])
    return int(differ.argmax()) if differ.any() else length
