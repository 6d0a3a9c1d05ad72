"""metrics.jsonl: appended, repaired, read; and what each tracker has of a run that was killed and went
on, with its real package and without a network."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from prom_jax.training import trackers
from prom_jax.utils.errors import UserError

SETTINGS = {"language": "sw", "pivot": {"weight": 0.1}}


def test_rows_after_the_step_and_a_torn_line_go(tmp_path):
    log = trackers.MetricsLog(tmp_path, -1)
    log.write(0, {"eval_target_nats": 3})
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = trackers.MetricsLog(tmp_path, 2)
    again.write(3, {"loss": 0.25})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows == again.rows and rows[-1]["loss"] == 0.25
    assert again.evaluation(0) == {"step": 0, "eval_target_nats": 3.0} and again.evaluation(2) is None


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        trackers.read(path)
    assert trackers.read(tmp_path / "none.jsonl") == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_told_in_one_line(tmp_path):
    log = trackers.MetricsLog(tmp_path, -1, trackers.find_trackers(["tensorboard"]))
    log._file.close()
    log._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        log.write(1, {"loss": 1})
    log.close()


@pytest.mark.slow
def test_training_starts_without_torch_where_there_is_one():
    program = "import prom_jax.train, sys; print('torch' in sys.modules); import torch.nn"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


# Three updates and an evaluation after the last; killed some seconds later, and gone on from step 1.
PROGRAM = """
import os, sys, time
from pathlib import Path
from prom_jax.training import trackers

workdir, name, second = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "second"
settings = {'language': 'sw', 'pivot': {'weight': 0.1}}
log = trackers.MetricsLog(workdir, 1 if second else -1, trackers.find_trackers([name]), settings)
if not second:
    log.text("data card", "| rows |\\n|---|\\n| 5 |")
    log.image("lengths", workdir / "lengths.png")
    log.write(0, {"eval_target_nats": 3})
for step in range(2 if second else 1, 5 if second else 4):
    log.write(step, {"loss": 1 / step})
    if step == 3:
        log.write(step, {"eval_target_nats": 2})
if not second:
    time.sleep(SECONDS)
    os._exit(9)
log.table("held out", [{"held out": "target nats", "before": "3.000", "after": "2.000"}])
log.close()
"""
# What was reported, each once.
UPDATES = [(step, 1 / step) for step in (1, 2, 3, 4)]
EVALUATIONS = [(0, 3.0), (3, 2.0)]
PASSED = ("data card", "lengths", "held out")


@pytest.fixture
def killed_and_resumed(tmp_path):
    """A function that runs PROGRAM twice with a tracker, and gives its work directory."""

    def run(name):
        workdir = tmp_path / "run"
        workdir.mkdir()
        Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(workdir / "lengths.png")
        environment = os.environ | {
            "PYTHONPATH": os.getcwd(),
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(tmp_path / "trackio"),
            "HOME": str(tmp_path),
        }
        for part, status in (("first", 9), ("second", 0)):
            command = [sys.executable, "-c", PROGRAM.replace("SECONDS", "3"), workdir, name, part]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == status and "WARNING" not in done.stdout, done.stdout + done.stderr
        rows = trackers.read(workdir / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4]
        return workdir

    return run


def events(folder):
    """TensorBoard's events, in the order of its files: a step that goes back purges what is after it."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


@pytest.mark.slow
def test_tensorboard(killed_and_resumed):
    found, tags = {}, set()
    for event in events(killed_and_resumed("tensorboard") / "tensorboard"):
        if event.HasField("session_log") and event.session_log.status == 1:  # START: purges from this step on
            found = {key: value for key, value in found.items() if key[1] < event.step}
        for value in event.summary.value:
            tags.add(value.tag)
            if value.HasField("simple_value"):
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    assert [found.pop(("loss", step)) for step, _ in UPDATES] == pytest.approx([loss for _, loss in UPDATES])
    assert found == {("eval/target_nats", step): nats for step, nats in EVALUATIONS}
    assert {"settings/text_summary", "data card/text_summary", "lengths", "held out/text_summary"} <= tags


def wandb_records(path):
    """What a .wandb file holds: after 7 bytes LevelDB's log format, blocks of 32 KiB with records that may go
    on in the next one."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline(killed_and_resumed):
    from wandb.proto.wandb_internal_pb2 import Record

    workdir = killed_and_resumed("wandb")
    paths = (workdir / "wandb").glob("offline-run-*/run-*.wandb")
    files = sorted(paths, key=lambda path: path.parent.stat().st_mtime_ns)
    history, ids, settings = [], set(), {}
    for record in (Record.FromString(data) for path in files for data in wandb_records(path)):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            history.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    assert len(files) == 2 and ids == {(workdir / "run_id.txt").read_text().strip()}
    assert reported(history, "loss") == UPDATES and reported(history, "eval/target_nats") == EVALUATIONS
    assert settings.items() >= SETTINGS.items()
    kinds = [row[f"{name}._type"] for name in PASSED for row in history if f"{name}._type" in row]
    assert kinds == ["html-file", "image-file", "table-file"]


def reported(rows, name):
    """Steps and values, in the order of their steps."""
    return sorted((row["step"], row[name]) for row in rows if name in row)


@pytest.mark.slow
def test_trackio(killed_and_resumed, tmp_path):
    workdir = killed_and_resumed("trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((configuration,),) = connection.execute("SELECT DISTINCT config FROM configs").fetchall()
    assert {name for name, *_ in rows} == {f"run-{(workdir / 'run_id.txt').read_text().strip()}"}
    logged = [{"step": step} | json.loads(metrics) for _, step, metrics in rows]
    assert reported(logged, "loss") == UPDATES and reported(logged, "eval/target_nats") == EVALUATIONS
    assert set(PASSED) <= {key for row in logged for key in row}
    assert json.loads(configuration).items() >= SETTINGS.items()


class Broken:
    """A tracker whose service is away."""

    repeats = False

    def __init__(self, run):
        self.run = run

    def scalars(self, step, values):
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, capsys):
    log = trackers.MetricsLog(tmp_path, -1, {"broken": Broken})
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
    log.close()
    assert len(trackers.read(tmp_path / "metrics.jsonl")) == 2
    said = capsys.readouterr().out
    assert said.count("broken gets nothing more of this run (ConnectionError: no route to host)") == 1


def test_unknown_trackers_are_named():
    with pytest.raises(UserError, match="trackers='mlfow': expected some of tensorboard, trackio, wandb"):
        trackers.find_trackers(["mlfow"])
    assert not trackers.find_trackers([])
