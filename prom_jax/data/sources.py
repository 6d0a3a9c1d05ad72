"""Read instructions, aligned sentences and raw text from wherever they are.

A *source* is a string:

- a local file ending in .json, .jsonl, .ndjson, .csv, .tsv or .parquet, for aligned sentences also .tmx, for
  raw text also .txt, all of these packed with gzip or zstd if need be; a folder of them; a pattern of names;
- a hub data set, ``owner/name[:config][@split]`` (split ``train`` unless given);
- for aligned sentences also ``english|target``: two text files aligned line by line, or two of the
  above with a column ``text``; or the name of a corpus that is fetched (`corpora`);
- ``sample``, the corpus that this package carries.

Settings follow after a question mark, ``?name=value&…``: where columns have other names than ours,
``ours=theirs`` with dots into nested ones (``owner/name?instruction=question&output=answer.text``), and those
of OPTIONS.
"""

import contextlib
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prom_jax.data import corpora, files, rows, tmx
from prom_jax.data.rows import BadRow, Row, Sentence, Text, names_of
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import quiet_loggers

SAMPLE = Path(__file__).parents[1] / "resources" / "sample"
HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@/]+))?$")
TABLES = (".csv", ".tsv")
BAD_ROWS = ("refuse", "skip")
SHOWN = 3  # of the rows that cannot be used, those that a message names
MOST_REASONS = 20  # told apart in a source


# What becomes of rows -----------------------------------------------------------------------------


@dataclass
class Counts:
    """Of a source: its rows; those that cannot be used, {reason: where they are}, how many in `bad`; and what
    was left out of others."""

    rows: int = 0
    bad: Counter = field(default_factory=Counter)
    where: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)


class Tally:
    """What became of the rows of all sources that are read, and whether bad ones are refused or skipped."""

    def __init__(self, bad_rows: str = "refuse"):
        if bad_rows not in BAD_ROWS:
            raise UserError(f"data.bad_rows is '{bad_rows}': expected one of {', '.join(BAD_ROWS)}.")
        self._refuse = bad_rows == "refuse"
        self.sources: dict[str, Counts] = {}

    def of(self, source: str) -> Counts:
        """The counts of a source."""
        return self.sources.setdefault(source, Counts())

    def bad(self, source: str, where: str, reason: str) -> None:
        """Enters a row that cannot be used."""
        counts = self.of(source)
        if reason not in counts.bad and len(counts.bad) >= MOST_REASONS:
            reason = "other reasons"
        counts.bad[reason] += 1
        if counts.bad[reason] <= SHOWN:
            counts.where.setdefault(reason, []).append(where)

    def check(self) -> None:
        """Raises UserError where there are rows that cannot be used, and they are to be refused; and for a
        source of which nothing is left."""
        bad = {
            (source, reason): number
            for source, counts in self.sources.items()
            for reason, number in counts.bad.items()
        }
        if bad and self._refuse:
            parts = [self._part(source, reason, number) for (source, reason), number in bad.items()]
            raise UserError(
                f"{'; '.join(parts)}. Fix {'it' if sum(bad.values()) == 1 else 'them'}, or leave out what "
                "cannot be used with data.bad_rows=skip."
            )
        for source, counts in self.sources.items():
            if counts.rows and counts.bad.total() == counts.rows:
                reason, number = counts.bad.most_common(1)[0]
                raise UserError(
                    f"Nothing of source '{source}' can be used: {self._part(source, reason, number)}."
                )

    def _part(self, source: str, reason: str, number: int) -> str:
        where = self.of(source).where[reason]
        if number == 1:
            return f"{where[0]} has {reason}"
        more = ", …" * (number > len(where))
        return f"{number:,} of {self.of(source).rows:,} rows have {reason}: {'; '.join(where)}{more}"

    def as_dict(self) -> dict:
        """{source: {"rows": number, "bad": {reason: number}, "left_out": {what: number}}}."""
        return {
            source: {"rows": counts.rows, "bad": dict(counts.bad), "left_out": dict(counts.left_out)}
            for source, counts in self.sources.items()
        }


# Reading ------------------------------------------------------------------------------------------


