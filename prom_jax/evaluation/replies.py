"""Measures of any generated reply, whatever its task: its script, its language, and chrF.

They come besides the task's own. A short answer may rightly be a name or a number, so script and
language are judged in replies of at least WORDS words.
"""

import functools

import regex

from prom_jax.data.translation import checks
from prom_jax.evaluation.metrics import thai_tokens

WORDS = 10
# Letters a word, in scripts that write no space between words; Thai words are found by dictionary.
LETTERS_PER_WORD = {"Laoo": 4, "Khmr": 4, "Mymr": 4, "Hans": 2, "Hant": 2, "Jpan": 2}
LETTER = regex.compile(r"\p{L}")


def measures(reply: str, golds: list, language: str | None) -> dict[str, float]:
    """Each as 0 … 1: `chrf` where a gold answer has letters; `right_script` and `right_language` in replies
    of WORDS words or more, where it is given which language they should be in, and the identifier knows it.

    Args:
      reply: of a model.
      golds: acceptable answers.
      language: BCP 47 code, or None.
    """
    worded = [gold for gold in golds if isinstance(gold, str) and LETTER.search(gold)]
    found = {"chrf": chrf(reply, worded)} if worded else {}
    if language and num_words(reply, language) >= WORDS:
        found["right_script"] = float(checks.in_script(reply, language))
        in_language = checks.is_language(reply, language)
        if in_language is not None:
            found["right_language"] = float(in_language)
    return found


def chrf(reply: str, golds: list[str]) -> float:
    """chrF (Popović 2015: character n-grams up to 6, β = 2) as sacrebleu computes it for one sentence, at its
    best over the gold answers; 0 … 1."""
    return max(_chrf().sentence_score(reply, [gold]).score for gold in golds) / 100


@functools.cache
def _chrf():
    from sacrebleu.metrics import CHRF

    return CHRF()


def num_words(text: str, language: str) -> int:
    """Words between spaces; in scripts without these by dictionary (Thai) or about, by the letters."""
    script = checks.script(language)
    if script == "Thai":
        return len(thai_tokens(text))
    if script in LETTERS_PER_WORD:
        return len(LETTER.findall(text)) // LETTERS_PER_WORD[script]
    return len(text.split())
