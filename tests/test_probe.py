"""The command, from its flags to its files."""

import json

import numpy as np
import pytest
from PIL import Image

from prom_jax import probe
from prom_jax.analysis.probe import probe as measure
from prom_jax.analysis.tables import read_table
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError
from tests.analysis.reference import write_table
from tests.reference import hf_model, to_model


@pytest.fixture
def folder(tmp_path, byte_level):
    hf = hf_model("llama3", vocab_size=len(byte_level), eos_token_id=byte_level.eos_token_id)
    hf.save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    return tmp_path / "model", to_model(hf)


def run(*flags):
    probe.main([f"--{flag}" for flag in flags])


def test_from_flags_to_files(tmp_path, folder, byte_level, capsys):
    path, model = folder
    tables = tmp_path / "tables"
    for language in ("sw", "th"):
        write_table(tables, language=language)
    given = [f"model={path}", f"tables={tables}", "languages=sw,th", "shots=2", "seed=1"]
    run(*given, f"out={tmp_path / 'before'}", "suggest-layer")
    output = capsys.readouterr().out
    assert "cloze, word scoring, 2 demonstrations (shared), seed 1" in output
    assert "sw        7 rows, 1 dropped as its English and target word are equal" in output
    assert output.count("the mean of P_en − P_target is largest") == 2

    entries = json.loads((tmp_path / "before" / "probe.json").read_text(encoding="utf-8"))
    assert list(entries) == ["sw", "th"]
    entry = entries["sw"]
    assert entry["model"] == str(path)
    assert (entry["scoring"], entry["shots"], entry["seed"]) == ("word", 2, 1)
    assert (entry["task"], entry["sources"]) == ("cloze", [])
    expected = measure(model, byte_level, read_table("sw", tables), shots=2, seed=1)
    np.testing.assert_allclose(entry["target_mean"], expected.target.mean(axis=0), rtol=1e-4)
    for row, (asked, prompt), english in zip(entry["rows"], expected.rows, expected.english, strict=True):
        assert (row["prompt"], row["english_word"], row["target_word"]) == (
            prompt,
            *asked.english,
            *asked.words,
        )
        np.testing.assert_allclose(row["english"], english, rtol=1e-4)
    for name, values in (("english", entry["english_mean"]), ("target", entry["target_mean"])):
        assert all(low <= mean <= high for (low, high), mean in zip(entry["intervals"][name], values))
    names = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert names == ["grid.png", "probe.json", "sw.png", "th.png"]

    run(*given, f"out={tmp_path / 'after'}", f"compare={tmp_path / 'before'}")
    assert json.loads((tmp_path / "after" / "probe.json").read_text(encoding="utf-8")) == entries
    pictures = {file.name: Image.open(file).size for file in (tmp_path / "after").glob("*.png")}
    assert pictures.keys() == {
        f"{name}{end}.png" for name in ("sw", "th", "grid") for end in ("", ".compare")
    }
    assert pictures["grid.png"][0] > pictures["sw.png"][0]


def test_translation_and_repetition(tmp_path, folder, capsys):
    tables = write_table(tmp_path / "tables")
    given = [f"model={folder[0]}", f"tables={tables}", "languages=sw", "shots=2"]
    for task, sources in (("translation", ["sources=el,th"]), ("translation", []), ("repetition", [])):
        out = tmp_path / f"{task}{len(sources)}"
        run(*given, f"task={task}", *sources, f"out={out}")
        assert f"{task}, word scoring" in capsys.readouterr().out
        (entry,) = json.loads((out / "probe.json").read_text(encoding="utf-8")).values()
        others = [
            other for other in ("ar", "bn", "el", "ml", "mr", "ta", "te", "th") if task == "translation"
        ]
        assert entry["sources"] == (["el", "th"] if sources else others)
        assert {row["source"] for row in entry["rows"]} <= {*entry["sources"]} or task == "repetition"
        assert Image.open(out / "grid.png").size[0] > 100
    with pytest.raises(UserError, match="task='cloze' translates nothing"):
        run(*given, "sources=el", f"out={tmp_path / 'out'}")
    with pytest.raises(
        UserError, match="measured with task='translation' for 'sw', this is with 'repetition'"
    ):
        run(*given, "task=repetition", f"out={tmp_path / 'out'}", f"compare={tmp_path / 'translation0'}")


