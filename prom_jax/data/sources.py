"""Read instructions and aligned sentences from wherever they are.

A *source* is a string:

- a local file ending in .json, .jsonl, .csv, .tsv or .parquet, for aligned sentences also .tmx;
- a hub data set, ``owner/name[:config][@split]`` (split ``train`` unless given);
- for aligned sentences also ``english|target``: two text files aligned line by line, or two of the
  above with a column ``text``;
- ``sample``, the corpus that this package carries.

Where columns have other names than ours, ``?ours=theirs&…`` follows, with dots into nested ones:
``owner/name?instruction=question&output=answer.text``.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import quiet_loggers

csv.field_size_limit(1 << 27)
MOST_COLUMNS = 1000  # of a CSV file; a row is filled up to as many as the header has
CHUNK = 1 << 20  # bytes of XML that are parsed at once; a longer text is scanned again with each
PARQUET_ROWS = 100  # that are decoded at once
PARQUET_ROW = 500  # bytes in memory besides its texts
PARQUET_FACTOR = 1000  # times its own size that a file may unpack to
SAMPLE = Path(__file__).parents[1] / "resources" / "sample"
HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@/]+))?$")


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user asks (`instruction`, perhaps about an `input`), and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Row:
    """One instruction example; several turns where the source has a conversation."""

    id: str | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Sentence:
    """An English sentence and its translation."""

    id: str | None
    english: str
    target: str


def read_instructions(sources: tuple[str, ...], language: str) -> list[Row]:
    """Rows of all `sources`, in order.

    A row has `instruction`, `output` and perhaps `input` and `id`; or `messages`, a list of
    {"role", "content"} in which user and assistant alternate. System messages are refused: the
    Alpaca prompt has no place for one.

    Raises:
      UserError: a source that is missing, empty, unreachable or of an unknown kind; a bad row.
    """
    keys = ("id", "instruction", "input", "output", "messages")
    return [
        _instruction(raw, f"{source}, row {number}")
        for source in sources
        for number, raw in _rows(source, keys, f"instructions.{language}.jsonl")
    ]


def read_parallel(sources: tuple[str, ...], language: str) -> list[Sentence]:
    """Aligned sentences of all `sources`, in order; structured rows have keys `en` and `language`,
    at the top or under `translation` as in many hub data sets.

    Raises:
      UserError: as `read_instructions`; sides of different lengths.
    """
    sentences = []
    for source in sources:
        if "|" in source:
            sentences += _aligned(source)
        elif source.lower().endswith(".tmx"):
            sentences += _read_tmx(_existing(source), language)
        else:
            rows = _rows(source, ("id", "en", language), f"translations.{language}.jsonl")
            for number, raw in rows:
                texts = raw["translation"] if isinstance(raw.get("translation"), dict) else raw
                english, target = _strings(texts, ("en", language), f"{source}, row {number}")
                sentences.append(Sentence(_id(raw, f"{source}, row {number}"), english, target))
    return sentences


def by_id(rows: list[Row], side: str) -> dict[str, Row]:
    """The rows of a `side` ('English', 'target') by id; those of a side without ids are named by their place,
    #1, #2, …

    Raises:
      UserError: some rows have ids and some not; an id occurs twice.
    """
    has_id = [row.id is not None for row in rows]
    if any(has_id) and not all(has_id):
        raise UserError(
            f"The {side} row {has_id.index(False) + 1} has no id, and others have: give all rows of "
            "that side an 'id', or none."
        )
    table: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        row = row if row.id is not None else replace(row, id=f"#{number}")
        if row.id in table:
            raise UserError(f"Id '{row.id}' occurs twice on the {side} side: make ids unique.")
        table[row.id] = row
    return table


def pair(english: list[Row], target: list[Row]) -> tuple[list[tuple[Row, Row]], int]:
    """(English row, target row) pairs by id, and how many rows found no partner.

    A side without ids is numbered, so that without any the rows pair by order.

    Raises:
      UserError: as `by_id`; no id on both sides; without ids, sides of different lengths.
    """
    ours, theirs = by_id(english, "English"), by_id(target, "target")
    if len(english) != len(target) and all(row.id is None for row in english + target):
        raise UserError(
            f"{len(english)} English and {len(target)} target rows cannot be paired by order: make "
            "them equally many, or give every row of both sides an 'id'."
        )
    pairs = [(ours[key], row) for key, row in theirs.items() if key in ours]
    if not pairs:
        raise UserError(
            f"No English row has the id of a target row (such as '{next(iter(ours))}' and "
            f"'{next(iter(theirs))}', where #n is the n-th row of a side without ids): give counterparts "
            "the same id."
        )
    return pairs, len(english) + len(target) - 2 * len(pairs)


def fingerprint(source: str, language: str) -> str:
    """A hash of what `source` holds now: file contents, or the hub data set's own fingerprint."""
    digest = hashlib.sha256()
    for name in map(_name, source.split("|")):
        if _on_hub(name):
            digest.update(_load_hub(name)._fingerprint.encode())
            continue
        paths = sorted(SAMPLE.glob(f"*.{language}.jsonl")) if name == "sample" else [_existing(name)]
        for path in paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# Rows of a source -----------------------------------------------------------------------------


