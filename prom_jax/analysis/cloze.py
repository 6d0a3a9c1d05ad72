"""Cloze tables, a word and a sentence that defines it with the word blanked, and the prompts made of them."""

import csv
import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prom_jax.data.sources import MOST_COLUMNS
from prom_jax.utils.errors import UserError

TABLES = Path(__file__).parents[1] / "resources" / "cloze"
BLANK = '"___"'
COLUMNS = ("english", "word", "sentence")
# Those of Wendler et al. 2024, whose third holds the whole prompt with cue and answer.
WENDLER_COLUMNS = ("word_original", "word_translation", "blank_prompt_translation_masked")
DEMONSTRATIONS = ("shared", "row")


@dataclass(frozen=True)
class Row:
    """A concept: its word in English and in the language, and the prompt that asks for it.

    query: up to the quotation mark that opens the answer; demonstration: the same with the answer.
    """

    english: str
    word: str
    query: str
    demonstration: str


@dataclass(frozen=True)
class Table:
    """The rows of a language that can be used, and how many could not be, by reason."""

    language: str
    rows: tuple[Row, ...]
    dropped: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Changes with any row."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()[:16]


class _Unusable(Exception):
    """What is wrong with a row, and what was expected."""

    def __init__(self, reason: str, expected: str):
        super().__init__(reason)
        self.reason, self.expected = reason, expected


def read_table(language: str, directory=None) -> Table:
    """Reads a language's cloze table.

    It has the columns `english`, `word` and `sentence`, of which the last holds `"___"` once; and `cue`, the
    word for "Answer", where the language's is not in cues.json. Or it has the columns of Wendler et al.: rows
    of theirs that cannot be used are left out and counted, where in other tables they are errors.

    Args:
      directory: holds `<language>/clean.csv`; None for the project's own tables.
    Raises:
      UserError: if there is no table of the language, a column is missing, or a row is not as it should be.
    """
    if language == "en":
        raise UserError("language 'en' cannot be set against English itself: ask for another language")
    path = TABLES / f"{language}.csv"
    remedy = (
        f"bring your own, DIR/{language}/clean.csv, with --tables=DIR (in a configuration probe.tables, "
        "or set pivot.regulate=never)"
    )
    if directory is not None:
        path = Path(directory) / language / "clean.csv"
        remedy = f"expected it in the folder {directory}"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TABLES.glob("*.csv") if file.stem != "en"))
        raise UserError(f"no cloze table {path}: {remedy}, or ask for one of {known}")
    records, columns = _read(path)
    theirs = set(WENDLER_COLUMNS) <= set(columns)
    if missing := [column for column in COLUMNS if column not in columns and not theirs]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}: expected {','.join(COLUMNS)}")
    rows, dropped, seen = [], Counter(), set()
    for line, record in records:
        try:
            row = _wendler_row(record) if theirs else _own_row(record, language)
            if {("english", row.english), ("word", row.word)} & seen:
                raise _Unusable("one of its words is in an earlier row", "each word once")
        except _Unusable as error:
            if not theirs:
                raise UserError(
                    f"{path}, line {line}, {record['english']!r:.60}: {error.reason}; expected "
                    f"{error.expected}"
                ) from None
            dropped[error.reason] += 1
        else:
            rows.append(row)
            seen |= {("english", row.english), ("word", row.word)}
    return Table(language, tuple(rows), dict(dropped))


def _read(path: Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """Each record with the line it ends on, and the columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if len(reader.fieldnames or ()) > MOST_COLUMNS:
                raise csv.Error(f"{len(reader.fieldnames)} columns")
            return [(reader.line_num, record) for record in reader], reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): expected a CSV file in UTF-8") from error


def _own_row(record: dict, language: str) -> Row:
    english, word, sentence = _cells(record, COLUMNS)
    cue = record.get("cue") or _cues().get(language)
    if not cue:
        raise _Unusable(f"no cue is known for {language!r}", "a column `cue` with the word for 'Answer'")
    if (blanks := sentence.count(BLANK)) != 1:
        raise _Unusable(f"its sentence has {blanks} blanks", f"{BLANK} once")
    _check_word(word, sentence)
    query = f'{sentence} {cue}: "'
    return Row(english, word, query, f'{query}{word}".')


@functools.cache
def _cues() -> dict[str, str]:
    return json.loads((TABLES / "cues.json").read_text(encoding="utf-8"))


def _wendler_row(record: dict) -> Row:
    english, word, prompt = _cells(record, WENDLER_COLUMNS)
    ends = re.fullmatch(rf'(.*"){re.escape(word)}"[.。]?', prompt)
    if not ends:
        raise _Unusable("its prompt does not end in the answer", '"<word>". there')
    query = ends[1]
    if (blanks := len(re.findall('"_+"', query))) != 1:
        raise _Unusable(f"its sentence has {blanks} blanks", f"{BLANK} once")
    _check_word(word, query)
    return Row(english, word, query, prompt)


def _cells(record: dict, columns: tuple[str, ...]) -> list[str]:
    cells = [(record[column] or "").strip() for column in columns]
    if not all(cells):
        raise _Unusable(f"its column {columns[cells.index('')]} is empty", "something in each column")
    return cells


def _check_word(word: str, sentence: str):
    """Words are compared as wholes: in a script without spaces a word is only seen between punctuation."""
    if _words(word) in _words(sentence):
        raise _Unusable("its word is in its own sentence", "the word in the blank alone")


def _words(text: str) -> str:
    """The text's words in lower case, with a space around each."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text.casefold())
    return " ".join(["", *"".join(kept).split(), ""])


def prompts(table: Table, shots: int, seed: int, demonstrations: str = "shared") -> list[tuple[Row, str]]:
    """The rows that are asked for, each with its prompt: demonstrations, then the query, a line each.

    Args:
      shots: k, the number of demonstrations.
      seed: of their choice.
      demonstrations: 'shared', the same k rows for all, which are not asked for; 'row', k others for each.
    Raises:
      UserError: if the table has no row left to ask for.
    """
    rows = table.rows
    if demonstrations not in DEMONSTRATIONS:
        raise UserError(f"demonstrations={demonstrations!r}: expected one of {', '.join(DEMONSTRATIONS)}")
    if not 0 <= shots < len(rows):
        raise UserError(
            f"shots={shots} with {len(rows)} usable rows in the table of {table.language!r}: expected 0 or "
            "more demonstrations, and fewer than rows"
        )
    random = np.random.default_rng(seed)
    shared = random.permutation(len(rows))[:shots]

    def prompt(asked: int) -> str:
        chosen = shared
        if demonstrations == "row":
            chosen = [i for i in random.permutation(len(rows)) if i != asked][:shots]
        return "\n".join([*(rows[i].demonstration for i in chosen), rows[asked].query])

    asked = [i for i in range(len(rows)) if demonstrations == "row" or i not in shared]
    return [(rows[i], prompt(i)) for i in asked]
