"""metrics.jsonl: appended, repaired, read."""

import json
import subprocess
import sys

import pytest

from prom_jax.training import trackers as metrics
from prom_jax.utils.errors import UserError


def test_rows_after_the_step_and_a_torn_line_go(tmp_path):
    log = metrics.MetricsLog(tmp_path, -1)
    log.write(0, {"eval_target_nats": 3})
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = metrics.MetricsLog(tmp_path, 2)
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
        metrics.read(path)
    assert metrics.read(tmp_path / "none.jsonl") == []


def test_training_starts_without_torch_where_there_is_one():
    program = "import prom_jax.train, sys; print('torch' in sys.modules); import torch.nn"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
