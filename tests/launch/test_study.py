"""The study's data, its units, and its small results, from which the report makes the same tables."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from prom_jax import report
from tests.launch.test_xquad import write_xquad
from tests.reporting.made_up import prom, write

LAUNCH = Path(__file__).parents[2] / "launch"


def script(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(LAUNCH), *sys.path])  # as Python does for a script
    return runpy.run_path(str(LAUNCH / name))["main"]


def test_data(tmp_path, monkeypatch):
    for language in ("en", "el"):
        write_xquad(tmp_path, language)
    (tmp_path / "newstest2019-src.eng.txt").write_text('A "cow".\nA hill.\n')
    (tmp_path / "newstest2019-ref.ell.txt").write_text("Μια «αγελάδα».\nΈνας λόφος.\n")
    for code, text in (("eng_Latn", "one"), ("ell_Grek", "ένα"), ("ara_Arab", "x")):
        lines = [f"{text} {number}" for number in range(250)]
        (tmp_path / f"{code}.devtest").write_text("\n".join(lines) + "\n")
    out, sources = tmp_path / "out", (f"--{name}={tmp_path}" for name in ("xquad", "ntrex", "flores"))
    script("study_data.py", monkeypatch)([*sources, f"--out={out}", "--languages=el"])
    with (out / "ntrex.el.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows[0] == {"en": 'A "cow".', "el": "Μια «αγελάδα»."} and len(rows) == 2
    assert len((out / "flores.el.tsv").read_text(encoding="utf-8").splitlines()) == 201
    assert {path.name for path in (out / "test").iterdir()} == {
        "xquad.en.json", "xquad.el.json", "eng_Latn.devtest", "ell_Grek.devtest",
    }  # fmt: skip


def list_units(*flags):
    command = ["bash", str(LAUNCH / "study.sh"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH)


def test_units(tmp_path):
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "results" / "el-prom-0").mkdir(parents=True)
    (tmp_path / "results" / "el-prom-0" / "unit.json").touch()
    flags = [f"--data={tmp_path / 'data'}", f"--results={tmp_path / 'results'}", "--list"]
    units = list_units(*flags).stdout.split()
    # Three base models, three methods in three languages and six controls in one, each with three seeds.
    assert len(units) == len(set(units)) == 3 + 3 * (3 * 3 + 6) - 1
    assert units[:4] == ["base-el", "base-ar", "base-th", "el-bactrian-0"] and "el-pcgrad-2" in units
    refused = list_units(*flags, "--units=fi-prom-0")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --units=fi-prom-0: expected some of")
    refused = list_units("--data=nowhere")
    assert refused.returncode == 2 and "a folder that launch/study_data.py made" in refused.stderr


@pytest.fixture
def unit(tmp_path):
    """What a unit leaves before it is made small, and a base model."""
    run = tmp_path / "runs" / "el-prom-0"
    for folder, trained, shift in ((run, prom("el"), 3), (tmp_path / "runs" / "base-el", None, 0)):
        of_questions = {
            "exact_match": [(i + shift) % 2 for i in range(12)],
            "f1": [i / (12 + shift) for i in range(12)],
        }
        write(folder / "questions", trained, {"xquad_el": of_questions, "xquad_en": of_questions})
        write(
            folder / "translations", trained, {"flores_el": {"chrf": [0.1 * shift + i / 7 for i in range(5)]}}
        )
        (folder / "probe").mkdir()
        rows = [
            {"prompt": "a text", "english_word": "cow", "english": [0.123456, 1e-9], "target": [0.0, 0.2]}
        ]
        (folder / "probe" / "probe.json").write_text(
            json.dumps({"el": {"english_mean": [0.123456], "rows": rows}})
        )
    (run / "summary.json").write_text(json.dumps({"data": ["/home/me/el.jsonl", "and / or"], "/a/b": 1}))
    return run


def test_small_results_make_the_same_tables(unit, tmp_path, monkeypatch):
    for name in ("el-prom-0", "base-el"):
        arguments = [str(unit.parent / name), str(tmp_path / "small" / name), "--seconds=7"]
        script("study_results.py", monkeypatch)(arguments)
    for name in ("runs", "small"):
        report.main([f"--runs={tmp_path / name}", f"--out={tmp_path / f'report of {name}'}"])
    tables = sorted(path.name for path in (tmp_path / "report of runs" / "tables").iterdir())
    assert tables
    for name in tables:
        texts = [(tmp_path / f"report of {of}" / "tables" / name).read_text() for of in ("runs", "small")]
        assert texts[0] == texts[1]
    assert any("xquad_en" in (tmp_path / "report of small/tables" / name).read_text() for name in tables)
    small = tmp_path / "small" / "el-prom-0"
    assert json.loads((small / "unit.json").read_text())["seconds"] == 7
    assert "<b>" not in (small / "questions" / "samples.jsonl").read_text()  # of the prompts
    probe = json.loads((small / "probe" / "probe.json").read_text())["el"]
    assert probe["english_mean"] == [0.123456]
    assert probe["rows"] == [{"english_word": "cow", "english": [0.123, 1e-9], "target": [0.0, 0.2]}]
    assert json.loads((small / "summary.json").read_text()) == {"data": ["el.jsonl", "and / or"], "b": 1}
    assert not (small / "regulation.json").exists()
