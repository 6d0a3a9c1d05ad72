"""Splitting, protecting, the cache and the whole way of rows, with a translator that is a Python function."""

import os
import random
import sqlite3
import threading
import time

import pytest

from prom_jax.data.rows import Row, Turn
from prom_jax.data.translation import translate
from prom_jax.data.translation.translate import Cache, mask, split
from prom_jax.utils.errors import UserError


class Toy:
    """Translates English into 'Thai' by spelling each letter as a Thai one; counts what it is asked."""

    name, price, rate, workers, max_texts, max_characters = "toy", 20.0, 100.0, 3, 4, 200

    def __init__(self, spell=None):
        self.requests = []
        self.spell = spell or spell_thai

    def translate(self, texts):
        self.requests.append(list(texts))
        return [self.spell(text) for text in texts]

    @property
    def sent(self):
        return [text for request in self.requests for text in request]


def spell_thai(text):
    return "".join(chr(0x0E01 + ord(c.lower()) - 97) if c.isascii() and c.isalpha() else c for c in text)


def row(instruction, output="It rains.", input="", id="1"):
    return Row(id, (Turn(instruction, input, output),))


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "translations.sqlite")
    yield cache
    cache.close()


FIELD = """Write a poem:

  1. about *rain*,\t
  - about 3 + 4 = 7
```python
print("left as it is")  # and this
```
7 x 6 = 42
def f(x):
    return x + 1
Then stop.   \r
"""


def test_split_sends_lines_of_prose_alone():
    assert split(FIELD)[1::2] == ["Write a poem:", "about *rain*,", "about 3 + 4 = 7", "Then stop."]


def test_split_loses_nothing():
    alphabet = [
        "a word",
        "`x`",
        " ",
        "\n",
        "\r\n",
        "\u2028",
        "\x0c",
        "```",
        "1. ",
        "- ",
        "7",
        "{",
        ";",
        "ก",
        "=",
        "[0]",
    ]
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices(alphabet, k=generator.randrange(40)))
        assert "".join(split(text)) == text
    assert "".join(split(FIELD)) == FIELD


def test_a_line_beyond_the_limit_is_cut_between_words():
    text = "word " * 3000 + "end"
    pieces = split(text)[1::2]
    assert "".join(split(text)) == text and len(pieces) == 4
    assert all(len(piece) <= translate.LONGEST and set(piece.split()) <= {"word", "end"} for piece in pieces)


@pytest.mark.parametrize(
    "line",
    [
        "class Stack:",
        "    total += item[1]",
        "import numpy as np",
        "for n in range(10):",
        "if (left < right) {",
        "}",
        "SELECT * FROM users;",
        "<td>Row 1</td>",
        "  color: red;",
        'print("Hello")',
    ],
)
def test_code_without_a_fence_is_kept(line):
    assert split(line) == [line]


@pytest.mark.parametrize(
    "line",
    [
        "For example:",
        "If you can keep your head, then:",
        "Dear {name}",
        "And often is his gold complexion dimmed;",
        "return to sender",
        "Import duties rose (a lot).",
        "Let x = 5; what is 2x?",
    ],
)
def test_prose_is_no_code(line):
    assert split(line)[1::2] == [line]


@pytest.mark.parametrize(
    "text, masked, protected",
    [
        ("See https://a.org/b?c=d_1.", "See [0].", ["https://a.org/b?c=d_1"]),
        ("Ask a.b@c.org, then `ls -l`!", "Ask [0], then [1]!", ["a.b@c.org", "`ls -l`"]),
        ("Dear {name}, [3] is <b>bold</b>", "Dear [0], [1] is [2]bold[3]", ["{name}", "[3]", "<b>", "</b>"]),
        ("if 3 < 4 and [see below]", "if 3 < 4 and [see below]", []),
    ],
)
def test_mask(text, masked, protected):
    assert mask(text) == (masked, protected)


