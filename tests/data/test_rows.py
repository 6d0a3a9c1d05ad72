"""What becomes of rows as people have them: each shape is read, and what cannot be used is counted."""

import json

import pytest

from prom_jax.data import sources
from prom_jax.data.rows import Row, Sentence, Text, Turn
from prom_jax.utils.errors import UserError


def said(*pairs, keys=("role", "content")):
    """Messages."""
    return [dict(zip(keys, pair)) for pair in pairs]


HUMAN = {"keys": ("from", "value")}
GREETING = (Turn("Xin chào", "", "Chào bạn"),)
CHAT = said(("user", "Xin chào"), ("assistant", "Chào bạn"))
SHAPES = {
    "instruction": ({"instruction": "Xin chào", "output": "Chào bạn"}, Row(None, GREETING)),
    "without input": ({"instruction": "a", "input": None, "output": "b"}, Row(None, (Turn("a", "", "b"),))),
    "messages": ({"id": 3, "messages": CHAT}, Row("3", GREETING)),
    "system": (
        {"messages": [*said(("system", "Bạn là trợ lý")), *CHAT]},
        Row(None, GREETING, "Bạn là trợ lý"),
    ),
    "sharegpt": (
        {"conversations": said(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), **HUMAN)},
        Row(None, (Turn("a", "", "b"), Turn("c", "", "d"))),
    ),
    "sharegpt with system": (
        {"system": "Brief.", "conversations": said(("human", "a"), ("gpt", "b"), **HUMAN)},
        Row(None, (Turn("a", "", "b"),), "Brief."),
    ),
    "prompt": ({"prompt": "a", "completion": "b"}, Row(None, (Turn("a", "", "b"),))),
    "prompt as messages": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Row(None, GREETING)),
    "question": ({"question": "a", "context": "c", "answer": "b"}, Row(None, (Turn("a", "c", "b"),))),
    "JSON text": ({"messages": json.dumps(CHAT)}, Row(None, GREETING)),
    "parts": (
        {"messages": said(("user", [{"type": "text", "text": "Xin "}, {"type": "text", "text": "chào"}]))
         + CHAT[1:]},
        Row(None, GREETING),
    ),
    "two shapes": ({"prompt": "unused", "messages": CHAT}, Row(None, GREETING)),
    "an empty one of two": (
        {"messages": None, "prompt": "a", "completion": "b"},
        Row(None, (Turn("a", "", "b"),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_known_by_its_keys(jsonl, name):
    raw, row = SHAPES[name]
    assert sources.read_instructions((jsonl("a.jsonl", [raw]),), "vi") == [row]


def test_the_shape_can_be_named(jsonl):
    source = jsonl("a.jsonl", [{"messages": CHAT, "prompt": "a", "completion": "b"}])
    assert sources.read_instructions((f"{source}?format=prompt",), "vi")[0].turns == (Turn("a", "", "b"),)
    with pytest.raises(UserError, match=r"row 1 has no 'question' \(keys found: messages, prompt"):
        sources.read_instructions((f"{source}?format=question",), "vi")
    with pytest.raises(UserError, match="sets format=alpaca: expected one of messages, sharegpt"):
        sources.read_instructions((f"{source}?format=alpaca",), "vi")


TOOLS = [
    *said(("user", "Weather?")),
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]},
    *said(("tool", "sunny"), ("assistant", "It is sunny.")),
]


@pytest.mark.parametrize(
    ("messages", "turns", "left_out"),
    [
        (CHAT + said(("user", "And?")), GREETING, {"last turns of the user": 1}),
        (said(("assistant", "Welcome!")) + CHAT, GREETING, {"first turns of the assistant": 1}),
        (TOOLS, (Turn("Weather?", "", "It is sunny."),), {"turns of tools": 2}),
    ],
)
def test_what_of_a_conversation_cannot_be_used_is_left_out_and_counted(jsonl, messages, turns, left_out):
    tally, source = sources.Tally(), jsonl("a.jsonl", [{"messages": messages}])
    (row,) = sources.read_instructions((source,), "vi", tally)
    assert row.turns == turns
    assert tally.as_dict() == {source: {"rows": 1, "bad": {}, "left_out": left_out}}


BAD = {
    "null": ({"instruction": "x", "output": None}, "no text under 'output'"),
    "number": ({"instruction": "x", "output": 7}, "a number in place of a text under 'output'"),
    "zero": ({"instruction": "x", "input": 0, "output": "a"}, "a number in place of a text under 'input'"),
    "five": ({"instruction": "x", "input": 5, "output": "a"}, "a number in place of a text under 'input'"),
    "synonyms": (
        {"query": "a", "response": "b"},
        r"no text under 'instruction' \(keys found: query, response\), the nearest shape being 'instruction' "
        r"with instruction and output: rename by '\?instruction=query&output=response' after",
    ),
    "half": ({"instruction": "a", "text_vi": "b"}, r"no text under 'output' .*rename by '\?output=…'"),
    "a list elsewhere": ({"dialog": CHAT}, r"'messages' with messages: rename by '\?messages=dialog'"),
    "nothing": ({"x": 1}, r"no text under 'instruction' \(keys found: x\)"),
    "raw": ({"text": "a"}, r"raw text, where instructions are expected \(name the source in data.text\)"),
    "turns": ({"messages": said(("user", "a"), ("user", "b"), ("assistant", "c"))}, "user before user"),
    "a late system": ({"messages": CHAT + said(("system", "x")) + CHAT}, "such as assistant before system"),
    "no answer": ({"messages": said(("user", "a"))}, "no answer of the assistant under 'messages'"),
    "role": ({"messages": said(("narrator", "a"))}, "a message of the role 'narrator'"),
    "picture": ({"messages": said(("user", [{"type": "image"}])) + CHAT[1:]}, "'image' in place of a text"),
    "no list": ({"messages": "Hello"}, "a str in place of a list of messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_named_or_left_out(jsonl, name):
    raw, reason = BAD[name]
    source = jsonl("a.jsonl", [{"instruction": "Hi", "output": "yo"}, raw])
    with pytest.raises(UserError, match=rf"a.jsonl, row 2 has .*{reason}.*data.bad_rows=skip"):
        sources.read_instructions((source,), "vi")
    tally = sources.Tally("skip")
    assert sources.read_instructions((source,), "vi", tally) == [Row(None, (Turn("Hi", "", "yo"),))]
    tally.check()
    assert tally.as_dict()[source]["rows"] == 2 and sum(tally.as_dict()[source]["bad"].values()) == 1


def test_all_bad_rows_are_counted_in_one_run(jsonl):
    rows = [{"instruction": "a", "output": "b" if i % 3 else None} for i in range(30)]
    source = jsonl("a.jsonl", [*rows, {"instruction": "a", "output": 1}])
    message = (
        r"10 of 31 rows have no text under 'output' .*: \S*a.jsonl, row 1; \S*a.jsonl, row 4; \S*a.jsonl, "
        r"row 7, …; \S*a.jsonl, row 31 has a number in place of a text under 'output'. Fix them"
    )
    with pytest.raises(UserError, match=message):
        sources.read_instructions((source,), "vi")
    nothing = jsonl("b.jsonl", [{"x": 1}] * 2)
    tally = sources.Tally("skip")
    sources.read_instructions((nothing,), "vi", tally)
    with pytest.raises(
        UserError, match=r"Nothing of source '\S*b.jsonl' can be used: 2 of 2 rows have no text"
    ):
        tally.check()
    with pytest.raises(UserError, match=r"data.bad_rows is 'drop': expected one of refuse, skip"):
        sources.Tally("drop")


def test_pairs_of_sides_stay_aligned_when_a_row_is_left_out(jsonl):
    english = jsonl("en.jsonl", [{"text": "One"}, {"text": 2}, {"text": "Three"}])
    target = jsonl("vi.jsonl", [{"text": "Một"}, {"text": "Hai"}, {"text": "Ba"}])
    found = sources.read_parallel((f"{english}|{target}",), "vi", sources.Tally("skip"))
    assert found == [Sentence(None, "One", "Một"), Sentence(None, "Three", "Ba")]


def test_raw_text(tmp_path, jsonl):
    lines = tmp_path / "vi.txt"
    lines.write_text("Xin chào\n\n Tạm biệt \n")
    rows = jsonl("a.jsonl", [{"id": "w1", "text": "Sông"}])
    expected = [Text(None, "Xin chào"), Text(None, "Tạm biệt"), Text("w1", "Sông")]
    assert sources.read_texts((str(lines), rows)) == expected
    (tmp_path / "folder").mkdir()
    lines.rename(tmp_path / "folder" / "vi.txt")
    assert sources.read_texts((str(tmp_path / "folder"),)) == expected[:2]
