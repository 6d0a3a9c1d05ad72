import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data.packing import Layout, Texts, choose_layout, join, plan_epoch, without_prompts

SEQ_LEN = 64


def assert_disjoint(plan, slots, shape):
    """No two examples of an update share a slot, and none leaves its row."""
    for update in range(plan.updates):
        used = np.zeros(shape, int)
        taken = slice(*plan.ends[update : update + 2])
        for row, offset, length in zip(*(column[taken] for column in slots), strict=True):
            if length:
                assert 0 <= offset <= shape[1] - length
                used[row, offset : offset + length] += 1
        assert used.max() <= 1


def pack(target, english, sequences, seq_len, seed=0, epoch=0):
    """Examples of these lengths, which share nothing: their plan, and the shape of the English rows."""
    texts = {"target": Texts.unshared(target), "english": Texts.unshared(english)}
    layout = choose_layout(texts, (sequences, seq_len))
    assert layout.appended is None
    return plan_epoch(texts, layout, seed=seed, epoch=epoch), layout.shapes.get("english")


def fill(plan, lengths, shape):
    """Real tokens a slot in all updates but the last, which takes what is left."""
    return lengths[plan.examples[: plan.ends[-2]]].sum() / ((plan.updates - 1) * shape[0] * shape[1])


pairs = st.lists(st.tuples(st.integers(1, SEQ_LEN), st.integers(0, SEQ_LEN)), min_size=1, max_size=700)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs, st.sampled_from([1, 2, 6, 8]), st.integers(0, 9), st.integers(0, 3))
def test_every_example_once_and_in_its_own_slots(pairs, sequences, seed, epoch):
    target, english = np.array(pairs).T
    plan, english_shape = pack(target, english, sequences, SEQ_LEN, seed, epoch)
    assert sorted(plan.examples) == list(range(len(target)))
    assert plan.ends[0] == 0 and plan.ends[-1] == len(target) and (np.diff(plan.ends) > 0).all()
    assert np.array_equal(plan.slots["target"].lengths, target[plan.examples])
    assert_disjoint(plan, plan.slots["target"], (sequences, SEQ_LEN))
    if english_shape is None:
        assert not english.any() and set(plan.slots) == {"target"}
    else:
        assert english.max() <= english_shape[1] <= SEQ_LEN
        assert np.array_equal(plan.slots["english"].lengths, english[plan.examples])
        assert_disjoint(plan, plan.slots["english"], english_shape)

    again, _ = pack(target, english, sequences, SEQ_LEN, seed, epoch)
    assert np.array_equal(plan.examples, again.examples) and np.array_equal(plan.ends, again.ends)
    for stream, slots in plan.slots.items():
        assert np.array_equal(slots, again.slots[stream])


def test_order_depends_on_seed_and_epoch():
    lengths = np.full(50, 8)

    def order(seed, epoch):
        return pack(lengths, lengths, 2, 64, seed, epoch)[0].examples.tolist()

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
    offsets = [each.slots["english"].offsets.tolist() for each in (plan, *plans)]
    assert offsets[0] == offsets[1] + offsets[2]


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
    layout = Layout({"target": (1, 8), "english": (1, 8)})
    for lengths in (([1, 9], [1, 1]), ([1, 1], [1, 9])):
        with pytest.raises(ValueError, match="9 tokens is longer than a row of 8"):
            plan_epoch(streams(map(Texts.unshared, lengths)), layout, seed=0, epoch=0)


def streams(texts):
    """Texts by the names of their streams."""
    return dict(zip(("target", "english", "replay"), texts))


# Shared prefixes.

PREFIXES = np.array([5, 9, 0])  # tokens by id; texts with the last share nothing


