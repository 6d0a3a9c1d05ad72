"""Tables of made-up runs against cells computed by hand."""

import collections
import json

import pytest

from prom_jax.report import PAPER
from prom_jax.reporting import runs as evaluations
from prom_jax.reporting.tables import OF_TABLE, Cell, Value, outcome, sections
from prom_jax.utils.errors import UserError
from tests.reporting.made_up import PIVOT, prom, training, write

QA = [
    "XQuAD th",
    "XQuAD ar",
    "XQuAD el",
    "MLQA ar",
    "IndicQA ta",
    "IndicQA mr",
    "IndicQA ml",
    "average",
]
ROWS = ("base", "bactrian", "xllama2", "unregulated", "prom")
BASE, BACTRIAN, XLLAMA2, UNREGULATED, PROM = (evaluations.METHODS[row] for row in ROWS)


@pytest.fixture
def paper():
    return json.loads(PAPER.read_text(encoding="utf-8"))


@pytest.fixture
def report(tmp_path, paper):
    """Evaluations, written with `add`; `make` gives the tables by base model and key, and the notes."""

    class Report:
        def add(self, trained, tasks, name=None, **more):
            scores = {task: dict(zip(metrics(task), values)) for task, values in tasks.items()}
            number = len(list(tmp_path.iterdir()))
            return write(tmp_path / (name or f"{number:02}"), trained, scores, **more)

        def make(self):
            runs, notes = evaluations.find(tmp_path)
            found, left_out = sections(runs, paper)
            return {s.base: {table.key: table for table in s.tables} for s in found}, notes + left_out

        def tables(self):
            (tables,) = self.make()[0].values()
            return tables

    return Report()


def metrics(task):
    return OF_TABLE["mgsm" if task.startswith("mgsm") else "qa"]


def cell(table, row, column):
    labels = [entry.label for entry in table.columns]
    return dict(table.rows)[row][labels.index(column)]


def qa(em, f1=None):
    """EM as so many of 10 documents, F1 as that value."""
    return [1] * em + [0] * (10 - em), [em / 10 if f1 is None else f1] * 10


def test_rivals_and_controls_have_a_row_where_they_were_evaluated(report):
    report.add(prom("th"), {"xquad_th": qa(3)})
    assert [row for row, _ in report.tables()["qa"].rows] == [BASE, BACTRIAN, XLLAMA2, UNREGULATED, PROM]
    shuffled = prom("th") | {"method": "shuffled"}  # the same pivot as PROM's: it is no other run of that
    report.add(shuffled, {"xquad_th": qa(2)})
    report.add(training("pcgrad", "th"), {"xquad_th": qa(1)})
    tables = report.tables()
    labels = [evaluations.METHODS[name] for name in ("pcgrad", "shuffled")]
    assert [cell(tables["qa"], row, "XQuAD th").values[0].ours for row in (PROM, *labels)] == [30, 10, 20]
    assert not set(labels) & {row for row, _ in tables["mgsm"].rows}


def test_cells_by_hand(report):
    report.add(None, {"xquad_th": qa(1, 0.2), "mgsm_sw": [[1, 0, 0, 0]]})
    report.add(prom("th", seed=0), {"xquad_th": qa(3, 0.4)})
    report.add(prom("th", seed=1), {"xquad_th": qa(5, 0.4)})
    report.add(training("prom", "ar"), {"xquad_ar": qa(2), "mlqa_ar": qa(4)})
    tables = report.tables()
    table = tables["qa"]
    assert [column.label for column in table.columns] == QA
    thai = cell(table, PROM, "XQuAD th")
    em, f1 = thai.values
    assert (em.ours, em.spread, em.paper) == pytest.approx((40, 2**0.5 * 10, 10.7))
    assert (f1.ours, f1.spread, f1.paper) == pytest.approx((40, 0, 22.5))
    assert (thai.seeds, thai.documents, thai.zeroed, thai.paper_zeroed) == (2, 10, False, False)
    arabic = cell(table, PROM, "MLQA ar")
    assert (arabic.values[0].ours, arabic.values[0].spread) == (40, None)
    assert (arabic.zeroed, arabic.paper_zeroed) == (True, True)
    assert cell(table, BASE, "XQuAD th").values == (Value(10, None, 1.6), Value(20, None, 9.8))
    assert cell(table, BASE, "XQuAD el").values == (Value(paper=1.8), Value(paper=11.4))
    assert cell(tables["mgsm"], BASE, "MGSM sw").values == (Value(25, None, 2.4),)