def test_protected_parts_survive_a_good_and_a_bad_engine(cache):
    text = "See https://a.org/x_1 or mail a@b.org about {name} and [1]."

    def reorders(text):
        return spell_thai(text).replace("[0]", "[๓]").replace("[3]", "[ 0 ]")

    def loses(text):
        return spell_thai(text.replace("[2]", "two")).replace("[1]", "[1] [1]")

    for name, spell in {"reorders": reorders, "loses": loses}.items():
        engine = Toy(spell)
        engine.name = name
        (done,) = translate.translate([row(text)], engine, cache, "th").rows
        for part in ("https://a.org/x_1", "a@b.org", "{name}", "[1]"):
            assert done.turns[0].instruction.count(part) == 1, (name, part)
    assert "two" not in done.turns[0].instruction
    assert engine.sent[-4:] == ["See", "or mail", "about", "and"]


def test_what_looks_like_a_placeholder_is_protected(cache):
    text = "The value of list [ 1 ] or 【1】 is shown [0] at https://example.org/a."
    result = translate.translate([row(text)], Toy(), cache, "th")
    assert (
        result.rows[0].turns[0].instruction
        == spell_thai("The value of list ")
        + "[ 1 ]"
        + spell_thai(" or ")
        + "【1】"
        + spell_thai(" is shown ")
        + "[0]"
        + spell_thai(" at ")
        + "https://example.org/a."
    )


def test_an_invented_placeholder_is_dropped(cache):
    engine = Toy(lambda text: spell_thai(text) + " [4]")
    (done,) = translate.translate([row("It snows.")], engine, cache, "th").rows
    assert done.turns[0].instruction == spell_thai("It snows.")


def test_translate_rows(cache):
    engine = Toy()
    rows = [
        row(FIELD, "It rains."),
        Row("7", (Turn("It rains.", "", "Yes."), Turn("Then stop.", "", "42"))),
        row("Hello there", "It rains.", "12 + 5", id="x"),
    ]
    result = translate.translate(rows, engine, cache, "th")
    assert result.rejected == [] and result.counts == {}
    assert [done.id for done in result.rows] == ["1", "7", "x"]
    expected = "".join(
        part if i % 2 == 0 else spell_thai(part) for i, part in enumerate(split(FIELD))
    )  # all but the prose as it was
    assert result.rows[0].turns[0] == Turn(expected, "", spell_thai("It rains."))
    assert result.rows[1].turns[1] == Turn(spell_thai("Then stop."), "", "42")
    assert result.rows[2].turns[0].input == "12 + 5"
    assert len(engine.sent) == len(set(engine.sent))  # nothing twice
    assert all(len(request) <= 4 and sum(map(len, request)) <= 200 for request in engine.requests)


def test_what_is_stored_is_not_sent_again(cache):
    rows = [row("It snows."), row("It rains.")]
    first, second, third = Toy(), Toy(), Toy()
    done = translate.translate(rows[:1], first, cache, "th")
    assert translate.translate(rows, second, cache, "th").rows[0] == done.rows[0]
    assert sorted(first.sent) == ["It rains.", "It snows."] and second.sent == []
    third.name = "another engine"
    translate.translate(rows, third, cache, "th")
    assert sorted(third.sent) == sorted(first.sent)
    fourth = Toy(lambda text: "Inanyesha.")
    translate.translate(rows, fourth, cache, "sw")  # another language
    assert sorted(fourth.sent) == sorted(first.sent)


def test_a_row_with_an_unusable_field_is_left_out(cache):
    rows = [
        row("It snows.", id="a"),
        row("Walk the dog\nIt rains on 3 days", id="b"),
        row("It rains.", id="c"),
    ]
    engine = Toy(lambda text: spell_thai(text).replace("3", "4") if "3" in text else spell_thai(text))
    result = translate.translate(rows, engine, cache, "th")
    assert [done.id for done in result.rows] == ["a", "c"]
    (rejected,) = result.rejected
    line = "It rains on 3 days"
    assert (rejected.id, rejected.field, rejected.reason, rejected.source) == (
        "b",
        "instruction",
        "numbers",
        line,
    )
    assert rejected.translation == spell_thai(line).replace("3", "4")
    assert result.counts == {"numbers": 1}


def test_checks_do_not_see_what_was_protected(cache):
    english = "Open https://example.org/12/a/long/way/down/the/road/of/english/words.html now, {first_name}!"
    assert translate.translate([row(english)], Toy(), cache, "th").rejected == []


