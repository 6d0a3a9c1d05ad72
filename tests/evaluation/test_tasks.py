"""The tasks as lm-evaluation-harness builds and scores them, on small files in the official formats."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import lm_eval
import pytest
import sacrebleu
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from prom_jax.data import templates
from prom_jax.evaluation import tasks
from prom_jax.evaluation.tasks import documents
from prom_jax.utils.errors import UserError

DIRECTORY = Path(tasks.__file__).parent
QA = ["xquad_ar", "xquad_el", "xquad_en", "xquad_th", "mlqa_ar", "indicqa_ml", "indicqa_mr", "indicqa_ta"]
MGSM = ["mgsm_bn", "mgsm_en", "mgsm_sw", "mgsm_te", "mgsm_th"]
# Two questions about one paragraph, one about another; the last has no answer (in IndicQA).
PARAGRAPHS = [
    ("\ufeffA river. {{b}} ", [("Which? ", ["the Nile", "Nile river"]), ("Where?", ["in Egypt"])]),
    ("A hill.", [("How high?", [""])]),
]
PROBLEMS = [("How many\xa0?", "2,125"), ('Say "three"', "3 ")]

# What the paper's prompts are for the first question or problem, letter by letter; English is ours.
PROMPTS = {
    "xquad_ar": ":معرفتي\n\n\ufeffA river. {{b}} \n\n:سؤالWhich? \n\n:إجابه",
    "xquad_el": "Πληροφορίες ιστορικού:\n\n\ufeffA river. {{b}} \n\nΕρώτηση:Which? \n\nΑπάντηση:",
    "xquad_en": "Background:\n\n\ufeffA river. {{b}} \n\nQuestion:Which? \n\nAnswer:",
    "xquad_th": "พื้นหลัง:\n\n\ufeffA river. {{b}} \n\nคำถาม:Which? \n\nตอบ:",
    "mlqa_ar": ":معرفتي\n\n\ufeffA river. {{b}} \n\n:سؤال Which? \n\n:إجابه",
    "indicqa_ta": "பின்னணி:\n\n\ufeffA river. {{b}} \n\nகேள்வி:Which? \n\nபதில்:",
    "indicqa_mr": "पार्श्वभूमी:\n\n\ufeffA river. {{b}} \n\nप्रश्न:Which? \n\nउत्तर:",
    "indicqa_ml": "പശ്ചാത്തലം:\n\n\ufeffA river. {{b}} \n\nചോദ്യം:Which? \n\nഉത്തരം:",
    "mgsm_bn": "প্রশ্ন: How many\xa0?\nধাপে ধাপে উত্তর:",
    "mgsm_en": "Question: How many\xa0?\nStep-by-Step Answer:",
    "mgsm_sw": "Swali: How many\xa0?\nJibu la Hatua kwa Hatua:",
    "mgsm_te": "ప్రశ్న: How many\xa0?\nదశలవారీగా సమాధానం:",
    "mgsm_th": "โจทย์: How many\xa0?\nคำตอบทีละขั้นตอน:",
}


def file_name(task):
    benchmark, language = task.split("_")
    return {
        "xquad": f"xquad.{language}.json",
        "mlqa": f"test-context-{language}-question-{language}.json",
        "indicqa": f"indicqa.{language}.json",
        "mgsm": f"mgsm_{language}.tsv",
    }[benchmark]


def squad_json():
    numbers = iter(range(10))
    qas = lambda questions: [
        {
            "id": str(next(numbers)),
            "question": q,
            "answers": [{"text": text, "answer_start": 0} for text in texts],
        }
        for q, texts in questions
    ]
    paragraphs = [{"context": context, "qas": qas(questions)} for context, questions in PARAGRAPHS]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.fixture
def data_dir(tmp_path):
    for task in QA + MGSM:
        path = tmp_path / "downloads" / task / file_name(task)
        path.parent.mkdir(parents=True)
        text = squad_json() if task in QA else "".join(f"{q}\t{a}\n" for q, a in PROBLEMS)
        path.write_text(text, encoding="utf-8-sig")
    return tmp_path


def manager(data_dir):
    return TaskManager(
        include_path=str(DIRECTORY), include_defaults=False, metadata={"data_dir": data_dir and str(data_dir)}
    )


def load(task, data_dir):
    return manager(data_dir).load([task])["tasks"][task]


class Scripted(LM):
    """Answers a prompt with what it is told to."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests):
        return [self.answers[request.args[0]] for request in requests]

    loglikelihood = loglikelihood_rolling = None


