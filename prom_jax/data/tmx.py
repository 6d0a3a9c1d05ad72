"""Translation Memory eXchange files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prom_jax.data.rows import Sentence
from prom_jax.utils.errors import UserError

CHUNK = 1 << 20  # bytes of XML that are parsed at once; a longer text is scanned again with each


def read_tmx(path: Path, language: str) -> Iterator[Sentence]:
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
    element: Any
    for _, element in parser.read_events():  # type: ignore[misc]  # the stub has events of all kinds
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
