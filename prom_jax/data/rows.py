"""One row of a source: an instruction example, or a sentence and its translation."""

from dataclasses import dataclass

from prom_jax.utils.errors import UserError


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


def instruction_row(raw: dict, where: str) -> Row:
    if raw.get("messages") is not None:
        return Row(row_id(raw, where), _conversation(raw["messages"], where))
    instruction, output = strings(raw, ("instruction", "output"), where)
    (input,) = strings(raw, ("input",), where) if raw.get("input") else ("",)
    return Row(row_id(raw, where), (Turn(instruction, input, output),))


def _conversation(messages, where: str) -> tuple[Turn, ...]:
    messages = messages if isinstance(messages, list) else [messages]
    roles = [m.get("role") if isinstance(m, dict) else m for m in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"{where}: messages have the roles {roles!r:.200}; expected user and assistant in turn, from "
            "user to assistant, without a system message."
        )
    texts = [strings(message, ("content",), where)[0] for message in messages]
    return tuple(Turn(user, "", answer) for user, answer in zip(texts[::2], texts[1::2]))


def strings(raw: dict, keys: tuple[str, ...], where: str) -> list[str]:
    for key in keys:
        if not isinstance(raw.get(key), str):
            raise UserError(f"{where} has no text under '{key}' (keys found: {names_of(raw)}): add it.")
        if any("\ud800" <= character <= "\udfff" for character in raw[key]):
            raise UserError(f"{where} has half a character (a surrogate) under '{key}': fix the text.")
    return [raw[key] for key in keys]


def names_of(row: dict) -> str:
    return ", ".join(map(str, row))[:300] or "none"


def row_id(raw: dict, where: str) -> str | None:
    name = raw.get("id")
    blank = name in (None, "") or name != name  # an empty cell, a NaN
    return None if blank else strings({"id": str(name)}, ("id",), where)[0]
