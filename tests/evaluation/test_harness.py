"""Own tasks from anywhere, and the flags of the harness against its own model, which computes with torch."""

import json
import multiprocessing
import sys

import lm_eval
import pytest
import torch
import transformers.data
import yaml
from lm_eval.models.huggingface import HFLM

import prom_jax
from prom_jax.evaluation import harness, squad_metrics
from prom_jax.evaluation.lm import HarnessModel
from prom_jax.utils.errors import UserError

QUESTIONS = [{"id": str(n), "question": f"swali {n}", "answers": [{"text": f"jibu {n}"}]} for n in range(4)]
PARAGRAPHS = [{"context": f"maji {n}", "qas": [question]} for n, question in enumerate(QUESTIONS)]
SQUAD = {"data": [{"title": "t", "paragraphs": PARAGRAPHS}]}
WORDS = {"background": "Contexto:", "question": "Pregunta:", "answer": "Respuesta:"}
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'plain' in message['content'] %}"
    "{{ raise_exception('no system role') }}{% endif %}[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(path, content):
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A folder of one's own: a task file by any name, its data by any name, and a function next to it."""
    (tmp_path / "preguntas de examen.txt").write_text(json.dumps(SQUAD))
    (tmp_path / "mine.py").write_text("def shout(doc): return doc['question'].upper()\n")
    kwargs = {"language": "es", "file": "preguntas de examen.txt", "words": WORDS}
    write(tmp_path / "mi tarea.yml", {"include": "_xquad", "task": "own_es", "dataset_kwargs": kwargs})
    write(
        tmp_path / "loud.yaml",
        "include: mi tarea.yml\ntask: own_loud\ndoc_to_text: !function mine.shout\n",
    )
    write(tmp_path / "other.yaml", "- no task\n")
    return tmp_path


def test_a_task_from_anywhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    tasks = harness.load_tasks([f"{folder.name}/mi tarea.yml"])
    assert list(tasks) == ["own_es"]
    doc = tasks["own_es"].eval_docs[1]
    assert tasks["own_es"].doc_to_text(doc) == "Contexto:\n\nmaji 1\n\nPregunta:swali 1\n\nRespuesta:"
    assert doc["golds"] == ["jibu 1"] and doc["cluster"] == "paragraph 2" and doc["language"] == "es"


def test_a_language_may_be_given_twice(folder):
    """The harness would pass it to one function twice."""
    write(folder / "twice.yaml", "include: mi tarea.yml\ntask: twice\nmetadata: {language: es, version: 2}\n")
    (task,) = harness.load_tasks([str(folder / "twice.yaml")]).values()
    assert task.eval_docs[0]["language"] == "es" and task.get_config("metadata")["version"] == 2


def test_tasks_of_a_folder_by_name(folder):
    tasks = harness.load_tasks(["own_loud", "own_es"], include_path=str(folder))
    assert list(tasks) == ["own_loud", "own_es"]
    task = tasks["own_loud"]
    assert task.doc_to_text(task.eval_docs[2]) == "SWALI 2"
    with pytest.raises(UserError, match=r"loud\.yaml' is a second task 'own_loud': give it another name"):
        harness.load_tasks(["own_loud", str(folder / "loud.yaml")], include_path=str(folder))
    with pytest.raises(UserError, match="--include_path=nowhere: there is no such folder"):
        harness.load_tasks(["own_es"], include_path="nowhere")


def test_words_of_a_file(folder):
    content = {
        "include": "_xquad",
        "task": "own_es",
        "dataset_kwargs": {"language": "es", "file": "preguntas de examen.txt"},
    }
    path = write(folder / "wordless.yaml", content)
    with pytest.raises(UserError, match="no words for background, question, answer in 'es'"):
        harness.load_tasks([path])
    words = write(folder / "words.json", json.dumps({"es": WORDS}))
    (task,) = harness.load_tasks([path], words=words).values()
    assert task.doc_to_text(task.eval_docs[0]).startswith("Contexto:\n\nmaji 0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"include": "_nothing", "task": "x"},
            "includes '_nothing': expected a file next to it, or one of _flores, _indicqa",
        ),
        ({"include": "bad.yaml", "task": "x"}, "bad.yaml includes itself"),
        ("task: [", r"cannot be loaded \(ParserError.*correct the file"),
        (
            {"include": "_xquad", "task": "x", "dataset_kwargs": {"language": "es", "file": "no.json"}},
            "no file",
        ),
        (
            {
                "include": "_xquad",
                "task": "x",
                "metadata": {"language": "de"},
                "dataset_kwargs": {"language": "es"},
            },
            "language is 'es' in dataset_kwargs and 'de' in metadata: give it once",
        ),
        ("task: x\nprocess_results: !function no_such_package.f\n", "needs a package that is not installed"),
    ],
)
def test_bad_files_are_one_sentence(folder, content, message):
    with pytest.raises(UserError, match=message):
        harness.load_tasks([write(folder / "bad.yaml", content)])


def test_english_is_one_word(monkeypatch):
    asked = []
    monkeypatch.setattr(harness, "_load_tasks", lambda names, *_: asked.extend(names) or {})
    harness.load_tasks(["english", "xquad_th", "xquad_en"], "data")
    assert asked == [*harness.ENGLISH, "xquad_th"]


