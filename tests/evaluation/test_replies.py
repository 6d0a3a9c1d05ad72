"""Script, language and chrF of replies."""

import pytest
from sacrebleu import sentence_chrf

from prom_jax.evaluation.replies import chrf, measures, num_words

SWAHILI = "Kitabu hiki kinaeleza jinsi watu wa pwani walivyoishi zamani kabla ya kuja kwa meli kubwa."
ENGLISH = "This book explains how the people of the coast lived long before the big ships came to them."
THAI = "หนังสือเล่มนี้อธิบายว่าผู้คนบนชายฝั่งทะเลมีชีวิตอยู่อย่างไรก่อนที่เรือใหญ่จะมาถึง"
CHINESE = "这本书解释了在大船到来之前海岸上的人们是如何生活的，以及他们吃什么。"


@pytest.mark.parametrize(
    ("reply", "language", "script", "right"),
    [
        (SWAHILI, "sw", 1, 1),
        (ENGLISH, "sw", 1, 0),
        (THAI, "th", 1, 1),
        (ENGLISH, "th", 0, 0),
        (SWAHILI, "th", 0, 0),
        (CHINESE, "zh", 1, 1),
        (THAI, "zh", 0, 0),
        ("NASA ESA " + THAI, "th", 1, 1),  # names of another script
    ],
)
def test_script_and_language(reply, language, script, right):
    assert measures(reply, [], language) == {"right_script": script, "right_language": right}


def test_short_replies_and_unknown_languages_are_not_judged():
    assert measures("Nairobi", [], "th") == {}
    assert measures(" ".join(SWAHILI.split()[:9]), [], "sw") == {}
    assert measures(SWAHILI, [], None) == {}
    assert measures(SWAHILI, [], "bem") == {"right_script": 1}  # a language that the identifier has not
    assert num_words(THAI, "th") > 15 and num_words(SWAHILI, "sw") == 15


def test_chrf_is_that_of_the_best_gold_answer():
    golds = ["Kitabu kidogo", SWAHILI[:60]]
    expected = [sentence_chrf(SWAHILI, [gold]).score / 100 for gold in golds]
    assert chrf(SWAHILI, golds) == pytest.approx(max(expected)) and expected[0] < expected[1]
    assert measures(SWAHILI, [*golds, "42"], None) == {"chrf": pytest.approx(max(expected))}
    assert measures("42", ["42"], "sw") == {} == measures("x", [], None)
