import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import prepare
from prom_jax.ops.attention import visible
from prom_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def records(byte_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    lines = [f'{{"instruction": "{i}", "output": "{"ab" * (1 + i % 7)}"}}\n' for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "mt.tsv").write_text("en\tsw\n" + "One\tMoja\n" * 5)
    rows = (str(folder / "rows.jsonl"),)
    recipe = Recipe("sw", rows, rows, (str(folder / "mt.tsv"),), seq_len=256)
    return prepare(recipe, byte_level, folder / "r").train


def batches(records, **changes):
    return Batches(records, **{"sequences": 2, "seq_len": 256, "seed": 0, "epochs": 2.0} | changes)


def unpack(rows, before=None):
    """The examples in packed rows, each with what it continues (there, or in the rows `before` them), as
    (tokens, loss) by brute force."""
    for row in range(len(rows["tokens"])):
        segments = rows["segments"][row]
        for number in sorted({n for n in segments.tolist() if n & 1023}):
            (here,) = np.nonzero(segments == number)
            assert np.array_equal(here, np.arange(here[0], here[-1] + 1))
            tokens = rows["tokens"][row, here]
            assert np.array_equal(rows["labels"][row, here[:-1]], tokens[1:])
            weights = rows["weights"][row, here]
            assert rows["labels"][row, here[-1]] == 0 and weights[-1] == 0
            continued = {number >> 10 << 10, number >> 20 << 20} - {0}
            parts = [
                dict(zip(of["positions"][row, seen].tolist(), of["tokens"][row, seen].tolist()))
                for of, wanted in ((rows, continued), (before, continued), (rows, {number}))
                if of is not None
                for seen in [np.isin(of["segments"][row], list(wanted))]
            ]
            whole = {position: token for part in parts for position, token in part.items()}
            assert len(whole) == sum(map(len, parts)) and sorted(whole) == list(range(len(whole)))
            text = tuple(whole[position] for position in range(len(whole)))
            yield text, (*[0] * (len(text) - len(here) + 1), *weights[:-1].tolist())
    padding = rows["segments"] == 0
    assert not any(rows[name][padding].any() for name in rows)


def sides_of(run, step):
    """The examples of a batch by side."""
    batch = run[step]
    before = {"english": batch["target"] if run.joined else None}
    return {side: list(unpack(rows, before.get(side))) for side, rows in batch.items()}


def test_an_epoch_is_every_example_once(records):
    examples = records.read(range(len(records)))
    runs = [batches(records, epochs=1.0, share_prompts=share) for share in (False, True)]
    once = [Batches.once(records, sequences=2, seq_len=256, share_prompts=share) for share in (False, True)]
    assert runs[1].joined and not once[1].joined and once[1].saved > 0
    for run in (*runs, *once):
        for side in ("target", "english"):
            found = [pair for i in range(len(run)) for pair in sides_of(run, i)[side]]
            expected = [
                (tuple(e[f"{side}_tokens"].tolist()), tuple(e[f"{side}_loss"].astype(float)))
                for e in examples
                if len(e[f"{side}_tokens"])
            ]
            assert sorted(found) == sorted(expected)


def test_shapes_dtypes_and_fill(records):
    run = batches(records)
    batch = run[0]
    assert batch["target"]["tokens"].shape == run.shapes["target"] == (2, 256)
    assert batch["english"]["tokens"].shape == run.shapes["english"]
    assert {k: v.dtype for k, v in batch["target"].items()} == {
        **dict.fromkeys(("tokens", "positions", "segments", "labels"), np.int32),
        "weights": np.float32,
    }
    for side in ("target", "english"):
        real = np.mean([(run[i][side]["segments"] > 0).mean() for i in range(len(run))])
        assert real == pytest.approx(run.fill[side])
    assert run.tokens(0) == sum((rows["segments"] > 0).sum() for rows in batch.values()) and run.saved == 0


def test_shared_prompts_take_room_once(records):
    alone, shared = batches(records), batches(records, share_prompts=True)
    assert shared.steps_per_epoch < alone.steps_per_epoch
    taken = sum((rows["segments"] > 0).sum() for i in range(len(shared)) for rows in shared[i].values())
    tokens = sum(shared.tokens(i) for i in range(len(shared)))
    assert shared.saved == pytest.approx(1 - taken / tokens) and shared.saved > 0.3
    whole = sum(
        len(text) for i in range(len(shared)) for side in sides_of(shared, i).values() for text, _ in side
    )
    assert whole == tokens


def test_nobody_sees_what_comes_after_it_in_a_row(records):
    """Kernels of attention rely on it."""
    run = batches(records, share_prompts=True)
    for step in range(len(run)):
        for rows in run[step].values():
            positions, segments = rows["positions"], rows["segments"]
            seen = visible(positions, positions, segments, segments) & (segments != 0)[:, None, :, None]
            assert seen.any() and not np.triu(seen, 1).any()


def test_sides_of_an_example_meet_in_one_update(records):
    """English and target rows are equal here, so each update holds the same on both sides."""
    for share in (False, True):
        run = batches(records, share_prompts=share)
        assert run.joined == share
        for step in range(len(run)):
            sides = sides_of(run, step)
            assert set(sides["english"]) <= set(sides["target"])


def test_number_of_steps(records):
    per_epoch = batches(records).steps_per_epoch
    assert per_epoch > 2
    assert batches(records, epochs=1.0).num_steps == per_epoch
    assert batches(records, epochs=1 / per_epoch).num_steps == 1
    second = batches(records, epochs=2.0).num_steps - per_epoch
    assert batches(records, epochs=1 + 2 / second).num_steps == per_epoch + 2
    assert sorted(batches(records, epochs=2.0).examples) == sorted(2 * list(range(len(records))))
    assert batches(records, steps=3 * per_epoch + 1, epochs=1.0).num_steps == 3 * per_epoch + 1
    assert sorted(batches(records, epochs=1.0).examples) == list(range(len(records)))
    with pytest.raises(UserError, match="steps is 0 and epochs is 0"):
        batches(records, epochs=0.0)


def test_iteration_from_a_step_equals_random_access(records):
    run, same = batches(records), batches(records)
    start = run.steps_per_epoch - 1
    seen = list(run.iterate(start))
    assert len(seen) == len(run) - start
    for step, batch in enumerate(seen, start):
        for name, array in batch["target"].items():
            assert np.array_equal(array, same[step]["target"][name])
    assert list(run.iterate(len(run))) == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), min_size=1, max_size=60),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(0, 5),
)
def test_hosts_read_every_example_once_between_them(lengths, hosts, start):
    """Each host reads the rows that are its own; together they have the whole batch, of any step on."""
    run = Batches(Lengths(lengths), sequences=4, seq_len=64, seed=0, epochs=2.0)
    start = min(start, len(run) - 1)
    shares = []
    for host in range(hosts):
        wanted = {side: np.arange(rows) % hosts == host for side, (rows, _) in run.shapes.items()}
        shares.append(list(run.iterate(start, wanted)))
    for step, parts in enumerate(zip(*shares, strict=True), start):
        for side, whole in run[step].items():
            for name, array in whole.items():
                assert np.array_equal(sum(part[side][name] for part in parts), array)
                for host, part in enumerate(parts):
                    assert not part[side][name][np.arange(len(array)) % hosts != host].any()
    seen = [first for step in range(run.steps_per_epoch) for first in first_tokens(run[step]["target"])]
    assert sorted(seen) == list(range(len(lengths)))