def test_estimate_counts_distinct_texts_that_are_not_cached(cache):
    rows = [row("It snows.\nIt rains."), row("It snows.", "Sun.")]
    estimate = translate.estimate(rows, Toy(), cache, "th")
    assert (estimate.texts, estimate.characters, estimate.cached_characters) == (3, 9 + 9 + 4, 0)
    assert estimate.dollars == pytest.approx(22 * 20 / 1e6) and estimate.seconds == pytest.approx(22 / 100)
    translate.translate(rows[:1], Toy(), cache, "th")
    estimate = translate.estimate(rows, Toy(), cache, "th")
    assert (estimate.texts, estimate.characters, estimate.cached_characters) == (1, 4, 18)
    translate.translate(rows, Toy(), cache, "th")
    assert translate.estimate(rows, Toy(), cache, "th") == translate.Estimate(0, 0, 22, 0.0, 0.0)


def test_estimate_measures_an_engine_without_a_rate(cache):
    engine = Toy()
    engine.rate = engine.price = 0.0
    rows = [row(f"Line number {'x' * i}") for i in range(40)]
    estimate = translate.estimate(rows, engine, cache, "th")
    assert len(engine.sent) == translate.SAMPLE == 41 - estimate.texts and estimate.seconds > 0
    assert estimate.dollars == 0
    translate.translate(rows, engine, cache, "th")
    assert len(engine.sent) == len(set(engine.sent)) == 41  # the trial's work is kept


def test_a_failure_stops_the_run_and_loses_nothing(cache):
    class Failing(Toy):
        workers, max_texts, asked = 1, 1, 0

        def translate(self, texts):
            self.asked += 1
            if self.asked == 4:
                raise UserError("quota")
            time.sleep(0.01)
            return super().translate(texts)

    rows = [row(f"Line {'x' * i}") for i in range(60)]
    failing, healthy = Failing(), Toy()
    with pytest.raises(UserError, match="quota"):
        translate.translate(rows, failing, cache, "th")
    assert 4 <= failing.asked < 20  # at most what was being picked up meanwhile
    assert len(translate.translate(rows, healthy, cache, "th").rows) == 60
    assert sorted(failing.sent + healthy.sent) == sorted(
        {"It rains.", *(f"Line {'x' * i}".strip() for i in range(60))}
    )


def test_cache_is_shared(tmp_path):
    path = tmp_path / "new folder" / "cache.sqlite"
    caches = [Cache(path) for _ in range(3)]  # as three processes have it
    key = "engine", "en", "th"

    def write(number):
        for i in range(30):
            caches[number].put(key, {f"{number} {i}": str(i), "common": str(number)})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    texts = [f"{number} {i}" for number in range(3) for i in range(30)]
    assert all(len(cache.get(key, [*texts, "none"])) == 90 for cache in caches)
    assert caches[0].get(("engine", "en", "el"), texts) == {}
    [cache.close() for cache in caches]
    assert os.listdir(path.parent) == ["cache.sqlite"]


def test_a_full_disk_keeps_what_was_stored(tmp_path):
    cache, key = Cache(tmp_path / "cache.sqlite"), ("engine", "en", "th")
    cache.put(key, {"a": "b"})
    cache._connection.execute("PRAGMA max_page_count = 1")  # SQLite's own way to say that there is no room
    with pytest.raises(UserError, match=r"disk is full.*free some space"):
        cache.put(key, {str(i): "x" * 1000 for i in range(100)})
    assert cache.get(key, ["a", "1"]) == {"a": "b"}


@pytest.mark.parametrize("damage", ["no database", "no table", "cut"])
def test_a_damaged_cache(tmp_path, damage):
    path = tmp_path / "cache.sqlite"
    if damage == "no database":
        path.write_text("This is a letter to the editor. " * 100)
    elif damage == "no table":
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE translations (other TEXT)")
        other.close()
    else:
        cache = Cache(path)
        cache.put(("e", "en", "th"), {str(i): "x" * 500 for i in range(200)})
        cache.close()
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\xff" * 4096 + data[8192:20000])
    with pytest.raises(UserError, match=r"cache\.sqlite cannot be used \(.*damaged") as error:
        Cache(path).get(("e", "en", "th"), [str(i) for i in range(200)])
    assert "\n" not in str(error.value)
