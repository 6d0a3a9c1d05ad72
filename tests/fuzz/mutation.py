"""How inputs are changed: as bytes, or as what they mean."""

import copy
import json
import random

import atheris

INTEGERS = (0, 1, 2, 3, 8, 31, 255, *(2**n + d for n in (16, 31, 32, 53, 60, 63, 64) for d in (-1, 0)))
DEEP = "@deep@"  # stands for lists in lists, which json could not write
VALUES = (
    None, True, False, -1, -(2**63), 10**12, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", " ", "1", "a b c", "../x", "/etc/passwd", "..", "\0", "\ud800", "\n\x1b[31m", "é" * 300,
    "a" * 20_000, [], {}, [[]], [0], ["x"], {"x": 0}, DEEP, *INTEGERS,
)  # fmt: skip


def raw(data: bytes, size: int, chance: random.Random) -> bytes:
    """Changes bytes, or a number among them."""
    if chance.random() < 0.5 or len(data) < 16:
        return atheris.Mutate(data, size)
    width = chance.choice((1, 2, 4, 8))
    at = chance.randrange(len(data) - width)
    number = chance.choice(INTEGERS) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def tree(data: bytes, size: int, chance: random.Random) -> bytes:
    """Changes JSON: values, keys, what is in what."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return atheris.Mutate(data, size)
    if chance.random() < 0.1:
        return atheris.Mutate(data, size)
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = _changed(value, chance)
    return written(value)[:size]


def lines(data: bytes, size: int, chance: random.Random) -> bytes:
    """Changes a line of JSON, or the bytes."""
    rows = data.split(b"\n")
    at = chance.randrange(len(rows))
    rows[at] = tree(rows[at], size, chance)
    return b"\n".join(rows)[:size]


def header(data: bytes, size: int, chance: random.Random) -> bytes:
    """Changes the JSON header of safetensors, whose length is kept true, or the bytes."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.2 or length > len(data):
        return raw(data, size, chance)
    text = tree(data[8 : 8 + length], size, chance)
    return (len(text).to_bytes(8, "little") + text + data[8 + length :])[:size]


def written(value) -> bytes:
    """JSON in which `DEEP` is what it stands for."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 50_000 + "]" * 50_000).encode()


def _changed(value, chance: random.Random):
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return _other(value, chance)
    value = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other, what = chance.choice(keys), chance.choice(keys), chance.random()
    if what < 0.08:
        del value[key]
    elif what < 0.16:
        value[key] = value[other]
    elif what < 0.24 and isinstance(value, dict):
        value[str(chance.choice(VALUES))] = value[key]
    elif what < 0.24:
        value.append(value[key])
    else:
        value[key] = _changed(value[key], chance)
    return value


def _other(value, chance: random.Random):
    what = chance.random()
    if isinstance(value, int | float) and what < 0.3:
        return value + chance.choice((-1, 1, 2, 0.5))
    if isinstance(value, str) and what < 0.3:
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice((value, "", " ", "x", "\0", "▁", "é", "/")) + value[at + 1 :]
    if what < 0.4:
        return [value] if what < 0.35 else {"x": value}
    return copy.deepcopy(chance.choice(VALUES))
