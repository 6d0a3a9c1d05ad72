"""Which documents and runs a paired test takes, and when it is refused."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from prom_jax.analysis.comparison import clustered_bootstrap
from prom_jax.reporting.comparisons import Comparison, adjust, compare
from prom_jax.reporting.runs import read
from tests.reporting.made_up import write

TASK = "xquad_th"
BETTER, WORSE = [1] * 9 + [0] * 11, [0] * 8 + [1] * 2 + [0] * 10


@pytest.fixture
def run(tmp_path):
    def make(name, em, **settings):
        scores = {"exact_match": em, "f1": [0.5 * value + 0.1 for value in em]}
        return read(write(tmp_path / name, None, {TASK: scores}, **settings) / "results.json")

    return make


def against(first, second, metric="exact_match"):
    return compare(("A", "B"), first, second, TASK, metric)


def test_exact_match_and_f1(run):
    first, second = {0: run("a", BETTER)}, {0: run("b", WORSE)}
    result = against(first, second)
    assert (result.test, result.documents, result.seeds) == ("McNemar", 20, 1)
    assert (result.first_only, result.second_only) == (8, 1)
    assert result.p == pytest.approx(binomtest(8, 9).pvalue)
    assert result.difference == pytest.approx(100 * (9 - 2) / 20)
    half = {0: run("half", [0.5] * 20)}
    assert against(half, second).test == "bootstrap"  # where not all are 0 or 1
    f1 = against(first, second, "f1")
    assert f1.test == "bootstrap" and f1.low < f1.difference < f1.high
    assert f1.difference == pytest.approx(50 * (9 - 2) / 20)
    differences = 0.5 * (np.array(BETTER) - WORSE)
    expected = clustered_bootstrap(differences, [doc // 2 for doc in range(20)])  # made_up's paragraphs
    assert (f1.p, f1.low) == pytest.approx((expected.p, 100 * expected.low))


def test_only_documents_that_both_have(run):
    # The last ten tell against A: a comparison that took them would see it.
    result = against({0: run("a", BETTER[:10], limit=10)}, {0: run("b", WORSE[:10] + [1] * 10)})
    assert result.documents == 10 and result.difference == pytest.approx(100 * (9 - 2) / 10)


def test_a_metric_that_leaves_out_documents(run):
    first, second = run("a", BETTER), run("b", WORSE)
    for doc in range(8):
        del first.samples[TASK][doc].scores["exact_match"]
    result = against({0: first}, {0: second})
    assert (result.documents, result.first_only, result.second_only) == (12, 0, 1)


def test_several_seeds_are_a_level_of_their_own(run):
    strong, weak = run("strong", [1] * 20), run("weak", [1] * 3 + [0] * 17)
    zero = run("zero", [0] * 20)
    result = against({0: strong, 1: weak}, {0: zero, 1: zero, 2: zero})
    assert (result.seeds, result.test, result.documents) == (2, "bootstrap", 20)
    assert result.difference == pytest.approx((100 + 15) / 2)
    expected = clustered_bootstrap([[1] * 20, [1] * 3 + [0] * 17], [doc // 2 for doc in range(20)])
    assert (result.p, result.low, result.high) == pytest.approx(
        (expected.p, 100 * expected.low, 100 * expected.high)
    )
    assert result.low < 15 < 100 <= result.high  # it ranges over what the seeds are
    # A base model has no seed, and is set against each.
    assert against({0: strong, 1: weak}, {None: zero}) == result
    assert against({0: strong, 1: zero}, {0: zero, 1: strong}).p == 1  # opposite signs


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bos": True}, "bos: False and True"), ({"compute_dtype": "bfloat16"}, "compute_dtype: float32 and")],
)
def test_other_settings_are_refused(run, settings, message):
    result = against({0: run("a", BETTER)}, {0: run("b", WORSE, **settings)})
    assert message in result.refused and result.p is None


def test_what_cannot_be_paired_is_refused(run, tmp_path):
    first, second = run("a", BETTER), run("b", WORSE)
    assert "no seed in common: 0 and 1" in against({0: first}, {1: second}).refused
    assert "no document in common" in against({0: first}, {0: second}, "accuracy").refused
    path = tmp_path / "b" / "samples.jsonl"
    text = path.read_text(encoding="utf-8")
    for content, message in (
        (text.replace("<b>3</b>", "<b>other</b>"), "1 documents ask different things"),
        (text.replace('"exact_match": 1', '"exact_match": NaN'), "not numbers"),
        (text.replace('"exact_match": 1', '"exact_match": [1, 2]'), "not numbers"),
        (text.replace('"exact_match": 1', f'"exact_match": {10**400}'), "not numbers"),
        (text.replace('"scores": {', '"scores": 3, "more": {'), "samples.jsonl cannot be read"),
        (text.replace('"doc_id": 3', '"doc_id": [3]'), "samples.jsonl cannot be read"),
        ("[" * 100_000, "samples.jsonl cannot be read"),
        (text[:-20], "samples.jsonl cannot be read"),
    ):
        path.write_text(content, encoding="utf-8")
        assert message in against({0: first}, {0: read(tmp_path / "b" / "results.json")}).refused
    path.unlink()
    again = against({0: first}, {0: read(tmp_path / "b" / "results.json")})
    assert "samples.jsonl cannot be read" in again.refused


def test_line_separators_inside_an_answer(run, tmp_path):
    run("a", BETTER)
    path = tmp_path / "a" / "samples.jsonl"
    rows = [json.loads(line) | {"output": "one\u2028two\x85three"} for line in path.open(encoding="utf-8")]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert len(read(tmp_path / "a" / "results.json").samples[TASK]) == 20


def test_holm_is_over_what_was_compared():
    made = [Comparison("A", "B", TASK, "f1", difference=sign, p=p) for sign, p in ((1.0, 0.02), (-1.0, 0.03))]
    refused = Comparison("A", "B", TASK, "f1", refused="no document in common")
    adjusted = adjust([made[0], refused, made[1]])
    np.testing.assert_allclose([adjusted[0].adjusted, adjusted[2].adjusted], [0.04, 0.04])
    assert adjusted[1] == refused
    assert [comparison.verdict for comparison in adjusted] == [1, 0, -1]
    assert adjust([Comparison("A", "B", TASK, "f1", difference=1.0, p=0.06)])[0].verdict == 0