def _rows(source: str, keys: tuple[str, ...], sample: str) -> Iterator[tuple[int, dict]]:
    """(number counted from 1, row with its columns renamed) of a structured source.

    `keys`: what columns may be renamed to; `sample`: the built-in file.
    """
    name, columns = _name(source), _columns(source, keys)
    if name == "sample":
        rows = _read_jsonl(_sample(sample))
    elif reader := READERS.get(Path(name).suffix.lower()):
        rows = reader(_existing(name))
    elif _on_hub(name):
        rows = _load_hub(name)
    else:
        raise UserError(
            f"Source '{source}' is of no known kind: expected a file ending in "
            f"{', '.join(READERS)}, a hub data set 'owner/name[:config][@split]', or 'sample'."
        )
    number = 0
    for number, row in enumerate(_readable(rows, name), 1):
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number} is not an object with keys: {row!r:.60}.")
        yield number, row | {ours: _column(row, theirs, name, number) for ours, theirs in columns.items()}
    if not number:
        raise UserError(f"Source '{name}' is empty: give a source with at least one row.")


def _name(source: str) -> str:
    """The source without its renamed columns."""
    return source if os.path.exists(source) else source.partition("?")[0]


def _on_hub(name: str) -> bool:
    """Whether it looks like a hub id, and not like a local file that is missing."""
    local = Path(name).suffix.lower() in (*READERS, ".tmx", ".txt") or Path(name).parent.is_dir()
    return bool(HUB_ID.match(name)) and not local


def _columns(source: str, keys: tuple[str, ...]) -> dict[str, str]:
    """{our key: their column} of a source."""
    query = source.removeprefix(_name(source)).removeprefix("?")
    renames = query.split("&") if query else []
    columns = {ours: theirs for ours, equals, theirs in (r.partition("=") for r in renames) if theirs}
    if len(columns) != len(renames) or not columns.keys() <= set(keys):
        raise UserError(
            f"Source '{source}' renames columns by '?{query}': expected 'ours=theirs', joined by '&', "
            f"with one of {', '.join(keys)} on the left."
        )
    return columns


def _column(row: dict, theirs: str, name: str, number: int):
    """A column, or with dots one inside others."""
    value = row
    for key in [theirs] if theirs in row else theirs.split("."):
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{name}, row {number} has no column '{theirs}' (found: {_names(row)}).")
        value = value[key]
    return value


def _read_json(path: Path) -> Iterator:
    rows = _parsed(path.read_text("utf-8-sig"), path)
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}: expected a list of objects.")
    yield from rows


def _read_jsonl(path: Path) -> Iterator:
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
        raise _unreadable(f"File '{path}'", error, "fetch it again.") from error


