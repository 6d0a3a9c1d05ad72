"""A library leaves its caller alone: importing, loading, evaluating, training change nothing of a process."""

import json
import os
import pickle
import subprocess
import sys

# What others' packages change when they are imported is theirs: they come first.
OTHERS = """
import datasets, grain, jax, lm_eval.evaluator, lm_eval.tasks, matplotlib.pyplot, ml_collections.config_flags
import google_crc32c, optax, orbax.checkpoint, scipy.sparse, scipy.stats, sentencepiece, tensorflow_datasets
import transformers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
jax.devices()
"""

# `changes` of the process between two moments, what calls the C library's allocator settings, and whether
# torch was hidden at any time, of which a thread keeps watch.
WATCH = """
import ctypes, logging, multiprocessing, os, re, signal, sys, threading, time, warnings
import numpy as np
from absl import flags

def state():
    loggers = {"root": logging.getLogger(), **logging.Logger.manager.loggerDict}
    found = {f"logger {name}": (x.level, x.disabled, x.propagate, [repr(h) for h in x.handlers])
             for name, x in loggers.items() if isinstance(x, logging.Logger)}
    found |= {f"hook {name}": repr(getattr(owner, name)) for owner, name in (
        (sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook"), (sys, "displayhook"))}
    found |= {f"variable {name}": value for name, value in os.environ.items()}
    found |= {f"signal {number}": repr(signal.getsignal(number)) for number in signal.valid_signals()}
    found |= {f"jax {name}": repr(value) for name, value in jax.config.values.items()}
    found |= {f"matplotlib {name}": repr(value) for name, value in matplotlib.rcParams.items()}
    found["absl flags"] = flags.FLAGS.is_parsed(), len(list(flags.FLAGS))
    found |= {f"warning {filter!r}": True for filter in warnings.filters}
    found["progress bars"] = datasets.are_progress_bars_disabled()
    found["verbosity"] = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    found["random"] = hash(np.random.get_state()[1].tobytes())
    found["paths"] = sys.path[:], [repr(finder) for finder in sys.meta_path], os.getcwd()
    found["arguments"] = sys.argv[:]
    found["start of processes"] = multiprocessing.get_start_method()
    found["limits"] = sys.getrecursionlimit(), sys.getswitchinterval()
    return found

wrong = []
get = ctypes.CDLL.__getattr__

def watched(library, name):
    if name == "mallopt":
        wrong.append("mallopt")
    return get(library, name)

ctypes.CDLL.__getattr__ = watched

def watch():
    while not over.wait(0.001):
        if "torch" in sys.modules and sys.modules["torch"] is None:
            wrong.append("torch is hidden")
            return

over, watcher = threading.Event(), threading.Thread(target=watch, daemon=True)
watcher.start()
before = state()
"""

REPORT = """
over.set()
watcher.join()
after = state()
for name, value in before.items():
    if after.get(name) != value:
        wrong.append(f"{name}: {value!r} -> {after.get(name)!r}")
for name in after.keys() - before.keys():
    # A package that comes late has loggers; tensorboardX brings torch where there is one, which has filters.
    if not (name.startswith("logger ") or (name.startswith("warning ") and re.search("torch|sympy", name))):
        wrong.append(f"{name} is new")
import json
print("RESULT " + json.dumps(wrong))
"""

EVERYTHING_BUT_TRAINING = """
import importlib, pkgutil, prom_jax
for module in pkgutil.walk_packages(prom_jax.__path__, "prom_jax."):
    importlib.import_module(module.name)
model, tokenizer = prom_jax.load("model")
model(np.asarray(tokenizer(["the cow"])["input_ids"]))
prom_jax.save_hf(model, tokenizer, "out")
prom_jax.convert.from_hf("model", "orbax")
prom_jax.load("orbax")
tasks = prom_jax.evaluation.harness.load_tasks(["mgsm_sw"], "tasks")
prom_jax.evaluation.harness.evaluate(prom_jax.evaluation.lm.HarnessModel(model, tokenizer), tasks, limit=1)
prom_jax.evaluation.metrics.thai_tokens("ภาษาไทย")
"""

TRAINING = """
import pickle
from pathlib import Path
import prom_jax.train
config = pickle.loads(Path("config").read_bytes())
prom_jax.train.train(config, "run")
# Once more outside of the main thread, where no signal can be caught; there is nothing left to do.
done = []
def work():
    done.append(prom_jax.train.train(config, "run"))
worker = threading.Thread(target=work)
worker.start()
worker.join()
assert done
"""


def changed(program, folder):
    """What a caller's program finds changed at its end."""
    (folder / "caller.py").write_text(OTHERS + WATCH + program + REPORT, encoding="utf-8")
    command = [sys.executable, folder / "caller.py", "--an=argument", "of-the-caller"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert not ran.returncode, ran.stderr
    return "\n".join(json.loads(ran.stdout.rpartition("RESULT ")[2]))


def test_a_process_is_left_as_it_was(config, tiny, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mgsm_sw.tsv").write_text("Je, 1 na 1?\t2\n")
    (tmp_path / "model").symlink_to(tiny / "model")
    config.steps = 2
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    assert changed(EVERYTHING_BUT_TRAINING + TRAINING, tmp_path) == ""
