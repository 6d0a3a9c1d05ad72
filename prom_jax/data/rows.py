"""What a row says: the shapes of rows that are in use, recognised by their keys.

`SHAPES` has a line for each shape: the keys that its rows have and those that they may have. `MEANINGS` has
the other names under which the same things are found, for a message that says which rename would do.
"""

import difflib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: what the user asks (`instruction`, perhaps about an `input`), and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction example; several turns where the source has a conversation. `system` is the message
    that comes before them; '' for none. `repeat` is how often an epoch has it, here and in the next ones."""

    id: str | None
    turns: tuple[Turn, ...]
    system: str = ""
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Sentence:
    """An English sentence and its translation."""

    id: str | None
    english: str
    target: str
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text to continue."""

    id: str | None
    text: str
    repeat: int = 1


class BadRow(ValueError):
    """A row that cannot be used, with the reason as the end of a sentence: "row 3 has …"."""


def instruction_row(raw: dict, shape: str = "") -> tuple[Row, Counter]:
    """A row of any of the shapes of instructions.

    Args:
      raw: as the source has it.
      shape: one of SHAPES; '' for the first whose keys the row has.

    Returns:
      The row, and what of it was left out: {reason: turns}.

    Raises:
      BadRow: for one that cannot be used.
    """
    found = SHAPES[shape] if shape else _shape_of(raw)
    if missing := [key for key in found.keys if key not in raw]:
        raise BadRow(f"no '{missing[0]}' (keys found: {names_of(raw)})")
    return found.read(raw, found)


def sentence_row(raw: dict, language: str) -> Sentence:
    """A row with an English sentence and one in a language, at the top or under `translation`.

    Raises:
      BadRow: for one that has not.
    """
    texts = raw["translation"] if isinstance(raw.get("translation"), dict) else raw
    return Sentence(row_id(raw), text_of(texts, "en"), text_of(texts, language))


def text_row(raw: dict) -> Text:
    """A row of raw text.

    Raises:
      BadRow: for one without text.
    """
    return Text(row_id(raw), text_of(raw, "text"))


def row_id(raw: dict) -> str | None:
    """The row's id as a text; None without one."""
    name = raw.get("id")
    blank = name in (None, "") or name != name  # an empty cell, a NaN
    return None if blank else text_of({"id": str(name)}, "id")


def text_of(raw: dict, key: str, optional: bool = False) -> str:
    """The text under a key; where it is `optional`, '' for nothing. A number is no text: nobody can tell
    whether 7 or 7.0 was meant.

    Raises:
      BadRow: there is none, or something else.
    """
    value = raw.get(key)
    if optional and (value is None or value != value):  # a NaN is pandas' empty cell
        return ""
    if value is None:
        raise BadRow(f"no text under '{key}' (keys found: {names_of(raw)})")
    if not isinstance(value, str):
        raise BadRow(f"{_kind(value)} in place of a text under '{key}'")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"half a character (a surrogate) under '{key}'") from None
    return value


def names_of(row: dict) -> str:
    """The keys of a row, for messages."""
    return ", ".join(map(str, row))[:300] or "none"


def _kind(value) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


# Exchanges ----------------------------------------------------------------------------------------


def _exchange(raw: dict, shape: "Shape") -> tuple[Row, Counter]:
    """A question, perhaps about a text, and its answer."""
    asks, answers = shape.keys
    about = text_of(raw, shape.optional[0], optional=True) if shape.optional else ""
    return Row(row_id(raw), (Turn(text_of(raw, asks), about, text_of(raw, answers)),)), Counter()


def _prompt_and_completion(raw: dict, shape: "Shape") -> tuple[Row, Counter]:
    """Two texts, or the messages of a conversation in two parts."""
    parts = [_as_messages(raw[key]) for key in shape.keys]
    if all(isinstance(part, list) for part in parts):
        return _conversation(raw, [message for part in parts for message in part], "completion")
    return _exchange(raw, shape)


# Conversations ------------------------------------------------------------------------------------

# What roles are called.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
    "tool": ("tool", "function", "function_call", "function_response", "observation", "ipython"),
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def _chat(raw: dict, shape: "Shape") -> tuple[Row, Counter]:
    (key,) = shape.keys
    return _conversation(raw, _as_messages(raw[key]), key)


