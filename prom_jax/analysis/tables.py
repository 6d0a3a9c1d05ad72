"""Tables of concepts: a word in English and in a language, and a sentence with a blank that defines it."""

import csv
import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import langcodes

from prom_jax.data.files import MOST_COLUMNS
from prom_jax.utils.errors import UserError

TABLES = Path(__file__).parents[1] / "resources" / "cloze"
BLANK = '"___"'
COLUMNS = ("english", "word", "sentence")
# Those of Wendler et al. 2024 and of RomanLens; the third holds the whole prompt with cue and answer.
WENDLER_COLUMNS = ("word_original", "word_translation", "blank_prompt_translation_masked")

_SEPARATOR = re.compile("[,;،؛，；、]")  # between several right words
_QUOTES = '"“”„«»'
_BLANK = re.compile(rf"[{_QUOTES}]+\s?_+\s?[{_QUOTES}]+|_+")


@dataclass(frozen=True)
class Concept:
    """A word in English and in a language.

    Attributes:
      english, words: the right words of either, the one that demonstrations show first.
      query: the cloze prompt up to the quotation mark that opens the answer; '' where a table has none.
      closing: what follows the answer in it.
    """

    english: tuple[str, ...]
    words: tuple[str, ...]
    query: str = ""
    closing: str = ""


@dataclass(frozen=True)
class Table:
    """The concepts of a language.

    Attributes:
      language: its code.
      name: its own name, such as 'Kiswahili'; '' if it is not known.
      concepts: those that can be used.
      dropped: how many cannot be used, by reason.
      path: where they are from.
    """

    language: str
    name: str
    concepts: tuple[Concept, ...]
    dropped: Mapping[str, int]
    path: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with any concept."""
        return hashlib.sha256(repr((self.name, self.concepts)).encode()).hexdigest()[:16]


class _Unusable(Exception):
    """What is wrong with a row, and what was expected."""

    def __init__(self, reason: str, expected: str):
        super().__init__(reason)
        self.reason, self.expected = reason, expected


class _Problem(NamedTuple):
    """A row that cannot be used, and why."""

    line: int
    word: str
    error: _Unusable


def read_table(language: str, directory=None) -> Table:
    """Reads a language's table.

    It has the columns `english` and `word`, and for the task 'cloze' `sentence`, which holds a blank (`___`)
    once; and `cue`, the word for "Answer", where the language's is not in cues.json; and `name`, the
    language's own name, where its code does not tell it. Or it has the columns of Wendler et al.: rows of
    theirs that cannot be used are left out and counted, where in other tables they are errors. Several right
    words stand in one cell, with commas or semicolons between them.

    Args:
      language: its code.
      directory: holds `<language>/clean.csv`; None for the project's own tables.

    Returns:
      The table.

    Raises:
      UserError: if there is no table of the language, a column is missing, rows are not as they should be, or
        none is left.
    """
    if language == "en":
        raise UserError("language 'en' cannot be set against English itself: ask for another language")
    path = table_path(language, directory)
    if not path.is_file():
        raise UserError(_no_table(path, language, directory))
    records, columns = _read(path)
    theirs = set(WENDLER_COLUMNS[:2]) <= set(columns)
    english, word, sentence = WENDLER_COLUMNS if theirs else COLUMNS
    if missing := [column for column in (english, word) if column not in columns]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}: expected {','.join(COLUMNS)}")
    concepts, problems, seen = [], [], set()
    for line, record in records:
        try:
            concept = Concept(_words_of(record, english), _words_of(record, word))
            if sentence in columns:
                complete = _with_whole_prompt if theirs else _with_sentence
                concept = complete(concept, _cell(record, sentence), record, language)
            shown = {("english", concept.english[0]), ("word", concept.words[0])}
            if shown & seen:
                raise _Unusable("one of its words is in an earlier row", "each word once")
        except _Unusable as error:
            problems.append(_Problem(line, record[english] or "", error))
        else:
            concepts.append(concept)
            seen |= shown
    if problems and not (theirs and concepts):
        raise UserError(f"{path}: {_by_reason(problems, len(records))}")
    name = next((record["name"] for _, record in records if record.get("name")), _own_name(language))
    dropped = Counter(problem.error.reason for problem in problems)
    return Table(language, name, tuple(concepts), dict(dropped), path)


def read_sources(names, language: str, directory=None) -> tuple[Table, ...]:
    """The tables of the languages that words are translated from.

    Args:
      names: codes of languages; empty for all that have a table, but for English and the language itself.
      language: the code of the one that is translated into.
      directory: as in `read_table`; a language that has none there has the project's own.

    Returns:
      A table each.

    Raises:
      UserError: as `read_table`, or for a source that is the language itself.
    """
    own = (
        {path.parent.name for path in Path(directory).glob("*/clean.csv")} if directory is not None else set()
    )
    names = tuple(dict.fromkeys(names)) or tuple(sorted((own | set(known_languages())) - {language, "en"}))
    if language in names:
        raise UserError(
            f"source {language!r} is the language itself: name others, or use the task 'repetition'"
        )
    return tuple(read_table(name, directory if name in own else None) for name in names)


def known_languages() -> list[str]:
    """Codes of the languages that the project has a table of, but for English."""
    return sorted(file.stem for file in TABLES.glob("*.csv") if file.stem != "en")


def table_path(language: str, directory=None) -> Path:
    """Where a language's table is."""
    return TABLES / f"{language}.csv" if directory is None else Path(directory) / language / "clean.csv"


