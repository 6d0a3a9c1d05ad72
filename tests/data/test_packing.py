import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data.packing import join, layout_english, plan_epoch

SEQ_LEN = 64


def assert_disjoint(plan, rows, offsets, lengths, num_rows, row_length):
    """No two examples of an update share a place, and none leaves its row."""
    for update in range(plan.updates):
        used = np.zeros((num_rows, row_length), int)
        taken = slice(*plan.ends[update : update + 2])
        for row, offset, length in zip(rows[taken], offsets[taken], lengths[taken], strict=True):
            assert 0 <= offset <= row_length - length
            used[row, offset : offset + length] += 1
        assert used.max() <= 1


pairs = st.lists(st.tuples(st.integers(1, SEQ_LEN), st.integers(0, SEQ_LEN)), min_size=1, max_size=700)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs, st.sampled_from([1, 2, 6, 8]), st.integers(0, 9), st.integers(0, 3))
def test_every_example_once_and_in_its_own_place(pairs, sequences, seed, epoch):
    target, english = np.array(pairs).T
    arguments = {"sequences": sequences, "seq_len": SEQ_LEN}
    plan = plan_epoch(target, english, **arguments, seed=seed, epoch=epoch)
    assert sorted(plan.examples) == list(range(len(target)))
    assert plan.ends[0] == 0 and plan.ends[-1] == len(target) and (np.diff(plan.ends) > 0).all()
    assert_disjoint(plan, plan.rows, plan.offsets, target[plan.examples], sequences, SEQ_LEN)

    again = plan_epoch(target, english, **arguments, seed=seed, epoch=epoch)
    for name in ("examples", "rows", "offsets", "ends"):
        assert np.array_equal(getattr(plan, name), getattr(again, name))

    layout = layout_english(plan, english, **arguments)
    if layout is None:
        assert not english.any()
        return
    assert english.max() <= layout.length <= SEQ_LEN and layout.length % 8 == 0
    lengths = english[plan.examples]
    assert_disjoint(plan, layout.rows, layout.offsets, lengths, layout.num_rows, layout.length)


def test_order_depends_on_seed_and_epoch():
    lengths = np.full(50, 8)

    def order(seed, epoch):
        plan = plan_epoch(lengths, lengths, sequences=2, seq_len=64, seed=seed, epoch=epoch)
        return plan.examples.tolist()

    assert len({tuple(order(s, e)) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4
    assert order(None, 0) == order(None, 1) == list(range(50))


def test_english_is_spread_evenly_over_the_updates():
    english = np.repeat([40, 0], 400)
    plan = plan_epoch(np.full(800, 32), english, sequences=8, seq_len=64, seed=0, epoch=0)
    sums = np.add.reduceat(english[plan.examples], plan.ends[:-1])
    assert sums.tolist() == [8 * 40] * 50


def test_epochs_join():
    lengths = np.array([5, 6, 7])
    plans = [plan_epoch(lengths, lengths, sequences=1, seq_len=12, seed=0, epoch=e) for e in range(2)]
    plan = join(plans)
    assert plan.updates == sum(p.updates for p in plans)
    assert plan.ends.tolist() == [0, *plans[0].ends[1:], *(3 + plans[1].ends[1:])]


def test_fill_on_lengths_like_alpaca():
    """Log-normal lengths, a target text of about three times its English one."""
    rng = np.random.default_rng(0)
    english = np.clip(rng.lognormal(4.7, 0.6, 9000), 50, 700).astype(int)
    target = np.minimum(english * rng.uniform(2, 4, 9000), 2048).astype(int)
    plan = join([plan_epoch(target, english, sequences=32, seq_len=2048, seed=0, epoch=e) for e in range(3)])
    assert target.sum() * 3 / (plan.updates * 32 * 2048) >= 0.97
    layout = layout_english(plan, english, sequences=32, seq_len=2048)
    assert layout.num_rows < 32 or layout.length <= 1024
    places = plan.updates * layout.num_rows * layout.length
    assert english.sum() * 3 / places >= 0.85


def test_english_rows_are_as_many_as_are_needed():
    """Seventeen long texts an update take eighteen rows, which two devices share, and not thirty-two."""
    plan = plan_epoch(np.full(17, 1900), np.full(17, 1200), sequences=32, seq_len=2048, seed=None, epoch=0)
    layout = layout_english(plan, np.full(17, 1200), sequences=32, seq_len=2048)
    assert layout.num_rows == 18
