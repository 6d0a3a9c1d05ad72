"""Writing whole or not at all."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from prom_jax.config import default
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import as_dict, check_same_config, write_config, write_json


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
    with pytest.raises(UserError, match=r"a.json cannot be written .*No space left.*free some space"):
        write_json(path, 2)
    assert json.loads(path.read_text()) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_run_of_another_version_is_not_continued(tmp_path):
    config = {"seed": 0, "batch": {"sequences": 8}}
    check_same_config(tmp_path, config)
    write_config(tmp_path, config | {"records": "x"})
    check_same_config(tmp_path, config)
    with pytest.raises(UserError, match=r"holds a run with batch\.sequences=8, now 4"):
        check_same_config(tmp_path, config | {"batch": {"sequences": 4}})
    write_json(tmp_path / "config.json", config)  # as commit f878607 wrote it
    with pytest.raises(
        UserError, match=r"config\.json is of a run or checkpoint of format 1, .* cannot go on with it"
    ):
        check_same_config(tmp_path, config)


def test_names_are_compared_by_what_they_hold_where_that_is_kept(tmp_path):
    config = {"model": "a", "data": {"target": ["a.jsonl"], "seq_len": 8}}
    moved = {"model": "b", "data": {"target": ["b.jsonl"], "seq_len": 8}}
    write_config(tmp_path, config | {"records": "x", "base": "y"})
    check_same_config(tmp_path, moved)
    check_same_config(tmp_path, moved | {"records": "x", "base": "y"})
    with pytest.raises(UserError, match=r"holds a run with model='a', now 'b'"):
        check_same_config(tmp_path, moved | {"records": "x", "base": "z"})
    with pytest.raises(
        UserError, match=r"holds a run with data.target=\['a.jsonl'\], now \['b.jsonl'\]: give"
    ):
        check_same_config(tmp_path, moved | {"records": "z", "base": "y"})
    with pytest.raises(UserError, match=r"holds a run with records='x', now 'z'"):
        check_same_config(tmp_path, config | {"records": "z"})
    write_config(tmp_path, config | {"records": "x"})  # as they were before
    with pytest.raises(UserError, match=r"holds a run with model='a', now 'b'"):
        check_same_config(tmp_path, moved)
    check_same_config(tmp_path, config | {"base": "y"})


def test_a_key_that_came_after_the_run_was_at_its_default(tmp_path):
    config = default()
    now = as_dict(config)
    before = as_dict(config)
    del before["data"]["pairing"]
    write_config(tmp_path, before)
    check_same_config(tmp_path, now)
    now["data"]["pairing"] = "none"
    with pytest.raises(UserError, match=r"holds a run with data.pairing='id', now 'none'"):
        check_same_config(tmp_path, now)
