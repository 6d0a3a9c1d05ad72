"""What README.md and docs/ name is there: links, paths, keys, commands and flags; and their code runs."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

import prom_jax.training.methods
import prom_jax.training.trackers
from prom_jax.config import default
from prom_jax.evaluation import harness
from prom_jax.models import auto, families
from prom_jax.training.methods import known_methods
from prom_jax.utils import cli
from tests.utils.test_cli import COMMANDS, WITH_CONFIG

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {f"prom_jax.{name}" for name in COMMANDS}


class Block(NamedTuple):
    """A fenced block of code: its language, its text and the number of its first line."""

    language: str
    text: str
    line: int

    @property
    def file(self):
        """The file that the block is, where its first line names one."""
        first = re.match(r"# (prom_jax/\S+)\n", self.text)
        return first and first[1]


def blocks(page, language=None):
    """The blocks of a page, of one language or all."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
        if language in (None, found[2]):
            yield Block(
                found[2], inspect.cleandoc("\n" + found[3]) + "\n", text[: found.start()].count("\n") + 2
            )


def without_blocks(page):
    """The page's text without its fenced blocks; lines keep their numbers."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^( *)```.*?^\1```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.M | re.S)


def code(page):
    """Of all text in backticks: what it says."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", without_blocks(page))]


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# What is named is there.


def headings(page):
    """The anchors that a page has."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in headings(target)):
                wrong.append(link)
    assert not wrong


@each_page
def test_paths_are_there(page):
    everything = without_blocks(page) + "".join(block.text for block in blocks(page) if not block.file)
    found = re.findall(r"(?<![\w/.*-])(?:prom_jax|configs|launch|tests|benchmarks)/[\w./*-]*", everything)
    made = {"configs/fi.py"}  # a page shows what to write into it
    wrong = {path for path in found if not (path in made or list(ROOT.glob(path.rstrip("./"))))}
    assert not wrong


@pytest.mark.parametrize("name", ["glossary.md", "method.md"])
def test_where_things_are(name):
    """Tables with a column `where` give paths below prom_jax/, and names in these files."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    tables = re.findall(r"^\|[^\n]* where[^\n]* \|\n\|[-|]+\n((?:\|[^\n]*\n)+)", text, re.M)
    cells = [re.split(r"(?<!\\)\|", row)[-2] for table in tables for row in table.splitlines()]
    assert len(cells) > 8
    for cell in cells:
        for path, names in re.findall(r"`([\w/]+(?:\.py|/))`(?: \(([^)]*)\))?", cell):
            file = ROOT / "prom_jax" / path
            assert file.exists(), path
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{path}: {name}"


def test_every_family_and_every_method_is_in_the_docs():
    models, method = (set(code(ROOT / "docs" / name)) for name in ("models.md", "method.md"))
    assert auto.known_families().keys() <= models
    assert {name for name in known_methods() if name != "prom"} <= {name.removeprefix(":") for name in method}


def test_the_formula_is_quoted_as_it_stands():
    (quoted,) = blocks(ROOT / "docs/method.md", "python")
    source = (ROOT / "prom_jax/training/methods/prom.py").read_text(encoding="utf-8")
    assert textwrap.indent(quoted.text, "    ") in source


