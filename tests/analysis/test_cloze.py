"""Tables and the prompts made of them."""

import csv
import unicodedata

import pytest

from prom_jax.analysis.cloze import TABLES, WENDLER_COLUMNS, prompts, read_table
from prom_jax.utils.errors import UserError
from tests.analysis.reference import HEADER, ROWS

BUILT_IN = sorted(path.stem for path in TABLES.glob("*.csv") if path.stem != "en")


@pytest.mark.parametrize("language", BUILT_IN)
def test_built_in_tables_are_whole(language):
    with (TABLES / "en.csv").open(encoding="utf-8", newline="") as file:
        concepts = [row["english"] for row in csv.DictReader(file)]
    table = read_table(language)
    assert [row.english for row in table.rows] == concepts
    assert len(table.rows) >= 120 and not table.dropped


SCRIPTS = {
    "ar": "ARABIC", "bn": "BENGALI", "el": "GREEK", "en": "LATIN", "ml": "MALAYALAM", "mr": "DEVANAGARI",
    "sw": "LATIN", "ta": "TAMIL", "te": "TELUGU", "th": "THAI",
}  # fmt: skip


@pytest.mark.parametrize("language", SCRIPTS)
def test_built_in_sentences_are_of_no_template(language):
    """The same concepts in every language, each in its script, with one blank, and no two begin alike."""
    with (TABLES / f"{language}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with (TABLES / "en.csv").open(encoding="utf-8", newline="") as file:
        assert [row["english"] for row in rows] == [row["english"] for row in csv.DictReader(file)]
    assert len(rows) >= 120 and len({row["word"] for row in rows}) == len(rows)
    openings = set()
    for row in rows:
        sentence = row["sentence"]
        assert sentence.count('"___"') == 1 and sentence == unicodedata.normalize("NFC", sentence)
        assert row["word"].casefold() not in sentence.casefold().split()
        letters = [c for c in sentence + row["word"] if c.isalpha()]
        assert all(unicodedata.name(c).startswith(SCRIPTS[language]) for c in letters)
        openings.add(sentence[:12] if language == "th" else tuple(sentence.split()[:3]))
    assert len(openings) == len(rows)
    assert sum(row["sentence"].startswith('"___"') for row in rows) <= 0.15 * len(rows)


def test_prompts_share_their_demonstrations(tables):
    table = read_table("sw", tables())
    rows = prompts(table, 2, seed=1)
    assert len(rows) == len(ROWS) - 2
    (row, prompt), (_, other) = rows[:2]
    first, second, query = prompt.split("\n")
    assert query == row.query == f'Hili "___" ni {len(row.word)}. Jibu: "'
    assert other.startswith(f"{first}\n{second}\n")
    shown = [r for r in table.rows if r not in [row for row, _ in rows]]
    assert {first, second} == {f'Hili "___" ni {len(r.word)}. Jibu: "{r.word}".' for r in shown}
    assert prompts(table, 2, seed=1) == rows != prompts(table, 2, seed=2)
    assert prompts(table, 0, seed=1) == [(row, row.query) for row in table.rows]


def test_each_row_has_demonstrations_of_its_own(tables):
    table = read_table("sw", tables())
    rows = prompts(table, len(ROWS) - 1, seed=0, demonstrations="row")
    assert [row for row, _ in rows] == list(table.rows)
    for row, prompt in rows:
        *shown, query = prompt.split("\n")
        assert query == row.query
        assert sorted(shown) == sorted(r.demonstration for r in table.rows if r is not row)
    assert len({prompt.split("\n")[0] for _, prompt in rows}) > 2


def test_wendlers_tables_lose_the_rows_that_cannot_be_used(tables):
    masked = 'Un "___" est gris. Réponse : "{}".'
    rows = [
        ("cloud", "nuage", masked.format("nuage")),
        ("book", "书", '"_"用来阅读。答案："书"。'),
        ("gold", "or", masked.format("l'or")),
        ("grey", "gris", masked.format("gris")),
        ("cloud", "brume", masked.format("brume")),
        ("time", "temps", 'Le "___" et le "___". Réponse : "temps".'),
        ("sea", "", masked.format("mer")),
    ]
    table = read_table("fr", tables(rows, WENDLER_COLUMNS, "fr"))
    cloud, book = table.rows
    assert (cloud.english, cloud.word) == ("cloud", "nuage")
    assert cloud.query == 'Un "___" est gris. Réponse : "'
    assert cloud.demonstration == masked.format("nuage")
    assert book.query == '"_"用来阅读。答案："'
    assert sum(table.dropped.values()) == len(table.dropped) == 5


def test_a_cue_of_ones_own(tables):
    rows = [("sun", "soleil", 'Le "___" brille.', "Réponse")]
    (row,) = read_table("fr", tables(rows, (*HEADER, "cue"), "fr")).rows
    assert row.query == 'Le "___" brille. Réponse: "'
    with pytest.raises(UserError, match="line 2, 'sun': no cue is known for 'fr'; expected a column `cue`"):
        read_table("fr", tables([rows[0][:3]], language="fr"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("sun", "jua", "Ni joto."), "line 3, 'sun': its sentence has 0 blanks; expected \"___\" once"),
        (("sun", "jua", '"___" na "___".'), "has 2 blanks"),
        (
            ("sun", "jua", 'Jua ni "___".'),
            "its word is in its own sentence; expected the word in the blank alone",
        ),
        (("sun", "", 'Ni "___".'), "its column word is empty"),
        (("sun", "jua"), "its column sentence is empty"),
        (("water", "jua", 'Ni "___".'), "one of its words is in an earlier row; expected each word once"),
        (("sun", "maji", 'Ni "___".'), "one of its words is in an earlier row"),
    ],
)
def test_a_row_that_is_not_as_it_should_be(tables, row, message):
    with pytest.raises(UserError, match=message) as error:
        read_table("sw", tables([ROWS[0], row]))
    assert "sw/clean.csv" in str(error.value)


