"""Read instructions and aligned sentences from wherever they are.

A *source* is a string:

- a local file ending in .json, .jsonl, .csv, .tsv or .parquet;
- for aligned sentences also ``english.txt|target.txt``, two files aligned line by line;
- a hub data set, ``owner/name[:config][@split]`` (split ``train`` unless given);
- ``sample``, the corpus that this package carries.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prom_jax.errors import UserError

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
    return [
        _instruction(raw, f"{source}, row {number}")
        for source in sources
        for number, raw in _rows(source, f"instructions.{language}.jsonl")
    ]


def read_parallel(sources: tuple[str, ...], language: str) -> list[Sentence]:
    """Aligned sentences of all `sources`, in order; structured rows have keys `en` and `language`,
    at the top or under `translation` as in many hub data sets.

    Raises:
      UserError: as `read_instructions`; text files with different numbers of lines.
    """
    sentences = []
    for source in sources:
        if "|" in source:
            sentences += _aligned_text(source)
            continue
        for number, raw in _rows(source, f"translations.{language}.jsonl"):
            texts = raw.get("translation", raw)
            english, target = _strings(texts, ("en", language), f"{source}, row {number}")
            sentences.append(Sentence(_id(raw), english, target))
    return sentences


def pair(english: list[Row], target: list[Row]) -> tuple[list[tuple[Row, Row]], int]:
    """(English row, target row) pairs, and how many rows found no partner.

    By id when rows have one, else by order.

    Raises:
      UserError: a row without id where others on both sides have one; an id that occurs twice; no id on
        both sides; without ids, sides of different lengths.
    """
    named = [[row.id is not None for row in side] for side in (english, target)]
    if all(map(any, named)):
        for side, name in zip(named, ("English", "target")):
            if not all(side):
                raise UserError(
                    f"The {name} row {side.index(False) + 1} has no id, and others have: give all rows of "
                    "both sides an 'id', or none."
                )
        by_id, wanted = _by_id(english, "English"), _by_id(target, "target")
        pairs = [(by_id[key], row) for key, row in wanted.items() if key in by_id]
        if not pairs:
            raise UserError(
                f"No English row has the id of a target row (such as '{english[0].id}' and "
                f"'{target[0].id}'): give counterparts the same id."
            )
        return pairs, len(english) + len(target) - 2 * len(pairs)
    if len(english) != len(target):
        raise UserError(
            f"{len(english)} English and {len(target)} target rows cannot be paired by order: make "
            "them equally many, or give every row of both sides an 'id'."
        )
    return list(zip(english, target, strict=True)), 0


def fingerprint(source: str, language: str) -> str:
    """A hash of what `source` holds now: file contents, or the hub data set's own fingerprint."""
    if HUB_ID.match(source) and not Path(source).exists():
        return _load_hub(source)._fingerprint
    if source == "sample":
        paths = sorted(SAMPLE.glob(f"*.{language}.jsonl"))
    else:
        paths = [_existing(name) for name in source.split("|")]
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# Rows of a source -----------------------------------------------------------------------------


def _rows(source: str, sample: str) -> Iterator[tuple[int, dict]]:
    """(number counted from 1, row) of a structured source; `sample` is the built-in file."""
    if source == "sample":
        rows = _read_jsonl(_sample(sample))
    elif reader := READERS.get(Path(source).suffix.lower()):
        rows = reader(_existing(source))
    elif HUB_ID.match(source) and not Path(source).exists():
        rows = _load_hub(source)
    else:
        raise UserError(
            f"Source '{source}' is of no known kind: expected a file ending in "
            f"{', '.join(READERS)}, a hub data set 'owner/name[:config][@split]', or 'sample'."
        )
    number = 0
    for number, row in enumerate(_readable(rows, source), 1):
        if not isinstance(row, dict):
            raise UserError(f"{source}, row {number} is not an object with keys: {row!r:.60}.")
        yield number, row
    if not number:
        raise UserError(f"Source '{source}' is empty: give a source with at least one row.")


def _read_json(path: Path) -> list:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend the file.") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}: expected a list of objects.")
    return rows


def _read_jsonl(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(
                        f"{path}, line {number} is not valid JSON ({error}): mend the file."
                    ) from None


def _read_csv(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_tsv(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:  # a quote is text like any other here
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({error}): fetch it again.") from None


def _readable(rows: Iterable, source: str) -> Iterator:
    try:
        yield from rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Source '{source}' cannot be read ({error}): save it as UTF-8 text.") from error


READERS: dict[str, Callable[[Path], Iterable]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _load_hub(source: str):
    import datasets

    name = HUB_ID.match(source)
    try:
        return datasets.load_dataset(name["id"], name["config"], split=name["split"] or "train")
    except Exception as error:  # the hub's client raises a dozen kinds, and not all of them its own
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Hub data set '{source}' cannot be read{offline}: {type(error).__name__}: {reason} "
            "If it is gated, ask for access on its page and log in with `hf auth login`; without a "
            "network, give the path of a local copy."
        ) from error


def _aligned_text(source: str) -> list[Sentence]:
    files = [_existing(name) for name in source.split("|")]
    if len(files) != 2:
        raise UserError(f"Source '{source}' names {len(files)} files: expected 'en.txt|target.txt'.")
    # not splitlines(), which also splits at the form feeds and separators that texts contain
    english, target = (path.read_text("utf-8-sig").removesuffix("\n").split("\n") for path in files)
    if len(english) != len(target):
        raise UserError(
            f"'{source}' is not aligned: {len(english)} English and {len(target)} target lines, "
            "expected as many on both sides."
        )
    if english == target == [""]:
        raise UserError(f"Source '{source}' is empty: give a source with at least one row.")
    return [Sentence(None, e.strip(), t.strip()) for e, t in zip(english, target, strict=True)]


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
        return Row(_id(raw), _conversation(raw["messages"], where))
    instruction, output = _strings(raw, ("instruction", "output"), where)
    (input,) = _strings(raw, ("input",), where) if raw.get("input") else ("",)
    return Row(_id(raw), (Turn(instruction, input, output),))


def _conversation(messages, where: str) -> tuple[Turn, ...]:
    messages = messages if isinstance(messages, list) else [messages]
    roles = [m.get("role") if isinstance(m, dict) else m for m in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"{where}: messages have the roles {roles}; expected user and assistant in turn, from "
            "user to assistant, without a system message."
        )
    texts = [_strings(message, ("content",), where)[0] for message in messages]
    return tuple(Turn(user, "", answer) for user, answer in zip(texts[::2], texts[1::2]))


def _strings(raw: dict, keys: tuple[str, ...], where: str) -> list[str]:
    for key in keys:
        if not isinstance(raw.get(key), str):
            found = ", ".join(map(str, raw)) or "none"
            raise UserError(f"{where} has no text under '{key}' (keys found: {found}): add it.")
    return [raw[key] for key in keys]


def _id(raw: dict) -> str | None:
    return None if raw.get("id") is None else str(raw["id"])


def _by_id(rows: list[Row], side: str) -> dict[str, Row]:
    table: dict[str, Row] = {}
    for row in rows:
        if row.id in table:
            raise UserError(f"Id '{row.id}' occurs twice on the {side} side: make ids unique.")
        table[row.id] = row
    return table
