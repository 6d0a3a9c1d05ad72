"""Files of rows: opening and decoding, by the ending of their names."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs

csv.field_size_limit(1 << 27)
MOST_COLUMNS = 1000  # of a CSV file; a row is filled up to as many as the header has
PARQUET_ROWS = 100  # that are decoded at once
PARQUET_ROW = 500  # bytes in memory besides its texts
PARQUET_FACTOR = 1000  # times its own size that a file may unpack to


def existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"There is no file '{name}': give data.* a local file or a hub data set.")
    return path


def _read_json(path: Path) -> Iterator:
    rows = _parsed(path.read_text("utf-8-sig"), path)
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}: expected a list of objects.")
    yield from rows


def read_jsonl(path: Path) -> Iterator:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parsed(line, f"{path}, line {number}")


def _parsed(text: str, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): fix the file.") from None


def _read_csv(path: Path, **dialect) -> Iterator[dict]:
    # Not through datasets, nor JSON: it infers types, so that the texts "NA", "007" or "2020-01-01" change.
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True, **dialect)
        if len(rows.fieldnames or ()) > MOST_COLUMNS:
            raise UserError(
                f"{path} has {len(rows.fieldnames)} columns: expected {MOST_COLUMNS} at most, remove others."
            )
        yield from rows


def _read_tsv(path: Path) -> Iterator[dict]:
    return _read_csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)  # a quote is text like any other here


def _read_parquet(path: Path) -> Iterator[dict]:
    # Not through datasets, which keeps a copy of all that a few bytes may unpack to.
    with needs("data"):
        from pyarrow import parquet

    left = PARQUET_FACTOR * max(path.stat().st_size, 1 << 16)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
                left -= batch.nbytes + PARQUET_ROW * batch.num_rows
                if left < 0:
                    raise ValueError(f"it unpacks to more than {PARQUET_FACTOR} times its size")
                yield from batch.to_pylist()
    except Exception as error:  # the library's own, and of the texts in it
        raise unreadable(f"File '{path}'", error, "fetch it again.") from error


def readable(rows: Iterable, source: str) -> Iterator:
    try:
        yield from rows
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(
            f"Source '{source}' cannot be read ({error}): fix it, or save it as UTF-8."
        ) from error


def unreadable(what: str, error: Exception, remedy: str) -> UserError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"{what} cannot be read: {type(error).__name__}: {reason:.200}: {remedy}")


READERS: dict[str, Callable[[Path], Iterable]] = {
    ".json": _read_json,
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
