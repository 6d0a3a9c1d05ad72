"""The command from its flags to its files, and launch/paper.sh, which ends with it."""

import csv
import html.parser
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from prom_jax import report
from prom_jax.utils import cli
from tests.reporting.made_up import LLAMA, prom, training, write

ROOT = Path(__file__).parents[1]
EVIL = "<script>alert('1')<\\script>|`x`"  # a slash would end a folder's name
CODES = "\x1b[2Jtask\n\u202e</td>"


@pytest.fixture
def runs(tmp_path):
    """PROM, a baseline and the base model in Thai, a small model of a nasty name, and two pictures."""
    folder = tmp_path / "runs"
    right = lambda share: [1] * round(40 * share) + [0] * round(40 * (1 - share))
    scores = lambda share: {"exact_match": right(share), "f1": [share] * 40}
    write(folder / "base", None, {"xquad_th": scores(0.05), "arc_easy": {"acc": right(0.5)}})
    write(folder / "pulled", prom("th", 1), {CODES: {EVIL: right(0.5)}})
    write(folder / "prom", prom("th"), {"xquad_th": scores(0.75)})
    write(folder / "xllama2", training("xllama2", "th"), {"xquad_th": scores(0.25)})
    write(folder / "evil", None, {"xquad_th": scores(0.1)}, source=EVIL)
    for name, beside in (("grid.png", "probe.json"), ("interference.png", "interference.json")):
        Image.new("RGB", (30, 20)).save(folder / name)
        (folder / beside).write_text('{"settings": {"model": "<i>probed</i>"}}')
    return folder


def run(*flags):
    report.main([f"--{flag}" for flag in flags])


class Page(html.parser.HTMLParser):
    """What a page is made of, and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.words.append(data.strip())


def test_from_flags_to_files(tmp_path, runs, capsys):
    out = tmp_path / "out"
    run(f"runs={runs}", f"out={out}")
    printed = capsys.readouterr().out
    assert f"base      {LLAMA}\n" in printed
    assert "Table 1. Question answering: 8 of 80 numbers; 6 comparisons, 6 significant" in printed
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == [
        "figures/1-grid.png", "figures/2-interference.png", "report.html", "report.md",
        "tables/ablation_th.csv", "tables/base.csv", "tables/comparisons.csv", "tables/language_th.csv",
        "tables/measurements.csv", "tables/mgsm.csv", "tables/qa.csv", "tables/wins.csv",
    ]  # fmt: skip

    text = (out / "report.md").read_text(encoding="utf-8")
    header = next(line for line in text.splitlines() if line.startswith("| | XQuAD th"))
    row = next(line for line in text.splitlines() if line.startswith("| PROM |"))
    assert row.split("|")[2].strip() == "75.0▲△ / 75.0▲△ (10.7 / 22.5)"
    assert row.count("|") == header.count("|") == 10
    assert "![Cloze probe](figures/1-grid.png)" in text

    with open(out / "tables" / "qa.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    (ours,) = (
        r for r in rows if (r["base_model"], r["row"], r["column"]) == (LLAMA, "PROM", "XQuAD th")
        and r["metric"] == "EM"
    )  # fmt: skip
    assert (ours["ours"], ours["paper"], ours["documents"]) == ("75.0", "10.7", "40")
    assert ours["significant"].startswith("significantly better than xLLaMA2(t+e)")
    with open(out / "tables" / "measurements.csv", encoding="utf-8", newline="") as file:
        assert {row["task"]: row["value"] for row in csv.DictReader(file)}["arc_easy"] == "0.5"


def test_the_page_needs_nothing_and_takes_text_as_text(tmp_path, runs, capsys):
    run(f"runs={runs}", f"out={tmp_path / 'out'}")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "i"} & set(page.tags)
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert EVIL in page.words and "<i>probed</i>" in " ".join(page.words)
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## &lt;script>alert('1')&lt;\\\\script>\\|\\`x\\`" in markdown
    assert "</td>" not in markdown and "\x1b" not in capsys.readouterr().out


def test_samples_missing(tmp_path, runs):
    (runs / "prom" / "samples.jsonl").unlink()
    run(f"runs={runs}", f"out={tmp_path / 'out'}")
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| PROM | 75.0 / 75.0 (10.7 / 22.5) |" in markdown
    assert "Not compared: PROM against xLLaMA2(t+e) on xquad\\_th exact\\_match" in markdown


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda runs, out: runs.rename(runs.with_name("moved")), "holds no results.json that can be read"),
        (lambda runs, out: out.write_text(""), "cannot be made a folder"),
        (lambda runs, out: (out / "report.html").mkdir(parents=True), "report.html cannot be written"),
        (lambda runs, out: (out / "figures" / "1-grid.png").mkdir(parents=True), "cannot be copied"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, runs, capsys, prepare, message):
    out = tmp_path / "out"
    prepare(runs, out)
    with pytest.raises(SystemExit) as stop:
        cli.guard(lambda: run(f"runs={runs}", f"out={out}"))
    assert stop.value.code == cli.MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# launch/paper.sh

# Notes each command, fails where FAIL says so, and leaves what the real one would.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
if [[ -n "$FAIL" && "$*" == *$FAIL* ]]; then exit "$STATUS"; fi
for argument; do case $argument in
  --workdir=*) work=${argument#*=} ;;
  --out=*) out=${argument#*=} ;;
esac; done
case $2 in
  prom_jax.prepare) mkdir -p "$work"; echo '{"training_flops": 3.6e+15}' > "$work/data_card.json" ;;
  prom_jax.train)
    mkdir -p "$work/hf"; touch "$work/hf/config.json"
    kept='{}'
    if [[ $work == *sw-prom* ]]; then kept='{"pivot.weight": 0.1}'; fi
    echo "$kept" > "$work/summary.json" ;;
  prom_jax.evaluate) mkdir -p "$out"; touch "$out/results.json" ;;
esac
"""


