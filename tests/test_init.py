"""What the package exports."""

import subprocess
import sys

import pytest

import prom_jax
from prom_jax.analysis.probe import probe
from prom_jax.analysis.tables import read_table
from prom_jax.checkpoints.pretrained import load, save_hf
from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import prepare
from prom_jax.evaluation.decode import greedy
from prom_jax.models.config import DecoderConfig, LayerKind
from prom_jax.models.decoder import Decoder
from prom_jax.parallel.sharding import make_mesh

EXPORTS = {
    "load": load,
    "save_hf": save_hf,
    "Decoder": Decoder,
    "DecoderConfig": DecoderConfig,
    "LayerKind": LayerKind,
    "make_mesh": make_mesh,
    "greedy": greedy,
    "cloze_probe": probe,
    "read_table": read_table,
    "Recipe": Recipe,
    "Batches": Batches,
    "prepare_records": prepare,
}


def test_exports_are_what_they_are_called():
    assert set(prom_jax.__all__) == set(EXPORTS)
    for name, value in EXPORTS.items():
        assert getattr(prom_jax, name) is value
    assert set(EXPORTS) <= set(dir(prom_jax))
    with pytest.raises(AttributeError, match="module 'prom_jax' has no attribute 'nothing'"):
        prom_jax.nothing  # noqa: B018


def test_no_export_has_a_modules_name():
    """Importing a module of the package sets an attribute, which would hide the export."""
    program = (
        "import pkgutil, prom_jax; modules = {of.name for of in pkgutil.iter_modules(prom_jax.__path__)};"
        "assert not modules & set(prom_jax.__all__), modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_package_starts_nothing():
    program = "import sys, prom_jax; assert not {'jax', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_windows_is_refused_in_one_sentence():
    sentence = "prom_jax runs on Linux and macOS: on Windows, install it within WSL"
    program = "import sys; sys.platform = 'win32'; "
    done = subprocess.run([sys.executable, "-c", program + "import prom_jax"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"ImportError: {sentence}"
    program += "import runpy; runpy._run_module_as_main('prom_jax.train')"  # what `python -m` calls
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and sentence in done.stderr
