"""What works without the extras, and what is said where one is missing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from prom_jax.utils import extras

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(requirements, wanted=frozenset(), found=None):
    """The distributions that requirements bring, with those that they require; `wanted` are the extras."""
    found = {} if found is None else found
    for requirement in map(Requirement, requirements):
        name, marker = normal(requirement.name), requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
            new = requirement.extras - found.get(name, set())
            if new or name not in found:
                found.setdefault(name, set()).update(new)
                installed(metadata.distribution(name).requires or (), found[name], found)
    return found


def fill(folder, names):
    """Makes it a folder of these packages and nothing else."""
    for name in names:
        for file in metadata.distribution(name).files:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(metadata.distribution(name).locate_file(top)))
    return folder


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder of packages that has what `pip install prom_jax` brings."""
    names = installed(PROJECT["dependencies"])
    assert not names.keys() & {"datasets", "matplotlib", "lm-eval", "grain", "torch"}
    return fill(tmp_path_factory.mktemp("core"), names)


def run(folder, *arguments, **kwargs):
    """Python with the packages of a folder alone."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, capture_output=True, text=True, **kwargs
    )


def test_loading_generating_and_saving_need_no_extra(core, tiny, tmp_path):
    program = f"""
import prom_jax
from prom_jax import generate
model, tokenizer = prom_jax.load({str(tiny / "model")!r})
print(model(tokenizer("the cow", return_tensors="np")["input_ids"]).shape[-1] == model.config.vocab_size)
prom_jax.save_hf(model, tokenizer, "hf")
generate.parse(["--model=hf", "the cow"])
for name in ("prepare_records", "Batches", "cloze_probe"):
    try:
        getattr(prom_jax, name)
    except ImportError as error:
        print(type(error).__name__, error)
"""
    done = run(core, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True"
    missing = [line for line in lines if line.startswith("MissingExtra ")]
    packages = "datasets, tensorflow_datasets, array_record, grain, py3langid"
    install = f"Install it with: pip install -e '{ROOT}[data]'"
    assert missing == [f"MissingExtra not installed: {packages}. {install}"] * 2


def test_replies_are_measured_with_the_extra_of_evaluation(tmp_path):
    names = installed(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["eval"])
    assert "ctranslate2" not in names
    program = """
from prom_jax.evaluation import replies
reply = "Ninapenda kusoma vitabu vya hadithi kila siku jioni nyumbani kwetu na watoto wangu wote."
print(*replies.measures(reply, [reply], "sw").values())
"""
    done = run(fill(tmp_path, names), "-c", program)
    assert done.stdout == "1.0 1.0 1.0\n", done.stderr


def test_a_command_tells_all_that_is_missing_in_one_line(core, tmp_path):
    train = run(core, "-m", "prom_jax.train", "--config=th", cwd=tmp_path)
    packages = "datasets, tensorflow_datasets, array_record, grain, py3langid, matplotlib"
    line = f"error: not installed: {packages}. Install it with: pip install -e '{ROOT}[data,report]'\n"
    assert (train.returncode, train.stdout, train.stderr) == (2, "", line)


def test_a_broken_package_is_not_called_missing():
    with pytest.raises(ModuleNotFoundError, match="nowhere"), extras.needs("data"):
        import nowhere  # noqa: F401


def test_the_pip_command_of_an_installed_package(monkeypatch):
    monkeypatch.setattr(extras.importlib.metadata, "distribution", lambda name: name)
    monkeypatch.setattr(extras, "_is_absent", lambda module: module == "datasets")
    with pytest.raises(extras.MissingExtra) as error:
        extras.require("data", "report", "eval")
    assert str(error.value) == "not installed: datasets. Install it with: pip install 'prom_jax[data,eval]'"


def test_extras_are_those_of_pyproject():
    optional = PROJECT["optional-dependencies"]
    owners = metadata.packages_distributions()
    for extra, modules in extras.EXTRAS.items():
        wanted = {normal(Requirement(text).name) for text in optional[extra]} - {"prom-jax"}
        brought = [owners.get(module, ["google-cloud-translate"]) for module in modules]
        assert {normal(name) for names in brought for name in names} == wanted, extra
    combined = {"train", "all", "cuda", "tpu"}
    assert optional.keys() == extras.EXTRAS.keys() | combined
    for name in ("train", "all"):
        (text,) = optional[name]
        assert Requirement(text).extras <= optional.keys()


def test_what_is_imported_is_declared():
    """Every package that a module imports is a dependency, or is imported under `needs`."""
    brought = {package for modules in extras.EXTRAS.values() for package in modules}
    tops = {package.partition(".")[0] for package in brought} - {"google"}
    wrong = []
    for path in (ROOT / "prom_jax").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:  # what importing the module runs
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: {name}" for name in found if name.partition(".")[0] in tops]
    assert not wrong


def test_the_lock_lies_in_the_ranges():
    """requirements.txt has for each Python one version of each dependency, in the range of pyproject.toml."""
    lock = [
        Requirement(line)
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line[0] not in "# "
    ]
    optional = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *optional["data"],
        *optional["report"],
        *optional["eval"],
        *optional["tensorboard"],
    ]
    for python in ("3.11", "3.12", "3.13", "3.14"):
        environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": "linux",
        }
        pins = {
            normal(r.name): next(iter(r.specifier)).version
            for r in lock
            if not r.marker or r.marker.evaluate(environment)
        }
        for requirement in map(Requirement, wanted):
            if not requirement.marker or requirement.marker.evaluate(environment):
                version = pins[normal(requirement.name)]
                assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"