def evaluate(name, data_dir, answers):
    """The harness's results where the documents are answered in order."""
    task = load(name, data_dir)
    answers = {task.doc_to_text(doc): answer for doc, answer in zip(task.eval_docs, answers, strict=True)}
    return lm_eval.simple_evaluate(
        model=Scripted(answers), tasks=[name], task_manager=manager(data_dir), torch_random_seed=None
    )


def table(results, task):
    return {key.removesuffix(",none"): value for key, value in results["results"][task].items()}


def scores(results, task):
    return [{name: sample[name] for name in sample["metrics"]} for sample in results["samples"][task]]


def test_there_is_a_task_for_every_cell_of_the_paper():
    of_flores = {f"flores_{language}" for language in ("ar", "bn", "el", "ml", "mr", "sw", "ta", "te", "th")}
    assert set(manager(None).all_tasks) == PROMPTS.keys() | of_flores


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_decoding(name, data_dir):
    task = load(name, data_dir)
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=0) == PROMPTS[name]
    stop = "\n" if name in QA else PROMPTS[name].split(" ")[0]
    assert task.config.generation_kwargs == {"until": [stop], "do_sample": False, "max_gen_toks": 256}
    assert task.config.num_fewshot is None  # zero, unless --num_fewshot says more


def test_documents_have_golds_and_clusters(data_dir):
    docs = load("indicqa_ta", data_dir).eval_docs
    assert docs["golds"] == [["the Nile", "Nile river"], ["in Egypt"], []]
    assert docs["cluster"] == ["paragraph 1", "paragraph 1", "paragraph 2"]
    docs = load("mgsm_sw", data_dir).eval_docs
    assert docs["golds"] == [["2125"], ["3"]] and docs["cluster"] == ["problem 1", "problem 2"]
    assert docs["question"][1] == 'Say "three"'


def test_results_of_question_answering(data_dir):
    results = evaluate("xquad_th", data_dir, [" Nile.", "in Egypt แม่น้ำ", "no"])
    found = scores(results, "xquad_th")
    assert [score["exact_match"] for score in found] == [1, 0, 0]
    assert [score["f1"] for score in found] == pytest.approx([1, 0.8, 0])
    assert [score["f1_segmented"] for score in found] == pytest.approx([1, 0.8, 0])
    total = table(results, "xquad_th")
    assert total["exact_match"] == pytest.approx(1 / 3) and total["f1"] == pytest.approx(0.6)
    # standard error of the mean with n - 1: deviations of F1 are 0.4, 0.2 and -0.6
    assert total["f1_stderr"] == pytest.approx(math.sqrt((0.16 + 0.04 + 0.36) / 2 / 3))
    sample = results["samples"]["xquad_th"][1]
    assert sample["arguments"][0][0].endswith("คำถาม:Where?\n\nตอบ:")
    assert sample["filtered_resps"] == ["in Egypt แม่น้ำ"] and sample["doc"]["golds"] == ["in Egypt"]


def test_results_of_mlqa_follow_its_own_rules(data_dir):
    results = evaluate("mlqa_ar", data_dir, ["«Nile»؟ river", "الin Egypt", "-"])
    assert [score["f1"] for score in scores(results, "mlqa_ar")] == [1, 1, 1]
    results = evaluate("xquad_ar", data_dir, ["«Nile»؟ river", "الin Egypt", "-"])
    assert [score["f1"] for score in scores(results, "xquad_ar")] == [0.5, 0.5, 1]


def test_unanswerable_questions_count_only_where_they_should(data_dir):
    results = evaluate("indicqa_mr", data_dir, ["Nile", "in Asia", ""])
    answered = {"exact_match": 1, "f1": 1, "exact_match_answerable": 1, "f1_answerable": 1}
    half = {"exact_match": 0, "f1": 0.5, "exact_match_answerable": 0, "f1_answerable": 0.5}
    assert scores(results, "indicqa_mr") == [answered, half, {"exact_match": 1, "f1": 1}]
    total = table(results, "indicqa_mr")
    assert total["f1"] == pytest.approx(2.5 / 3) and total["f1_answerable"] == 0.75
    assert total["exact_match_answerable_stderr"] == pytest.approx(0.5)  # of 1 and 0


