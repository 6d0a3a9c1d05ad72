"""Tables of made-up runs against cells computed by hand."""

import collections
import json
from pathlib import Path

import pytest

from prom_jax.report import PAPER
from prom_jax.reporting import runs as evaluations
from prom_jax.reporting.cells import Cell, Value
from prom_jax.reporting.tables import OF_TABLE, outcome, sections
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
            return self.write(trained, scores, name, **more)

        def write(self, trained, scores, name=None, **more):
            number = len(list(tmp_path.iterdir()))
            return write(tmp_path / (name or f"{number:02}"), trained, scores, **more)

        def make(self, *reference):
            runs, notes = evaluations.find(tmp_path)
            found, left_out = sections(runs, paper, *reference)
            return {s.base: {table.key: table for table in s.tables} for s in found}, notes + left_out

        def tables(self):
            (tables,) = self.make()[0].values()
            return tables

    return Report()


def metrics(task):
    return OF_TABLE["mgsm" if task.startswith("mgsm") else "qa"]


def cell(table, row, column):
    labels = [entry.label for entry in table.columns]
    return cells(table)[row][labels.index(column)]


def cells(table):
    return {row.label: row.cells for row in table.rows}


def qa(em, f1=None):
    """EM as so many of 10 documents, F1 as that value."""
    return [1] * em + [0] * (10 - em), [em / 10 if f1 is None else f1] * 10


def test_rivals_and_controls_have_a_row_where_they_were_evaluated(report):
    report.add(prom("th"), {"xquad_th": qa(3)})
    assert [row.label for row in report.tables()["qa"].rows] == [BASE, BACTRIAN, XLLAMA2, UNREGULATED, PROM]
    shuffled = prom("th") | {"method": "shuffled"}  # the same pivot as PROM's: it is no other run of that
    report.add(shuffled, {"xquad_th": qa(2)})
    report.add(training("pcgrad", "th"), {"xquad_th": qa(1)})
    tables = report.tables()
    labels = [evaluations.METHODS[name] for name in ("pcgrad", "shuffled")]
    assert [cell(tables["qa"], row, "XQuAD th").values[0].ours for row in (PROM, *labels)] == [30, 10, 20]
    assert not set(labels) & {row.label for row in tables["mgsm"].rows}


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
    counts = {c.label: one.values[0].ours for c, one in zip(wins.columns, cells(wins)[PROM])}
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
    values = {
        row: [value for entry in found for value in entry.values] for row, found in cells(table).items()
    }
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
    rows = [
        row.label for row in by_base["small"]["ablation_th"].rows
    ]  # without the settings of another model
    assert rows == ["Bactrian+(t): λ = 0", "n = 20, α = 0.1, λ = 0.1", "n = 22, α = 0.1, λ = 0.1"]


def test_one_place_is_one_evaluation(report):
    first = report.add(prom("th"), {"xquad_th": qa(3)}, name="first")
    report.add(prom("th"), {"xquad_th": ([1] * 4, [1] * 4)}, name="limited", limit=4)
    tables = report.tables()
    assert cell(tables["qa"], PROM, "XQuAD th").values[0].ours == 30
    assert "limited: xquad_th is left out (4 documents" in "".join(report.make()[1])

    second = report.add(prom("th"), {"xquad_th": qa(3)}, name="second")
    by_base, notes = report.make()
    (tables,) = by_base.values()
    assert cell(tables["qa"], PROM, "XQuAD th").values[0].ours is None
    claim = (
        "first and second claim one cell of the paper's tables, PROM on xquad_th, seed 0, and neither has it"
    )
    assert claim in "".join(notes)
    settings = [column.label for column in tables["language_th"].columns]
    assert settings == ["PROM in first", "PROM in limited", "PROM in second"]
    path = second / "results.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(second), str(first)), encoding="utf-8")
    assert "the same evaluation as" in "".join(report.make()[1])
    path.write_text(path.read_text(encoding="utf-8").replace('"bos": false', '"bos": true'), encoding="utf-8")
    assert "differ in bos: False and True: move one" in "".join(report.make()[1])


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
        "xquad_ar is in none of the paper's tables, as the model is adapted to 'th'",
        "nan: exact_match of xquad_th is not a number",
        "broken/results.json is left out",
        "other/results.json is left out: not a results.json of prom_jax.evaluate (KeyError: 'model')",
    ):
        assert part in told


# A table for each language.


def values(table):
    """Numbers and marks by row and column."""
    return {
        (row.label, row.detail, column.label): (
            None if cell.values[0].ours is None else round(cell.values[0].ours, 9),
            cell.values[0].verdicts,
        )
        for row in table.rows
        for column, cell in zip(table.columns, row.cells)
    }


