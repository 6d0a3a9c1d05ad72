"""Writing whole or not at all."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import write_json


def write_many(path, value):
    for _ in range(100):
        write_json(path, [value] * 2000)


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "a" / "b.json"
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = [pool.submit(write_many, path, value) for value in (1, 2)]
        while not all(future.done() for future in running):
            if path.exists():
                assert len(json.loads(path.read_text())) == 2000
        assert [future.result() for future in running] == [None, None]
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"a.json cannot be written .*No space left.*make room"):
        write_json(path, 2)
    assert json.loads(path.read_text()) == 1 and len(list(tmp_path.iterdir())) == 1
