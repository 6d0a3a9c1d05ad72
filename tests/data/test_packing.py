import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data.packing import choose_english_shape, join, plan_epoch

SEQ_LEN = 64


def assert_disjoint(plan, places, lengths, shape):
    """No two examples of an update share a place, and none leaves its row."""
    for update in range(plan.updates):
        used = np.zeros(shape, int)
        taken = slice(*plan.ends[update : update + 2])
        for row, offset, length in zip(
            places.rows[taken], places.offsets[taken], lengths[taken], strict=True
        ):
            if length:
                assert 0 <= offset <= shape[1] - length
                used[row, offset : offset + length] += 1
        assert used.max() <= 1


def pack(target, english, sequences, seq_len, seed=0, epoch=0):
    shape = (sequences, seq_len)
    english_shape = choose_english_shape(target, english, shape)
    plan = plan_epoch(
        target, english, target_shape=shape, english_shape=english_shape, seed=seed, epoch=epoch
    )
    return plan, english_shape


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
    assert_disjoint(plan, plan.target, target[plan.examples], (sequences, SEQ_LEN))
    if english_shape is None:
        assert not english.any()
    else:
        assert english.max() <= english_shape[1] <= SEQ_LEN
        assert_disjoint(plan, plan.english, english[plan.examples], english_shape)

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
    shapes = {"target_shape": (1, 8), "english_shape": (1, 8), "seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match="9 tokens is longer than a row of 8"):
        plan_epoch([1, 9], [1, 1], **shapes)
    with pytest.raises(ValueError, match="9 tokens is longer than a row of 8"):
        plan_epoch([1, 1], [1, 9], **shapes)
