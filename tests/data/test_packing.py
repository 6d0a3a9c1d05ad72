import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data.packing import Layout, Texts, choose_layout, continuing, join, plan_epoch

SEQ_LEN = 64


def assert_disjoint(plan, places, shape):
    """No two examples of an update share a place, and none leaves its row."""
    for update in range(plan.updates):
        used = np.zeros(shape, int)
        taken = slice(*plan.ends[update : update + 2])
        for row, offset, length in zip(*(column[taken] for column in places), strict=True):
            if length:
                assert 0 <= offset <= shape[1] - length
                used[row, offset : offset + length] += 1
        assert used.max() <= 1


def pack(target, english, sequences, seq_len, seed=0, epoch=0):
    """Examples of these lengths, which share nothing: their plan, and the shape of the English rows."""
    texts = Texts.alone(target), Texts.alone(english)
    layout = choose_layout(*texts, (sequences, seq_len))
    assert not layout.joined
    return plan_epoch(*texts, layout, seed=seed, epoch=epoch), layout.english


def fill(plan, lengths, shape):
    """Real tokens a place in all updates but the last, which takes what is left."""
    return lengths[plan.examples[: plan.ends[-2]]].sum() / ((plan.updates - 1) * shape[0] * shape[1])


pairs = st.lists(st.tuples(st.integers(1, SEQ_LEN), st.integers(0, SEQ_LEN)), min_size=1, max_size=700)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs, st.sampled_from([1, 2, 6, 8]), st.integers(0, 9), st.integers(0, 3))
def test_every_example_once_and_in_its_own_place(pairs, sequences, seed, epoch):
    target, english = np.array(pairs).T
    plan, english_shape = pack(target, english, sequences, SEQ_LEN, seed, epoch)
    assert sorted(plan.examples) == list(range(len(target)))
    assert plan.ends[0] == 0 and plan.ends[-1] == len(target) and (np.diff(plan.ends) > 0).all()
    assert np.array_equal(plan.target.lengths, target[plan.examples])
    assert_disjoint(plan, plan.target, (sequences, SEQ_LEN))
    if english_shape is None:
        assert not english.any()
    else:
        assert english.max() <= english_shape[1] <= SEQ_LEN
        assert np.array_equal(plan.english.lengths, english[plan.examples])
        assert_disjoint(plan, plan.english, english_shape)

    again, _ = pack(target, english, sequences, SEQ_LEN, seed, epoch)
    assert np.array_equal(plan.examples, again.examples) and np.array_equal(plan.ends, again.ends)
    for side in ("target", "english"):
        assert np.array_equal(getattr(plan, side), getattr(again, side))


