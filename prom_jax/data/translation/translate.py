"""Translate instruction rows with an engine: what is sent, what is kept as it is, and what has been paid for.

A field is split into lines; a line is what is sent. Code, white space, list markers and lines without a word
are never sent, equal lines are sent once, and URLs, addresses and template slots inside a line travel as
``[0]``, ``[1]`` and come back as they were. Every answer is stored when it comes, so a run that stops goes
on without paying twice.
"""

import collections
import contextlib
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from prom_jax.data.rows import Row, Turn
from prom_jax.data.translation import checks
from prom_jax.data.translation.engines import Engine
from prom_jax.utils import console
from prom_jax.utils.errors import UserError

FIELDS = "instruction", "input", "output"
SAMPLE = 16  # texts translated to measure a local engine's speed


@dataclass(frozen=True)
class Estimate:
    """What a translation will take.

    Attributes:
      texts: distinct texts still to be sent.
      characters, cached_characters: of those, and of the texts that the cache has.
      dollars: US dollars, without what a service gives for free.
      seconds: at the engine's rate: the least it takes for a service with a quota.
    """

    texts: int
    characters: int
    cached_characters: int
    dollars: float
    seconds: float


@dataclass(frozen=True)
class Rejected:
    """A field whose translation is not usable: the row's `id`, the `field` (``output``, or
    ``turns[1].output`` in a conversation), the reason (see `checks.flaw`), and the line concerned in both
    languages."""

    id: str
    field: str
    reason: str
    source: str
    translation: str


@dataclass(frozen=True)
class Result:
    """Translated rows, in order and with their ids; rows with a rejected field are left out."""

    rows: list[Row]
    rejected: list[Rejected]

    @property
    def counts(self) -> dict[str, int]:
        """How many fields were rejected for which reason."""
        return dict(collections.Counter(field.reason for field in self.rejected))