def test_leaving_out_a_regulation_that_kept_lambda_changes_nothing(report):
    report.add(prom("th"), {"xquad_th": qa(3)})
    report.add(training("prom", "ar"), {"xquad_ar": qa(2)})
    report.add(prom("el"), {"xquad_el": qa(4)})
    report.add(prom("el", regulate="never"), {"xquad_el": qa(5)})
    table = report.tables()["qa"]
    thai = cell(table, UNREGULATED, "XQuAD th")
    assert thai.borrowed and thai.values[0].ours == 30
    assert cell(table, UNREGULATED, "XQuAD ar").values[0].ours is None
    own = cell(table, UNREGULATED, "XQuAD el")
    assert not own.borrowed and own.values[0].ours == 50
    assert not [c for c in table.comparisons if c.first == UNREGULATED and c.task == "xquad_th"]


def test_averages_are_of_complete_rows(report):
    tasks = ("mgsm_sw", "mgsm_th", "mgsm_bn", "mgsm_te")
    for method, seeds in (("xllama2", (0, 1)), ("bactrian", (0,))):
        for number, task in enumerate(tasks[: len(tasks) - (method == "bactrian")]):
            for seed in seeds:
                right = number + 2 * seed
                report.add(training(method, task[-2:], seed), {task: [[1] * right + [0] * (10 - right)]})
    table = report.tables()["mgsm"]
    average = cell(table, XLLAMA2, "average").values[0]
    # Seeds: 0 10 20 30 and 20 30 40 50.
    assert (average.ours, average.spread, average.paper) == pytest.approx((25, 2**0.5 * 10, 3.2))
    assert cell(table, BACTRIAN, "average").values == (Value(),)


def test_significance_and_wins(report):
    good, bad = [[1] * 30 + [0] * 10], [[0] * 40]
    for language, ours, theirs in (("sw", good, bad), ("th", bad, bad), ("bn", bad, good)):
        report.add(prom(language), {f"mgsm_{language}": ours})
        report.add(training("xllama2", language), {f"mgsm_{language}": theirs})
    for language, ours, theirs in (("el", qa(1, 0.5), qa(2, 0.3)), ("mr", qa(1, 0.5), qa(1, 0.3))):
        task = {"el": "xquad_el", "mr": "indicqa_mr"}[language]
        report.add(prom(language), {task: ours}, paragraph=1)
        report.add(training("xllama2", language), {task: theirs}, paragraph=1)
    tables = report.tables()
    mgsm = tables["mgsm"]
    assert [cell(mgsm, PROM, f"MGSM {x}").values[0].verdicts for x in ("sw", "th", "bn")] == [
        {"xllama2": 1},
        {},
        {"xllama2": -1},
    ]
    wins = tables["wins"]
    counts = {c.label: cells.values[0].ours for c, cells in zip(wins.columns, dict(wins.rows)[PROM])}
    assert counts == {
        "won": 2, "lost": 1, "tied": 1, "mixed": 1, "of 11": 5,
        "significantly better": 3, "significantly worse": 1,
    }  # fmt: skip
    assert cell(wins, PROM, "won").values[0].paper == 9
    assert cell(wins, BACTRIAN, "won").values[0].ours is None


def test_the_rule_of_wins_on_the_papers_own_tables(paper):
    counts = collections.Counter()
    for task in paper["tasks"]:
        prom_, other = (
            Cell(tuple(Value(paper["results"][method][task][metric]) for metric in metrics(task)))
            for method in ("prom", "xllama2")
        )
        counts.update(outcome(prom_, other))
    assert counts == {"compared": 11, "won": 8, "tied": 1, "mixed": 2}


def test_the_papers_averages_are_those_of_its_cells(paper):
    for method, results in paper["results"].items():
        for metric, average in results.get("average", {}).items():
            values = [results[task][metric] for task in paper["tasks"] if metric in metrics(task)]
            assert sum(values) / len(values) == pytest.approx(average, abs=0.0501), (method, metric)


