"""Processes that meet, wait for one another, and end together; and whole runs of two that are broken."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import faults

# What each process does between joining and leaving; signs of life come quickly here.
SCRIPT = """
import os, sys, time
from prom_jax.parallel import multihost as distributed
from prom_jax.utils.errors import UserError
distributed.HEARTBEAT_SECONDS = 0.1
process, address, work = int(sys.argv[1]), f"localhost:{sys.argv[2]}", sys.argv[3]
timeouts = {"connect_timeout": float(sys.argv[4]), "hang_timeout": 1}
with distributed.run_distributed(address, 2, process, **timeouts):
    exec(work)
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes with some work; ends them after the test."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    script, started = tmp_path / "work.py", []
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}

    def run(work, processes=(0, 1), connect_timeout=60):
        for process in processes:
            command = [sys.executable, str(script), str(process), port, work, str(connect_timeout)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes))
        return started

    yield run
    for process in started:
        process.kill()


def ended(processes, timeout=60):
    """Of each: exit status and the lines that begin with 'error: '."""
    printed = [process.communicate(timeout=timeout)[1] for process in processes]
    return [
        (process.returncode, re.findall("^error: (.*)$", text, re.M))
        for process, text in zip(processes, printed, strict=True)
    ]


def test_process_0_goes_first(start, tmp_path):
    work = """
with distributed.main_process_first("x"):
    if process == 0:
        time.sleep(0.5)
    open("order", "a").write(str(process))
"""
    assert ended(start(work)) == [(0, []), (0, [])]
    assert (tmp_path / "order").read_text() == "01"


def test_a_mistake_in_one_ends_all_with_its_message(start):
    work = "if process == 1: raise UserError('no such thing')\ntime.sleep(60)"
    assert ended(start(work)) == [(2, ["process 1: no such thing"])] * 2


def test_what_hangs_is_told(start):
    work = "distributed.progress(f'step {7 + process}')\ntime.sleep(60)"
    for status, (message,) in ended(start(work)):
        assert status == 69
        assert (
            "nothing has moved for 1 s (--hang_timeout): process 0 at step 7, process 1 at step 8" in message
        )


@pytest.mark.slow
def test_one_that_is_killed_is_named(start):
    processes = start("open(str(process), 'w').close()\ntime.sleep(60)")
    folder = processes[0].args[1].rpartition("/")[0]
    while not os.path.exists(f"{folder}/1"):
        time.sleep(0.1)
    time.sleep(1)
    processes[1].send_signal(signal.SIGKILL)
    (status, (message,)), _ = ended(processes)
    assert status == 69 and message.startswith("process 0: process 1 has given no sign of life")


def test_nobody_comes(start):
    ((status, (message,)),) = ended(start("", processes=[1], connect_timeout=2))
    assert status == 69 and "not all processes have met at the coordinator localhost:" in message


@pytest.mark.slow
def test_faults_at_random_moments(byte_level, tmp_path):
    """FAULTS=20 for so many."""
    config, chance = faults.prepare(tmp_path / "tiny", byte_level), random.Random(time.time_ns())
    whole = faults.unbroken(config, tmp_path / "whole")
    for number in range(int(os.environ.get("FAULTS", 1))):
        workdir = tmp_path / f"run{number}"
        told = faults.broken(config, workdir, list(faults.STATUS)[number % len(faults.STATUS)], chance)
        assert faults.unbroken(config, workdir) == whole, told
        print(f"{number + 1:>3} {told}; then as the unbroken run", flush=True)
