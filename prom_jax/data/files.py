"""Files of rows: which files a path means, what they are packed and encoded in, and the rows in them.

A reader gives a row as the file has it, and a `Bad` for one that cannot be told from its neighbours, so that
all of them are counted in one run.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs

csv.field_size_limit(1 << 27)
MOST_COLUMNS = 1000  # of a CSV file; a row is filled up to as many as the header has
PARQUET_ROWS = 100  # that are decoded at once
PARQUET_ROW = 500  # bytes in memory besides its texts
UNPACKED = 1000  # times its own size that a file may unpack to
PACKED = (".gz", ".zst")
DELIMITERS = (",", ";", "\t", "|")  # of a .csv file: the first that its header has


class Bad(NamedTuple):
    """Why a row cannot be used, as the end of a sentence: "row 3 has …"."""

    reason: str


class File(NamedTuple):
    """A file to read rows from.

    names: of the columns of a table that has no header; None where its first row is one.
    """

    path: Path
    names: tuple[str, ...] | None = None


# Paths ------------------------------------------------------------------------------------------


def find(name: str, endings: Iterable[str] = ()) -> list[Path]:
    """The files that a path means: one file, all in a folder and the folders in it that have a known ending,
    or those that match a pattern with `*` or `[…]`. `~` is the home folder. In order of their names.

    Args:
      endings: of the files that count in a folder; those of `READERS` unless given.

    Raises:
      UserError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    endings = tuple(endings) or tuple(READERS)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and ending(p) in endings)
        found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise UserError(
                f"Folder '{name}' has no file that ends in {', '.join(endings)}: name another one."
            )
        return found
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not found:
        raise UserError(f"There is no file '{name}': give data.* a local file or a hub data set.")
    return found


def is_local(name: str) -> bool:
    """Whether something is there that a name means, a file, a folder, or what matches a pattern."""
    path = os.path.expanduser(name)
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def ending(path: str | Path) -> str:
    """The ending of a file's name in small letters, without that of its packing: '.jsonl' of 'a.jsonl.gz'."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


# Bytes and text -----------------------------------------------------------------------------------


class _Unpacked(io.RawIOBase):
    """What a packed file unpacks to, at most a thousand times its size: a few bytes of a stranger's may stand
    for more than a disk holds."""

    def __init__(self, stream, path: Path):
        self._stream, self._left = stream, UNPACKED * max(path.stat().st_size, 1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {UNPACKED} times its size")
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where they are packed, whatever its name says."""
    with open(path, "rb") as file:
        magic = file.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            yield io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=file), path))
        elif magic == b"\x28\xb5\x2f\xfd":
            with needs("data"):
                import pyarrow
            with pyarrow.input_stream(file, compression="zstd") as stream:
                yield io.BufferedReader(_Unpacked(stream, path))
        else:
            yield file


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text: UTF-8, or UTF-16 where it begins with a byte order mark of that."""
    with open_binary(path) as file:
        wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        yield io.TextIOWrapper(file, "utf-16" if wide else "utf-8-sig", newline=newline)


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Names the source where something in it cannot be read."""
    try:
        yield
    except (UnicodeError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"Source '{source}' cannot be read ({error}): fix it, or save it as UTF-8."
        ) from error


