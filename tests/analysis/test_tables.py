"""The tables: the project's own, and what users bring."""

import csv
import unicodedata

import pytest

from prom_jax.analysis.tables import TABLES, WENDLER_COLUMNS, read_sources, read_table, strip_invisible
from prom_jax.utils.errors import UserError
from tests.analysis.reference import HEADER, ROWS

BUILT_IN = sorted(path.stem for path in TABLES.glob("*.csv") if path.stem != "en")


@pytest.mark.parametrize("language", BUILT_IN)
def test_built_in_tables_are_whole(language):
    with (TABLES / "en.csv").open(encoding="utf-8", newline="") as file:
        concepts = [row["english"] for row in csv.DictReader(file)]
    table = read_table(language)
    assert [row.english for row in table.concepts] == [(word,) for word in concepts]
    assert len(table.concepts) >= 120 and not table.dropped


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
    cloud, book = table.concepts
    assert (cloud.english, cloud.words) == (("cloud",), ("nuage",))
    assert cloud.query == 'Un "___" est gris. Réponse : "'
    assert cloud.query + "nuage" + cloud.closing == masked.format("nuage")
    assert book.query == '"_"用来阅读。答案："'
    assert sum(table.dropped.values()) == len(table.dropped) == 5


def test_a_cue_of_ones_own(tables):
    rows = [("sun", "soleil", 'Le "___" brille.', "Réponse")]
    (row,) = read_table("fr", tables(rows, (*HEADER, "cue"), "fr")).concepts
    assert row.query == 'Le "___" brille. Réponse: "'
    message = r"1 of 1 rows cannot be used: 1 × no cue is known for 'fr' \(line 2, 'sun'\); expected a column"
    with pytest.raises(UserError, match=message):
        read_table("fr", tables([rows[0][:3]], language="fr"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("sun", "jua", "Ni joto."), r"its sentence has 0 blanks \(line 3, 'sun'\); expected \"___\" once"),
        (("sun", "jua", '"___" na "___".'), "its sentence has 2 blanks"),
        (("sun", "jua", 'Jua ni "___".'), r"its own sentence \(.*\); expected the word in the blank alone"),
        (("sun", "moto, jua", 'Jua ni "___".'), "its word is in its own sentence"),
        (("sun", "", 'Ni "___".'), "its column word is empty"),
        (("sun", " , \u200f", 'Ni "___".'), "its column word has no word"),
        (("sun", "jua"), "its column sentence is empty"),
        (("water", "jua", 'Ni "___".'), r"one of its words is in an earlier row .* expected each word once"),
        (("sun", "maji", 'Ni "___".'), "one of its words is in an earlier row"),
    ],
)
def test_a_row_that_is_not_as_it_should_be(tables, row, message):
    with pytest.raises(UserError, match=rf"sw/clean.csv: 1 of 2 rows cannot be used: 1 × .*{message}"):
        read_table("sw", tables([ROWS[0], row]))


def test_a_refused_table_counts_each_reason(tables):
    rows = [("sun", "jua", "Ni joto."), ("moon", "mwezi", "Ni usiku."), ("tree", "", "Ni ___.")]
    message = r"3 of 4 rows .* 2 × its sentence has 0 blanks \(line 2, 'sun'\).* 1 × its column word is empty"
    with pytest.raises(UserError, match=message):
        read_table("sw", tables([*rows, ROWS[0]]))


def test_part_of_another_word_is_not_the_word(tables):
    assert read_table("sw", tables([("sun", "jua", 'Anajua "___" huangaza.')])).concepts


def test_tables_that_are_not_there(tables, tmp_path):
    with pytest.raises(UserError, match=r"no cloze table .*xx.csv: bring your own.* one of .*th"):
        read_table("xx")
    with pytest.raises(UserError, match=r"no cloze table .*xx/clean.csv: expected it in the folder"):
        read_table("xx", tables())
    with pytest.raises(UserError, match="'en' cannot be set against English itself"):
        read_table("en")
    with pytest.raises(UserError, match=r"clean.csv lacks the column word: expected english,word"):
        read_table("sw", tables([("sun", "Ni")], ("english", "definition")))
    (tables() / "sw" / "clean.csv").write_bytes("english,word,sentence\nfire,πυρ,x".encode("iso-8859-7"))
    with pytest.raises(UserError, match=r"cannot be read .* expected a CSV file in UTF-8"):
        read_table("sw", tmp_path / "tables")
    with pytest.raises(UserError, match=r"cannot be read \(1003 columns\)"):
        read_table("sw", tables([], (*HEADER, *map(str, range(1000)))))


