"""The command, from its flags to its files."""

import json
import shutil
import subprocess
import sys

import pytest

from prom_jax import evaluate
from prom_jax.utils.errors import UserError

CONTEXT = "ng'ombe anakula nyasi na hutoa maziwa kila asubuhi katika shamba dogo karibu na mto"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five questions on two paragraphs and three problems, in the official files' formats."""
    folder = tmp_path_factory.mktemp("data")
    question = lambda number, answer: {
        "id": f"q{number}",
        "question": f"swali la {number}?",
        "answers": [{"text": answer, "answer_start": CONTEXT.find(answer)}],
    }
    paragraphs = [
        {"context": CONTEXT, "qas": [question(1, "nyasi"), question(2, "maziwa"), question(3, "mto")]},
        {"context": CONTEXT * 2, "qas": [question(4, "shamba dogo"), question(5, "asubuhi")]},
    ]
    (folder / "xquad").mkdir()
    content = {"data": [{"title": "ng'ombe", "paragraphs": paragraphs}], "version": "1.1"}
    (folder / "xquad" / "xquad.th.json").write_text(json.dumps(content))
    (folder / "mgsm_sw.tsv").write_text("".join(f"Je, {n} na {n}?\t{2 * n}\n" for n in range(3)))
    return folder


def run(tiny, data, out, *more, tasks="xquad_th,mgsm_sw"):
    flags = [f"--model={tiny / 'model'}", f"--tasks={tasks}", f"--data-dir={data}", f"--out={out}", *more]
    evaluate.evaluate(evaluate.parse(flags))
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((out / "results.json").read_text(encoding="utf-8")), list(map(json.loads, lines))


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, *run(tiny, data, out)


def test_from_flags_to_files(tiny, whole):
    _, results, samples = whole
    assert results["model"]["source"] == str(tiny / "model") and results["model"]["training"] is None
    assert results["settings"] == {
        "compute_dtype": "float32",
        "bos": False,
        "max_length": 1024,
        "limit": None,
    }
    assert {"jax", "transformers", "lm_eval"} <= set(results["versions"])
    assert [sample["task"] for sample in samples] == ["xquad_th"] * 5 + ["mgsm_sw"] * 3
    for task, metrics in (("xquad_th", {"exact_match", "f1", "f1_segmented"}), ("mgsm_sw", {"accuracy"})):
        mine = [sample for sample in samples if sample["task"] == task]
        entry = results["tasks"][task]
        assert entry["n"] == len(mine) and metrics <= set(entry["metrics"])
        for name in metrics:
            mean = sum(sample["scores"][name] for sample in mine) / len(mine)
            assert entry["metrics"][name]["value"] == pytest.approx(mean)
            assert entry["metrics"][name]["n"] == len(mine)
    first = samples[0]
    assert first["prompt"].startswith("พื้นหลัง:\n\nng'ombe") and first["prompt"].endswith("ตอบ:")
    assert first["gold"] == ["nyasi"] and "\n" not in first["output"]
    clusters = [sample["cluster"] for sample in samples]
    assert len(set(clusters[:3])) == 1 and len(set(clusters[:5])) == 2 and len(set(clusters[5:])) == 3


def test_killed_and_run_again(tiny, data, whole, tmp_path, capsys):
    out, results, samples = whole
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 1 + 8
    (tmp_path / "answers.jsonl").write_text("".join(lines[:4]) + lines[4][:20], encoding="utf-8")
    assert run(tiny, data, tmp_path) == (results, samples)
    assert "kept      3 of 5 answers" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_bytes() == (out / "results.json").read_bytes()
    assert (tmp_path / "samples.jsonl").read_bytes() == (out / "samples.jsonl").read_bytes()


def test_another_mesh_and_a_limit(tiny, data, whole, tmp_path):
    _, _, samples = whole
    flags = "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--places=700", "--limit=4"
    results, few = run(tiny, data, tmp_path, *flags, tasks="xquad_th")
    assert few == samples[:4]
    assert results["settings"]["limit"] == 4 and results["tasks"]["xquad_th"]["n"] == 4


def test_what_a_model_was_trained_on_is_told(tiny, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    config = json.loads((model / "config.json").read_text())
    details = {"base_model": "base", "language": "th", "method": "prom", "seed": 3}
    (model / "config.json").write_text(json.dumps(config | {"prom_jax": details}))
    flags = [
        f"--model={model}",
        "--tasks=xquad_th",
        "--limit=1",
        f"--data-dir={data}",
        f"--out={tmp_path / 'out'}",
    ]
    evaluate.evaluate(evaluate.parse(flags))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["training"] == details


def test_bad_input(tiny, data, whole, tmp_path):
    out = whole[0]
    before = (out / "results.json").read_bytes()
    no_tokenizer = tmp_path / "bare"
    no_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / "model" / name, no_tokenizer)
    (tmp_path / "file").touch()
    cases = [
        ({"tasks": "xquad_sw"}, "'xquad_sw' is no task"),
        ({"tasks": "xquad_el"}, "xquad.el.json"),
        ({"tasks": "mgsm_sw", "model": tmp_path / "none"}, "does not exist"),
        ({"model": no_tokenizer}, "tokenizer"),
        ({"out": tmp_path / "file"}, "cannot be made a folder"),
        ({"limit": 0}, "--limit=0"),
        ({"max_length": 2048}, "context has 1024 tokens"),
        ({"max_length": 256}, "leaves no token"),
        ({"out": out, "bos": None}, "no BOS|bos=False, now True"),
        ({"out": out, "compute_dtype": "bfloat16"}, "compute_dtype='float32', now 'bfloat16'"),
    ]
    for change, message in cases:
        given = {
            "model": tiny / "model",
            "tasks": "xquad_th",
            "data-dir": data,
            "out": tmp_path / "out",
        } | change
        flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in given.items()]
        with pytest.raises(UserError, match=message):
            evaluate.evaluate(evaluate.parse(flags))
    assert (out / "results.json").read_bytes() == before


def test_results_of_another_model_are_kept(tiny, data, whole, tmp_path):
    out, *_ = whole
    other = tmp_path / "model"
    shutil.copytree(tiny / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(UserError, match=r"holds answers with model='\w+-\w+', now '\w+-\w+'"):
        run_flags = [f"--model={other}", "--tasks=xquad_th", f"--data-dir={data}", f"--out={out}"]
        evaluate.evaluate(evaluate.parse(run_flags))


NO_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hide = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
PathFinder.find_spec = staticmethod(hide)
"""


def test_without_torch(tiny, data, whole, tmp_path):
    _, results, _ = whole
    flags = [f"--model={tiny / 'model'}", "--tasks=mgsm_sw", f"--data-dir={data}", f"--out={tmp_path}"]
    imports = "from prom_jax import evaluate\nfrom prom_jax.utils import cli"
    code = f"{NO_TORCH}\n{imports}\ncli.guard(lambda: evaluate.main({flags}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["tasks"]["mgsm_sw"] == results["tasks"]["mgsm_sw"]
