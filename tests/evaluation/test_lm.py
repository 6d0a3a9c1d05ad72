"""Our model in the harness against the harness's own, which computes with torch."""

import json
import random

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import prom_jax
from prom_jax.evaluation import harness
from prom_jax.evaluation.answers import Answers
from prom_jax.evaluation.lm import HarnessModel
from prom_jax.utils.errors import UserError
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def ours(tiny):
    return HarnessModel(*prom_jax.load(tiny / "model"), slots=2048)


@pytest.fixture(scope="module")
def theirs(tiny):
    return HFLM(pretrained=str(tiny / "model"), dtype=torch.float32, batch_size=4, device="cpu")


def asked(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=i, metadata=("t", i, 1))
        for i, argument in enumerate(arguments)
    ]


chance = random.Random(0)
text = lambda number, language="sw": " ".join(chance.choices(WORDS[language], k=number))


def tasks(folder):
    """Two tasks in the harness's own format over local files: multiple choice and perplexity."""
    rows = [
        {
            "context": text(30),
            "choices": [text(1), text(4), text(1), "the"],
            "gold": number % 4,
        }
        for number in range(6)
    ]
    # The last is longer than the context.
    pages = [{"page": text(number)} for number in (1, 50, 600)]
    for name, lines in (("choice", rows), ("pages", pages)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {}/{}.jsonl}}}}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        "task: choice\noutput_type: multiple_choice\n" + data.format(folder, "choice") + "doc_to_text: "
        "'{{context}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "pages.yaml").write_text(
        "task: pages\noutput_type: loglikelihood_rolling\n"
        + data.format(folder, "pages")
        + "doc_to_text: ''\n"
        "doc_to_target: '{{page}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
    return [str(folder / "choice.yaml"), str(folder / "pages.yaml")]


@pytest.mark.slow
def test_stock_tasks_equal_the_harness_own_model(tmp_path, ours, theirs):
    loaded = harness.load_tasks(tasks(tmp_path))
    assert list(loaded) == ["choice", "pages"]
    results, samples = harness.evaluate(ours, loaded)
    expected = lm_eval.simple_evaluate(model=theirs, tasks=list(loaded.values()), bootstrap_iters=1000)
    for task in loaded:
        logged = sorted(expected["samples"][task], key=lambda entry: entry["doc_id"])
        mine = [sample for sample in samples if sample["task"] == task]
        assert len(mine) == len(logged) == results[task]["n"]
        for sample, entry in zip(mine, logged):
            numbers = [answer[0] if task == "choice" else answer for (answer,) in entry["resps"]]
            got = sample["output"] if task == "choice" else [sample["output"]]
            got = [answer[0] if task == "choice" else answer for answer in got]
            np.testing.assert_allclose(got, numbers, atol=1e-3)
    for metric in ("acc", "bits_per_byte"):
        task = "choice" if metric == "acc" else "pages"
        entry = results[task]["metrics"][metric]
        assert entry["value"] == pytest.approx(expected["results"][task][f"{metric},none"], rel=1e-5)
        error = expected["results"][task][f"{metric}_stderr,none"]
        assert entry["stderr"] == (pytest.approx(error) if isinstance(error, float) else None)
        assert entry["n"] == results[task]["n"]


def test_generation_equals_the_harness_own_model(ours, theirs):
    prompts = [text(number) for number in (1, 3, 40, 41, 2)]
    free = theirs.generate_until(asked("generate_until", *((p, {"max_gen_toks": 24}) for p in prompts)))
    # Strings that come about in the middle of answers, of one character and of several.
    stops = [[], [free[0][5]], [free[2][7:11], free[1][9:11]]]
    requests = asked(
        "generate_until",
        *((prompt, {"until": until, "max_gen_toks": 24}) for until in stops for prompt in prompts),
    )
    answers = ours.generate_until(requests)
    assert answers == theirs.generate_until(requests)
    assert len({len(answer) for answer in answers}) > 3


