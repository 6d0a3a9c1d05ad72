"""The built-in corpus: complete, aligned, and without templates."""

import itertools
import json
import re
from collections import Counter

import pytest

from prom_jax.data.sources import SAMPLE, read_instructions, read_parallel

FILES = sorted(SAMPLE.glob("*.jsonl"))
SCRIPT = {"en": r"[A-Za-z]", "sw": r"[A-Za-z]", "th": r"[\u0e00-\u0e7f]"}


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def units(text, language):
    """Words; for Thai, which has no spaces, characters."""
    return list(text) if language == "th" else re.findall(r"\w+", text.lower())


def trigrams(texts, language):
    return Counter(gram for text in texts for gram in zip(*(units(text, language)[i:] for i in range(3))))


def test_sizes():
    assert len(read_instructions(("sample",), "en")) >= 250
    assert len(read_instructions(("sample",), "sw")) >= 250
    assert len(read_parallel(("sample",), "sw")) >= 300
    assert len(read_instructions(("sample",), "th")) >= 60
    assert len(read_parallel(("sample",), "th")) >= 60


def test_every_row_has_its_english():
    ids = {row["id"] for row in rows(SAMPLE / "instructions.en.jsonl")}
    for language in ("sw", "th"):
        own = [row["id"] for row in rows(SAMPLE / f"instructions.{language}.jsonl")]
        assert len(set(own)) == len(own) and ids.issuperset(own)
    english = {row["id"]: row["en"] for row in rows(SAMPLE / "translations.sw.jsonl")}
    assert all(english[row["id"]] == row["en"] for row in rows(SAMPLE / "translations.th.jsonl"))


def test_inputs_agree():
    english = {row["id"]: row for row in rows(SAMPLE / "instructions.en.jsonl")}
    for language in ("sw", "th"):
        for row in rows(SAMPLE / f"instructions.{language}.jsonl"):
            assert bool(row["input"]) == bool(english[row["id"]]["input"]), row["id"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_texts_are_in_their_language_and_not_twice(path):
    language = path.name.split(".")[1]
    for key in ("instruction", "output", language):
        texts = [row[key] for row in rows(path) if key in row]
        assert len(set(texts)) == len(texts) or key == "output"
        assert all(text == text.strip() and text for text in texts)
        for text in texts:
            if key != "output":  # an output may be code or a number
                assert re.search(SCRIPT[language], text), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_two_rows_share_a_template(path):
    """No two begin alike, and no two are made of mostly the same words."""
    language = path.name.split(".")[1]
    texts = [row.get("instruction", row.get(language)) for row in rows(path)]
    opening = 12 if language == "th" else 3 if "translations" in path.name else 4
    openings = Counter(tuple(units(text, language)[:opening]) for text in texts)
    assert openings.most_common(1)[0][1] == 1, openings.most_common(3)
    if language != "th":
        sets = [set(units(text, language)) for text in texts]
        for a, b in itertools.combinations(sets, 2):
            assert len(a & b) < 0.7 * min(len(a), len(b)) or min(len(a), len(b)) < 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_trigrams_are_varied(path):
    language = path.name.split(".")[1]
    texts = [row.get("output", row.get(language)) for row in rows(path)]
    counts = trigrams(texts, language)
    distinct = len(counts) / counts.total()
    print(f"{path.name}: {len(texts)} rows, {counts.total()} trigrams, {distinct:.1%} distinct")
    assert distinct > (0.4 if language == "th" else 0.9)