def read_instructions(sources: tuple[str, ...], language: str, tally: Tally | None = None) -> list[Row]:
    """Instruction rows of all `sources`, in order, in any of the shapes of `rows.SHAPES`.

    Args:
      tally: gets what becomes of the rows; None to refuse those that cannot be used.

    Raises:
      UserError: a source that is missing, empty, unreachable or of an unknown kind; a row that cannot be
        used, unless there is a tally, which then says it.
    """
    found: list[Row] = []
    with _kept(tally) as kept:
        for source in (parse(text, rows.KEYS) for text in sources):
            shape, counts = source.options.get("format", ""), kept.of(source.text)

            def read(raw: dict, shape=shape, counts=counts) -> Row:
                row, left_out = rows.instruction_row(raw, shape)
                counts.left_out.update(left_out)
                return row

            found += source.chosen(_read(source, kept, read, sample=f"instructions.{language}.jsonl"))
    return found


def read_parallel(sources: tuple[str, ...], language: str, tally: Tally | None = None) -> list[Sentence]:
    """Aligned sentences of all `sources`, in order; structured rows have keys `en` and `language`,
    at the top or under `translation` as in many hub data sets.

    Raises:
      UserError: as `read_instructions`; sides of different lengths.
    """
    found: list[Sentence] = []
    with _kept(tally) as kept:
        for text in sources:
            if sides := _sides(text, language):
                found += _aligned(text, sides, kept)
                continue
            source = parse(text, ("id", "en", language))
            if files.ending(source.name) == ".tmx":
                found += source.chosen(_read_tmx(source, language, kept))
                continue

            def read(raw: dict) -> Sentence:
                return rows.sentence_row(raw, language)

            sample, names = f"translations.{language}.jsonl", ("en", language)
            found += source.chosen(_read(source, kept, read, sample, names))
    return found


def _read_tmx(source: "Source", language: str, tally: Tally) -> list[Sentence]:
    found = [s for path in _paths(source, (".tmx",)) for s in tmx.read_tmx(path, language)]
    tally.of(source.text).rows += len(found)
    return found


def read_texts(sources: tuple[str, ...], tally: Tally | None = None) -> list[Text]:
    """Raw texts of all `sources`, in order: rows with a `text`, or the lines of a text file that have any.

    Raises:
      UserError: as `read_instructions`.
    """
    found: list[Text] = []
    with _kept(tally) as kept:
        for source in (parse(text, ("id", "text")) for text in sources):
            if _is_plain(source):
                lines = [
                    line for path in _paths(source, (".txt",)) for line in files.read_lines(path) if line
                ]
                kept.of(source.text).rows += len(lines)
                found += source.chosen([Text(None, line) for line in lines])
            else:
                found += source.chosen(_read(source, kept, rows.text_row, names=("text",)))
    return found


@contextlib.contextmanager
def _kept(tally: Tally | None) -> Iterator[Tally]:
    """A tally; one of its own, that refuses at the end, where none is given."""
    kept = tally or Tally()
    yield kept
    if tally is None:
        kept.check()


def fingerprint(source: str, language: str) -> str:
    """A hash of what `source` holds now: file contents, or the hub data set's own fingerprint."""
    digest = hashlib.sha256()
    for part in _sides(source, language) or [source]:
        parsed = parse(part)
        if parsed.on_hub:
            digest.update(_load_hub(parsed)._fingerprint.encode())
            continue
        is_sample = parsed.name == "sample"
        for path in sorted(SAMPLE.glob(f"*.{language}.jsonl")) if is_sample else _paths(parsed, ALL):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def manner(source: str, language: str) -> str:
    """How a source is read, without where it is: the kind of its files and its settings."""
    parts = [parse(part) for part in _sides(source, language) or [source]]
    kinds = (files.ending(part.name) for part in parts)
    return "|".join(
        f"{kind if kind in ALL else ''}{part.text.removeprefix(part.name)}"
        for kind, part in zip(kinds, parts)
    )


# Sources ------------------------------------------------------------------------------------------


def _positive(value: str) -> bool:
    return value.isascii() and value.isdigit() and int(value) > 0


# What may be set besides the names of columns, with what it must be.
OPTIONS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "format": (f"one of {', '.join(rows.SHAPES)}", lambda value: value in rows.SHAPES),
    "header": ("no, for a table whose first row is one like the others", lambda value: value == "no"),
    "take": ("a number of rows, the first ones", _positive),
    "repeat": ("how often an epoch has each row", _positive),
    "revision": ("a branch, tag or commit of a hub data set", bool),
}
ALL = (*files.READERS, ".tmx", ".txt")