def test_order_depends_on_seed_and_epoch():
    lengths = np.full(50, 8)
    order = lambda seed, epoch: pack(lengths, lengths, 2, 64, seed, epoch)[0].examples.tolist()
    assert len({tuple(order(s, e)) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4
    assert order(None, 0) == order(None, 1) == list(range(50))


def test_examples_come_about_when_they_are_drawn():
    """An update takes the next ones in order but for what fills its gaps, or the end of an epoch would be
    all of one kind."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.6, 4000), 20, 1024).astype(int)
    plan, _ = pack(lengths, np.zeros(4000, int), 16, 1024)
    means = np.array([m.mean() for m in np.split(lengths[plan.examples], plan.ends[1:-1])[:-1]])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.5
    assert means.max() < 1.4 * means.min()


def test_english_is_spread_evenly_over_the_updates():
    english = np.repeat([40, 0], 400)
    plan, _ = pack(np.full(800, 32), english, 8, 64)
    sums = np.add.reduceat(english[plan.examples], plan.ends[:-1])
    assert sums.tolist() == [8 * 40] * 50


def test_epochs_join():
    lengths = np.array([5, 6, 7])
    plans = [pack(lengths, lengths, 1, 16, epoch=e)[0] for e in range(2)]
    plan = join(plans)
    assert plan.updates == sum(p.updates for p in plans)
    assert plan.ends.tolist() == [0, *plans[0].ends[1:], *(3 + plans[1].ends[1:])]
    assert plan.english.offsets.tolist() == [*plans[0].english.offsets, *plans[1].english.offsets]


def alpaca_like(ratio, longest, examples=9229):
    """Log-normal lengths with the median and the upper percentiles of Alpaca's (96, 177, 320)."""
    rng = np.random.default_rng(0)
    english = np.clip(rng.lognormal(np.log(96), 0.5, examples), 40, 984).astype(int)
    target = np.minimum(english * ratio * rng.uniform(0.85, 1.15, examples), longest).astype(int)
    return target, english


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [1024, 2048])
def test_fill_on_lengths_like_alpaca(ratio, seq_len):
    target, english = alpaca_like(ratio, seq_len)
    plan, shape = pack(target, english, 32, seq_len)
    assert fill(plan, target, (32, seq_len)) >= 0.96
    assert fill(plan, english, shape) >= 0.85 and shape[0] % 8 == 0


def test_fill_with_short_pairs_and_translations():
    """A third of the examples have English, three to a row: lengths like SIB-200 with NTREX-128."""
    rng = np.random.default_rng(0)
    english = np.concatenate([rng.integers(60, 110, 1000), np.zeros(2000, int)])
    target = np.concatenate([rng.integers(90, 250, 1000), rng.integers(80, 300, 2000)])
    for sequences, devices in ((8, 2), (16, 4), (32, 8)):
        plan, shape = pack(target, english, sequences, 1024)
        assert fill(plan, target, (sequences, 1024)) >= 0.96
        assert fill(plan, english, shape) >= 0.85 and shape[0] % devices == 0


def test_english_longer_than_the_target():
    target, english = alpaca_like(0.5, 1024, 2000)
    plan, shape = pack(target, english, 8, 1024)
    assert shape[0] > 8 and fill(plan, target, (8, 1024)) >= 0.9 and fill(plan, english, shape) >= 0.85


def test_an_example_longer_than_a_row_is_refused():
    layout = Layout((1, 8), (1, 8))
    for lengths in (([1, 9], [1, 1]), ([1, 1], [1, 9])):
        with pytest.raises(ValueError, match="9 tokens is longer than a row of 8"):
            plan_epoch(*map(Texts.alone, lengths), layout, seed=0, epoch=0)


# Prompts that begin alike.

BEGINNINGS = np.array([5, 9, 0])  # tokens by kind; texts of the last kind share nothing


@st.composite
def sharing(draw):
    """Target and English texts, of which some share a beginning, and the prompts that they have in common."""
    own = st.integers(1, 40)
    text = st.tuples(st.integers(0, 2), own)
    examples = draw(st.lists(st.tuples(text, st.none() | text, st.integers(0, 20)), min_size=1, max_size=200))
    sides = []
    for side in (0, 1):
        kinds, lengths = zip(*(example[side] or (2, 0) for example in examples))
        shared = BEGINNINGS[list(kinds)]
        sides.append(Texts(np.array(lengths) + shared, np.array(kinds), shared))
    target, english = sides
    prompts = np.minimum([target.shared[i] + example[2] for i, example in enumerate(examples)], 60)
    prompts = np.where(prompts < np.minimum(target.lengths, english.lengths), prompts, 0)
    return target, english, np.where(prompts >= target.shared, prompts, 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sharing(), st.sampled_from([1, 2, 6]), st.booleans())
def test_a_row_has_each_beginning_once(texts, sequences, joined):
    target, english, prompts = texts
    if joined:
        english = continuing(english, prompts)
        layout = Layout((sequences, 64), (sequences, 70), joined=True)
    else:
        layout = Layout((sequences, 64), (sequences, 64))
    plan = plan_epoch(target, english, layout, seed=0, epoch=0)
    assert sorted(plan.examples) == list(range(len(prompts)))
    for side, of, shape in ((target, plan.target, layout.target), (english, plan.english, layout.english)):
        side = side.take(plan.examples)
        assert_disjoint(plan, of, shape)
        update = np.repeat(np.arange(plan.updates), np.diff(plan.ends))
        there = {}
        for i in np.flatnonzero(side.lengths):
            beginning = (update[i], of.rows[i], side.kinds[i])
            first = there.setdefault(beginning, i) == i
            assert of.lengths[i] == side.lengths[i] - (0 if first else side.shared[i])
        assert (of.lengths[side.lengths == 0] == 0).all()
    if joined:
        both = plan.english.lengths > 0
        assert np.array_equal(plan.target.rows[both], plan.english.rows[both])


def test_sharing_makes_fewer_updates_and_may_join_the_sides():
    target, english = alpaca_like(2, 1024)
    kinds = np.random.default_rng(1).integers(0, 2, len(target))
    alone, _ = pack(target, english, 8, 1024)
    target, english = (
        Texts(lengths, kinds, np.minimum(np.array([24, 33])[kinds], lengths - 1))
        for lengths in (target, english)
    )
    prompts = np.minimum(english.lengths // 2, target.lengths // 2)
    prompts = np.where(prompts < target.shared, 0, prompts)
    layout = choose_layout(target, english, (8, 1024))
    shared = plan_epoch(target, english, layout, seed=0, epoch=0)
    assert not layout.joined and shared.updates < 0.95 * alone.updates
    joined = choose_layout(target, english, (8, 1024), prompts)
    assert joined.joined and joined.english[0] == 8
    assert joined.english[1] * 8 < 0.9 * np.prod(layout.english)


def test_english_of_more_than_twice_the_target_rows_stays_apart():
    target, english = Texts.alone(np.full(200, 4)), Texts.alone(np.full(200, 40))
    assert not choose_layout(target, english, (2, 64), np.full(200, 2)).joined


def test_a_row_takes_no_more_texts_than_can_be_numbered():
    texts = Texts.alone(np.full(3000, 2))
    plan = plan_epoch(texts, Texts.alone(np.zeros(3000)), Layout((2, 4096), None), seed=0, epoch=0)
    assert np.bincount(plan.target.rows[: plan.ends[1]]).max() == 1023 and plan.updates == 2