def test_a_language_that_the_paper_has_not(report):
    right, wrong = [[1] * 30 + [0] * 10], [[0] * 40]
    mixed = {"acc": right[0], "bits_per_byte": [1.5] * 40}
    plain = {"acc": wrong[0], "bits_per_byte": [2.5] * 40}
    report.write(
        training("prom", "es", 0, "small"), {"own_es": mixed}, higher_is_better={"bits_per_byte": False}
    )
    report.write(None, {"own_es": plain, "arc": {"acc": right[0]}}, source="small", paragraph=1,
                 higher_is_better={"bits_per_byte": False})  # fmt: skip
    tables = report.tables()
    assert set(tables) == {"language_es", "base"}  # none of the paper's
    table = tables["language_es"]
    assert table.title == "Spanish (es)" and not table.is_papers
    better = {BASE: 1}
    assert values(table) == {
        ("own_es", "acc, %", BASE): (0, {}),
        ("own_es", "acc, %", PROM): (75, better),
        ("own_es", "bits_per_byte", BASE): (2.5, {}),
        ("own_es", "bits_per_byte", PROM): (1.5, better),  # lower is better
    }
    assert [comparison.test for comparison in table.comparisons] == ["McNemar", "bootstrap"]
    assert [comparison.adjusted / comparison.p for comparison in table.comparisons] == pytest.approx(
        [2, 1]
    )  # Holm of two
    assert list(values(tables["base"])) == [("arc", "acc, %", BASE)]


def test_settings_are_told_apart_by_what_differs(report):
    for seed in (0, 1):
        report.add(prom("th", seed, **{"pivot.layer": 20}), {"xquad_th": qa(3 + seed)})
    report.add(prom("th"), {"xquad_th": qa(6)})
    report.add(prom("th"), {"xquad_th": qa(7)}, num_fewshot=2)
    report.add(None, {"xquad_th": qa(1)})
    table = report.tables()["language_th"]
    labels = [column.label for column in table.columns]
    assert labels == [
        BASE,
        "PROM (pivot.layer 20)",
        "PROM (pivot.layer 24)",
        "PROM (num_fewshot 2, pivot.layer 24)",
    ]
    assert [column.seeds for column in table.columns] == ["", "2 seeds", "", ""]
    assert [row.cells[1].values[0].ours for row in table.rows] == pytest.approx([35, 35])
    refused = [comparison.first for comparison in table.comparisons if comparison.refused]
    assert set(refused) == {labels[3]}  # the base model was asked without examples


def test_another_reference(report):
    report.add(training("bactrian", "th"), {"xquad_th": qa(2)}, name="b")
    report.add(prom("th"), {"xquad_th": qa(7)}, name="deep/p")
    for reference, tested in (("base", []), ("bactrian", [PROM]), ("b", [PROM]), ("deep/p", [BACTRIAN])):
        by_base, notes = report.make(reference)
        (tables,) = by_base.values()
        assert {c.first for c in tables["language_th"].comparisons} == set(tested)
        assert ("nothing is tested" in "".join(notes)) == (reference == "base")
    with pytest.raises(UserError, match="--reference=other: expected one of the methods bactrian, prom, or"):
        report.make("other")


def test_answers_to_read(report, tmp_path):
    for name, trained in (("base", None), ("adapted", training("prom", "th"))):
        folder = report.add(trained, {"xquad_th": qa(3)}, name=name)
        path = folder / "samples.jsonl"
        rows = [json.loads(line) | {"output": f"{name} {n}"} for n, line in enumerate(path.open())]
        path.write_text("\n".join(map(json.dumps, rows)))
    examples = report.tables()["language_th"].examples
    assert [example.document for example in examples] == [0, 4, 8]
    assert examples[1].answers == [(BASE, "base 4"), (PROM, "adapted 4")]
    assert examples[1].asked.prompt == "xquad_th <b>4</b>" and examples[1].asked.golds == ["x"]


def test_one_report_from_any_folder(report, tmp_path, monkeypatch):
    """Files call the base model by a path that is one from some folders alone."""
    report.add(prom("th") | {"base_model": "small"}, {"xquad_th": qa(3)}, name="adapted")
    report.add(None, {"xquad_th": qa(1)}, name="base", source="hf/small")
    (tmp_path / "hf" / "small").mkdir(parents=True)
    found = []
    for folder in (tmp_path, Path(__file__).parent):
        monkeypatch.chdir(folder)
        found.append(report.make())
        assert list(found[-1][0]) == ["small"]
    assert found[0] == found[1]
    names = evaluations.base_names
    assert names({"a/x", "b/x"}) == {"a/x": "a/x", "b/x": "b/x"}  # ids of the hub
    assert names({"a/x", "x", "/m/x/"}) == dict.fromkeys(("a/x", "x", "/m/x/"), "x")
    assert names({"../a/x.gguf", "a/x.gguf"}) == dict.fromkeys(("../a/x.gguf", "a/x.gguf"), "x.gguf")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[" * 100_000,
        lambda text: text.replace('"seed": 0', '"seed": {}'),
        lambda text: text.replace('"language": "th"', '"language": "../../th"'),
        lambda text: text.replace('"pivot.layer": 24', '"pivot.layer": "24"'),
        lambda text: text.replace('"n": 10, "metrics"', '"n": "10", "metrics"'),
        lambda text: text.replace('"metrics": {', '"metrics": {"x": 3, '),
    ],
)
def test_damaged_files_are_named(report, damage):
    report.add(None, {"xquad_th": qa(1)}, name="whole")
    path = report.add(prom("th"), {"xquad_th": qa(3)}, name="damaged") / "results.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    _, notes = report.make()
    assert [note for note in notes if note.startswith("damaged/results.json is left out: not a results.json")]
