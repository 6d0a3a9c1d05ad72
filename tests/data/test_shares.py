"""Repeated sources and shares of streams: how often each example comes, and that copies stay apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data.loader import Batches
from prom_jax.data.shares import draw, fit, parse_shares
from prom_jax.utils.errors import UserError
from tests.data.test_loader import Lengths

ONCE = np.ones(100, np.int64)
FEW = np.arange(100) < 4  # which have English


def test_a_stream_has_its_share_of_an_epoch():
    times = fit({"english": FEW}, ONCE, {"english": 0.25})
    assert times[FEW].sum() / times.sum() == pytest.approx(0.25) and np.array_equal(times[~FEW], ONCE[~FEW])
    assert np.array_equal(times[FEW], np.full(4, 8.0))  # 32 of 128
    less = fit({"english": ~FEW}, ONCE, {"english": 0.5})
    assert less[~FEW].sum() == pytest.approx(4) and np.array_equal(less[FEW], ONCE[FEW])
    both = fit({"english": FEW, "replay": np.arange(100) > 89}, ONCE, {"english": 0.2, "replay": 0.3})
    assert [both[:4].sum(), both[90:].sum()] == pytest.approx([0.2 * both.sum(), 0.3 * both.sum()], rel=1e-3)
    repeated = fit({"english": FEW}, ONCE + FEW, {"english": 0.25})
    assert repeated[FEW].sum() / repeated.sum() == pytest.approx(0.25)
    assert np.array_equal(fit({}, ONCE + FEW, {}), ONCE + FEW)


def test_shares_that_cannot_be_had():
    with pytest.raises(UserError, match=r"english=0.5 cannot be had, .*come to 1.00: every one has it"):
        fit({"english": ONCE > 0}, ONCE, {"english": 0.5})
    with pytest.raises(UserError, match="names 'replay', and the data have none of it"):
        fit({"english": FEW}, ONCE, {"replay": 0.5})
    with pytest.raises(UserError, match="cannot be had"):
        fit({"a": FEW, "b": ~FEW}, ONCE, {"a": 0.5, "b": 0.3})


def test_shares_are_read():
    assert parse_shares(("english=0.25", "replay=.1")) == {"english": 0.25, "replay": 0.1}
    for entry in ("english", "english=2", "=0.5", "english=x", "english=nan", "english=inf", "english=0"):
        with pytest.raises(UserError, match=rf"data\.share has '{entry}': expected 'name=share'"):
            parse_shares((entry,))
    with pytest.raises(UserError, match=r"data\.share has 'sw=2': expected 'name=share' once"):
        parse_shares(("sw=1", "sw=2"), ("sw", "fi"))


def test_shares_of_languages():
    assert parse_shares(("fi=.5", "sw=2", "english=0.1"), ("sw", "fi")) == {
        "fi": 0.2,
        "sw": 0.8,
        "english": 0.1,
    }
    assert parse_shares(("sw=0.5",), ("sw", "fi", "th")) == {"sw": 0.5}
    with pytest.raises(UserError, match=r"data\.share has 'sw=2'"):
        parse_shares(("sw=2",), ("sw", "fi", "th"))
    with pytest.raises(UserError, match=r"data\.share has 'sw=1'"):
        parse_shares(("sw=1",), ("sw",))


@pytest.mark.parametrize(
    ("sizes", "shares", "expected"),
    [
        ((1000, 200), ("sw=1", "fi=1"), (1000, 1000)),
        ((1000, 200), ("sw=1", "fi=3"), (1000, 3000)),
        ((1000, 900), ("sw=3", "fi=1"), (2700, 900)),
        ((5, 5), ("sw=.5", "fi=.5"), (5, 5)),
        ((10, 1000), ("sw=.5",), (1000, 1000)),
        ((1000, 10), ("sw=.5",), (1000, 1000)),
    ],
)
def test_no_language_is_left_out_for_anothers_share(sizes, shares, expected):
    groups = np.repeat([0, 1], sizes)
    present = {"sw": groups == 0, "fi": groups == 1}
    times = fit(present, np.ones(len(groups)), parse_shares(shares, ("sw", "fi")), ("sw", "fi"))
    assert [times[of].sum() for of in present.values()] == pytest.approx(list(expected))


def test_languages_and_streams_have_shares_together():
    groups, english = np.repeat([0, 1], (300, 100)), np.arange(400) % 10 == 0
    present = {"sw": groups == 0, "fi": groups == 1, "english": english}
    times = fit(present, np.ones(400), {"sw": 0.5, "fi": 0.5, "english": 0.25}, ("sw", "fi"))
    found = {name: times[of].sum() / times.sum() for name, of in present.items()}
    assert found == pytest.approx({"sw": 0.5, "fi": 0.5, "english": 0.25}, abs=1e-3)
    assert times[groups == 0].sum() >= 300 - 1e-6 and times[groups == 1].sum() >= 100 - 1e-6


@pytest.mark.parametrize("share_prompts", [False, True])
def test_copies_in_one_update_have_keys_of_their_own(share_prompts):
    """But for a prefix that examples share, which rows may have once."""
    records = Lengths([(20, 18)] * 2 + [(17, 0)] * 6, prompt=16)
    records.repeats = np.array([3, 3] + [1] * 6)
    shape = {"sequences": 8, "seq_len": 64, "seed": 0, "epochs": 1.0, "share_prompts": share_prompts}
    run = Batches(records, **shape, keys=True)
    assert len(run) == 1
    rows = run[0]["target"]
    prefix = (rows["positions"] < 8) & (rows["segments"] > 0)
    own = (rows["positions"] >= 8) & (rows["segments"] > 0)
    assert own.sum() == 6 * 12 + 6 * 9 == len(np.unique(rows["keys"][own]))
    assert len(np.unique(rows["keys"][prefix])) == 1  # its tokens are all the same, -1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.integers(0, 9))
def test_each_comes_as_often_as_it_should(times, seed):
    times = np.array(times)
    epochs = [np.bincount(draw(times, seed, epoch), minlength=len(times)) for epoch in range(8)]
    assert np.all(np.abs(np.sum(epochs, axis=0) - 8 * times) < 1 + 1e-6)
    assert all(np.all(np.abs(number - times) < 1 + 1e-6) for number in epochs)
    assert np.array_equal(draw(times, seed, 3), draw(times, seed, 3))


@pytest.mark.parametrize("share_prompts", [False, True])
def test_copies_in_one_update_are_texts_of_their_own(share_prompts):
    """Each copy has its segments, of which the rows' tokens are those of whole texts."""
    records = Lengths([(20, 18)] * 2 + [(17, 0)] * 6, prompt=16)
    records.repeats = np.array([3, 3] + [1] * 6)
    run = Batches(records, sequences=4, seq_len=64, seed=0, epochs=2.0, share_prompts=share_prompts)
    assert run.examples_per_epoch == 12 and np.array_equal(np.bincount(run.examples), [6, 6] + [2] * 6)
    assert np.array_equal(np.bincount(run.steps_of_examples, minlength=len(run)) > 0, np.ones(len(run), bool))
    seen = 0
    for step in range(len(run)):
        for stream, rows in run[step].items():
            placed = run.slots(step, stream)
            ends = [
                (row, rows["segments"][row, offset + length - 1]) for _, row, offset, length in zip(*placed)
            ]
            assert len(set(ends)) == len(ends)
            seen += len(ends)
    assert seen == 2 * (12 + 6)
    alone = Batches(records, sequences=4, seq_len=64, seed=0, epochs=1.0, shares={"english": 0.5})
    assert np.bincount(alone.examples)[:2].sum() == 6
    assert len(Batches.once(records, sequences=4, seq_len=64).examples) == 8
