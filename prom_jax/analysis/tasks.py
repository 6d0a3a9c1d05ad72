"""What the probe asks: the tasks of Wendler et al. 2024, each a function from a concept to its prompt.

Another task is a function and an entry of `TASKS`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prom_jax.analysis.tables import Concept, Table
from prom_jax.utils.errors import UserError

DEMONSTRATIONS = ("shared", "row")


@dataclass(frozen=True)
class Row:
    """A word that is asked for.

    Attributes:
      english, words: the right answers in English and in the language.
      query: the prompt up to the quotation mark that opens the answer.
      demonstration: the same with the answer.
      source: the language that its word is translated from; '' if none is.
    """

    english: tuple[str, ...]
    words: tuple[str, ...]
    query: str
    demonstration: str
    source: str = ""


@dataclass(frozen=True)
class Questions:
    """What a task asks of a language.

    Attributes:
      language, task: of what.
      rows: the words that can be asked for.
      dropped: how many concepts cannot, by reason.
      sources: the languages that words are translated from.
    """

    language: str
    task: str
    rows: tuple[Row, ...]
    dropped: Mapping[str, int]
    sources: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Changes with any row."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()[:16]


class NoRows(UserError):
    """Too few rows of a table can be asked for, or be told apart with a tokenizer and a scoring."""


class _Unusable(Exception):
    """Why a concept cannot be asked for."""


@dataclass(frozen=True)
class Task:
    """A way to ask for words.

    Attributes:
      row: makes a row of (concept, its table, its number, the sources); raises `_Unusable`.
      translates: whether sources are needed.
    """

    row: Callable[[Concept, Table, int, Sequence[Table]], Row]
    translates: bool = False


def _cloze(concept: Concept, table: Table, number: int, sources: Sequence[Table]) -> Row:
    """`A "___" is used to read stories. Answer: "book".`"""
    if not concept.query:
        raise _Unusable("its table has no sentence")
    return _row(concept, concept.query, concept.closing)


def _translation(concept: Concept, table: Table, number: int, sources: Sequence[Table]) -> Row:
    """`Ελληνικά: "βιβλίο" - العربية: "كتاب"`. Sources take turns, so that each word is asked for once."""
    for turn in range(len(sources)):
        source = sources[(number + turn) % len(sources)]
        word = _word_in(source, concept.english[0])
        if word:
            break
    else:
        raise _Unusable("no source has its English word")
    if word in (*concept.english, *concept.words):
        raise _Unusable("its word in the source is an answer")
    return _row(concept, f'{_name(source)}: "{word}" - {_name(table)}: "', '"', source.language)


def _repetition(concept: Concept, table: Table, number: int, sources: Sequence[Table]) -> Row:
    """`العربية: "كتاب" - العربية: "كتاب"`."""
    return _row(concept, f'{_name(table)}: "{concept.words[0]}" - {_name(table)}: "', '"')


TASKS = {
    "cloze": Task(_cloze),
    "translation": Task(_translation, translates=True),
    "repetition": Task(_repetition),
}


def _row(concept: Concept, query: str, closing: str, source: str = "") -> Row:
    return Row(concept.english, concept.words, query, f"{query}{concept.words[0]}{closing}", source)


def _word_in(source: Table, english: str) -> str | None:
    """The source's word for an English one."""
    return next((other.words[0] for other in source.concepts if english in other.english), None)


def _name(table: Table) -> str:
    if table.name:
        return table.name
    raise UserError(
        f"{table.path}: the own name of language {table.language!r} is not known, and this task writes it: "
        "add a column `name`"
    )


def ask(task: str, table: Table, sources: Sequence[Table] = ()) -> Questions:
    """The rows of a task.

    Args:
      task: one of TASKS.
      table: of the language that is asked for.
      sources: tables of the languages that words are translated from, where the task translates.

    Returns:
      The questions.

    Raises:
      UserError: for a task that is not known, one that needs sources and has none, or the other way round.
    """
    if task not in TASKS:
        raise UserError(f"task={task!r}: expected one of {', '.join(TASKS)}")
    if TASKS[task].translates != bool(sources):
        one = "needs languages to translate from" if not sources else "translates nothing"
        raise UserError(f"task={task!r} {one}: sources are for the task 'translation' alone")
    rows, dropped = [], Counter(table.dropped)
    for number, concept in enumerate(table.concepts):
        try:
            rows.append(TASKS[task].row(concept, table, number, sources))
        except _Unusable as reason:
            dropped[str(reason)] += 1
    return Questions(
        table.language, task, tuple(rows), dict(dropped), tuple(source.language for source in sources)
    )


def prompts(
    questions: Questions, shots: int, seed: int, demonstrations: str = "shared"
) -> list[tuple[Row, str]]:
    """The rows that are asked for, each with its prompt: demonstrations, then the query, a line each.

    Args:
      questions: of a task.
      shots: k, the number of demonstrations.
      seed: of their choice.
      demonstrations: 'shared', the same k rows for all, which are not asked for; 'row', k others for each.

    Returns:
      Rows and prompts.

    Raises:
      NoRows: if there is no row left to ask for.
      UserError: for another kind of demonstrations.
    """
    rows = questions.rows
    if demonstrations not in DEMONSTRATIONS:
        raise UserError(f"demonstrations={demonstrations!r}: expected one of {', '.join(DEMONSTRATIONS)}")
    if not 0 <= shots < len(rows):
        raise NoRows(
            f"shots={shots} with {len(rows)} usable rows in the table of {questions.language!r} for the task "
            f"{questions.task!r}{_reasons(questions.dropped)}: expected 0 or more demonstrations, and fewer "
            "than rows"
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


def _reasons(dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{number} × {reason}" for reason, number in dropped.items())
    return f" ({reasons})" if reasons else ""