@st.composite
def sharing(draw):
    """Target and English texts, of which some share a prefix, and the prompts that they have in common."""
    own = st.integers(1, 40)
    text = st.tuples(st.integers(0, 2), own)
    examples = draw(st.lists(st.tuples(text, st.none() | text, st.integers(0, 20)), min_size=1, max_size=200))
    texts = []
    for stream in (0, 1):
        ids, lengths = zip(*(example[stream] or (2, 0) for example in examples))
        shared = PREFIXES[list(ids)]
        texts.append(Texts(np.array(lengths) + shared, np.array(ids), shared))
    target, english = texts
    prompts = np.minimum([target.shared[i] + example[2] for i, example in enumerate(examples)], 60)
    prompts = np.where(prompts < np.minimum(target.lengths, english.lengths), prompts, 0)
    return target, english, np.where(prompts >= target.shared, prompts, 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sharing(), st.sampled_from([1, 2, 6]), st.booleans())
def test_a_row_has_each_prefix_once(texts, sequences, appended):
    target, english, prompts = texts
    if appended:
        english = without_prompts(english, prompts)
        layout = Layout({"target": (sequences, 64), "english": (sequences, 70)}, "english")
    else:
        layout = Layout({"target": (sequences, 64), "english": (sequences, 64)})
    texts = {"target": target, "english": english}
    plan = plan_epoch(texts, layout, seed=0, epoch=0)
    assert sorted(plan.examples) == list(range(len(prompts)))
    for stream, slots in plan.slots.items():
        assert_prefixes_once(plan, texts[stream], slots, layout.shapes[stream])
    if appended:
        both = plan.slots["english"].lengths > 0
        assert np.array_equal(plan.slots["target"].rows[both], plan.slots["english"].rows[both])


def assert_prefixes_once(plan, texts, slots, shape):
    """Every text has its slots, without its prefix where the row has that already."""
    texts = texts.take(plan.examples)
    assert_disjoint(plan, slots, shape)
    update = np.repeat(np.arange(plan.updates), np.diff(plan.ends))
    there = {}
    for i in np.flatnonzero(texts.lengths):
        prefix = (update[i], slots.rows[i], texts.prefix_ids[i])
        first = there.setdefault(prefix, i) == i
        assert slots.lengths[i] == texts.lengths[i] - (0 if first else texts.shared[i])
    assert (slots.lengths[texts.lengths == 0] == 0).all()


@st.composite
def three_streams(draw):
    """Texts of three streams, of which an example may lack any, and what its prompts have in common."""
    text = st.none() | st.tuples(st.integers(0, 2), st.integers(1, 40))
    examples = draw(st.lists(st.tuples(text, text, text, st.integers(0, 20)), min_size=1, max_size=150))
    texts = []
    for stream in range(3):
        ids, lengths = zip(*(example[stream] or (2, 0) for example in examples))
        shared = PREFIXES[list(ids)]
        texts.append(Texts(np.array(lengths) + shared, np.array(ids), shared))
    texts = streams(texts)
    prompts = {}
    for stream in ("english", "replay"):
        common = texts["target"].shared + [example[3] for example in examples]
        least = np.minimum(texts["target"].lengths, texts[stream].lengths)
        prompts[stream] = np.where(common < least, common, 0)
    return texts, prompts


@settings(max_examples=150, deadline=None, derandomize=True)
@given(three_streams(), st.sampled_from([1, 2, 6]), st.booleans())
def test_three_streams(texts_and_prompts, sequences, append):
    """Every example once, each text in slots of its own, whichever streams an example lacks."""
    texts, prompts = texts_and_prompts
    layout = choose_layout(texts, (sequences, 64), prompts if append else None)
    assert list(layout.shapes) == [s for s in texts if s == "target" or texts[s].lengths.any()]
    assert layout.shapes["target"] == (sequences, 64)
    if layout.appended:
        assert append and layout.shapes[layout.appended][0] == sequences
        texts |= {layout.appended: without_prompts(texts[layout.appended], prompts[layout.appended])}
    plan = plan_epoch(texts, layout, seed=0, epoch=0)
    assert sorted(plan.examples) == list(range(len(texts["target"].lengths)))
    assert (np.diff(plan.ends) > 0).all() and list(plan.slots) == list(layout.shapes)
    for stream, slots in plan.slots.items():
        assert_prefixes_once(plan, texts[stream], slots, layout.shapes[stream])
    if layout.appended:
        target, other = plan.slots["target"], plan.slots[layout.appended]
        both = (target.lengths > 0) & (other.lengths > 0)
        assert np.array_equal(target.rows[both], other.rows[both])