@each_page
def test_names_of_the_package_are_there(page):
    """`prom_jax.load`, `prom_jax.train` and the like."""
    files = ("py", "md", "json", "egg")
    for name in set(re.findall(r"(?<![\w/.-])prom_jax((?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        found = prom_jax
        for part in name.split(".")[1:]:
            if part in files:
                break
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


@functools.cache
def keys():
    """All keys of the configuration, groups included."""
    found = set()

    def add(node, prefix):
        for key, value in node.items():
            found.add(prefix + key)
            if hasattr(value, "items"):
                add(value, f"{prefix}{key}.")

    add(default(), "")
    return found


@each_page
def test_keys_are_those_of_the_configuration(page):
    text = "".join([without_blocks(page), *(block.text for block in blocks(page) if not block.file)])
    named = set(re.findall(r"(?<![\w.])config\.((?:\w+\.)*\w+)", text)) | set(
        re.findall(r"--config\.([\w.]+)", text)
    )
    groups = "|".join(key for key in keys() if any(other.startswith(f"{key}.") for other in keys()))
    for words in code(page):
        named |= set(re.findall(rf"(?<![\w./-])((?:{groups})\.[a-z_]+)(?![\w/(])", words))
    files = {"py", "json", "md"}  # config.py is a file
    unknown = {key for key in named if key not in keys() and key.rpartition(".")[2] not in files}
    assert not unknown - {"KEY", "prom_jax", "get_config"}  # a flag's pattern, model.config, a function


def test_workflows_run_scripts_that_are_there():
    """GitHub runs what `.ci/run` and a developer run, and the Pythons are those that the package allows."""
    scripts, pythons = set(), set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        scripts |= set(re.findall(r"(?<![\w/])(?:tests/\w+\.sh|\.ci/run)", text))
        pythons |= set(re.findall(r'"(3\.\d+)"', text))
    assert {".ci/run", "tests/wheel.sh", "tests/versions.sh"} <= scripts
    assert all((ROOT / script).is_file() for script in scripts)
    assert pythons == {"3.11", "3.12", "3.13", "3.14"}


# Commands.


def commands(page):
    """Every command of ours on a page: (module, arguments)."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for found in re.finditer(r"python -m ((?:prom_jax|benchmarks|tests)\.\w+)([^\n`)]*)", text):
        yield found[1], found[2]


def flags_of(module):
    """The names of a command's flags."""
    parsers = []

    class Caught(Exception):
        pass

    def parse_args(self, *_):
        parsers.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Caught):
        patch.setattr(cli.Parser, "parse_args", parse_args)
        importlib.import_module(module).parse([])
    return set(parsers[0]._option_string_actions)


known_flags = functools.cache(flags_of)


@each_page
def test_commands_and_their_flags_are_known(page):
    for module, arguments in commands(page):
        assert importlib.util.find_spec(module), module
        if module not in PARSERS:
            continue
        for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", arguments.partition(" #")[0]):
            name = flag.replace("-", "_")
            with_config = module.rpartition(".")[2] in WITH_CONFIG and name.startswith("config.")
            assert with_config or f"--{name}" in known_flags(module), f"{module} --{flag}"


def test_configurations_of_commands_are_there():
    for page in PAGES:
        for _, arguments in commands(page):
            for path, variant in re.findall(r"--config=(configs/\w+\.py)(?::([\w+]+))?", arguments):
                spec = importlib.util.spec_from_file_location("configuration", ROOT / path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                module.get_config(variant)


# Code.


@each_page
def test_lines_are_not_too_long(page):
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    long = [number for number, line in lines if len(line) > 120 and not line.lstrip().startswith("|")]
    inside = [range(block.line, block.line + block.text.count("\n") + 1) for block in blocks(page, "")]
    assert not [number for number in long if not any(number in lines for lines in inside)]


@each_page
def test_python_compiles_and_its_imports_resolve(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text, f"{page.name}:{block.line}")):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("prom_jax", "tests"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}:{block.line}: {name.name}"
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)


def run(page, namespace):
    """Runs the Python blocks of a page in order, in one namespace; those that are files are left out."""
    for block in blocks(page, "python"):
        if not block.file:
            padding = "\n" * (block.line - 1)  # for the line numbers of errors
            exec(compile(padding + block.text, str(page), "exec"), namespace)
    return namespace


@pytest.fixture
def small(tiny, tmp_path, monkeypatch):
    """An empty folder to work in, where SMOLLM2 names the tests' model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOLLM2", str(tiny / "model"))
    return tmp_path


def test_the_snippets_run(small, tiny):
    shutil.copytree(tiny / "model", "runs/demo/hf")
    run(ROOT / "README.md", {})
    assert (small / "hf/copy/config.json").exists()
    run(ROOT / "docs/models.md", {})
    assert (small / "tiny/config.json").exists() and (small / "hf/smollm2/config.json").exists()
    values = run(ROOT / "docs/data.md", {})
    assert set(values["half"]) == {"target", "english"}


@pytest.fixture
def extended(small, tmp_path, monkeypatch):
    """The files that docs/extending.md shows, in folders where the package looks for them."""
    page = ROOT / "docs/extending.md"
    for block in filter(lambda block: block.file, blocks(page)):
        path = tmp_path / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    (lines,) = blocks(page, "json")
    assert all(map(json.loads, lines.text.splitlines()))
    (tmp_path / "capitals_sw.jsonl").write_text(lines.text, encoding="utf-8")
    loaded = set(sys.modules)
    caches = (known_methods, auto.known_families)
    packages = (prom_jax.training.methods, prom_jax.training.trackers, families)
    for package in packages:
        folder = tmp_path / Path(package.__file__).parent.relative_to(ROOT)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.setattr(harness, "TASKS", tmp_path / "prom_jax/evaluation/tasks")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for cache in caches:
        cache.cache_clear()
    yield page
    for cache in caches:
        cache.cache_clear()
    for package in packages:
        for name in {name for name in sys.modules if name.startswith(f"{package.__name__}.")} - loaded:
            del sys.modules[name]
            delattr(package, name.rpartition(".")[2])


@pytest.mark.slow
def test_what_the_page_of_extending_shows_works(extended, tiny):
    run(extended, {"root": tiny})
    assert {"balanced", "prom_replay"} <= known_methods().keys()
    assert "cwm" in auto.known_families()
    (name,) = harness.load_tasks(["prom_jax/evaluation/tasks/capitals_sw.yaml"])
    assert name == "capitals_sw"
