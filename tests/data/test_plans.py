"""The plan of a run in a file."""

import os

import numpy as np
import pytest

from prom_jax.data import plans
from prom_jax.data.loader import Batches
from tests.data.test_loader import Lengths


@pytest.fixture
def records(monkeypatch):
    """Some with English, which is appended, some repeated."""
    monkeypatch.setattr(plans, "KEPT_FROM", 10)
    found = Lengths([(20 + i % 7, 18 * (i % 2)) for i in range(60)], prompt=16)
    found.repeats = 1 + np.arange(60) % 2
    return found


def run(records, plans=None, **changes):
    settings = {"sequences": 2, "seq_len": 64, "seed": 0, "epochs": 2.5, "share_prompts": True} | changes
    return Batches(records, **settings, plans=plans)


@pytest.mark.parametrize("changes", [{}, {"share_prompts": False}, {"epochs": 0, "steps": 7}])
def test_what_is_kept_is_what_was_made(records, tmp_path, monkeypatch, changes):
    plain, first = run(records, **changes), run(records, tmp_path, **changes)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(plans, "_make", lambda request: pytest.fail("was made again"))
    kept = run(records, tmp_path, **changes)
    for other in (first, kept):
        assert (other.shapes, other.appended, len(other)) == (plain.shapes, plain.appended, len(plain))
        assert other.steps_per_epoch == plain.steps_per_epoch and other.fill == plain.fill
        np.testing.assert_array_equal(other.first_epoch, plain.first_epoch)
        for step in range(len(plain)):
            for stream, rows in plain[step].items():
                for name, values in rows.items():
                    np.testing.assert_array_equal(other[step][stream][name], values)
                    assert other[step][stream][name].dtype == values.dtype
    path.write_bytes(path.read_bytes()[:900])  # a damaged one is made again
    monkeypatch.undo()
    monkeypatch.setattr(plans, "KEPT_FROM", 10)
    np.testing.assert_array_equal(run(records, tmp_path, **changes).examples, plain.examples)
    assert len(list(tmp_path.iterdir())) == 1


def test_another_run_has_another_plan(records, tmp_path):
    changes = [{}, {"seed": 1}, {"epochs": 3.0}, {"seq_len": 128}, {"sequences": 3}, {"share_prompts": False}]
    for number, change in enumerate([*changes, {"shares": {"english": 0.3}}], 1):
        np.testing.assert_array_equal(
            run(records, tmp_path, **change).examples, run(records, **change).examples
        )
        assert len(list(tmp_path.iterdir())) == number
    records.streams["english"].lengths[1] += 1
    run(records, tmp_path)
    assert len(list(tmp_path.iterdir())) == number + 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_few_examples_and_a_full_disk(records, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert len(run(records, tmp_path)) == len(run(records)) and not list(tmp_path.iterdir())
    monkeypatch.undo()
    run(records, tmp_path)
    assert not list(tmp_path.iterdir())  # 60 are few