class Lengths:
    """Records of given lengths, whose tokens say which example they are."""

    def __init__(self, lengths):
        self.target_lengths, self.english_lengths = np.array(lengths).T

    def read(self, indices):
        return [
            {
                f"{side}_{what}": np.full(getattr(self, f"{side}_lengths")[i], i if what == "tokens" else 1)
                for side in ("target", "english")
                for what in ("tokens", "loss")
            }
            for i in indices
        ]


def first_tokens(rows):
    begins = (rows["positions"] == 0) & (rows["segments"] > 0)
    return rows["tokens"][begins].tolist()


def test_a_host_reads_no_others_examples(records, monkeypatch):
    run = batches(records)
    read, original = [], records.read
    monkeypatch.setattr(records, "read", lambda indices: read.append(list(indices)) or original(indices))
    mine = {side: np.arange(rows) == 0 for side, (rows, _) in run.shapes.items()}
    run.read(0, mine)
    expected = {example for side in run.shapes for example, row, *_ in zip(*run.places(0, side)) if row == 0}
    assert set(read[0]) == expected and len(read[0]) == len(expected) < len(records)


def test_english_is_absent_where_there_is_none(byte_level, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    recipe = Recipe("sw", (str(path),), (str(path),), seq_len=256, use_english=False)
    run = batches(prepare(recipe, byte_level, tmp_path / "r").train)
    assert set(run.shapes) == set(run.fill) == set(run[0]) == {"target"}