def test_part_of_another_word_is_not_the_word(tables):
    assert read_table("sw", tables([("sun", "jua", 'Anajua "___" huangaza.')])).rows


def test_tables_that_are_not_there(tables, tmp_path):
    with pytest.raises(UserError, match=r"no cloze table .*xx.csv: bring your own.* one of .*th"):
        read_table("xx")
    with pytest.raises(UserError, match=r"no cloze table .*xx/clean.csv: expected it in the folder"):
        read_table("xx", tables())
    with pytest.raises(UserError, match="'en' cannot be set against English itself"):
        read_table("en")
    with pytest.raises(UserError, match=r"clean.csv lacks the column word, sentence: expected english,word"):
        read_table("sw", tables([("sun", "Ni")], ("english", "definition")))
    (tables() / "sw" / "clean.csv").write_bytes("english,word,sentence\nfire,πυρ,x".encode("iso-8859-7"))
    with pytest.raises(UserError, match=r"cannot be read .* expected a CSV file in UTF-8"):
        read_table("sw", tmp_path / "tables")
    with pytest.raises(UserError, match=r"cannot be read \(1003 columns\)"):
        read_table("sw", tables([], (*HEADER, *map(str, range(1000)))))


@pytest.mark.parametrize("shots", [-1, len(ROWS)])
def test_more_demonstrations_than_rows(tables, shots):
    with pytest.raises(UserError, match=f"shots={shots} with {len(ROWS)} usable rows in the table of 'sw'"):
        prompts(read_table("sw", tables()), shots, seed=0)


def test_unknown_demonstrations(tables):
    with pytest.raises(UserError, match="demonstrations='none': expected one of shared, row"):
        prompts(read_table("sw", tables()), 1, 0, "none")


def test_a_fingerprint_is_of_the_rows(tables):
    fingerprint = read_table("sw", tables()).fingerprint
    assert read_table("sw", tables()).fingerprint == fingerprint
    assert read_table("sw", tables(ROWS[:-1])).fingerprint != fingerprint
