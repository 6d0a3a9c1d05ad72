"""Scores of one answer: exact match and F1 of question answering, numbers of arithmetic.

An answer is compared as a list of tokens, and a rule is a function from text to tokens: `squad_tokens`,
`mlqa_tokens` and `thai_tokens`. Two answers match exactly when their tokens are the same, and F1 is the
overlap of their tokens. The first two rules are those of the data sets' own scripts, and take text as it is:
characters that differ in normalisation (NFC) or by a zero-width mark differ. `thai_tokens` is ours and takes
these for equal.
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import environment

Tokens = Callable[[str], list[str]]

ASCII_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
# What shows nothing: zero-width space, non-joiner and joiner, direction marks, word joiner, byte order mark.
INVISIBLE = dict.fromkeys([*range(0x200B, 0x2010), 0x2060, 0xFEFF])
ENGLISH_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Of every language that MLQA has; in Arabic the article is the word's beginning, and the script removes its
# two letters wherever they stand.
MLQA_ARTICLES = {
    "ar": re.compile("ال"),
    "de": re.compile(r"\b(?:der|die|das|den|dem|des|ein|eine|einen|einem|einer|eines)\b"),
    "en": ENGLISH_ARTICLES,
    "es": re.compile(r"\b(?:el|la|los|las|un|una|unos|unas)\b"),
    "hi": None,
    "vi": re.compile(r"\b(?:của|là|cái|chiếc|những)\b"),
    "zh": None,
}
CHINESE_TOKEN = re.compile(r"[\u4e00-\u9fa5]|[^\s\u4e00-\u9fa5]+")

INTEGER = re.compile(r"-?\d+")  # \d: decimal digits of any script
# Grouped by thousands or as in India (1,00,000), with European or Arabic signs; else plain. A minus sign
# belongs to the number unless something is there to subtract from.
NUMBER = re.compile(
    r"(?:(?<![\d)\]%])[-\N{MINUS SIGN}])?"
    r"(?:\d{1,3}(?:[,٬]\d{2,3})*[,٬]\d{3}(?!\d)|\d+)(?:[.٫]\d+)?"
)


def exact_match(prediction: str, golds: list[str], tokens: Tokens) -> float:
    """1 where the prediction has the tokens of one of the gold answers, else 0.

    Args:
      golds: acceptable answers; none means that the question has no answer, and only an empty one is right.
      tokens: the rule by which answers are compared.
    """
    predicted = tokens(prediction)
    return float(any(predicted == tokens(gold) for gold in golds or [""]))


def f1(prediction: str, golds: list[str], tokens: Tokens) -> float:
    """F1 of the prediction's tokens against those of a gold answer, at its best over the gold answers.

    An answer without tokens (empty, or an article alone) has F1 1 with another such and 0 with any other, as
    in SQuAD 2.0; the scripts of SQuAD 1.1 and MLQA, which know no unanswerable questions, give 0 in both
    cases.

    Args:
      prediction, golds, tokens: as in `exact_match`.
    """
    predicted = tokens(prediction)
    return max(_overlap(predicted, tokens(gold)) for gold in golds or [""])


def _overlap(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def squad_tokens(text: str) -> list[str]:
    """Words in lower case without ASCII punctuation and English articles (Rajpurkar et al. 2016, the script
    of SQuAD 1.1). In Thai, where no space parts words, mostly one token."""
    return ENGLISH_ARTICLES.sub(" ", text.lower().translate(ASCII_PUNCTUATION)).split()


def mlqa_tokens(text: str, language: str) -> list[str]:
    """Words in lower case without punctuation of any script and the articles of the `language` (Lewis et al.
    2020, the script of MLQA); in Chinese every character is a word.

    Raises:
      KeyError: for a language that MLQA has not.
    """
    text = "".join(character for character in text.lower() if not _is_punctuation(character))
    if articles := MLQA_ARTICLES[language]:
        text = articles.sub(" ", text)
    return CHINESE_TOKEN.findall(text) if language == "zh" else text.split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def thai_tokens(text: str) -> list[str]:
    """Words as `squad_tokens`, Thai ones by dictionary (PyThaiNLP's newmm, maximal matching), after NFC and
    without zero-width characters."""
    visible = unicodedata.normalize("NFC", text).translate(INVISIBLE)
    return _thai_words()(" ".join(squad_tokens(visible)))


@functools.cache
def _thai_words() -> Tokens:
    # It would make a directory for downloads in the user's home, and its dictionary needs none.
    with needs("eval"), environment(PYTHAINLP_READ_ONLY="1"):
        from pythainlp.tokenize import word_tokenize

        words = functools.partial(word_tokenize, engine="newmm", keep_whitespace=False)
        words("ไทย")  # which reads the dictionary
    return words


def last_integer(text: str) -> Decimal | None:
    """The last run of digits, in any script, with a minus sign where one is directly before it (the reading
    of lm-evaluation-harness 0.3's MGSM): 125 in '2,125', 0 in '18.00'. None without digits."""
    integers = INTEGER.findall(text)
    return Decimal(integers[-1]) if integers else None


def last_number(text: str) -> Decimal | None:
    """The last number, with all its digits: 2125 in '2,125', 18 in '18.00', 18 in '১৮', 3 in '5-3'. None
    without digits."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    return Decimal(re.sub("[,٬]", "", numbers[-1]).replace("\N{MINUS SIGN}", "-").replace("٫", "."))