def test_long_prompts_lose_their_beginning(tiny, theirs, capsys):
    ours = HarnessModel(*prom_jax.load(tiny / "model"), max_length=64)
    short = HFLM(
        pretrained=str(tiny / "model"), dtype=torch.float32, device="cpu", max_length=64, truncation=True
    )
    requests = asked("generate_until", (text(60), {"max_gen_toks": 16, "until": []}))
    assert ours.generate_until(requests) == short.generate_until(requests)
    assert "1 of 1 prompts are longer than 48 tokens and cut on the left" in capsys.readouterr().out
    requests = asked("loglikelihood", (text(60), " " + text(3)), (text(2), " " + text(60)))
    pairs = zip(ours.loglikelihood(requests)[:1], short.loglikelihood(requests[:1]))
    for got, expected in pairs:
        assert got[0] == pytest.approx(expected[0], abs=1e-3)


def test_bos(tiny, byte_level):
    model, tokenizer = prom_jax.load(tiny / "model")
    tokenizer.bos_token = tokenizer.eos_token
    lm = HarnessModel(model, tokenizer, bos=True)
    assert lm.tok_encode("maji")[0] == tokenizer.bos_token_id
    assert lm.tok_encode("maji", add_special_tokens=False) == lm.tok_encode("maji")[1:]
    context, continuation = lm._encode_pair("maji", " moto")
    assert context[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in continuation
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="has no BOS token"):
        HarnessModel(model, tokenizer, bos=True)


def test_answers_are_asked_once(tmp_path, ours, monkeypatch, capsys):
    requests = asked(
        "generate_until", *((prompt, {"max_gen_toks": 4}) for prompt in ("a b", "c", "a b", "d"))
    )
    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr(ours, "answers", Answers(path, {}))
    first = ours.generate_until(requests)
    assert first[0] == first[2] and len(Answers(path, {})) == 3
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")  # as if killed after the first
    monkeypatch.setattr(ours, "answers", Answers(path, {}))
    capsys.readouterr()
    assert ours.generate_until(requests) == first
    output = capsys.readouterr().out
    assert "kept      1 of 3 answers" in output and "3 of 3" in output
    assert sorted(path.read_text().splitlines()) == sorted(lines)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 5},
        {"max_completion_tokens": 6},
        {"max_new_tokens": 7, "max_tokens": 3},
        {"do_sample": False, "temperature": 1, "top_p": 0.5, "max_gen_toks": 9},
    ],
    ids=str,
)
def test_settings_of_generation_are_read_as_by_the_harness(ours, theirs, settings):
    requests = asked("generate_until", *((prompt, settings) for prompt in ("ng'ombe", "maziwa kila")))
    answers = ours.generate_until(requests)
    assert answers == theirs.generate_until(requests) and all(answers)


@pytest.mark.parametrize(("until", "same"), [(["", "mto"], ["mto"]), ("", []), (None, [])], ids=str)
def test_an_empty_stop_string_stops_nothing(ours, until, same):
    """(The harness's own model ends every answer after a token.)"""
    answers = [
        ours.generate_until(asked("generate_until", ("maziwa kila", {"until": stops, "max_gen_toks": 9})))
        for stops in (until, same)
    ]
    assert answers[0] == answers[1] and all(answers[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "only greedy decoding"),
        ({"temperature": 0.7}, "only greedy decoding"),
        ({"num_beams": 4}, "only greedy decoding"),
        ({"do_sample": False, "repetition_penalty": 1.2}, "repetition_penalty would change the answers"),
        ({"max_gen_toks": 1024}, "leaves no token for a prompt in a context of 1024"),
    ],
)
def test_what_cannot_be_generated(ours, settings, message):
    with pytest.raises(UserError, match=message):
        ours.generate_until(asked("generate_until", ("a", settings)))


def test_tasks_that_cannot_be_had(tmp_path):
    for names, message in (
        ([" "], "--tasks is empty"),
        (["xquad_th"], "xquad.th.json"),
        ([str(tmp_path / "none.yaml")], "no YAML file"),
    ):
        with pytest.raises(UserError, match=message):
            harness.load_tasks(names, str(tmp_path))
    (tmp_path / "bad.yaml").write_text(
        "task: bad\ndataset_path: json\ndataset_kwargs: {data_files: no.json}\n"
    )
    with pytest.raises(UserError, match=r"bad.yaml' cannot be loaded \(FileNotFoundError"):
        harness.load_tasks([str(tmp_path / "bad.yaml")])
