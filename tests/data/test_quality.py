"""What is said of data that are given wrong: the wrong file, a shuffled one, the same twice."""

import itertools
import json
from pathlib import Path

import pytest

from prom_jax.data.examples import Example, Recipe
from prom_jax.data.quality import SAMPLE as MOST
from prom_jax.data.quality import Look, Sample, warnings
from prom_jax.data.records import prepare
from prom_jax.data.rows import Turn
from prom_jax.data.templates import Dialogue, Plain
from prom_jax.data.translation.checks import flaw

SAMPLE = Path("prom_jax/resources/sample")


def rows(name):
    return [json.loads(line) for line in (SAMPLE / f"instructions.{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def checks(byte_level, tmp_path, jsonl):
    """What is found in instruction pairs of the sample corpus."""

    def found(target, english=None, language="sw", **changes):
        sides = {
            "english": (jsonl("en.jsonl", english or rows("en")),),
            "target": (jsonl("t.jsonl", target),),
        }
        recipe = Recipe(language, **sides, seq_len=512, **changes)
        return prepare(recipe, byte_level, tmp_path / "records").report["checks"]

    return found


def test_good_data_have_no_warning(checks):
    assert not [*warnings(checks(rows("sw"), holdout=10))]


def test_the_english_file_as_target_is_noticed(checks):
    found = checks(rows("en"))["target"]["other language"]
    assert found["rows"] > 0.3 * found["of"] and len(found["examples"]) == 3
    (sentence, *_) = warnings(checks(rows("en"), language="th"))
    assert sentence.startswith("100.0% of 312 texts of target are not in the language, such as '")


def test_shuffled_rows_are_noticed(checks):
    ids = [{"id": row["id"]} for row in rows("sw")]
    numbered = [row | {"output": f"{row['output']} {i}"} for i, row in enumerate(rows("sw"))]
    english = [row | {"output": f"{row['output']} {i}"} for i, row in enumerate(rows("en"))]
    found = checks(numbered, english)
    assert found["target"]["numbers"]["rows"] < 10  # hours, which Swahili counts from six o'clock
    assert not [*warnings(found)]
    moved = [row | ids[i - 1] for i, row in enumerate(numbered)]
    assert any("other numbers" in sentence for sentence in warnings(checks(moved, english)))


def test_duplicates_and_odd_characters():
    once, again = Dialogue((Turn("a", "", "b"),)), Dialogue((Turn("c", "", "b"),))
    asked = [Dialogue((Turn(request, "Good", "Nzuri"),)) for request in ("Translate.", "Into Swahili!")]
    texts = {
        "target": [once, again, once],
        "translation": asked,
        "text": [Plain("cafe\u0301"), Plain("ku\u200dna")],
    }
    look = Look(Recipe("sw", ("t",)), [Example("", "target", {"target": again})])
    for role, of_role in texts.items():
        for text in of_role:
            look.at(Example("", role, {"target": text}))
    found = look.found()
    assert found["target"]["duplicate"] == {"rows": 1, "of": 3, "examples": ["b"]}
    assert found["target"]["held out too"]["rows"] == 1
    assert found["translation"]["duplicate"]["rows"] == 1
    assert {name: check["rows"] for name, check in found["text"].items()} == {"not NFC": 1, "invisible": 1}
    assert any("in the held-out examples too" in sentence for sentence in warnings(found))


@pytest.mark.parametrize("number", [0, 1, MOST, MOST + 1, 5 * MOST + 3])
def test_a_sample_is_spread_evenly(number):
    sample = Sample()
    for i in range(number):
        sample.add(i)
    assert len(sample.taken) == number if number <= MOST else MOST // 2 < len(sample.taken) <= MOST
    steps = {after - before for before, after in itertools.pairwise(sample.taken)}
    assert len(steps) <= 1 and (not number or sample.taken[0] == 0)


@pytest.mark.parametrize(
    ("english", "target"),
    [("It is 3½ m.", "Ni m 3½."), ("x² + 1", "x2 + 1"), ("H2O is wet.", "H₂O ni maji.")],
)
def test_numbers_in_other_characters_are_no_mistakes(english, target):
    assert flaw(english, target, "sw") != "numbers"
