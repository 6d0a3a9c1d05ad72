import numpy as np
import pytest

from prom_jax.data.loader import Batches
from prom_jax.data.records import Recipe, prepare
from prom_jax.errors import UserError


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


def unpack(rows):
    """The examples in packed rows: (tokens, loss) by brute force."""
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segments"][row].max() + 1):
            (here,) = np.nonzero(rows["segments"][row] == segment)
            assert np.array_equal(here, np.arange(here[0], here[-1] + 1))
            tokens = rows["tokens"][row, here]
            assert np.array_equal(rows["positions"][row, here], np.arange(len(here)))
            assert np.array_equal(rows["labels"][row, here[:-1]], tokens[1:])
            weights = rows["weights"][row, here]
            assert rows["labels"][row, here[-1]] == 0 and weights[-1] == 0
            yield tuple(tokens.tolist()), (0, *weights[:-1].tolist())
    padding = rows["segments"] == 0
    assert not any(rows[name][padding].any() for name in rows)


def test_an_epoch_is_every_example_once(records):
    examples = records.read(range(len(records)))
    for run in (batches(records, epochs=1.0), Batches.once(records, sequences=2, seq_len=256)):
        for side in ("target", "english"):
            found = [pair for batch in (run[i] for i in range(len(run))) for pair in unpack(batch[side])]
            expected = [
                (tuple(e[f"{side}_tokens"].tolist()), tuple(e[f"{side}_loss"].astype(float)))
                for e in examples
                if len(e[f"{side}_tokens"])
            ]
            assert sorted(found) == sorted(expected)


def test_shapes_dtypes_and_fill(records):
    run = batches(records)
    batch = run[0]
    assert batch["target"]["tokens"].shape == run.target_shape == (2, 256)
    assert batch["english"]["tokens"].shape == run.english_shape
    assert {k: v.dtype for k, v in batch["target"].items()} == {
        **dict.fromkeys(("tokens", "positions", "segments", "labels"), np.int32),
        "weights": np.float32,
    }
    real = np.mean([(run[i]["target"]["segments"] > 0).mean() for i in range(len(run))])
    assert real == pytest.approx(run.target_fill)
    real = np.mean([(run[i]["english"]["segments"] > 0).mean() for i in range(len(run))])
    assert real == pytest.approx(run.english_fill)


def test_sides_of_an_example_meet_in_one_update(records):
    """English and target rows are equal here, so each update holds the same on both sides."""
    run = batches(records)
    for step in range(len(run)):
        target, english = (set(unpack(run[step][side])) for side in ("target", "english"))
        assert english <= target


def test_number_of_steps(records):
    per_epoch = batches(records).steps_per_epoch
    assert per_epoch > 2
    assert batches(records, epochs=2.0).num_steps == 2 * per_epoch
    assert batches(records, epochs=1 / per_epoch).num_steps == 1
    assert batches(records, epochs=1 + 2 / per_epoch).num_steps == per_epoch + 2
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


def test_english_is_absent_where_there_is_none(byte_level, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    recipe = Recipe("sw", (str(path),), (str(path),), seq_len=256, use_english=False)
    run = batches(prepare(recipe, byte_level, tmp_path / "r").train)
    assert run.english_shape is None and run.english_fill == 0 and "english" not in run[0]