@dataclass(frozen=True)
class Source:
    """A source string in its parts: what it names, {our key: their column}, and {option: value}."""

    text: str
    name: str
    columns: dict[str, str]
    options: dict[str, str]

    def chosen(self, rows: list) -> list:
        """As many of the rows (None: a bad one) as the source takes, as often in an epoch as it says."""
        rows = rows[: int(self.options.get("take", len(rows)))]
        number = int(self.options.get("repeat", 1))
        return [row and replace(row, repeat=number) for row in rows] if number > 1 else rows

    @property
    def on_hub(self) -> bool:
        """Whether it looks like a hub id, and not like a local file that is missing."""
        local = files.is_local(self.name) or Path(self.name).parent.is_dir()
        return bool(HUB_ID.match(self.name)) and files.ending(self.name) not in ALL and not local


def parse(source: str, keys: tuple[str, ...] | None = None) -> Source:
    """The parts of a source.

    Args:
      keys: what columns may be renamed to; None for anything.

    Raises:
      UserError: a setting that is none.
    """
    name = _name(source)
    query = source.removeprefix(name).removeprefix("?")
    settings = [setting.partition("=") for setting in query.split("&")] if query else []
    given = {ours: theirs for ours, _, theirs in settings if theirs}
    options = {key: value for key, value in given.items() if key in OPTIONS}
    columns = {key: value for key, value in given.items() if key not in OPTIONS}
    if len(given) != len(settings) or not (keys is None or columns.keys() <= set(keys)):
        expected = f"one of {', '.join(keys)} on the left" if keys else "different names on the left"
        raise UserError(
            f"Source '{source}' renames columns by '?{query}': expected 'ours=theirs', joined by '&', "
            f"with {expected}, or one of the settings {', '.join(OPTIONS)}."
        )
    for key, value in options.items():
        expected, holds = OPTIONS[key]
        if not holds(value):
            raise UserError(f"Source '{source}' sets {key}={value}: expected {expected}.")
    return Source(source, name, columns, options)


def _name(source: str) -> str:
    """The source without its settings: as much of it as is there, since names may have question marks."""
    ends = [len(source), *(match.start() for match in re.finditer(r"\?", source))]
    return next((source[:end] for end in ends if files.is_local(source[:end])), source.partition("?")[0])


def _sides(source: str, language: str) -> list[str]:
    """The sources of 'english|target', or of a corpus by name, the settings after the target's; none where it
    is one source, whose name may have a bar."""
    name = _name(source)
    if name in corpora.NAMES and not files.is_local(name):
        english, target = corpora.find(name, language)
        return [str(english), f"{target}{source.removeprefix(name)}"]
    if "|" not in source or files.is_local(_name(source)):
        return []
    splits = [(source[: m.start()], source[m.end() :]) for m in re.finditer(r"\|", source)]
    there = [sides for sides in splits if all(files.is_local(_name(side)) for side in sides)]
    if not there and len(splits) > 1:
        raise UserError(f"Source '{source}' names {len(splits) + 1} files: expected 'english|target'.")
    return list((there or splits)[0])


def _paths(source: Source, endings: tuple[str, ...] = ()) -> list[Path]:
    return files.find(source.name, endings)


def _is_plain(source: Source) -> bool:
    """Whether a source is a file of text without rows, or a folder with such files alone."""
    if source.on_hub or source.name == "sample" or files.ending(source.name) in files.READERS:
        return False
    found = {files.ending(path) for path in _paths(source, ALL)}
    return not found & set(files.READERS)


def _read(
    source: Source, tally: Tally, read: Callable, sample: str = "", names: tuple[str, ...] = ()
) -> list:
    """What `_each_row` gives of the rows that can be used."""
    return [row for row in _each_row(source, tally, read, sample, names) if row is not None]


def _each_row(
    source: Source, tally: Tally, read: Callable, sample: str, names: tuple[str, ...]
) -> Iterator[Any]:
    """The rows of a structured source as they are wanted; None for one that cannot be used.

    Args:
      read: makes of a row what is wanted, or raises BadRow.
      sample: the built-in file.
      names: of the columns of a table without header.

    Raises:
      UserError: a source that is empty, or that cannot be read.
    """
    counts = tally.of(source.text)
    raw_rows = itertools.islice(_raw(source, sample, names), int(source.options.get("take", 0)) or None)
    for where, raw in raw_rows:
        counts.rows += 1
        try:
            yield read(_renamed(source, raw))
        except BadRow as error:
            tally.bad(source.text, where, str(error))
            yield None
    if not counts.rows:
        raise UserError(f"Source '{source.name}' is empty: give a source with at least one row.")


def _renamed(source: Source, raw) -> dict:
    """A row with its columns under our names."""
    if isinstance(raw, files.Bad):
        raise BadRow(raw.reason)
    if not isinstance(raw, dict):
        raise BadRow(f"{raw!r:.60} in place of an object with keys")
    return raw | {ours: _column(raw, theirs) for ours, theirs in source.columns.items()}


