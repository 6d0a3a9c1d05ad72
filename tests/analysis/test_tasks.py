"""What the tasks ask, and the prompts made of it."""

import pytest

from prom_jax.analysis.tables import read_sources, read_table
from prom_jax.analysis.tasks import ask, prompts
from prom_jax.utils.errors import UserError
from tests.analysis.reference import HEADER, ROWS


def test_prompts_share_their_demonstrations(tables):
    table = ask("cloze", read_table("sw", tables()))
    rows = prompts(table, 2, seed=1)
    assert len(rows) == len(ROWS) - 2
    (row, prompt), (_, other) = rows[:2]
    first, second, query = prompt.split("\n")
    assert query == row.query == f'Hili "___" ni {len(row.words[0])}. Jibu: "'
    assert other.startswith(f"{first}\n{second}\n")
    shown = [r for r in table.rows if r not in [row for row, _ in rows]]
    assert {first, second} == {f'Hili "___" ni {len(r.words[0])}. Jibu: "{r.words[0]}".' for r in shown}
    assert prompts(table, 2, seed=1) == rows != prompts(table, 2, seed=2)
    assert prompts(table, 0, seed=1) == [(row, row.query) for row in table.rows]


def test_each_row_has_demonstrations_of_its_own(tables):
    table = ask("cloze", read_table("sw", tables()))
    rows = prompts(table, len(ROWS) - 1, seed=0, demonstrations="row")
    assert [row for row, _ in rows] == list(table.rows)
    for row, prompt in rows:
        *shown, query = prompt.split("\n")
        assert query == row.query
        assert sorted(shown) == sorted(r.demonstration for r in table.rows if r is not row)
    assert len({prompt.split("\n")[0] for _, prompt in rows}) > 2


@pytest.mark.parametrize("shots", [-1, len(ROWS)])
def test_more_demonstrations_than_rows(tables, shots):
    with pytest.raises(UserError, match=f"shots={shots} with {len(ROWS)} usable rows in the table of 'sw'"):
        prompts(ask("cloze", read_table("sw", tables())), shots, seed=0)


def test_unknown_demonstrations(tables):
    with pytest.raises(UserError, match="demonstrations='none': expected one of shared, row"):
        prompts(ask("cloze", read_table("sw", tables())), 1, 0, "none")


def test_words_are_translated_from_the_sources_in_turn(tables):
    tables([("house", "oikia"), ("tree, plant", "dendro"), ("sun", "ilios")], HEADER[:2], "el")
    folder = tables([("tree", "ton"), ("sun", "jua"), ("water", "nam")], HEADER[:2], "th")
    rows = [("water", "maji"), ("tree", "mti"), ("sun", "jua, kiangazi"), ("house", "nyumba"), ("egg", "yai")]
    table = read_table("sw", tables(rows, HEADER[:2]))
    asked = ask("translation", table, read_sources(("el", "th"), "sw", folder))
    assert [(row.english[0], row.source, row.query) for row in asked.rows] == [
        ("water", "th", 'ไทย: "nam" - Kiswahili: "'),  # el, whose turn it is, has no water
        ("tree", "th", 'ไทย: "ton" - Kiswahili: "'),
        ("sun", "el", 'Ελληνικά: "ilios" - Kiswahili: "'),
        ("house", "el", 'Ελληνικά: "oikia" - Kiswahili: "'),
    ]
    assert asked.rows[2].demonstration == 'Ελληνικά: "ilios" - Kiswahili: "jua"'
    assert asked.dropped == {"no source has its English word": 1}
    assert asked.sources == ("el", "th")
    only = ask("translation", table, read_sources(("th",), "sw", folder))
    assert only.dropped == {"no source has its English word": 2, "its word in the source is an answer": 1}
    assert only.fingerprint != asked.fingerprint


def test_repetition_shows_the_word_itself(tables):
    asked = ask("repetition", read_table("sw", tables([("sun", "jua, kiangazi")], HEADER[:2])))
    (row,) = asked.rows
    assert row.query == 'Kiswahili: "jua" - Kiswahili: "'
    assert row.demonstration == 'Kiswahili: "jua" - Kiswahili: "jua"'
    assert (row.words, row.source) == (("jua", "kiangazi"), "")


def test_what_cannot_be_asked(tables):
    table = read_table("sw", tables([("sun", "jua"), ("moon", "mwezi")], HEADER[:2]))
    asked = ask("cloze", table)
    with pytest.raises(UserError, match=r"0 usable rows .* 'cloze' \(2 × its table has no sentence\)"):
        prompts(asked, 0, seed=0)
    with pytest.raises(UserError, match="task='summary': expected one of cloze, translation, repetition"):
        ask("summary", table)
    with pytest.raises(UserError, match="task='translation' needs languages to translate from"):
        ask("translation", table)
    with pytest.raises(UserError, match="task='cloze' translates nothing"):
        ask("cloze", table, (table,))
    nameless = read_table("xx", tables([("sun", "soleil")], HEADER[:2], "xx"))
    with pytest.raises(UserError, match=r"own name of language 'xx' is not known.* a column `name`"):
        ask("repetition", nameless)
