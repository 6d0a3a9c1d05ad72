"""Good translations pass, each failure has its name."""

import pytest

from prom_jax.data.translation import checks
from prom_jax.utils.errors import UserError

ENGLISH = "The river is 2,125 km long, and 30 million people live on its banks."
# Written for this project; the same sentence in scripts of several kinds.
GOOD = {
    "th": "แม่น้ำสายนี้ยาว 2,125 กม. และมีผู้คน 30 ล้านคนอาศัยอยู่ริมฝั่ง",
    "ar": "يبلغ طول النهر ٢٬١٢٥ كم، ويعيش على ضفافه ٣٠ مليون شخص.",
    "el": "Ο ποταμός έχει μήκος 2.125 km και στις όχθες του ζουν 30 εκατομμύρια άνθρωποι.",
    "sw": "Mto huu una urefu wa kilomita 2125, na watu milioni 30 wanaishi kwenye kingo zake.",
    "bn": "নদীটি ২,১২৫ কিমি দীর্ঘ এবং এর তীরে ৩০ মিলিয়ন মানুষ বাস করে।",
    "ja": "この川の長さは2,125kmで、岸辺には30百万人が住んでいます。",
    "ko": "이 강의 길이는 2,125km이며 강변에는 30백만 명이 살고 있습니다.",
    "zh": "这条河长2125公里,有30百万人居住在河岸上。",
    "zh-Hant": "這條河長2125公里,有30百萬人居住在河岸上。",
}


@pytest.mark.parametrize("language", GOOD)
def test_a_good_translation_has_no_flaw(language):
    assert checks.flaw(ENGLISH, GOOD[language], language) is None


@pytest.mark.parametrize("language", GOOD)
def test_every_failure_has_its_name(language):
    good = GOOD[language]
    broken = {
        "empty": " .",
        "untranslated": ENGLISH.upper(),
        "repetition": good[:30] * 6,
        "length": good + good[::-1] + "".join(map(chr, range(0x4E00, 0x4E00 + 500))),
        "numbers": good.replace("30", "31").replace("٣٠", "٣١").replace("৩০", "৩১"),
    }
    found = {reason: checks.flaw(ENGLISH, text, language) for reason, text in broken.items()}
    assert found == {reason: reason for reason in broken}


@pytest.mark.parametrize("language", sorted(set(GOOD) - {"sw"}))
def test_letters_of_another_script(language):
    swahili = GOOD["sw"]
    assert checks.flaw(ENGLISH, swahili, language) == "script"
    assert checks.flaw("Hello", "hello", language) == "script"
    assert checks.flaw("Made by Ada Lovelace at NASA", "Ada Lovelace NASA", language) is None  # names stay


def test_another_language_in_the_same_script():
    almost = "The river is 2,125 km long, and 30 million folk do live on its banks."
    assert checks.flaw(ENGLISH, almost, "sw") == "language"
    assert checks.flaw(ENGLISH, GOOD["zh"] + "他们每天都去河里打鱼,晚上回家吃饭。", "ja") == "language"
    assert checks.flaw(ENGLISH, almost, "ln") is not None  # Lingala, which the identifier knows as well
    assert checks.flaw(ENGLISH, almost, "kg") is None  # Kongo, which it does not
    assert checks.flaw("A fine day", "A very fine day", "sw") is None  # too short to tell


@pytest.mark.parametrize(
    "english, translation, same",
    [
        ("It costs 2,125 dollars", "Inagharimu dola 2.125", True),
        ("It costs 2,125 dollars", "Inagharimu dola 2 125", True),
        ("At 8:30 on 5/12", "Saa 8.30 tarehe 5-12", True),
        ("The 1st of 3, 10% off", "Ya 1 kati ya 3, punguzo la asilimia 10", True),
        (".75 of it at 7 am", "0.75 yake saa 7:00", True),
        ("Add 10 and 5", "Jumlisha 100 na 5", False),
        ("Add 3 and 5", "Jumlisha 5 na 3", True),
        ("Add 3 and 5", "Jumlisha 3 na 4", False),
        ("Add 3 and 5", "Jumlisha 3", False),
        ("Add the numbers", "Jumlisha namba 7", False),
        ("Add 3 and 3", "Jumlisha 3", False),
        ("Two million people came", "Watu milioni 2 walikuja", True),
        ("Write 2 poems", "Andika mashairi mawili", False),
        ("1,00,000 rupees", "১০০০০০ টাকা", True),
    ],
)
def test_numbers_survive(english, translation, same):
    language = "bn" if "টাকা" in translation else "sw"
    assert (checks.flaw(english, translation, language) is None) == same


def test_a_source_that_repeats_may_be_repeated():
    assert checks.flaw("Ha ha ha ha ha ha ha ha ha!", "Ha ha ha ha ha ha ha ha ha haa!", "sw") is None
    assert checks.flaw("Name: ______________________", "Jina: ______________________", "sw") is None


def test_a_loan_word_alone_is_translated():
    assert checks.flaw("radio", "radio", "sw") is None


@pytest.mark.parametrize(
    "language, script",
    [("th", "Thai"), ("sw", "Latn"), ("mr", "Deva"), ("sr-Latn", "Latn"), ("zh-TW", "Hant")],
)
def test_likely_script(language, script):
    assert checks.script(language) == script


def test_no_language():
    with pytest.raises(UserError, match="'no language!' is no language code"):
        checks.script("no language!")