def unreadable(what: str, error: BaseException, remedy: str) -> UserError:
    """The error for what a library of others could not read."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"{what} cannot be read: {type(error).__name__}: {reason:.200}: {remedy}")


# Rows ---------------------------------------------------------------------------------------------


def read_rows(file: File) -> Iterator:
    """What a file has, row by row: a dict where it is as it should be.

    Raises:
      UserError: the file cannot be read as what its name, or its content, says that it is.
    """
    with reading(str(file.path)):
        yield from READERS[ending(file.path)](file)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without the white space around them."""
    with reading(str(path)), open_text(path) as file:
        text = file.read()
    # not splitlines(), which also splits at the form feeds and separators that texts contain
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def _read_json(file: File) -> Iterator:
    """A list of rows, an object with one under `data`, or JSON Lines: told apart by the content, as names
    often are not."""
    with open_text(file.path) as text:  # for each look anew, as packed files cannot be rewound
        lines = (line for line in text if line.strip())
        first, has_more = next(lines, ""), next(lines, None) is not None
    row = None if first.lstrip().startswith("[") else _json_or_none(first)
    if row is None or (not has_more and isinstance(row, dict) and isinstance(row.get("data"), list)):
        with open_text(file.path) as text:
            content = _whole_json(text, file.path)
        if content is not None:
            yield from _listed(content, file.path)
            return
    with open_text(file.path) as text:
        yield from _json_lines(text)


def _whole_json(text: TextIO, path: Path):
    """The content of a file that is one JSON value; None for one that is not and is named as JSON Lines."""
    try:
        return json.load(text)
    except (ValueError, RecursionError) as error:
        if ending(path) != ".json":
            return None
        raise UserError(f"{path} is not valid JSON ({error}): fix the file.") from None


def _listed(content, path: Path) -> list:
    rows = content.get("data") if isinstance(content, dict) else content
    if isinstance(rows, list):
        return rows
    keys = f" with the keys {', '.join(map(str, content))[:200]}" if isinstance(content, dict) else ""
    raise UserError(
        f"{path} holds a {type(content).__name__}{keys}: expected a list of objects, such a list under "
        "'data', or an object a line."
    )


def _json_lines(text: TextIO) -> Iterator:
    for line in text:
        if line.strip():
            row = _json_or_none(line)
            yield Bad("no valid JSON") if row is None else row


def _json_or_none(line: str):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)


def _read_csv(file: File) -> Iterator:
    # Not through datasets, nor JSON: it infers types, so that the texts "NA", "007" or "2020-01-01" change.
    with open_text(file.path) as text:
        header = text.readline()
    delimiter = next((d for d in DELIMITERS if d in header), ",")
    with open_text(file.path, newline="") as text:
        yield from _table(csv.reader(text, strict=True, delimiter=delimiter), file)


def _read_tsv(file: File) -> Iterator:
    with open_text(file.path, newline="") as text:
        # a quote is text like any other here
        yield from _table(csv.reader(text, strict=True, delimiter="\t", quoting=csv.QUOTE_NONE), file)


def _table(rows: Iterator[list[str]], file: File) -> Iterator[dict | Bad]:
    """The rows of a table, by the names in its header."""
    names = file.names or next((row for row in rows if row), [])
    if len(names) > MOST_COLUMNS:
        raise UserError(
            f"{file.path} has {len(names)} columns: expected {MOST_COLUMNS} at most, remove others."
        )
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise UserError(f"{file.path} has the column '{min(twice)}' twice: rename one of them.")
    for row in rows:
        if any(row[len(names) :]):
            yield Bad(
                f"{len(row)} cells where there are {len(names)} columns (a text that has the delimiter in it "
                "needs quotes)"
            )
        elif row:
            yield dict(zip(names, [*row, *[None] * (len(names) - len(row))]))


def _read_parquet(file: File) -> Iterator[dict]:
    # Not through datasets, which keeps a copy of all that a few bytes may unpack to.
    with needs("data"):
        from pyarrow import parquet

    left = UNPACKED * max(file.path.stat().st_size, 1 << 16)
    try:
        with parquet.ParquetFile(file.path) as parts:
            for batch in parts.iter_batches(PARQUET_ROWS, use_threads=False):
                left -= batch.nbytes + PARQUET_ROW * batch.num_rows
                if left < 0:
                    raise ValueError(f"it unpacks to more than {UNPACKED} times its size")
                yield from batch.to_pylist()
    except Exception as error:  # the library's own, and of the texts in it
        raise unreadable(f"File '{file.path}'", error, "fetch it again.") from error


READERS: dict[str, Callable[[File], Iterable]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