@pytest.fixture
def paper(tmp_path):
    """Calls launch/paper.sh with a stand-in for Python; gives its exit status, output and commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, content in (("python", PYTHON), ("pip", "#!/bin/sh\n")):
        (commands / name).write_text(content)
        (commands / name).chmod(0o755)
    log = tmp_path / "log"

    def call(*flags, fail="", status=1):
        log.write_text("")
        environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path),
            "LOG": str(log), "FAIL": fail, "STATUS": str(status),
        }  # fmt: skip
        script = ["bash", str(ROOT / "launch" / "paper.sh"), f"--runs={tmp_path / 'runs'}", *flags]
        done = subprocess.run(script, env=environment, capture_output=True, text=True)
        return done, [line.removeprefix("-m prom_jax.") for line in log.read_text().splitlines()]

    return call


def test_dry_run_of_the_whole_matrix(paper, tmp_path):
    done, ran = paper("--dry-run", "--seeds=0,1", "--data-dir=facts", "--config.data.target={language}.jsonl")
    assert (done.returncode, ran) == (0, [])
    lines = done.stdout.splitlines()
    trained = [line for line in lines if "prom_jax.train" in line]
    # Three methods in nine languages, four without regulation, ten rows of the ablation; two seeds.
    assert len(trained) == 2 * (9 * 3 + 4 + 10)
    assert len([line for line in lines if "prom_jax.evaluate" in line]) == len(trained) + 1
    assert all((ROOT / "configs" / f"{name}.py").is_file() for name in ("ar", "bn", "el", "ml", "mr"))
    run = f"{tmp_path}/runs/ta-unregulated-seed1"
    assert (
        f"python -m prom_jax.train --config=configs/ta.py:unregulated --workdir={run} --config.seed=1 "
        "--config.data.target=ta.jsonl"
    ) in lines
    evaluation = f"--model={run}/hf --tasks=indicqa_ta --out={run}/evaluation --data-dir=facts"
    assert f"python -m prom_jax.evaluate {evaluation}" in lines
    # 82 runs of 6 · 6.74e9 · 8e7 FLOPs at 0.4 · 989e12 a second.
    hours = 82 * 6 * 6.74e9 * 8e7 / (0.4 * 989e12) / 3600
    assert lines[-1].startswith(f"# training: about {hours:.3g} hours of one device")


def test_every_variant_exists(paper):
    done, _ = paper("--dry-run")
    names = {word for line in done.stdout.splitlines() for word in line.split() if "--config=" in word}
    assert len(names) == 9 * 3 + 4 + 10
    for name in names:
        path, _, variant = name.removeprefix("--config=").partition(":")
        module = {}
        exec((ROOT / path).read_text(encoding="utf-8"), module)
        module["get_config"](variant)


def test_goes_on_where_it_was(paper, tmp_path):
    flags = "--languages=sw,te", "--methods=base,prom,unregulated", "--config.steps=3"
    done, ran = paper(*flags, fail="prom_jax.train --config=configs/te.py --", status=3)
    assert done.returncode == 1 and "failed: python -m prom_jax.train --config=configs/te.py" in done.stderr
    whole = ["prepare", "train", "evaluate"]
    assert [line.split()[0] for line in ran] == ["evaluate", *whole, "prepare", "train", *whole, "report"]
    assert not any("sw.py:unregulated" in line for line in ran)  # λ was kept: it is PROM's own run
    done, ran = paper("--dry-run", *flags)
    hours = 3.6e15 / (0.4 * 989e12) / 3600  # of one run, as its data card says
    assert f"about {hours:.3g} hours" in done.stdout
    done, ran = paper(*flags)
    assert done.returncode == 0
    assert [line.split()[0] for line in ran] == ["train", "evaluate", "report"]


def test_any_language_and_its_tasks(paper, tmp_path):
    """configs/demo.py stands for a language that the paper has not."""
    flags = (
        "--languages=sw,demo",
        "--methods=base,prom",
        "--tasks=own_{language}.yaml,arc_easy",
        "--words=w.json",
    )
    done, _ = paper("--dry-run", *flags)
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if "prom_jax.evaluate" in line]
    assert [line.partition("--tasks=")[2].partition(" ")[0] for line in lines] == [
        "own_sw.yaml,arc_easy,own_demo.yaml", "own_sw.yaml,arc_easy", "own_demo.yaml,arc_easy",
    ]  # fmt: skip
    assert all(line.endswith("--words=w.json") for line in lines)


def test_a_stopped_training_stops_all(paper):
    done, ran = paper("--languages=sw,te", "--methods=prom", fail="prom_jax.train", status=75)
    assert done.returncode == 75 and [line.split()[0] for line in ran] == ["prepare", "train"]
    assert "run the same command to go on" in done.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--language=th", "--language=th is not a flag of launch/paper.sh"),
        ("--config.seed=1", "--config.seed=1 is not a flag"),
        ("--languages=th,xx", "--languages=xx: expected some of"),
        ("--languages=demo", "--languages=demo: the paper has no tasks in it, give them with --tasks"),
        ("--methods=llama", "--methods=llama: expected some of base bactrian"),
    ],
)
def test_mistakes_in_the_flags_of_the_matrix(paper, flag, message):
    done, ran = paper(flag)
    assert (done.returncode, ran) == (2, [])
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
