"""From spans of text to tokens, and which of them have a loss."""

import dataclasses
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prom_jax.data.templates import Alpaca, Span, Template


@dataclass(frozen=True)
class EncodedText:
    """One stream's text of an example: int32 tokens [T], bool loss [T], and of its loss tokens how many
    end an answer (EOS), and the UTF-8 bytes and words (white space between) under the others. `rest` are the
    texts that follow of one that continues, each from the last token of the one before."""

    tokens: np.ndarray
    loss: np.ndarray
    eos: int
    bytes: int
    words: int
    truncated: bool
    rest: tuple["EncodedText", ...] = ()


def encode(
    tokenizer, texts: list[list[Span]], seq_len: int, template: Template | None = None
) -> list[EncodedText]:
    """Tokenise each list of spans into one text of at most `seq_len` tokens.

    A token has a loss if it covers a character that has one, or is the end of a turn; the first token never
    does, as nothing predicts it. BOS comes as the tokenizer adds it, EOS by its id. Text that spells a
    special token stays text.

    Args:
      template: that the spans are of; None for Alpaca's.
    """
    spans = list(itertools.chain.from_iterable(texts))
    ids, offsets = (template or Alpaca(tokenizer)).tokenise([span.text for span in spans])
    parts = zip(spans, ids, offsets, strict=True)
    bos, eos = bos_ids(tokenizer), tokenizer.eos_token_id
    return [_encode_one(list(itertools.islice(parts, len(text))), bos, eos, seq_len) for text in texts]


def _encode_one(parts: list, bos: list[int], eos: int, seq_len: int) -> EncodedText:
    """A text of (span, ids, character offsets) parts. In lists, as these are faster than arrays for texts of
    a few hundred tokens."""
    if parts and parts[0][0].whole:
        bos = []
    if parts and parts[0][0].continues and len(bos) + len(parts[0][1]) + 1 > seq_len:
        span, ids, offsets = parts[0]
        return _in_pieces(span, ids, offsets, bos, eos, seq_len)
    tokens, loss = list(bos), [False] * len(bos)
    ends_kept = size = words = 0
    for span, ids, offsets in parts:
        ends = [end for _, end in offsets]
        of_span = [False] * len(ids)
        stop = len(ids)
        for begin, end in span.learnt:
            first, stop = bisect_right(ends, begin), _stop(end, len(span.text), offsets)
            kept = min(stop, seq_len - len(tokens))  # of these tokens, before the cut
            if kept > first:
                begin = begin if tokens or first else ends[0]  # nothing predicts the first token of all
                learnt = span.text[begin : min(ends[kept - 1], end)]
                size += len(learnt.encode())
                words += len(learnt.split())
            of_span[first:stop] = [True] * (stop - first)
        for begin, _ in span.ends:
            number = bisect_right(ends, begin)
            of_span[number] = True
            ends_kept += len(tokens) + number < seq_len
        if not span.whole:
            ids, of_span = ids[:stop], of_span[:stop]
        tokens += ids
        loss += of_span
        if span.eos and not span.whole:
            tokens.append(eos)
            loss.append(True)
            ends_kept += len(tokens) <= seq_len
    loss[:1] = [False]
    return EncodedText(
        tokens=np.array(tokens[:seq_len], np.int32),
        loss=np.array(loss[:seq_len], bool),
        eos=ends_kept,
        bytes=size,
        words=words,
        truncated=len(tokens) > seq_len,
    )


def _in_pieces(
    span: Span, ids: list[int], offsets: list, bos: list[int], eos: int, seq_len: int
) -> EncodedText:
    """A text that is longer than `seq_len`, in pieces. Each begins with the last token of the one before, so
    that every token is predicted once; EOS not, where it would be a piece of its own."""
    tokens = [*bos, *ids, eos]
    if len(tokens) % (seq_len - 1) == 2 % (seq_len - 1):
        tokens.pop()
    ends = [0] * len(bos) + [end for _, end in offsets] + [len(span.text)]
    pieces = []
    for first in range(0, len(tokens) - 1, seq_len - 1):
        last = min(first + seq_len, len(tokens)) - 1
        learnt = span.text[ends[first] : ends[last]]
        pieces.append(
            EncodedText(
                tokens=np.array(tokens[first : last + 1], np.int32),
                loss=np.arange(last + 1 - first) > 0,
                eos=int(last == len(bos) + len(ids)),
                bytes=len(learnt.encode()),
                words=len(learnt.split()),
                truncated=False,
            )
        )
    return dataclasses.replace(pieces[0], rest=tuple(pieces[1:]))


def _stop(end: int, length: int, offsets: list[tuple[int, int]]) -> int:
    """The number of tokens before the first that is beyond character `end` of a text of this length."""
    if end == length:
        return len(offsets)
    stop = bisect_left(offsets, (end, -1))
    while stop < len(offsets) and offsets[stop][1] <= end:
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
