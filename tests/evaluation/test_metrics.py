"""Scores of hand-made answers, worked out with pencil and paper from the rules of SQuAD 1.1 and MLQA."""

import unicodedata
from decimal import Decimal
from functools import partial

import pytest

from prom_jax.evaluation import metrics

COMBINING = unicodedata.normalize("NFD", "Παναμάς")


@pytest.mark.parametrize(
    ("prediction", "golds", "exact_match", "f1"),
    [
        (
            " The  panthers' (24) wins. ",
            ["Panthers 24 wins"],
            1,
            1,
        ),  # case, articles, signs, spaces
        ("an-a the", ["ana"], 1, 1),  # punctuation goes first, so that "an-a" is no article
        ("in the theatre", ["in theatre"], 1, 1),
        ("gold cup", ["silver cup", "cup", "the gold cup of 1998"], 0, 2 / 3),  # the best of 1/2, 2/3 and 4/6
        ("cup cup", ["cup"], 0, 2 / 3),  # a token counts as often as both have it
        ("«Πάνθερς»", ["Πάνθερς"], 0, 0),  # only ASCII punctuation goes, so Greek ano teleia and quotes stay
        ("24 νίκες· τέλος", ["24 νίκες"], 0, 0.4),
        ("هل فاز؟", ["هل فاز"], 0, 0.5),  # and the Arabic question mark
        ("قناة السويس", ["قناة سويس"], 0, 0.5),  # and the Arabic article
        ("กรุงเทพมหานครของไทย", ["กรุงเทพมหานคร"], 0, 0),  # without spaces it is one token
        ("308", ["\ufeff308"], 0, 0),  # the rules know nothing of what cannot be seen
        ("308", ["3\u200b08"], 0, 0),
        (COMBINING, ["Παναμάς"], 0, 0),
        ("", ["308"], 0, 0),
        ("308", [], 0, 0),  # no gold answer: only an empty one is right
        (" \n", [], 1, 1),
        ("the.", [], 1, 1),
        ("", ["", "308"], 1, 1),
    ],
)
def test_squad(prediction, golds, exact_match, f1):
    assert metrics.exact_match(prediction, golds, metrics.squad_tokens) == exact_match
    assert metrics.f1(prediction, golds, metrics.squad_tokens) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("language", "prediction", "gold", "exact_match", "f1"),
    [
        ("ar", "«السويس»؟", "سويس", 1, 1),  # punctuation of any script, and the article
        ("ar", "قناة السويس، مصر", "قناة سويس", 0, 0.8),
        ("ar", "سؤال", "سؤ", 1, 1),  # its two letters go wherever they are, as in the official script
        ("ar", "سويس the", "سويس", 0, 2 / 3),  # another language's article stays
        ("ar", "\ufeff308", "308", 0, 0),
        ("en", "the “Gold” Cup", "gold cup", 1, 1),
        ("en", "$5 + tax", "5 tax", 1, 1),  # ASCII's signs that Unicode calls symbols
        ("de", "Der Rhein – ein Fluss", "rhein fluss", 1, 1),
        ("es", "¿Los Ángeles?", "ángeles", 1, 1),
        ("vi", "những con mèo", "con mèo", 1, 1),
        ("hi", "कप।", "कप", 1, 1),
        ("hi", "the कप", "कप", 0, 2 / 3),
        ("zh", "《红楼梦》 2 卷", "红楼梦2卷", 1, 1),
        ("zh", "红楼", "红楼梦", 0, 0.8),  # a character is a token
        ("zh", "abc红", "abc 红", 1, 1),
        ("ar", "ال", "", 1, 1),
    ],
)
def test_mlqa(language, prediction, gold, exact_match, f1):
    tokens = partial(metrics.mlqa_tokens, language=language)
    assert metrics.exact_match(prediction, [gold], tokens) == exact_match
    assert metrics.f1(prediction, [gold], tokens) == pytest.approx(f1)


def test_mlqa_has_no_rule_for_other_languages():
    with pytest.raises(KeyError):
        metrics.mlqa_tokens("ตอบ", "th")


def test_thai_words_are_found_without_spaces():
    assert metrics.thai_tokens("เมืองหลวงของประเทศไทย (24)") == ["เมืองหลวง", "ของ", "ประเทศ", "ไทย", "24"]
    assert metrics.f1("เมืองหลวงของประเทศไทย", ["ประเทศไทย"], metrics.thai_tokens) == pytest.approx(4 / 6)
    assert metrics.f1("", [], metrics.thai_tokens) == 1
    # what cannot be seen makes no difference
    assert metrics.thai_tokens("\ufeffน้ำ\u200bแ\u2060ข็ง") == metrics.thai_tokens("น้ำแข็ง") == ["น้ำแข็ง"]
    assert metrics.thai_tokens(COMBINING) == metrics.thai_tokens("Παναμάς")


@pytest.mark.parametrize(
    ("text", "integer", "number"),
    [
        ("ni 16, kwa hivyo 2,125", 125, 2125),
        ("18.00", 0, 18),
        ("= $18.50.", 50, Decimal("18.5")),
        ("x = -5", -5, -5),
        ("21-3", -3, 3),  # a difference, not a negative number
        ("\N{MINUS SIGN}5", 5, -5),
        ("১৮", 18, 18),
        ("క్రింద ౧౨", 12, 12),
        ("१,२५,०००", 0, 125000),  # grouped as in India
        ("๒,๑๒๕ บาท", 125, 2125),
        ("٢٬١٢٥٫٥", 5, Decimal("2125.5")),
        ("18 ...", 18, 18),
        ("18.", 18, 18),
        ("1, 2,3", 3, 3),  # a list
        ("12,3456", 3456, 3456),
        ("50%", 50, 50),
        ("9" * 5000, Decimal("9" * 5000), Decimal("9" * 5000)),  # more digits than int() reads
        ("-", None, None),
        ("", None, None),
    ],
)
def test_last_number(text, integer, number):
    assert metrics.last_integer(text) == integer
    assert metrics.last_number(text) == number