def test_results_of_arithmetic(data_dir):
    results = evaluate("mgsm_bn", data_dir, ["5 × 425 = 2,125", "\n২ + ১ = ৩"])
    assert scores(results, "mgsm_bn") == [
        {"accuracy": 0, "accuracy_numeric": 1},
        {"accuracy": 1, "accuracy_numeric": 1},
    ]
    assert table(results, "mgsm_bn")["accuracy"] == 0.5


def test_translation(tmp_path):
    """The prompt is that of training, to the letter; the measure is sacrebleu's."""
    (tmp_path / "flores" / "devtest").mkdir(parents=True)
    lines = {
        "eng_Latn": ["A cow.", "A hill is high."],
        "tha_Thai": ["วัว", "เนินเขาสูง"],
        "ell_Grek": ["x", "y"],
    }
    for code, texts in lines.items():
        (tmp_path / "flores" / "devtest" / f"{code}.devtest").write_text("\n".join(texts) + "\n")
    task = load("flores_th", tmp_path)
    prompts = [task.doc_to_text(doc) for doc in task.eval_docs]
    dialogue = templates.translation("A hill is high.", "เนินเขาสูง", "th", "0", "en")
    (trained,) = templates.Alpaca(None).spans(dialogue)
    assert prompts[1] + "เนินเขาสูง" == trained.text
    results = evaluate("flores_th", tmp_path, ["วัว", "เขาสูง"])
    expected = [
        sacrebleu.sentence_chrf("วัว", ["วัว"]).score,
        sacrebleu.sentence_chrf("เขาสูง", ["เนินเขาสูง"]).score,
    ]
    assert [score["chrf"] for score in scores(results, "flores_th")] == pytest.approx(
        [score / 100 for score in expected]
    )
    with pytest.raises(Exception, match="no language 'sw' in script Latn among the 3"):
        load("flores_sw", tmp_path)
    with pytest.raises(Exception, match="give --data_dir, a folder with its"):
        load("flores_th", None)
    (tmp_path / "flores" / "devtest" / "tha_Thai.devtest").write_text("วัว\n")
    with pytest.raises(Exception, match=r"has 2 lines and .* 1: get them again"):
        load("flores_th", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"xquad\.th\.json is not as .*Expecting property name.*: get it again"),
        (b"\xff\xfe", r"xquad\.th\.json is not as .*utf-8"),
        ("[]", r"xquad\.th\.json is not as .*list indices"),
        ('{"data": [{"title": "t"}]}', r"xquad\.th\.json is not as .*'paragraphs' is missing"),
        ('{"data": []}', r"xquad\.th\.json has no questions"),
        (squad_json().replace('"A hill."', "7"), r"xquad\.th\.json is not as .*7 is not a text"),
        (squad_json().replace("hill", r"\ud800"), r"xquad\.th\.json is not as .*surrogates"),
    ],
)
def test_bad_question_files_are_one_sentence(data_dir, content, message):
    path = next(data_dir.rglob("xquad.th.json"))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        load("xquad_th", data_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("How many?\n", r"mgsm_sw\.tsv is not as .*line 1 has no tab"),
        ("question\tanswer\nHow many?\t3\n", r"problem 1 has the answer 'answer', not a number"),
        ("How many?\t3\textra\n", r"'3\\textra', not a number"),
        ("\n", r"mgsm_sw\.tsv has no questions"),
    ],
)
def test_bad_problem_files_are_one_sentence(data_dir, content, message):
    next(data_dir.rglob("mgsm_sw.tsv")).write_text(content)
    with pytest.raises(UserError, match=message):
        load("mgsm_sw", data_dir)


