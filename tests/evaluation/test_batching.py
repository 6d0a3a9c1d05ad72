"""Which texts share a row, and that each is whole in it."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from prom_jax.evaluation.batching import MAX_TEXTS, own_segment, plan
from prom_jax.ops.attention import SHARED_PREFIX

TOKENS = st.integers(1, 9)
BEGINNINGS = st.lists(st.lists(TOKENS, min_size=20, max_size=60), min_size=1, max_size=3)


@st.composite
def texts_and_own(draw):
    beginnings = draw(BEGINNINGS)
    text = st.builds(
        lambda beginning, rest: beginning + rest,
        st.sampled_from([[], *beginnings]),
        st.lists(TOKENS, min_size=1, max_size=30),
    )
    texts = draw(st.lists(text, min_size=1, max_size=40))
    return texts, [draw(st.integers(1, len(text))) for text in texts]


@hypothesis.given(texts_and_own(), st.integers(0, 8), st.integers(1, 4000), st.sampled_from([1, 2, 8]))
@hypothesis.settings(deadline=None, max_examples=60)
def test_every_text_is_whole_and_once(case, extra, slots, shards):
    texts, own = case
    seen = []
    for batch in plan(texts, own, extra=extra, slots=slots, shards=shards):
        rows, length = batch.tokens.shape
        number = batch.texts.shape[1]
        assert rows % shards == 0
        assert rows == shards or rows * (length + number * extra) <= slots
        for b, r in np.argwhere(batch.texts >= 0):
            text = batch.texts[b, r]
            seen.append(text)
            mine = np.isin(batch.segments[b], (SHARED_PREFIX, own_segment(r)))
            order = np.argsort(batch.positions[b][mine])
            assert batch.tokens[b][mine][order].tolist() == texts[text]
            assert sorted(batch.positions[b][mine]) == list(range(len(texts[text])))
            assert np.sum(batch.segments[b] == own_segment(r)) >= own[text]
            assert batch.lengths[b, r] == len(texts[text])
            end = batch.ends[b, r]
            assert (
                batch.segments[b, end] == own_segment(r) and batch.positions[b, end] == len(texts[text]) - 1
            )
    assert sorted(seen) == list(range(len(texts)))


def test_a_shared_beginning_is_computed_once():
    context = list(range(100, 600))
    texts = [[*context, number, 7] for number in range(12)] + [[number] * 30 for number in range(4)]
    batches = list(plan(texts, [1] * len(texts), extra=0, slots=4096))
    used = sum(int((batch.segments != 0).sum()) for batch in batches)
    assert used == 2 * len(context) + 12 * 2 + 4 * 30  # twelve texts are more than one row takes
    assert max(batch.texts.shape[1] for batch in batches) == MAX_TEXTS


def test_few_shapes():
    chance = np.random.default_rng(0)
    texts = [chance.integers(0, 1000, length).tolist() for length in chance.integers(10, 1000, 400)]
    batches = list(plan(texts, [1] * len(texts), extra=64, slots=16_384))
    lengths = [batch.tokens.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)  # what needs most memory comes first
    assert len({batch.tokens.shape for batch in batches}) <= 24
    padding = sum(int((batch.segments == 0).sum()) for batch in batches)
    assert padding < 0.25 * sum(map(len, texts))


@pytest.mark.parametrize("length", [1, 16, 17, 300, 1025])
def test_padding_is_on_the_left(length):
    (batch,) = plan([[5] * length], [1], extra=0, slots=1)
    assert (batch.segments[0] != 0).tolist() == [False] * (batch.tokens.shape[1] - length) + [True] * length


def test_unlike_rows_are_not_padded_to_each_other():
    chance = np.random.default_rng(0)
    long, short = ([chance.integers(0, 1000, n).tolist() for _ in range(8)] for n in (2000, 100))
    shapes = [batch.tokens.shape for batch in plan(long + short, [1] * 16, extra=64, slots=32_768)]
    assert shapes == [(8, 2048), (8, 128)]
    (batch,) = plan(long[:1] + short[:1], [1] * 2, extra=1, slots=32_768)  # a step more costs more than that
    assert batch.tokens.shape == (2, 2048)


def test_texts_with_little_in_common_do_not_share_a_row():
    chance = np.random.default_rng(0)
    beginning = chance.integers(0, 1000, 40).tolist()
    texts = [beginning + chance.integers(0, 1000, 900).tolist() for _ in range(8)]
    rows = lambda **more: [
        number
        for batch in plan(texts, [1] * 8, **more)
        for number in (batch.texts >= 0).sum(axis=1)
        if number
    ]
    assert rows(extra=64, slots=32_768) == [1] * 8  # every answer would look at all eight
    assert rows(extra=0, slots=32_768) == [8]
    assert max(rows(extra=0, slots=8 * 2048, shards=8)) == 2  # of a shard's slots