def _raw(source: Source, sample: str, names: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    """(where it is, row as it is there) of a structured source."""
    if source.on_hub:
        yield from _numbered(_load_hub(source), source.name)
        return
    if "revision" in source.options:
        raise UserError(f"Source '{source.text}' sets a revision, and is no hub data set: leave it out.")
    header = names if source.options.get("header") else None
    if source.options.get("header") and not names:
        raise UserError(f"Source '{source.text}' sets header=no: instructions need a header with names.")
    paths = [_sample(sample)] if source.name == "sample" else _paths(source)
    for path in paths:
        if files.ending(path) not in files.READERS:
            raise UserError(
                f"Source '{source.text}' is of no known kind: expected a file ending in "
                f"{', '.join(files.READERS)}, a hub data set 'owner/name[:config][@split]', or 'sample'."
            )
        if names and files.ending(path) in TABLES and not header and not source.columns:
            _check_header(path, names)
        yield from _numbered(files.read_rows(files.File(path, header)), str(path))


def _numbered(found: Iterable, name: str) -> Iterator[tuple[str, object]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(found, 1))


def _check_header(path: Path, names: tuple[str, ...]) -> None:
    """Refuses a table whose first row has none of the names: taken as a header, it would be lost."""
    first = next(iter(files.read_rows(files.File(path))), None)
    if isinstance(first, dict) and not set(first) & {*names, "translation"}:
        raise UserError(
            f"{path} begins with {' | '.join(map(str, first))!r:.100}, which has none of {', '.join(names)}: "
            f"where this is a row like the others, add '?header=no' to the source (columns "
            f"{', '.join(names)}); where it is a header, rename by '?{names[0]}=…'."
        )


def _column(row: dict, theirs: str):
    """A column, or with dots one inside others."""
    value = row
    for key in [theirs] if theirs in row else theirs.split("."):
        if not isinstance(value, dict) or key not in value:
            raise BadRow(f"no column '{theirs}' (found: {names_of(row)})")
        value = value[key]
    return value


def _aligned(source: str, sides: list[str], tally: Tally) -> list[Sentence]:
    if {"take", "repeat"} & parse(sides[0]).options.keys():
        raise UserError(f"Source '{source}' sets take or repeat for its English alone: put it at the end.")
    english, target = (_side(part, tally) for part in sides)
    if len(english) != len(target):
        raise UserError(
            f"'{source}' is not aligned: {len(english)} English and {len(target)} target lines, "
            "expected as many on both sides."
        )
    taken = parse(sides[1]).chosen(
        [
            Sentence(None, first, second) if first is not None and second is not None else None
            for first, second in zip(english, target, strict=True)
        ]
    )
    return [pair for pair in taken if pair]


def _side(text: str, tally: Tally) -> list[str | None]:
    """The texts of one side, all of them: the lines of a file, or a column, in which None stands for a row
    that cannot be used."""
    source = parse(text, ("text",))
    if _is_plain(source):
        lines: list[str | None] = []
        for path in _paths(source, (".txt",)):
            lines += files.read_lines(path)
        if not lines:
            raise UserError(f"Source '{source.name}' is empty: give a source with at least one line.")
        tally.of(text).rows += len(lines)
        return lines
    whole = replace(source, options={key: value for key, value in source.options.items() if key != "take"})
    return list(_each_row(whole, tally, lambda raw: rows.text_of(raw, "text").strip(), "", ("text",)))


def _sample(name: str) -> Path:
    path = SAMPLE / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in SAMPLE.glob("*.jsonl"))) or "no files"
        raise UserError(f"The sample corpus has no {name} (it has {known}): give a source.")
    return path


def _load_hub(source: Source):
    parts = HUB_ID.match(source.name)
    assert parts  # Source.on_hub has looked
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    remedy = (
        "if it is gated, ask for access on its page and log in with `hf auth login`; without a network, "
        "give the path of a local copy."
    )
    revision = {"revision": source.options["revision"]} if "revision" in source.options else {}
    return _load(
        f"Hub data set '{source.name}'{offline}",
        remedy,
        parts["id"],
        parts["config"],
        split=parts["split"] or "train",
        **revision,
    )


def _load(what: str, remedy: str, *args, **kwargs):
    with needs("data"):
        import datasets

    try:
        with quiet_loggers("datasets"):  # what it logs, it raises too
            return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # the library raises a dozen kinds, and not all of them its own
        raise files.unreadable(what, error.__cause__ or error, remedy) from error