def _no_table(path: Path, language: str, directory) -> str:
    remedy = (
        f"bring your own, DIR/{language}/clean.csv, with --tables=DIR (in a configuration probe.tables, "
        "or set pivot.regulate=never)"
        if directory is None
        else f"expected it in the folder {directory}"
    )
    return f"no cloze table {path}: {remedy}, or ask for one of {', '.join(known_languages())}"


def _read(path: Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """Each record with the line it ends on, and the columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            if len(columns) > MOST_COLUMNS:
                raise csv.Error(f"{len(columns)} columns")
            return [(reader.line_num, record) for record in reader], columns
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): expected a CSV file in UTF-8") from error


def _by_reason(problems: list[_Problem], number: int) -> str:
    """How many rows cannot be used, and for each reason how many, the first of them and what was expected."""
    reasons = {}
    for problem in problems:
        reasons.setdefault(problem.error.reason, []).append(problem)
    told = [
        f"{len(found)} × {reason} (line {found[0].line}, {found[0].word!r:.60}); expected "
        f"{found[0].error.expected}"
        for reason, found in reasons.items()
    ]
    return f"{len(problems)} of {number} rows cannot be used: {'. '.join(told)}"


# What a row says.


def _cell(record: dict, column: str) -> str:
    if text := (record[column] or "").strip():
        return text
    raise _Unusable(f"its column {column} is empty", "something in each column")


def _words_of(record: dict, column: str) -> tuple[str, ...]:
    """The right words of a cell."""
    words = map(strip_invisible, _SEPARATOR.split(_cell(record, column)))
    if found := tuple(dict.fromkeys(filter(None, words))):
        return found
    raise _Unusable(f"its column {column} has no word", "one or more, with commas between")


def strip_invisible(word: str) -> str:
    """The word without white space and invisible characters (Unicode's category Cf) at its ends.

    A joiner after a virama spells the end of a word in Indic scripts, and stays.
    """

    def is_letter(at: int) -> bool:
        character = word[at]
        if character in "\u200c\u200d":
            return at > 0 and unicodedata.combining(word[at - 1]) == 9  # a virama
        return not character.isspace() and unicodedata.category(character) != "Cf"

    letters = [at for at in range(len(word)) if is_letter(at)]
    return word[letters[0] : letters[-1] + 1] if letters else ""


def _with_sentence(concept: Concept, sentence: str, record: dict, language: str) -> Concept:
    """The concept with the query that the project makes of a sentence."""
    cue = record.get("cue") or _cues().get(language)
    if not cue:
        raise _Unusable(f"no cue is known for {language!r}", "a column `cue` with the word for 'Answer'")
    blanks = len(_BLANK.findall(sentence))
    if blanks != 1:
        raise _Unusable(f"its sentence has {blanks} blanks", f"{BLANK} once")
    sentence = _BLANK.sub(BLANK, sentence)
    _check_words(concept.words, sentence)
    return replace(concept, query=f'{sentence} {cue}: "', closing='".')


@functools.cache
def _cues() -> dict[str, str]:
    return json.loads((TABLES / "cues.json").read_text(encoding="utf-8"))


def _with_whole_prompt(concept: Concept, prompt: str, record: dict, language: str) -> Concept:
    """The concept with the query of a prompt that ends in the answer; that answer is its first word."""
    prompt = re.sub('"{2,}', '"', prompt)
    ends = re.fullmatch(r'(.*")([^"]+)("\W*)', prompt, re.DOTALL)
    answer = strip_invisible(ends[2]) if ends else ""
    if not ends or answer not in concept.words:
        raise _Unusable("its prompt does not end in its word", '"<word>". there')
    query = ends[1]
    blanks = len(_BLANK.findall(query))
    if blanks != 1:
        raise _Unusable(f"its sentence has {blanks} blanks", f"{BLANK} once")
    _check_words(concept.words, query)
    words = tuple(dict.fromkeys((answer, *concept.words)))
    return replace(concept, words=words, query=query, closing=ends[3])


def _check_words(words: tuple[str, ...], sentence: str):
    """Words are compared as wholes: in a script without spaces a word is only seen between punctuation."""
    if any(_plain(word) in _plain(sentence) for word in words):
        raise _Unusable("its word is in its own sentence", "the word in the blank alone")


def _plain(text: str) -> str:
    """The text's words in lower case, with a space around each."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text.casefold())
    return " ".join(["", *"".join(kept).split(), ""])


def _own_name(language: str) -> str:
    """The language's name in itself, such as 'Kiswahili' for 'sw'; '' if it is not known."""
    name = langcodes.get(language).autonym() if langcodes.tag_is_valid(language) else "Unknown"
    return "" if name.startswith("Unknown") else name
