"""The command line that all commands share."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from prom_jax import __main__
from prom_jax.config import VARIANTS
from prom_jax.utils import cli, config_file, extras
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import as_dict, write_config

WITH_CONFIG = ("train", "prepare", "regulate", "interference")
COMMANDS = (*WITH_CONFIG, "probe", "generate", "evaluate", "convert", "report")
# What a command cannot do without.
NEEDED = {
    "interference": ["--out=o"],
    "probe": ["--model=m", "--languages=th", "--out=o"],
    "generate": ["prompt", "--model=m"],
    "evaluate": ["--model=m", "--tasks=xquad_th", "--out=o"],
    "report": ["--runs=r", "--out=o"],
}


def module(command):
    return importlib.import_module(f"prom_jax.{command}")


def parse(command, *more):
    given = ["--config=configs/demo.py"] * (command in WITH_CONFIG)
    return module(command).parse([*given, *NEEDED.get(command, ()), *more])


def mistake(command, *given):
    """The message with which a command line is refused."""
    with pytest.raises(UserError) as error:
        module(command).parse(list(given))
    message = str(error.value)
    assert "\n" not in message and "\\n" not in message
    return message


def test_all_commands_are_here():
    modules = {path.stem for path in Path(cli.__file__).parents[1].glob("*.py")}
    assert modules - {"__init__", "__main__", "config"} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_flag_with_its_default(command, monkeypatch, capsys):
    parsers = []
    original = cli.Parser.parse_args
    monkeypatch.setattr(cli.Parser, "parse_args", lambda self, *a: parsers.append(self) or original(self, *a))
    with pytest.raises(SystemExit) as stop:
        module(command).main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"python -m prom_jax.{command} ") and "usage:" not in printed
    told = dict(entries(printed))
    actions = {name: action for action in parsers[0]._actions for name in action.option_strings}
    for name, action in actions.items():
        if name not in ("-h", "--help"):
            assert "(required)" in told[name] or "(default: " in told[name], name
            if isinstance(action.default, int) and not isinstance(action.default, bool):
                assert f"(default: {action.default})" in told[name]
    if command in WITH_CONFIG:
        assert {"--config", "--workdir"} <= told.keys() and "prom_jax/config.py" in told["--config.KEY"]


def entries(printed):
    """Of the flags in a help text: name and the text of all its lines."""
    lines = printed.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("  -")]
    for i in starts:
        block = [lines[i]]
        for line in lines[i + 1 :]:
            if not line.startswith("   "):
                break
            block.append(line)
        yield lines[i].split()[0].rstrip(","), " ".join(" ".join(block).split())


@pytest.mark.parametrize("given", ["--max-length=7", "--max_length=7", "--max-length 7", "--max_length 7"])
def test_dashes_and_underscores_and_spaces(given):
    assert parse("evaluate", *given.split()).max_length == 7


def test_values_keep_their_dashes():
    arguments = parse("evaluate", "--data-dir=a-b_c", "--mesh.data=2")
    assert arguments.data_dir == "a-b_c" and getattr(arguments, "mesh.data") == 2
    assert module("generate").parse(["--model=m", "--", "--what-is this"]).prompt == "--what-is this"
    assert module("generate").parse(["--model=m", "--what-is this?"]).prompt == "--what-is this?"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_answered_with_the_nearest(command):
    message = mistake(command, "--modle=x", "--otu=x")
    assert message.startswith("unknown flag --modle: ")
    if command in ("probe", "interference", "generate", "evaluate"):
        assert "did you mean --model?" in message
    assert "unknown flag --out_: did you mean --out?" in mistake("report", "--out-", "x")
    assert mistake(command, "--zzzzzz").endswith("--zzzzzz: --help lists all flags")
    assert "unknown flag --config.steps" in mistake("probe", "--config.steps=1")


def test_flags_are_not_shortened():
    assert "did you mean --translate?" in mistake("prepare", "--config=configs/demo.py", "--transl=google")


@pytest.mark.parametrize("command", [*WITH_CONFIG, "probe", "evaluate", "report"])
def test_an_unexpected_argument(command):
    with pytest.raises(UserError, match=r"^unexpected argument 'x': flags are given as --name=value$"):
        parse(command, "x")


def test_a_run_is_enough(tmp_path):
    """Its config.json is its configuration, to go on with or to do again elsewhere."""

    def read(*flags):
        return module("train").parse(list(flags))

    def told(*flags):
        with pytest.raises(UserError) as error:
            read(*flags)
        return str(error.value)

    config = read("--config=configs/th.py:xllama2", "--config.data.seq_len=99").config
    config.data.target = ("a.jsonl", "b.jsonl")
    write_config(
        tmp_path,
        as_dict(config) | {"records": "ab", "prompts_shared": True, "base": "cd", "versions": {"jax": "1"}},
    )
    found = read(f"--workdir={tmp_path}", "--config.checkpoint.keep=5")
    assert found.workdir == tmp_path and found.config.checkpoint.keep == 5
    found.config.checkpoint.keep = config.checkpoint.keep
    assert as_dict(found.config) == as_dict(config)
    assert {type(value) for value in found.config.data.values()} == {type(v) for v in config.data.values()}
    assert f"--config={tmp_path}/config.json" in found.run
    again = read(f"--config={tmp_path}/config.json", "--workdir=again")
    assert again.workdir == Path("again") and as_dict(again.config) == as_dict(config)
    assert read(f"--config={tmp_path}/config.json").workdir == tmp_path
    assert "--config is missing" in told("--workdir=nowhere")
    for content, message in (
        ('{"format": 2, "pivot": {"wait": 1}}', "unknown configuration key 'wait'"),
        ('{"format": 1}', "is of a run or checkpoint of format 1"),
        ('{"format": 2, "steps": "many"}', "is no config.json of a run"),
        ("[]", "is no config.json of a run"),
    ):
        (tmp_path / "config.json").write_text(content)
        assert message in told(f"--workdir={tmp_path}")


def test_what_is_missing_is_told():
    assert mistake("train").startswith(
        "--config is missing: for example --config=configs/demo.py, or --workdir"
    )
    assert mistake("report", "--runs=x") == "--out is missing: a folder for the report"
    assert mistake("generate", "--model=m").startswith("expected one of a prompt, --interactive and")
    assert "--out: expected one argument" in mistake("report", "--out")


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("evaluate", "--limit=0", "--limit=0: expected 1 or more"),
        ("evaluate", "--limit=x", "--limit=x: expected an integer"),
        ("evaluate", "--tasks=,", "--tasks=,: expected one or more names"),
        ("train", "--hang-timeout=x", "--hang_timeout=x: expected a number"),
        ("probe", "--scoring=wrod", "--scoring: invalid choice: 'wrod' (choose from "),
    ],
)
def test_values_of_flags(command, flag, message):
    with pytest.raises(UserError) as error:
        parse(command, flag)
    assert message in str(error.value)


@pytest.mark.parametrize("command", WITH_CONFIG)
@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_a_configuration_and_its_variant(command, form):
    given = [*form.format("configs/th.py:smoothing_0.3").split(), "--config.seed", "3", "--config.steps=2"]
    arguments = module(command).parse([*NEEDED.get(command, ()), *given])
    config = arguments.config
    assert (config.language, config.pivot.label_smoothing) == ("th", 0.3)
    assert (config.seed, config.steps) == (3, 2)
    assert arguments.workdir == Path("runs/th-smoothing_0.3") and config.is_locked
    again = module(command).parse([*NEEDED.get(command, ()), *shlex.split(arguments.run)])
    assert (again.config, again.workdir) == (config, arguments.workdir)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("--config.data.target=a.jsonl --config.data.target=b.jsonl", "data.target", ("a.jsonl", "b.jsonl")),
        ("--config.data.target a.jsonl --config.data.target b.jsonl", "data.target", ("a.jsonl", "b.jsonl")),
        ("--config.data.target=('a','b')", "data.target", ("a", "b")),
        ("--config.data.target=('a',)", "data.target", ("a",)),
        ("--config.data.target=()", "data.target", ()),
        ("--config.data.target=", "data.target", ()),
        ("--config.data.seq-len=7", "data.seq_len", 7),
        ("--config.steps=7 --config.steps=8", "steps", 8),
        ("--config.mesh.fsdp -1", "mesh.fsdp", -1),
        ("--config.optimizer.epochs=1", "optimizer.epochs", 1.0),
        ("--config.pivot.translation_source", "pivot.translation_source", True),
        ("--config.pivot.translation_source true", "pivot.translation_source", True),
        ("--noconfig.pivot.translation_source", "pivot.translation_source", False),
        ("--config.model=a=b", "model", "a=b"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_overrides_keep_the_type(given, key, value, last):
    parts = ["--config=configs/demo.py"], given.split()  # in either order
    node = module("train").parse([*parts[last], *parts[1 - last]]).config
    for part in key.split("."):
        node = node[part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--config.pivot.wait=1", "unknown configuration key 'wait' in --config.pivot.wait=1: did you mean "),
        ("--config.pivot.wait=1", "did you mean --config.pivot.weight?"),
        ("--config.pivt.weight 1", "unknown configuration key 'pivt' in --config.pivt.weight=1"),
        ("--config.learning_rate=1", "did you mean --config.optimizer.learning_rate?"),
        ("--config.zzz=1", "'zzz' in --config.zzz=1: prom_jax/config.py lists them all"),
        ("--config.steps.more=1", "unknown configuration key 'more'"),
        ("--config.mesh=2", "mesh is a group: set one of mesh.data, mesh.fsdp, mesh.tensor"),
        ("--config.steps=many", "--config.steps=many: expected an integer"),
        ("--config.steps=0.5", "--config.steps=0.5: expected an integer"),
        ("--config.steps", "--config.steps: expected an integer"),
        ("--config.optimizer.epochs=all", "--config.optimizer.epochs=all: expected a number"),
        ("--config.pivot.translation_source=2", "translation_source=2: expected true or false"),
        (
            "--config=configs/th.py:bactrain",
            "unknown variant 'bactrain': expected one of bactrian, ",
        ),
        (
            "--config=configs/xx.py",
            "configs/xx.py does not exist: --config expects a configuration file, such as",
        ),
    ],
)
def test_configurations_that_cannot_be(given, message):
    assert message in mistake("train", "--config=configs/demo.py", *given.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(: pass", "SyntaxError"),
        ("def get_config(variant=''):\n    return {}", "returns dict: expected an ml_collections.ConfigDict"),
        (
            "from prom_jax.config import default\n\n\ndef get_config():\n    default().steps = 'x'",
            "makes no configuration (TypeError: ",
        ),
    ],
)
def test_files_that_make_no_configuration(tmp_path, content, message):
    (tmp_path / "c.py").write_text(content)
    with pytest.raises(UserError) as error:
        config_file.load(str(tmp_path / "c.py"))
    assert message in str(error.value) and f"{tmp_path / 'c.py'}" in str(error.value)


def test_the_flags_of_the_process_are_left_alone():
    before = {name: flags.FLAGS[name].value for name in flags.FLAGS}, flags.FLAGS.is_parsed()
    for command in COMMANDS:
        if command != "convert":
            parse(command)
    parse("train", "--config.steps=1")
    assert ({name: flags.FLAGS[name].value for name in flags.FLAGS}, flags.FLAGS.is_parsed()) == before
    assert not {"config", "workdir", "dry_run", "coordinator"} & set(flags.FLAGS)


def test_a_command_ends_with_one_line():
    command = [sys.executable, "-m", "prom_jax.train", "--config", "configs/demo.py:bactrain"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    known = ", ".join(filter(None, VARIANTS))
    assert done.stderr == f"error: unknown variant 'bactrain': expected one of {known}\n"


def test_ctrl_c_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.guard(interrupted)
    assert end.value.code == 130
    assert (
        capsys.readouterr().err == "interrupted: what is whole stays, and the same command goes on with it\n"
    )


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("given", "value"),
    [("--dry_run", True), ("--dry-run=true", True), ("--dry_run=false", False), ("--nodry_run", False)],
)
def test_switches_take_a_truth_value_too(given, value):
    assert parse("train", given).dry_run is value
    with pytest.raises(UserError, match="--dry_run=maybe: expected true or false, or --dry_run alone"):
        parse("train", "--dry_run=maybe")


def test_the_console_script_runs_the_commands(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(module("convert"), "main", seen.append)
    __main__.main(["convert", "to_hf", "a", "b"])
    assert seen == [["to_hf", "a", "b"]]
    __main__.main(["--help"])
    told = capsys.readouterr().out
    assert all(re.search(rf"^  {command} +[A-Za-z]", told, re.M) for command in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["trian"])
    assert capsys.readouterr().err.startswith("error: unknown command 'trian': did you mean train? expected ")
    assert set(COMMANDS) == set(extras.COMMANDS)


def test_configurations_of_the_package_by_name(tmp_path, monkeypatch):
    here = Path("configs").resolve()
    assert {path.name for path in config_file.OWN.glob("*.py")} == {path.name for path in here.glob("*.py")}
    monkeypatch.chdir(tmp_path)
    arguments = module("train").parse(["--config=th:smoothing_0.3"])
    assert (arguments.config.language, arguments.config.pivot.label_smoothing) == ("th", 0.3)
    assert arguments.workdir == Path("runs/th-smoothing_0.3")
    message = mistake("train", "--config=xx")
    assert message.startswith("xx does not exist: --config expects ") and "or one of ar, bn, demo" in message