def test_the_first_stream_that_gains_is_appended():
    """The second has a prompt of its own, the third the target's, and the others keep rows of their own."""
    lengths = np.full(400, 40)
    texts = streams(map(Texts.unshared, (lengths, lengths // 2, lengths)))
    prompts = {"english": np.zeros(400, int), "replay": np.full(400, 32)}
    layout = choose_layout(texts, (8, 64), prompts)
    assert layout.appended == "replay" and layout.shapes["replay"] == (8, 16)
    assert layout.shapes["english"] == choose_layout(texts, (8, 64)).shapes["english"]
    both = choose_layout(texts, (8, 64), prompts | {"english": np.full(400, 16)})
    assert both.appended == "english" and both.shapes["replay"] != (8, 16)


def test_streams_are_spread_evenly_over_the_updates():
    """Examples that have a third stream alone come between the others."""
    target, replay = np.repeat([32, 0], [600, 200]), np.repeat([0, 40], [600, 200])
    texts = streams(map(Texts.unshared, (target, np.zeros(800, int), replay)))
    layout = choose_layout(texts, (8, 64))
    plan = plan_epoch(texts, layout, seed=0, epoch=0)
    sums = np.add.reduceat(replay[plan.examples], plan.ends[:-1])
    assert layout.shapes.keys() == {"target", "replay"} and plan.updates == 38
    assert np.ptp(sums[:-1]) <= 2 * 40


@pytest.mark.slow
def test_sharing_makes_fewer_updates_and_may_append_english():
    target, english = alpaca_like(2, 1024)
    ids = np.random.default_rng(1).integers(0, 2, len(target))
    alone, _ = pack(target, english, 8, 1024)
    target, english = (
        Texts(lengths, ids, np.minimum(np.array([24, 33])[ids], lengths - 1)) for lengths in (target, english)
    )
    prompts = np.minimum(english.lengths // 2, target.lengths // 2)
    prompts = np.where(prompts < target.shared, 0, prompts)
    texts = {"target": target, "english": english}
    layout = choose_layout(texts, (8, 1024))
    shared = plan_epoch(texts, layout, seed=0, epoch=0)
    assert layout.appended is None and shared.updates < 0.95 * alone.updates
    appended = choose_layout(texts, (8, 1024), {"english": prompts})
    assert appended.appended == "english" and appended.shapes["english"][0] == 8
    assert appended.shapes["english"][1] * 8 < 0.9 * np.prod(layout.shapes["english"])


def test_english_of_more_than_twice_the_target_rows_stays_apart():
    texts = streams(map(Texts.unshared, (np.full(200, 4), np.full(200, 40))))
    assert choose_layout(texts, (2, 64), {"english": np.full(200, 2)}).appended is None


def test_a_row_takes_no_more_texts_than_can_be_numbered():
    texts = streams(map(Texts.unshared, (np.full(3000, 2), np.zeros(3000))))
    plan = plan_epoch(texts, Layout({"target": (2, 4096)}), seed=0, epoch=0)
    assert np.bincount(plan.slots["target"].rows[: plan.ends[1]]).max() == 1023 and plan.updates == 2


def test_texts_of_appended_streams_are_numbered_with_the_primary_ones():
    """So that both together are no more than can be numbered, if an example has but one of them."""
    target, replay = np.repeat([2, 0], 1500), np.repeat([0, 2], 1500)
    texts = streams(map(Texts.unshared, (target, np.zeros(3000), replay)))
    layout = Layout({"target": (2, 4096), "replay": (2, 4096)}, "replay")
    plan = plan_epoch(texts, layout, seed=0, epoch=0)
    first = slice(plan.ends[1])
    rows = np.where(target[plan.examples] > 0, plan.slots["target"].rows, plan.slots["replay"].rows)
    assert np.bincount(rows[first]).max() == 1023 and plan.updates == 2
