"""Imports go from higher folders to lower ones, and never in a circle."""

import ast
import graphlib
import re
from pathlib import Path

import prom_jax

PACKAGE = Path(prom_jax.__file__).parent
# From the lowest to the highest; a folder may import itself and those before it. `resources` has no code.
FOLDERS = (
    "utils", "parallel", "ops", "models", "tokenization", "data", "checkpoints", "training", "analysis",
    "evaluation", "reporting",
)  # fmt: skip
COMMANDS = len(FOLDERS)  # what lies in the package itself
# Settings, without a word of code that could import a command.
SETTINGS = "prom_jax.config"


def name_of(path: Path) -> str:
    """A module's name."""
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(module: str, path: Path):
    """The modules of this package that one of them imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from package import name`: the name may be a module or something in the package.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in found if name in MODULES and name != module)


IMPORTS = {module: set(imports(module, path)) for module, path in MODULES.items()}


def level(module: str) -> int:
    """The position of a module's folder, the commands' on top."""
    folder = module.split(".")[1] if "." in module else ""
    return FOLDERS.index(folder) if folder in FOLDERS else COMMANDS


def test_every_folder_has_its_level():
    folders = {
        path.parent.relative_to(PACKAGE).parts[0] for path in MODULES.values() if path.parent != PACKAGE
    }
    assert folders == set(FOLDERS)


def test_no_module_imports_from_a_higher_folder():
    wrong = [
        f"{module} imports {other}"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if level(other) > level(module) and other not in (SETTINGS, PACKAGE.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_settings_import_nothing_of_ours():
    assert IMPORTS[SETTINGS] <= {PACKAGE.name, "prom_jax.utils.errors"}


def test_docstrings_have_blocks():
    """`Args:` and the like stand in lines of their own after an empty one: documentation generators read them
    there alone."""
    names = r"(Args|Returns|Raises|Yields|Attributes):"
    inline = re.compile(rf"^\s*{names} *\S|\S *\n *{names}$", re.MULTILINE)
    wrong = [
        f"{module}.{node.name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and inline.search(ast.get_docstring(node) or "")
    ]
    assert not wrong