def _read_tmx(path: Path, language: str) -> Iterator[Sentence]:
    """The units of a Translation Memory eXchange file that have both languages, of either's variants the
    first."""
    number = 0
    try:
        for unit in _tmx_units(path):
            texts = _tmx_texts(unit)
            if texts.keys() >= {"en", _base(language)}:
                number += 1
                yield Sentence(unit.get("tuid"), texts["en"], texts[_base(language)])
    except (ElementTree.ParseError, LookupError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a TMX file ({error}): fetch it again.") from None
    if not number:
        raise UserError(f"{path} has no unit in both 'en' and '{language}': give another file.")


def _tmx_units(path: Path) -> Iterator[ElementTree.Element]:
    parser = ElementTree.XMLPullParser()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            parser.feed(chunk)
            yield from _tmx_complete(parser)
    parser.close()
    yield from _tmx_complete(parser)


def _tmx_complete(parser: ElementTree.XMLPullParser) -> Iterator[ElementTree.Element]:
    for _, element in parser.read_events():
        if _tag(element) == "tu":
            yield element
            element.clear()


def _tmx_texts(unit) -> dict[str, str]:
    texts = {}
    for variant in unit:
        code = variant.get("{http://www.w3.org/XML/1998/namespace}lang") or variant.get("lang", "")
        segment = next((part for part in variant if _tag(part) == "seg"), None)
        if code and segment is not None:
            texts.setdefault(_base(code), _tmx_text(segment).strip())
    return texts


def _tmx_text(element) -> str:
    """Text without the codes that stand for formatting: all inline elements but `hi`."""
    inner = ((_tmx_text(inline) if _tag(inline) == "hi" else "") + (inline.tail or "") for inline in element)
    return (element.text or "") + "".join(inner)


def _tag(element) -> str:
    return element.tag.rpartition("}")[2]


def _base(language: str) -> str:
    return re.split("[-_]", language.lower())[0]


def _readable(rows: Iterable, source: str) -> Iterator:
    try:
        yield from rows
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(
            f"Source '{source}' cannot be read ({error}): fix it, or save it as UTF-8."
        ) from error


READERS: dict[str, Callable[[Path], Iterable]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _load_hub(name: str):
    parts = HUB_ID.match(name)
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    remedy = (
        "if it is gated, ask for access on its page and log in with `hf auth login`; without a network, "
        "give the path of a local copy."
    )
    split = parts["split"] or "train"
    return _load(f"Hub data set '{name}'{offline}", remedy, parts["id"], parts["config"], split=split)


def _load(what: str, remedy: str, *args, split: str = "train", **kwargs):
    with needs("data"):
        import datasets

    try:
        with quiet_loggers("datasets"):  # what it logs, it raises too
            return datasets.load_dataset(*args, split=split, **kwargs)
    except Exception as error:  # the library raises a dozen kinds, and not all of them its own
        raise _unreadable(what, error.__cause__ or error, remedy) from error


def _unreadable(what: str, error: Exception, remedy: str) -> UserError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"{what} cannot be read: {type(error).__name__}: {reason:.200}: {remedy}")


def _aligned(source: str) -> list[Sentence]:
    sides = [_side(part) for part in source.split("|")]
    if len(sides) != 2:
        raise UserError(f"Source '{source}' names {len(sides)} files: expected 'english|target'.")
    english, target = sides
    if len(english) != len(target):
        raise UserError(
            f"'{source}' is not aligned: {len(english)} English and {len(target)} target lines, "
            "expected as many on both sides."
        )
    return [Sentence(None, e, t) for e, t in zip(english, target, strict=True)]


def _side(source: str) -> list[str]:
    """The texts of one side: the lines of a file, or a column."""
    name = _name(source)
    if _on_hub(name) or Path(name).suffix.lower() in READERS:
        rows = _rows(source, ("text",), "")
        return [_strings(raw, ("text",), f"{name}, row {number}")[0].strip() for number, raw in rows]
    (text,) = _readable((path.read_text("utf-8-sig") for path in [_existing(name)]), name)
    if not text:
        raise UserError(f"Source '{name}' is empty: give a source with at least one line.")
    # not splitlines(), which also splits at the form feeds and separators that texts contain
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"There is no file '{name}': give data.* a local file or a hub data set.")
    return path


def _sample(name: str) -> Path:
    path = SAMPLE / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in SAMPLE.glob("*.jsonl"))) or "no files"
        raise UserError(f"The sample corpus has no {name} (it has {known}): give a source.")
    return path


# One row --------------------------------------------------------------------------------------


def _instruction(raw: dict, where: str) -> Row:
    if raw.get("messages") is not None:
        return Row(_id(raw, where), _conversation(raw["messages"], where))
    instruction, output = _strings(raw, ("instruction", "output"), where)
    (input,) = _strings(raw, ("input",), where) if raw.get("input") else ("",)
    return Row(_id(raw, where), (Turn(instruction, input, output),))


def _conversation(messages, where: str) -> tuple[Turn, ...]:
    messages = messages if isinstance(messages, list) else [messages]
    roles = [m.get("role") if isinstance(m, dict) else m for m in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"{where}: messages have the roles {roles!r:.200}; expected user and assistant in turn, from "
            "user to assistant, without a system message."
        )
    texts = [_strings(message, ("content",), where)[0] for message in messages]
    return tuple(Turn(user, "", answer) for user, answer in zip(texts[::2], texts[1::2]))


def _strings(raw: dict, keys: tuple[str, ...], where: str) -> list[str]:
    for key in keys:
        if not isinstance(raw.get(key), str):
            raise UserError(f"{where} has no text under '{key}' (keys found: {_names(raw)}): add it.")
        if any("\ud800" <= character <= "\udfff" for character in raw[key]):
            raise UserError(f"{where} has half a character (a surrogate) under '{key}': fix the text.")
    return [raw[key] for key in keys]


def _names(row: dict) -> str:
    return ", ".join(map(str, row))[:300] or "none"


def _id(raw: dict, where: str) -> str | None:
    name = raw.get("id")
    blank = name in (None, "") or name != name  # an empty cell, a NaN
    return None if blank else _strings({"id": str(name)}, ("id",), where)[0]