def _as_messages(value):
    """A list of messages, which may come as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _conversation(raw: dict, messages, key: str) -> tuple[Row, Counter]:
    """Exchanges of user and assistant. What these are not is left out and counted: turns of tools, and of
    the assistant that do nothing but call them; what the assistant says first; what the user says last."""
    if not isinstance(messages, list):
        raise BadRow(f"{_kind(messages)} in place of a list of messages under '{key}'")
    said, left_out = [], Counter()
    for message in messages:
        role, content = _message(message, key)
        if role == "tool" or (role == "assistant" and message.get("tool_calls")):
            left_out["turns of tools"] += 1
        else:
            said.append((role, content))
    system = text_of(raw, "system", optional=True)
    if said and said[0][0] == "system":
        system = said.pop(0)[1]
    while said and said[0][0] == "assistant":
        said.pop(0)
        left_out["first turns of the assistant"] += 1
    if said and said[-1][0] == "user":
        said.pop()
        left_out["last turns of the user"] += 1
    roles = [role for role, _ in said]
    if not roles:
        raise BadRow(f"no answer of the assistant under '{key}'")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRow(f"roles that do not take turns under '{key}', {_first_repeated(roles)}")
    texts = [content for _, content in said]
    turns = (Turn(asked, "", answer) for asked, answer in zip(texts[::2], texts[1::2]))
    return Row(row_id(raw), tuple(turns), system), left_out


def _first_repeated(roles: list[str]) -> str:
    for before, role in itertools.pairwise(roles):
        if role == before or role == "system":
            return f"such as {before} before {role}"
    return f"such as {roles[0]} first"


def _message(message, key: str) -> tuple[str, str]:
    """The role and the text of a message."""
    if not isinstance(message, dict):
        raise BadRow(f"{_kind(message)} in place of a message under '{key}'")
    name = next((message[k] for k in ROLE_KEYS if k in message), None)
    role = _ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"a message of the role {name!r:.40} under '{key}'")
    content_key = next((k for k in CONTENT_KEYS if k in message), CONTENT_KEYS[0])
    content = message.get(content_key)
    if role == "tool" or (role == "assistant" and message.get("tool_calls")):
        return role, ""
    if isinstance(content, list):
        return role, "".join(_part(part, content_key) for part in content)
    return role, text_of(message, content_key)


def _part(part, key: str) -> str:
    """A part of a message's content."""
    if isinstance(part, dict) and part.get("type") == "text":
        return text_of(part, "text")
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadRow(f"{kind!r:.40} in place of a text among the parts of '{key}'")


def _raw_text(raw: dict, shape: "Shape") -> tuple[Row, Counter]:
    raise BadRow("raw text, where instructions are expected (name the source in data.text)")


# Shapes -------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A shape of instruction rows.

    keys: that its rows have; the first is what is asked, or all of a conversation.
    optional: that they may have.
    read: makes a `Row` of one, and says what of it was left out.
    """

    keys: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict, "Shape"], tuple[Row, Counter]]


# In the order in which they are tried.
SHAPES = {
    "messages": Shape(("messages",), ("system",), _chat),
    "sharegpt": Shape(("conversations",), ("system",), _chat),
    "instruction": Shape(("instruction", "output"), ("input",), _exchange),
    "prompt": Shape(("prompt", "completion"), (), _prompt_and_completion),
    "question": Shape(("question", "answer"), ("context",), _exchange),
    "text": Shape(("text",), (), _raw_text),
}
KEYS = (
    "id",
    *dict.fromkeys(key for s in ("instruction", *SHAPES) for key in SHAPES[s].keys + SHAPES[s].optional),
)
# Other names of the same, for messages alone.
MEANINGS = (
    ("instruction", "prompt", "question", "query", "q", "task", "problem", "user", "human"),
    ("output", "completion", "answer", "response", "reply", "a", "target", "solution", "assistant", "chosen"),
    ("input", "context", "passage", "document"),
    (
        "messages",
        "conversations",
        "conversation",
        "dialog",
        "dialogue",
        "turns",
        "chat",
        "conversations_list",
    ),
    ("text", "content", "body", "sentence", "article"),
)


def _shape_of(raw: dict) -> Shape:
    """The first shape whose keys a row has, with something under them if it can be."""
    fitting = [shape for shape in SHAPES.values() if raw.keys() >= set(shape.keys)]
    filled = (shape for shape in fitting if all(raw[key] is not None for key in shape.keys))
    if not fitting:
        raise BadRow(_unknown(raw))
    return next(filled, fitting[0])


def _unknown(raw: dict) -> str:
    """Of a row of no known shape: what it lacks of the nearest one, and the rename that would do."""
    renames = {name: _renames(raw, shape.keys) for name, shape in SHAPES.items()}
    lacking = {
        name: [key for key in shape.keys if key not in raw and key not in renames[name]]
        for name, shape in SHAPES.items()
    }
    nearest = min(SHAPES, key=lambda n: (len(lacking[n]) / len(SHAPES[n].keys), len(renames[n])))
    keys = SHAPES[nearest].keys
    if len(lacking[nearest]) == len(keys):
        nearest, keys = "instruction", SHAPES["instruction"].keys
    wanted = {key: renames[nearest].get(key, "…") for key in keys if key not in raw}
    query = "&".join(f"{ours}={theirs}" for ours, theirs in wanted.items())
    return (
        f"no text under '{next(iter(wanted))}' (keys found: {names_of(raw)}), the nearest shape being "
        f"'{nearest}' with {' and '.join(keys)}: rename by '?{query}' after the source"
    )


def _renames(raw: dict, keys: Iterable[str]) -> dict[str, str]:
    """For each key that a row lacks the one that seems to stand for it, where there is one."""
    free = [key for key in raw if isinstance(key, str) and key not in keys]
    found: dict[str, str] = {}
    for key in (key for key in keys if key not in raw):
        names = next((names for names in MEANINGS if key in names), (key,))
        spelled = {other.lower(): other for other in free if other not in found.values()}
        like = [name for name in names if name in spelled] or difflib.get_close_matches(key, spelled, 1, 0.75)
        if like:
            found[key] = spelled[like[0]]
    return found
