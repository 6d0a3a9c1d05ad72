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

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from prom_jax.data.files import READERS, existing, read_jsonl, readable, unreadable
from prom_jax.data.rows import Row, Sentence, instruction_row, names_of, row_id, strings
from prom_jax.data.tmx import read_tmx
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import quiet_loggers

SAMPLE = Path(__file__).parents[1] / "resources" / "sample"
HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@/]+))?$")


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
        instruction_row(raw, f"{source}, row {number}")
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
            sentences += read_tmx(existing(source), language)
        else:
            rows = _rows(source, ("id", "en", language), f"translations.{language}.jsonl")
            for number, raw in rows:
                texts = raw["translation"] if isinstance(raw.get("translation"), dict) else raw
                english, target = strings(texts, ("en", language), f"{source}, row {number}")
                sentences.append(Sentence(row_id(raw, f"{source}, row {number}"), english, target))
    return sentences


def fingerprint(source: str, language: str) -> str:
    """A hash of what `source` holds now: file contents, or the hub data set's own fingerprint."""
    digest = hashlib.sha256()
    for name in map(_name, source.split("|")):
        if _on_hub(name):
            digest.update(_load_hub(name)._fingerprint.encode())
            continue
        paths = sorted(SAMPLE.glob(f"*.{language}.jsonl")) if name == "sample" else [existing(name)]
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
        rows = read_jsonl(_sample(sample))
    elif reader := READERS.get(Path(name).suffix.lower()):
        rows = reader(existing(name))
    elif _on_hub(name):
        rows = _load_hub(name)
    else:
        raise UserError(
            f"Source '{source}' is of no known kind: expected a file ending in "
            f"{', '.join(READERS)}, a hub data set 'owner/name[:config][@split]', or 'sample'."
        )
    number = 0
    for number, row in enumerate(readable(rows, name), 1):
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
            raise UserError(f"{name}, row {number} has no column '{theirs}' (found: {names_of(row)}).")
        value = value[key]
    return value


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
        raise unreadable(what, error.__cause__ or error, remedy) from error


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
        return [strings(raw, ("text",), f"{name}, row {number}")[0].strip() for number, raw in rows]
    (text,) = readable((path.read_text("utf-8-sig") for path in [existing(name)]), name)
    if not text:
        raise UserError(f"Source '{name}' is empty: give a source with at least one line.")
    # not splitlines(), which also splits at the form feeds and separators that texts contain
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _sample(name: str) -> Path:
    path = SAMPLE / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in SAMPLE.glob("*.jsonl"))) or "no files"
        raise UserError(f"The sample corpus has no {name} (it has {known}): give a source.")
    return path