def test_files_are_there_once(data_dir):
    path = next(data_dir.rglob("xquad.el.json"))
    (data_dir / path.name).write_text(squad_json())
    with pytest.raises(UserError, match=r"2 files xquad\.el\.json below .*downloads.*: leave one"):
        load("xquad_el", data_dir)
    path.unlink()
    assert len(load("xquad_el", data_dir).eval_docs) == 3
    (data_dir / path.name).unlink()
    with pytest.raises(UserError, match=r"no xquad\.el\.json below .*leave --data_dir out to fetch it"):
        load("xquad_el", data_dir)
    with pytest.raises(UserError, match=r"no directory 'nowhere': give --data_dir"):
        load("xquad_el", "nowhere")


@pytest.mark.parametrize(
    ("name", "asked", "rows"),
    [
        ("xquad_th", ("google/xquad", "xquad.th", "validation"), None),
        ("mlqa_ar", ("facebook/mlqa", "mlqa.ar.ar", "test"), None),
        ("mgsm_te", ("juletxara/mgsm", "te", "test"), [{"question": q, "answer": None} for q, _ in PROBLEMS]),
    ],
)
def test_the_hub_gives_the_same_documents(monkeypatch, data_dir, name, asked, rows):
    def load_dataset(path, config, split):
        assert (path, config, split) == asked
        if rows:
            answers = (2125, 3)
            return datasets.Dataset.from_list(
                [{**row, "answer_number": answer} for row, answer in zip(rows, answers)]
            )
        texts = lambda answers: {"text": answers, "answer_start": [0] * len(answers)}
        questions = [(context, *question) for context, questions in PARAGRAPHS for question in questions]
        return datasets.Dataset.from_list(
            [
                {"id": str(i), "context": context, "question": question, "answers": texts(answers)}
                for i, (context, question, answers) in enumerate(questions)
            ]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load(name, None).eval_docs.to_list() == load(name, data_dir).eval_docs.to_list()


def test_the_hub_gives_indicqa_as_files(monkeypatch, data_dir):
    def hf_hub_download(repository, path, repo_type):
        assert (repository, path, repo_type) == ("ai4bharat/IndicQA", "data/indicqa.ml.json", "dataset")
        return str(next(data_dir.rglob("indicqa.ml.json")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert load("indicqa_ml", None).eval_docs.to_list() == load("indicqa_ml", data_dir).eval_docs.to_list()


@pytest.mark.parametrize("name", ["xquad_ar", "mlqa_ar", "indicqa_ta", "mgsm_th"])
def test_without_the_hub_it_says_which_file_it_wants(name):
    # HF_HUB_OFFLINE is set for all tests
    wanted = rf"cannot be fetched from the hub .*give --data_dir=DIR, .*{re.escape(file_name(name))}"
    with pytest.raises(UserError, match=wanted):
        load(name, None)


def test_a_language_without_words_is_told_so(data_dir):
    next(data_dir.rglob("xquad.el.json")).rename(data_dir / "xquad.de.json")
    with pytest.raises(UserError, match=r"no words for background, question, answer in 'de': give them in"):
        documents.xquad("de", str(data_dir))
    some = {"background": "B:", "question": "Q:"}
    with pytest.raises(UserError, match=r"no words for answer in 'de'"):
        documents.xquad("de", str(data_dir), words=some)
    (data_dir / "words.json").write_text(json.dumps({"de": some | {"answer": "A:"}, "fr": {}}))
    path = str(data_dir / "words.json")
    (words,) = {
        tuple(row.items())
        for row in documents.xquad("de", str(data_dir), words_file=path, words={"answer": "C:"})["test"][
            "words"
        ]
    }
    assert dict(words) == some | {"answer": "C:"}
    for broken in ("[" * 9, "[]", '{"de": 3}'):
        (data_dir / "words.json").write_text(broken)
        with pytest.raises(UserError, match=r"--words=.*words.json cannot be read"):
            documents.xquad("de", str(data_dir), words_file=path)


@pytest.mark.slow
def test_torch_is_not_imported(data_dir):
    code = """
import sys
from lm_eval.evaluator import evaluate
from tests.evaluation.test_tasks import Scripted, manager
task_dict = manager(sys.argv[1]).load(["xquad_th", "mgsm_th"])
class Same(dict):
    __missing__ = lambda self, prompt: "ตอบ 3"
evaluate(Scripted(Same()), task_dict=task_dict, bootstrap_iters=1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(data_dir)], check=True, cwd=Path(__file__).parents[2])
