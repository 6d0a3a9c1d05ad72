"""Is this a usable translation? Seven ways in which machine translation fails, each with its name.

The bounds come from human translations (3,001 sentences of NTREX-128 and FLORES in each of nine languages:
Arabic, Bengali, Greek, Malayalam, Marathi, Swahili, Tamil, Telugu, Thai) and are wide: to lose a good row
costs more than to keep a clumsy one.
"""

import collections
import functools
import re
import unicodedata

import langcodes
import regex

from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs

# Human translations have 0.38 to 3.3 times the characters of the English, and Chinese has fewer.
LENGTH_RATIO, LENGTH_SLACK = 6, 20
# At 40 characters and a probability of .8 the identifier errs in none of the human translations.
LANGUAGE_CHARACTERS, LANGUAGE_PROBABILITY = 40, 0.8

# Scripts that Unicode writes with several of its own.
SCRIPTS = {
    "Jpan": r"\p{Han}\p{Hiragana}\p{Katakana}",
    "Kore": r"\p{Hangul}\p{Han}",
    "Hans": r"\p{Han}",
    "Hant": r"\p{Han}",
}
LETTER = regex.compile(r"\p{L}")
PLAIN_WORD = regex.compile(r"\b\p{Ll}{2,}\b")
NUMBER = regex.compile(r"\d+")
NUMBER_WORD = regex.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|forty"
    r"|(?:thir|four|fif|six|seven|eigh|nine)(?:teen|ty)|dozens?|hundreds?|thousands?|[mb]illions?"
    r"|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|half|quarter|once|twice"
    r"|noon|midday|midnight)\b",
    regex.IGNORECASE,
)
# A unit of at most 100 characters, five times in a row or more. (This one pattern is faster with `re`.)
LOOP = re.compile(r"(.{1,100}?)\1{4,}")


def flaw(source: str, translation: str, language: str) -> str | None:
    """The first of the reasons below for which `translation` is not usable, or None.

    - ``empty``: no letter and no digit;
    - ``untranslated``: the source again, though it has words to translate;
    - ``repetition``: the same few words over and over, which the source does not have;
    - ``length``: more than `LENGTH_RATIO` times as long as the source, or as short;
    - ``script``: most of its letters are of another script than the language's, names apart;
    - ``language``: another language by `py3langid`, where that knows `language`;
    - ``numbers``: not the digits of the source.

    Args:
      source: English text, one line, without code, URLs and the like.
      translation: what an engine made of it.
      language: BCP 47 code of the language that it should be in.
    """
    for reason, test in FLAWS.items():
        if test(source, translation, language):
            return reason
    return None


def script(language: str) -> str:
    """ISO 15924 code of the script that `language` is most likely written in.

    Raises:
      UserError: `language` is no language code.
    """
    try:
        return langcodes.Language.get(language).maximize().script or "Latn"
    except langcodes.LanguageTagError:
        raise UserError(
            f"'{language}' is no language code: expected one such as th, sw or zh-Hant."
        ) from None


def in_script(text: str, language: str) -> bool:
    """Whether no more letters of a text are of another script than of the language's."""
    own, foreign = _letters(script(language))
    return len(foreign.findall(text)) <= len(own.findall(text))


def is_language(text: str, language: str) -> bool | None:
    """Whether `py3langid` takes a text for the language, or a related one; None where it does not know it."""
    wanted = langcodes.Language.get(language).language
    if wanted not in _identifier().nb_classes:
        return None
    return _related(_identifier().classify(text)[0], wanted)


def _empty(source: str, translation: str, language: str) -> bool:
    return not regex.search(r"[\p{L}\p{N}]", translation)


def _untranslated(source: str, translation: str, language: str) -> bool:
    same = source.casefold().split() == translation.casefold().split()
    return same and len(PLAIN_WORD.findall(source)) > 1  # one word alone may be a loan word


def _repetition(source: str, translation: str, language: str) -> bool:
    return _loops(translation) and not _loops(source)


def _loops(text: str) -> bool:
    return any(len(m[0]) >= 20 and LETTER.search(m[1]) for m in LOOP.finditer(text))


def _length(source: str, translation: str, language: str) -> bool:
    short, long = sorted((len(source), len(translation)))
    return long > LENGTH_RATIO * short + LENGTH_SLACK


def _script(source: str, translation: str, language: str) -> bool:
    own, foreign = _letters(script(language))
    names = {word for word in source.split() if not word.islower()}
    text = " ".join(word for word in translation.split() if word not in names)
    others = len(foreign.findall(text))
    return others > 3 and others > len(own.findall(text))  # three: a unit, a symbol


@functools.cache
def _letters(code: str) -> tuple[regex.Pattern, regex.Pattern]:
    """Patterns of one character of the script, and of one letter of another script."""
    own = SCRIPTS.get(code, rf"\p{{Script={code}}}")
    return (
        regex.compile(rf"[[{own}]&&[\p{{L}}\p{{M}}]]", regex.V1),
        regex.compile(rf"[\p{{L}}--[{own}\p{{Common}}\p{{Inherited}}]]", regex.V1),
    )


def _language(source: str, translation: str, language: str) -> bool:
    if len(translation) < LANGUAGE_CHARACTERS:
        return False
    identifier = _identifier()
    wanted = langcodes.Language.get(language).language
    if wanted not in identifier.nb_classes:
        return False
    found, probability = identifier.classify(translation)
    return probability > LANGUAGE_PROBABILITY and not _related(found, wanted)


@functools.cache
def _related(one: str, other: str) -> bool:
    """Whether the identifier may take one for the other: Egyptian for Arabic, Nynorsk for Norwegian."""
    return min(langcodes.tag_distance(one, other), langcodes.tag_distance(other, one)) <= 20


@functools.cache
def _identifier():
    with needs("data"):  # and "eval" brings it
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _numbers(source: str, translation: str, language: str) -> bool:
    """Whether digits got lost or came in.

    Separators and leading zeros do not count: 2,125 and 2.125 and 2 125 are the same, as are 8:30 and 8.30,
    .75 and 0.75, 7 and 7:00. Where the source has number words ("two million"), new digits may be theirs.
    """
    composed = (unicodedata.normalize("NFKC", text) for text in (source, translation))
    return _digits_differ(source, translation) and _digits_differ(*composed)  # "x²" is "x2", "H₂O" "H2O"


def _digits_differ(source: str, translation: str) -> bool:
    given, got = _digits(source), _digits(translation)
    lost, new = ("".join(rest.elements()).lstrip("0") for rest in (given - got, got - given))
    return lost != new and (bool(lost) or not NUMBER_WORD.search(source))


def _digits(text: str) -> collections.Counter:
    return collections.Counter(
        "".join(str(unicodedata.decimal(digit)) for digit in number) for number in NUMBER.findall(text)
    )


FLAWS = {
    "empty": _empty,
    "untranslated": _untranslated,
    "repetition": _repetition,
    "length": _length,
    "script": _script,
    "language": _language,
    "numbers": _numbers,
}