def test_what_transformers_dropped_is_there_while_tasks_load(folder):
    (folder / "gone.py").write_text(
        "import transformers.data.metrics.squad_metrics as squad_metrics\n"
        "from transformers.data.metrics import squad_metrics as again\n"
        "def results(doc, answers):\n"
        "    assert again is squad_metrics\n"
        "    return {'f1': squad_metrics.compute_f1(doc['golds'][0], answers[0])}\n"
    )
    content = "include: mi tarea.yml\ntask: gone\nprocess_results: !function gone.results\n"
    (task,) = harness.load_tasks([write(folder / "gone.yaml", content)]).values()
    assert task.process_results({"golds": ["the big cow"]}, ["A big, dog"]) == {"f1": 0.5}
    assert not [name for name in sys.modules if name.startswith("transformers.data.metrics")]
    assert not hasattr(transformers.data, "metrics")


@pytest.mark.parametrize(
    ("gold", "answer", "exact", "f1"),
    [("The Cow", "cow!", 1, 1.0), ("a b c", "b d", 0, 2 * 0.5 * 0.5), ("", "the", 1, 1), ("", "x", 0, 0)],
)
def test_squad_metrics(gold, answer, exact, f1):
    assert squad_metrics.compute_exact(gold, answer) == exact
    assert squad_metrics.compute_f1(gold, answer) == pytest.approx(f1)


# The flags against the harness's own model.


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def models(request, tiny):
    folder = tiny / "model" if request.param == "tiny" else request.getfixturevalue("smollm2")[2]
    model, tokenizer = prom_jax.load(folder)
    theirs = HFLM(pretrained=str(folder), dtype=torch.float32, batch_size=4, device="cpu")
    tokenizer.chat_template = theirs.tokenizer.chat_template = CHAT
    return HarnessModel(model, tokenizer, slots=2048), theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"num_fewshot": 2, "chat": True, "system": "Jibu."},
        {},
        {"num_fewshot": 2},
        {"num_fewshot": 2, "system": "Jibu kwa Kiswahili."},
        {"chat": True},
        {"num_fewshot": 1, "chat": True, "multiturn": False},
        {"chat": True, "system": "plain"},
    ],
    ids=str,
)
def test_flags_equal_the_harness_own_model(folder, models, flags):
    ours, theirs = models
    flags = dict(flags)
    num_fewshot = flags.pop("num_fewshot", None)
    names = [str(folder / "mi tarea.yml")]
    _, samples = harness.evaluate(ours, harness.load_tasks(names, num_fewshot=num_fewshot), **flags)
    expected = lm_eval.simple_evaluate(
        model=theirs,
        tasks=list(harness.load_tasks(names, num_fewshot=num_fewshot).values()),
        num_fewshot=num_fewshot,
        apply_chat_template=flags.get("chat", False),
        fewshot_as_multiturn=flags.get("multiturn", flags.get("chat", False)),
        system_instruction=flags.get("system"),
        bootstrap_iters=0,
    )
    logged = sorted(expected["samples"]["own_es"], key=lambda entry: entry["doc_id"])
    assert len(logged) == len(samples) == 4
    for sample, entry in zip(samples, logged):
        assert sample["prompt"] == entry["arguments"][0][0]
        assert [sample["output"]] == entry["filtered_resps"]


def test_examples_of_a_task_that_wants_none(folder, capsys):
    path = write(folder / "none.yaml", "include: mi tarea.yml\ntask: none\nnum_fewshot: 0\n")
    (task,) = harness.load_tasks([path], num_fewshot=3).values()
    assert task.config.num_fewshot == 0
    assert "none stays without examples" in capsys.readouterr().out


def test_no_chat_template_is_told(models):
    ours, _ = models
    ours.tokenizer.chat_template = None
    with pytest.raises(UserError, match="--apply_chat_template: the tokenizer has no such chat template"):
        ours.chat_template()
    ours.tokenizer.chat_template = CHAT


def test_standard_errors_need_no_process(folder, models, monkeypatch, capsys):
    """The harness would fork this process, in which JAX has threads."""
    monkeypatch.setattr(multiprocessing, "Pool", None)
    metrics = "metric_list:\n  - metric: bleu\n    aggregation: bleu\n    higher_is_better: true\n"
    content = "include: mi tarea.yml\ntask: bleu\nprocess_results: null\ndoc_to_target: '{{golds[0]}}'\n"
    tasks = harness.load_tasks([write(folder / "bleu.yaml", content + metrics)])
    results, samples = harness.evaluate(models[0], tasks)
    assert results["bleu"]["metrics"]["bleu"]["stderr"] is not None
    assert "bootstrapping" not in capsys.readouterr().out
    assert "DISABLE_MULTIPROC" not in __import__("os").environ
    assert results["bleu"]["metrics"]["bleu"]["higher_is_better"] is True
    scores = [sample["scores"]["chrf"] for sample in samples]  # no metric of the task
    assert results["bleu"]["metrics"]["chrf"]["value"] == pytest.approx(sum(scores) / 4)