def estimate(rows: list[Row], engine: Engine, cache: "Cache", language: str, source: str = "en") -> Estimate:
    """What translating `rows` will take.

    Sends nothing, but for an engine whose speed only a trial can tell: that translates `SAMPLE` texts, into
    the cache.

    Raises:
      UserError: the trial failed.
    """
    key = engine.name, source, language
    texts = _texts(rows)
    missing = _missing(texts, cache, key)
    rate = engine.rate
    if missing and not rate:
        trial = missing[:: max(1, len(missing) // SAMPLE)][:SAMPLE]
        start = time.perf_counter()
        _ask(trial, engine, cache, key)
        rate = sum(map(len, trial)) / (time.perf_counter() - start)
        missing = _missing(texts, cache, key)
    characters = sum(map(len, missing))
    return Estimate(
        texts=len(missing),
        characters=characters,
        cached_characters=sum(map(len, texts)) - characters,
        dollars=characters * engine.price / 1e6,
        seconds=characters / rate if characters else 0.0,
    )


def translate(rows: list[Row], engine: Engine, cache: "Cache", language: str, source: str = "en") -> Result:
    """Translates every field of every row, by way of the cache, and checks the outcome.

    Raises:
      UserError: of the engine or the cache; everything answered before is stored.
    """
    key = engine.name, source, language
    texts = _texts(rows)
    _ask(_missing(texts, cache, key), engine, cache, key)
    answers = cache.get(key, texts)
    # Where an answer lost a placeholder, the text between the placeholders is translated piece by piece.
    pieces = _distinct(
        piece for text, answer in answers.items() if not _faithful(text, answer) for piece in _pieces(text)
    )
    _ask(_missing(pieces, cache, key), engine, cache, key)
    answers.update(cache.get(key, pieces))
    return _collect(rows, answers, language)


def _collect(rows: list[Row], answers: dict[str, str], language: str) -> Result:
    translated, rejected = [], []
    for row in console.track(rows, "Checking"):
        turns, flaws = [], []
        for number, turn in enumerate(row.turns):
            fields = {}
            for name in FIELDS:
                fields[name], lines = _render(getattr(turn, name), answers)
                where = name if len(row.turns) == 1 else f"turns[{number}].{name}"
                flaws += _flaws(row.id, where, lines, language)
            turns.append(Turn(**fields))
        system, lines = _render(row.system, answers)
        flaws += _flaws(row.id, "system", lines, language)
        if flaws:
            rejected += flaws
        else:
            translated.append(replace(row, turns=tuple(turns), system=system))
    return Result(translated, rejected)


def _flaws(id: str, field: str, lines: list[tuple[str, str]], language: str) -> Iterator[Rejected]:
    """The field's first unusable line, if any."""
    for source, translation in lines:
        plain = SLOT.sub(" ", source).strip(), SLOT.sub(" ", translation).strip()
        if reason := checks.flaw(*plain, language):
            yield Rejected(id, field, reason, source, translation)
            return


# Text: what is sent, and how it comes back ----------------------------------------------------------

WORD = re.compile(r"[^\W\d_]{2,}")  # what "4 x 6 = 24" does not have
FENCE = re.compile(r"\s*(```|~~~)")
# Indentation and list, heading and quotation marks; the text; white space at the end.
LINE = re.compile(r"(\s*(?:(?:[-*+•>]|#{1,6}|\(?(?:\d{1,3}|[A-Za-z])[.)])\s+)*)(.*?)(\s*)", re.DOTALL)
# Most code in instruction data stands without a fence, so its unmistakable lines are told by their form.
CODE = re.compile(
    r"""\s*(?:
      (?:def|class)\s+\w+\s*(?:\(.*)?: | (?:import|from)\s+[\w.]+(?:\s+(?:import|as)\s.*)?;?
    | \#include\b.* | @\w+(?:\(.*\))? | (?:else|try|finally)\s*[:{]
    | for\s+\w+\s+in\b.*: | (?:if|elif|while)\b.*[=<>()].*: | (?:if|for|while|switch)\s*\(.*\)
    | (?<=\s)return\b.* | (?:return|public|private|static|function)\b.*[;)}] | (?:const|let|var)\s+\w+\s*=.*
    | [a-z_][\w.\[\]'"]*\s*[-+*/]?=\s*[\w"'(\[{].* | [\w.]+\(.*\)\s*;? | .*\);
    | (?:SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE)\s.*[;*=].*
    | [a-z-]+:\s*[^\s;]+(?:\s[^\s;]+){0,3}; | <[/!]?\w.*> | .*\{ | \}.*
    )\s*""",
    re.VERBOSE | re.DOTALL,
)
# A placeholder, also in the digits and brackets of the language.
SLOT = re.compile(r"[\[［【]\s*\d+\s*[\]］】]")
PROTECTED = re.compile(
    rf"""`[^`\n]+`                                # inline code
    | (?:https?://|ftp://|www\.)[^\s<>"']*[\w/]    # URL, without the full stop after it
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                # e-mail address
    | {SLOT.pattern} | \{{\{{?[\w.]*\}}?\}}       # slots of a template
    | </?[A-Za-z][\w-]*(?:\s+[\w-]+=[^<>]*)?/?>   # tags
    """,
    re.VERBOSE,
)
LONGEST = 5000  # characters; a longer line is cut at white space


def split(text: str) -> list[str]:
    """Parts of `text` that make it up when joined: those at odd indices are to be translated."""
    parts, fenced = [""], False
    for line in text.splitlines(keepends=True):
        edge = bool(FENCE.match(line))
        if fenced or edge or CODE.fullmatch(line):
            parts[-1] += line
        else:
            found = LINE.fullmatch(line)
            assert found  # any line is one
            before, body, after = found.groups()
            for piece in re.findall(rf".{{1,{LONGEST}}}(?:\s+|$)|.{{1,{LONGEST}}}", body):
                bare = piece.strip()
                if WORD.search(PROTECTED.sub("", bare)):
                    lead, _, tail = piece.partition(bare)
                    parts[-1] += before + lead
                    parts += [bare, tail]
                else:
                    parts[-1] += before + piece
                before = ""
            parts[-1] += before + after
        fenced ^= edge
    return parts


def mask(text: str) -> tuple[str, list[str]]:
    """`text` with its protected parts as ``[0]``, ``[1]``, … and those parts."""
    protected = []

    def slot(match):
        protected.append(match[0])
        return f"[{len(protected) - 1}]"

    return PROTECTED.sub(slot, text), protected


def _unmask(text: str, protected: list[str]) -> str:
    return SLOT.sub(lambda slot: protected[int(slot[0][1:-1])], text)


def _faithful(text: str, answer: str) -> bool:
    """Whether the answer has every placeholder of the text once, and no other."""
    given, got = (sorted(int(slot[1:-1]) for slot in SLOT.findall(side)) for side in (text, answer))
    return given == got


def _pieces(text: str) -> list[str]:
    """What stands between the placeholders and has a word in it."""
    return [piece.strip() for piece in SLOT.split(text) if WORD.search(piece)]


def _patched(text: str, answers: dict[str, str]) -> str:
    """`text` with its pieces translated one by one."""
    parts = re.split(f"({SLOT.pattern})", text)
    for i in range(0, len(parts), 2):
        if WORD.search(parts[i]):
            bare = parts[i].strip()
            parts[i] = parts[i].replace(bare, SLOT.sub("", answers[bare]).strip())
    return "".join(parts)


def _render(text: str, answers: dict[str, str]) -> tuple[str, list[tuple[str, str]]]:
    """The field in the other language, and its (line, translation) pairs with placeholders in both."""
    parts, lines = split(text), []
    for i in range(1, len(parts), 2):
        masked, protected = mask(parts[i])
        answer = re.sub(r"\s*\n\s*", " ", answers[masked].strip())  # a line stays a line
        if not _faithful(masked, answer):
            answer = _patched(masked, answers)
        lines.append((masked, answer))
        parts[i] = _unmask(answer, protected)
    return "".join(parts), lines


def _texts(rows: list[Row]) -> list[str]:
    """The distinct texts to send for `rows`, in order."""
    return _distinct(mask(line)[0] for row in rows for text in _fields(row) for line in split(text)[1::2])


def _fields(row: Row) -> list[str]:
    return [row.system, *(getattr(turn, name) for turn in row.turns for name in FIELDS)]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


# Requests -----------------------------------------------------------------------------------------


def _missing(texts: list[str], cache: "Cache", key: tuple[str, str, str]) -> list[str]:
    known = cache.get(key, texts)
    return [text for text in texts if text not in known]


def _ask(texts: list[str], engine: Engine, cache: "Cache", key: tuple[str, str, str]) -> None:
    """Has `texts` translated into the cache."""

    def work(batch: list[str]) -> int:
        cache.put(key, dict(zip(batch, engine.translate(batch), strict=True)))
        return len(batch)

    batches = list(_batches(texts, engine.max_texts, engine.max_characters))
    pool = ThreadPoolExecutor(engine.workers)
    try:
        requests = [pool.submit(work, batch) for batch in batches]
        for request in console.track(as_completed(requests), "Translating", len(requests)):
            request.result()
    finally:
        # What is in flight is paid for: wait for it and store it, but send no more.
        pool.shutdown(cancel_futures=True)


def _batches(texts: list[str], max_texts: int, max_characters: int) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        if batch and (len(batch) == max_texts or characters + len(text) > max_characters):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


class Cache:
    """Translations on disk, in SQLite: what was answered once is never asked for again.

    The key is (engine name, source language, language) and the text. Safe for threads and several processes.

    Args:
      path: of the file; it is made, with its folder, where it does not exist.

    Raises:
      UserError: a file that is damaged or no such cache; a full disk (what was stored before stays).
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._lock = threading.Lock()
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: each statement below is a transaction of its own.
            self._connection = sqlite3.connect(
                self._path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS translations (engine TEXT, source TEXT, language TEXT, "
                "text TEXT, translation TEXT NOT NULL, PRIMARY KEY (engine, source, language, text)) "
                "WITHOUT ROWID"
            )

    def get(self, key: tuple[str, str, str], texts: Iterable[str]) -> dict[str, str]:
        """The stored translations of those of `texts` that have one."""
        query = "SELECT translation FROM translations WHERE (engine, source, language, text) = (?, ?, ?, ?)"
        with self._errors(), self._lock:
            found = {text: self._connection.execute(query, (*key, text)).fetchone() for text in texts}
        return {text: row[0] for text, row in found.items() if row}

    def put(self, key: tuple[str, str, str], translations: dict[str, str]) -> None:
        """Stores `translations` (text: translation), all of them or none."""
        rows = [(*key, text, translation) for text, translation in translations.items()]
        with self._errors(), self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR REPLACE INTO translations VALUES (?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Leaves one file, without SQLite's own two."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"The translation cache {self._path} cannot be used ({error}): free some space and "
                "run the same command again (what it holds is kept), or name another file if it is damaged."
            ) from None