def test_several_right_words(tables):
    rows = [("ox; bull", "fahali,ng'ombe dume", 'Ni "___".'), ("sun", "jua، jua ،kiangazi", 'Wa "___".')]
    ox, sun = read_table("sw", tables(rows)).concepts
    assert (ox.english, ox.words) == (("ox", "bull"), ("fahali", "ng'ombe dume"))
    assert sun.words == ("jua", "kiangazi")


@pytest.mark.parametrize("blank", ["___", "_", "“___”", '"___"', '""___""', '" ___"', "«___»"])
def test_a_blank_in_any_quotes_or_none(tables, blank):
    (row,) = read_table("sw", tables([("sun", "jua", f"Leo {blank}, ni kali.")])).concepts
    assert row.query == 'Leo "___", ni kali. Jibu: "'


# Tables as others publish them: synonyms, doubled quotes, closing punctuation of other scripts, and a word of
# the answer that is not the first of the synonyms.
@pytest.mark.parametrize("closing", ["।", ".", "", "。", " ؟", "።"])
def test_published_tables_with_synonyms(tables, closing):
    rows = [
        ("book", "buku, kitabu", f'""___"" husomwa. Jibu: ""kitabu""{closing}'),
        ("cloud", "wingu, ukungu", f'"___" ni mvuke. Jibu: "wingu"{closing}'),
        ("bag", "mfuko, gunia", f'"___" hubeba. Jibu: "begi"{closing}'),
        ("soil", "udongo", f'Mti humea kwenye "udongo". Jibu: "udongo"{closing}'),
    ]
    table = read_table("sw", tables(rows, WENDLER_COLUMNS))
    book, cloud = table.concepts
    assert book.words == ("kitabu", "buku") and cloud.words == ("wingu", "ukungu")
    assert book.query == '"___" husomwa. Jibu: "' and book.closing == f'"{closing}'
    assert table.dropped == {"its prompt does not end in its word": 1, "its sentence has 0 blanks": 1}


def test_a_published_table_of_which_nothing_is_left_tells_why(tables):
    rows = [("sun", "jua", 'Ni "___". Jibu: "mwezi".'), ("moon", "mwezi", 'Ni "___". Jibu: "jua".')]
    message = r'2 of 2 rows cannot be used: 2 × its prompt does not end in its word .*"<word>"\. there'
    with pytest.raises(UserError, match=message):
        read_table("sw", tables(rows, WENDLER_COLUMNS))


def test_a_table_of_words_alone(tables):
    (sun,) = read_table("sw", tables([("sun", "jua")], WENDLER_COLUMNS[:2])).concepts
    assert (sun.english, sun.words, sun.query) == (("sun",), ("jua",), "")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("\u200fكلب\u200f", "كلب"),
        (" \ufeff\u2060jua \u200e ", "jua"),
        ("می\u200cروم\u200f", "می\u200cروم"),  # inside it is spelling
        ("അവന\u0d4d\u200d", "അവന\u0d4d\u200d"),  # after a virama too
        ("അവൻ\u200d", "അവൻ"),
        ("\u200f", ""),
    ],
)
def test_invisible_characters_at_ends(text, word):
    assert strip_invisible(text) == word


def test_names_of_languages(tables):
    assert read_table("sw", tables()).name == "Kiswahili"
    rows = [("sun", "soleil", 'Le "___".', "R", "patois")]
    assert read_table("xx", tables(rows, (*HEADER, "cue", "name"), "xx")).name == "patois"
    assert read_table("xx", tables([row[:4] for row in rows], (*HEADER, "cue"), "xx")).name == ""


def test_sources_are_all_others_unless_named(tables):
    others = [language for language in BUILT_IN if language != "el"]
    assert [source.language for source in read_sources((), "el")] == others
    assert [source.language for source in read_sources(("th", "ar", "th"), "el")] == ["th", "ar"]
    folder = tables([("sun", "soleil")], ("english", "word"), "fr")
    mixed = read_sources((), "sw", folder)
    assert [source.language for source in mixed] == sorted({*BUILT_IN, "fr"} - {"sw"})
    assert len(mixed[-1].concepts) > len(next(s for s in mixed if s.language == "fr").concepts) == 1
    with pytest.raises(UserError, match="source 'sw' is the language itself"):
        read_sources(("sw",), "sw")


def test_a_fingerprint_is_of_the_rows(tables):
    fingerprint = read_table("sw", tables()).fingerprint
    assert read_table("sw", tables()).fingerprint == fingerprint
    assert read_table("sw", tables(ROWS[:-1])).fingerprint != fingerprint