def test_an_earlier_file_without_a_task_is_of_cloze(tmp_path, folder):
    given = [f"model={folder[0]}", f"tables={write_table(tmp_path)}", "languages=sw", "shots=2"]
    run(*given, f"out={tmp_path / 'before'}")
    path = tmp_path / "before" / "probe.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in before["sw"].items() if key not in ("task", "sources")}
    path.write_text(json.dumps({"sw": kept}))
    run(*given, f"out={tmp_path / 'after'}", f"compare={tmp_path / 'before'}")
    assert (tmp_path / "after" / "grid.compare.png").is_file()


def test_a_language_without_rows_is_left_out(tmp_path, folder, capsys):
    tables = write_table(tmp_path, language="sw")
    write_table(tmp_path, [("a", "πυρ", 'Na "___".')], language="el")
    given = [f"model={folder[0]}", f"tables={tables}", "scoring=prefix", "shots=0", f"out={tmp_path / 'out'}"]
    run(*given, "languages=el,sw")
    assert "WARNING   no row of the table of 'el' can be measured" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "probe.json").read_text(encoding="utf-8"))) == ["sw"]
    with pytest.raises(UserError, match="no row of the table of 'el' can be measured with scoring='prefix'"):
        run(*given, "languages=el")


def test_unreliable_scoring_is_told(tmp_path, folder, capsys):
    # Thai words of whose characters the vocabulary has none: it can only begin them with one byte.
    rows = [(english, word, 'Na "___".') for english, word in zip("abcd", ("มา", "นก", "ปลา", "กา"))]
    given = [f"model={folder[0]}", f"tables={write_table(tmp_path, rows)}", "languages=sw", "shots=0"]
    run(*given, f"out={tmp_path / 'out'}", "scoring=byte")
    assert "WARNING   sw: at 4 of 4 layers P_target is mostly that of tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["languages=xx"], "no cloze table"),
        (["languages=en"], "cannot be set against English itself"),
        (["languages=,"], "--languages=,: expected"),
        (["shots=10"], "shots=10 with 10 usable rows"),
        (["mesh.data=3"], "mesh.data=3"),
        (["compare=nowhere"], "--compare=nowhere: nowhere/probe.json cannot be read"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, folder, capsys, flags, message):
    given = {"model": folder[0], "tables": write_table(tmp_path), "languages": "sw", "out": tmp_path / "out"}
    given |= dict(flag.split("=") for flag in flags)
    with pytest.raises(SystemExit) as stop:
        cli.guard(lambda: run(*(f"{name}={value}" for name, value in given.items())))
    assert stop.value.code == cli.MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_a_checkpoint_without_a_file_it_needs(tmp_path, folder, capsys, file):
    (folder[0] / file).unlink()
    with pytest.raises(SystemExit):
        cli.guard(
            lambda: run(
                f"model={folder[0]}", f"tables={write_table(tmp_path)}", "languages=sw", f"out={tmp_path}"
            )
        )
    error = capsys.readouterr().err
    assert error.startswith("error: ") and file in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sw": {"scoring": "byte"}}, "measured with scoring='byte' for 'sw', this is with 'word'"),
        ({"th": {}}, "has no 'sw', only th: probe it first"),
        ({"sw": {"table": None}}, "measured with table=None for 'sw'"),
    ],
)
def test_only_like_is_compared_with_like(tmp_path, folder, change, message):
    given = [f"model={folder[0]}", f"tables={write_table(tmp_path)}", "languages=sw", "shots=2"]
    run(*given, f"out={tmp_path / 'before'}")
    path = tmp_path / "before" / "probe.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: before["sw"] | entry for key, entry in change.items()}))
    with pytest.raises(UserError, match=message):
        run(*given, f"out={tmp_path / 'after'}", f"compare={tmp_path / 'before'}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sw": {"scoring": "word", "rows": []}}', "'sw' lacks english_mean, target_mean, intervals"),
        ('{"sw": 3}', "'sw' lacks scoring"),
        ("[]", "it is no object"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_probe_is_not_compared_with(tmp_path, content, message):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(UserError, match=rf"--compare=.*probe.json cannot be read \(.*{message}"):
        probe.earlier(str(tmp_path), {"sw": {}})