def test_ablation(report):
    tasks = {"xquad_th": qa(3), "mgsm_th": [[1, 0, 0, 0]]}
    report.add(prom("th"), tasks)
    report.add(prom("th", regulate="never", **{"pivot.weight": 0.5}), {"xquad_th": qa(6)})
    report.add(prom("th", regulate="never", **{"pivot.layer": 20}), {"xquad_th": qa(7)})
    report.add(training("bactrian", "th"), {"xquad_th": qa(2)})
    tables = report.tables()
    table = tables["ablation_th"]
    assert [column.label for column in table.columns] == ["MGSM th", "XQuAD th"]
    values = {row: [value for entry in cells for value in entry.values] for row, cells in table.rows}
    ours = {row: [value.ours and round(value.ours, 9) for value in entry] for row, entry in values.items()}
    papers = {row: [value.paper for value in entry] for row, entry in values.items()}
    assert ours["n = 24, α = 0.1, λ = 0.1"] == [25, 30, 30]
    assert papers["n = 24, α = 0.1, λ = 0.1"] == [4.4, 10.7, 22.5]
    assert ours["n = 24, α = 0.1, λ = 0.5"] == [None, 60, 60]
    assert papers["n = 24, α = 0.1, λ = 0.5"] == [2.8, 8.2, 21.1]
    assert (ours["n = 20, α = 0.1, λ = 0.1"][1], papers["n = 20, α = 0.1, λ = 0.1"][1]) == (70, None)
    assert ours["Bactrian+(t): λ = 0"] == [None, 20, 20]
    assert {c.second for c in table.comparisons} == {"n = 24, α = 0.1, λ = 0.1"}
    # None of the ablation's runs is taken for PROM, or for PROM without regulation.
    assert cell(tables["qa"], PROM, "XQuAD th").values[0].ours == 30
    assert cell(tables["qa"], UNREGULATED, "XQuAD th").values[0].ours == 30


def test_base_models_share_no_cell(report):
    report.add(prom("th"), {"xquad_th": qa(3)})
    for seed in (0, 1):
        small = training("prom", "th", seed, base="small/") | PIVOT
        report.add(small | {"pivot.layer": 22}, {"xquad_th": qa(5)})
    report.add(small | {"pivot.layer": 20}, {"xquad_th": qa(7)})
    report.add(None, {"xquad_th": qa(1)}, source="/models/small")  # exports name no folder
    by_base, _ = report.make()
    assert list(by_base) == ["meta-llama/Llama-2-7b-hf", "small"]
    assert cell(by_base["small"]["qa"], PROM, "XQuAD th").values[0].ours == 50
    assert cell(by_base["small"]["qa"], BASE, "XQuAD th").values[0].ours == 10
    assert by_base["small"]["qa"].notes == ["PROM here is n = 22, α = 0.1, λ = 0.1."]
    rows = [row for row, _ in by_base["small"]["ablation_th"].rows]  # without the settings of another model
    assert rows == ["Bactrian+(t): λ = 0", "n = 20, α = 0.1, λ = 0.1", "n = 22, α = 0.1, λ = 0.1"]


def test_one_place_is_one_evaluation(report):
    first = report.add(prom("th"), {"xquad_th": qa(3)}, name="first")
    report.add(prom("th"), {"xquad_th": ([1] * 4, [1] * 4)}, name="limited", limit=4)
    tables = report.tables()
    assert cell(tables["qa"], PROM, "XQuAD th").values[0].ours == 30
    assert "limited: xquad_th is left out (4 documents" in "".join(report.make()[1])

    second = report.add(prom("th"), {"xquad_th": qa(3)}, name="second")
    with pytest.raises(
        UserError, match=r"first and .*second are both PROM on xquad_th, seed 0, and differ in"
    ):
        report.make()
    path = second / "results.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(second), str(first)), encoding="utf-8")
    assert "the same evaluation as" in "".join(report.make()[1])
    path.write_text(path.read_text(encoding="utf-8").replace('"bos": false', '"bos": true'), encoding="utf-8")
    with pytest.raises(UserError, match="differ in bos: False and True: move one"):
        report.make()


def test_what_has_no_place_is_told(report, tmp_path):
    report.add(prom("th"), {"xquad_ar": qa(3), "xquad_th": qa(2)})
    folder = report.add(None, {"xquad_th": qa(2)}, name="nan")
    path = folder / "results.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"value": 0.2', '"value": NaN', 1))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"model": ')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"results": {}}')
    by_base, notes = report.make()
    (tables,) = by_base.values()
    assert cell(tables["qa"], PROM, "XQuAD ar").values[0].ours is None
    em, f1 = cell(tables["qa"], BASE, "XQuAD th").values
    assert em.ours is None and f1.ours == 20
    told = "\n".join(notes)
    for part in (
        "xquad_ar is in no table, as the model is adapted to 'th'",
        "nan: exact_match of xquad_th is not a number",
        "broken/results.json is left out",
        "other/results.json is left out: not a results.json of prom_jax.evaluate (KeyError: 'model')",
    ):
        assert part in told
