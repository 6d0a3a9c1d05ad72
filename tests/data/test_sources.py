import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from prom_jax.data import sources
from prom_jax.data.pairing import pair
from prom_jax.data.rows import Row, Sentence, Turn
from prom_jax.utils.errors import UserError

ROWS = [
    {"instruction": "Say hi", "input": "", "output": "Hi", "id": "a"},
    {"instruction": "Add", "input": "1, 2", "output": 'three, "3"', "id": "b"},
]
EXPECTED = [Row("a", (Turn("Say hi", "", "Hi"),)), Row("b", (Turn("Add", "1, 2", 'three, "3"'),))]


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(row) for row in [rows[0], *map(dict.values, rows)]))
    else:
        path.write_text('instruction,input,output,id\nSay hi,,Hi,a\nAdd,"1, 2","three, ""3""",b\n')


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path, ROWS)
    assert sources.read_instructions((str(path),), "sw") == EXPECTED
    assert sources.read_instructions((str(path), str(path)), "sw") == EXPECTED * 2


def test_messages_become_turns(jsonl):
    texts = ["Hi", "Hello", "Bye", "See you"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    source = jsonl("chat.jsonl", [{"messages": messages}])
    (row,) = sources.read_instructions((source,), "en")
    assert row.turns == (Turn("Hi", "", "Hello"), Turn("Bye", "", "See you"))


def test_hub_source_passes_config_and_split(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs["split"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sources.read_instructions(("own/set:sw@train[:10%]", "own/set"), "sw") == EXPECTED * 2
    assert calls == [("own/set", "sw", "train[:10%]"), ("own/set", None, "train")]


def test_unreachable_hub_source_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'no/such' \(HF_HUB_OFFLINE is set\) cannot be read.*hf auth login"):
        sources.read_instructions(("no/such",), "sw")


def test_aligned_sentences(tmp_path, jsonl):
    english, target = tmp_path / "en.txt", tmp_path / "sw.txt"
    english.write_text("One\nTwo \x0c still\n")
    target.write_text("Moja\nMbili\n")
    assert sources.read_parallel((f"{english}|{target}",), "sw") == [
        Sentence(None, "One", "Moja"),
        Sentence(None, "Two \x0c still", "Mbili"),
    ]
    rows = [{"id": 1, "en": "One", "sw": "Moja"}, {"translation": {"en": "Two", "sw": "Mbili"}}]
    expected = [Sentence("1", "One", "Moja"), Sentence(None, "Two", "Mbili")]
    assert sources.read_parallel((jsonl("a.jsonl", rows),), "sw") == expected
    tsv = tmp_path / "a.tsv"
    tsv.write_text('en\tsw\n"Quoted" text\tMaandishi\n')
    assert sources.read_parallel((str(tsv),), "sw") == [Sentence(None, '"Quoted" text', "Maandishi")]
    target.write_text("Moja\n")
    with pytest.raises(UserError, match="2 English and 1 target lines"):
        sources.read_parallel((f"{english}|{target}",), "sw")


def test_pairs_by_id_or_by_order():
    def rows(*ids):
        return [Row(i, (Turn(f"{n}", "", "x"),)) for n, i in enumerate(ids)]

    def ids(pairs):
        both = [(english.id, target.id) for english, target in pairs.pairs]
        return both, [row.id for row in pairs.english], [row.id for row in pairs.target]

    english, target = rows("a", "b", "c"), rows("c", "a", "d")
    assert ids(pair(english, target)) == ([("c", "c"), ("a", "a")], ["b"], ["d"])
    assert ids(pair(english, target, "order")) == ([("a", "c"), ("b", "a"), ("c", "d")], [], [])
    assert ids(pair(english, target, "none")) == ([], ["a", "b", "c"], ["c", "a", "d"])
    assert ids(pair(rows(None, None), rows(None, None))) == ([("#1", "#1"), ("#2", "#2")], [], [])
    found = pair(rows(None, None, None), rows("#3", "#1"))  # as translation leaves it
    assert [e.turns[0].instruction for e, _ in found.pairs] == ["2", "0"] and len(found.english) == 1
    assert ids(pair(rows("a"), rows("b"))) == ([], ["a"], ["b"])
    assert ids(pair([], rows("b", "b"))) == ([], [], ["b", "b"])
    with pytest.raises(UserError, match="The English row 2 has no id, and others have"):
        pair(rows("a", None), rows("b", "c"))
    for sides, pairing in (((None, None), "id"), (("a", "b"), "order")):
        with pytest.raises(UserError, match=r"2 English and 1 target rows.*'id', or set data.pairing=none"):
            pair(rows(*sides), rows(sides[0]), pairing)
    with pytest.raises(UserError, match="'a' occurs twice on the English side"):
        pair(rows("a", "a"), rows("a", "b"))
    with pytest.raises(UserError, match=r"data.pairing is 'ids': expected one of id, order, none"):
        pair(rows("a"), rows("a"), "ids")


def test_renamed_columns(jsonl):
    rows = [{"q": "Say hi", "n": {"a.b": "Hi", "c": 7}, "input": "now"}]
    source = jsonl("a.jsonl", rows) + "?instruction=q&output=n.a.b&id=n.c"
    with pytest.raises(
        UserError, match=r"a.jsonl, row 1 has no column 'n.a.b' \(found: q, n, input\).*bad_rows=skip"
    ):
        sources.read_instructions((source,), "sw")
    source = jsonl("a.jsonl", [{"q": "Say hi", "n": {"a": "Hi", "c": 7}, "input": "now"}])
    renamed = source + "?instruction=q&output=n.a&id=n.c"
    assert sources.read_instructions((renamed,), "sw") == [Row("7", (Turn("Say hi", "now", "Hi"),))]
    assert sources.fingerprint(renamed, "sw") == sources.fingerprint(source, "sw")
    parallel = jsonl("p.jsonl", [{"eng": "One", "swh": "Moja"}]) + "?en=eng&sw=swh"
    assert sources.read_parallel((parallel,), "sw") == [Sentence(None, "One", "Moja")]
    for query in ("instruct=q", "instruction", "instruction=q&instruction=n"):
        with pytest.raises(
            UserError, match=r"renames columns by .*expected 'ours=theirs'.*instruction, output"
        ):
            sources.read_instructions((f"{source}?{query}",), "sw")


def test_a_missing_file_is_no_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "texts").mkdir()
    for name in ("data/alpaca.th.jsonl", "data/en.txt", "texts/a"):
        with pytest.raises(UserError, match=rf"There is no file '{name}'"):
            sources.fingerprint(name, "th")


def test_blank_ids_are_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,instruction,output\n,a,b\n7,c,d\n")
    rows = sources.read_instructions((str(path),), "sw")
    assert [row.id for row in rows] == [None, "7"]
    with pytest.raises(UserError, match="row 1 has no id, and others have"):
        pair(rows, rows)


def test_columns_of_text_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nNA,007\n2020-01-01,None\n")
    turns = [row.turns[0] for row in sources.read_instructions((str(path),), "sw")]
    assert turns == [Turn("NA", "", "007"), Turn("2020-01-01", "", "None")]


def test_sides_apart(tmp_path, jsonl):
    english = tmp_path / "en.devtest"
    english.write_text("One\nTwo\n")
    target = jsonl("sw.jsonl", [{"sentence": "Moja"}, {"sentence": "Mbili"}]) + "?text=sentence"
    expected = [Sentence(None, "One", "Moja"), Sentence(None, "Two", "Mbili")]
    assert sources.read_parallel((f"{english}|{target}",), "sw") == expected
    before = sources.fingerprint(f"{english}|{target}", "sw")
    english.write_text("One\nTow\n")
    assert sources.fingerprint(f"{english}|{target}", "sw") != before


TMX = """<?xml version="1.0" encoding="utf-8"?>
<tmx version="1.4"><header/><body>
<tu tuid="7"><tuv xml:lang="en-US">
<seg>Wash <bpt i="1">&lt;b&gt;</bpt>your<ept i="1">&lt;/b&gt;</ept> <hi>two
 <hi>clean</hi> hands</hi>.</seg></tuv>
<tuv xml:lang="sw"><prop type="x">y</prop><seg>Osha mikono &amp; uso.</seg></tuv>
<tuv xml:lang="sw-KE"><seg>Nyingine</seg></tuv><tuv xml:lang="th"/></tu>
<tu><tuv xml:lang="en"><seg>One</seg></tuv><tuv xml:lang="fr"><seg>Un</seg></tuv></tu>
</body></tmx>"""


def test_tmx(tmp_path):
    path = tmp_path / "memory.tmx"
    path.write_text(TMX)
    expected = [Sentence("7", "Wash your two\n clean hands.", "Osha mikono & uso.")]
    assert sources.read_parallel((str(path),), "sw") == expected
    with pytest.raises(UserError, match="no unit in both 'en' and 'th'"):
        sources.read_parallel((str(path),), "th")
    path.write_text(TMX.replace("<tmx ", '<tmx xmlns="http://www.lisa.org/tmx14" '))
    assert sources.read_parallel((str(path),), "sw") == expected
    path.write_text(TMX[:-20])
    with pytest.raises(UserError, match="is not a TMX file"):
        sources.read_parallel((str(path),), "sw")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": "c"}',
            r"r.jsonl, row 2 has no text under 'output' \(keys found: instruction\)",
        ),
        ("r.jsonl", '{"instruction": ', "row 1 has no valid JSON"),
        ("r.json", '{"instruction":\n"a"}', "holds a dict with the keys instruction: expected a list"),
        ("r.json", '["a"]', "row 1 has 'a' in place of an object"),
        ("r.json", "[]", "is empty"),
        ("r.parquet", "PAR1", r"r.parquet' cannot be read: ArrowInvalid.*fetch it again"),
        ("r.xml", "<a/>", "of no known kind"),
        ("r.csv", 'instruction,output\n"a,b\nc,d\n', "cannot be read .*unexpected end of data"),
        ("r.jsonl", '{"instruction": "a", "output": "\\ud83d"}', "half a character"),
        ("none.json", None, "There is no file"),
        ("r.json", "[" * 100_000, "r.json is not valid JSON"),
        ("r.jsonl", "[" * 100_000, "no valid JSON"),
        ("r.jsonl", '{"id": "\\ud83d", "instruction": "a", "output": "b"}', "half a character"),
        ("r.csv", "instruction,output" + ",x" * 1000 + "\na,b\n", "has 1002 columns"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        sources.read_instructions((str(path),), "sw")


def tmx_with(entities, cited):
    return TMX.replace("<tmx ", f"<!DOCTYPE tmx [{entities}]><tmx ").replace("Osha", cited)


BOMB = ['<!ENTITY e0 "xxxxxxxxxx">'] + [f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 9)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TMX.replace("utf-8", "shift_jis"), "multi-byte encodings"),
        (TMX.replace("<hi>", "<hi>" * 5000).replace("</hi>", "</hi>" * 5000), "recursion"),
        (tmx_with('<!ENTITY x SYSTEM "file:///etc/hostname">', "&x;"), "undefined entity"),
        (tmx_with("".join(BOMB), "&e8;"), "amplification"),
    ],
)
def test_tmx_files_that_mean_harm(tmp_path, content, message):
    path = tmp_path / "memory.tmx"
    path.write_text(content)
    with pytest.raises(UserError, match=f"is not a TMX file .*{message}"):
        sources.read_parallel((str(path),), "sw")


def test_parquet_that_unpacks_to_a_million_times_its_size(tmp_path):
    path = tmp_path / "r.parquet"
    rows = pyarrow.array([0]).take(pyarrow.array([0] * 3_000_000))
    text = pyarrow.DictionaryArray.from_arrays(rows.cast("int32"), ["a" * 100])
    pyarrow.parquet.write_table(pyarrow.table({"instruction": text, "output": text}), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="unpacks to more than 1000 times its size"):
        sources.read_instructions((str(path),), "sw")


def test_fingerprint_follows_the_contents(jsonl):
    source = jsonl("a.jsonl", ROWS)
    before = sources.fingerprint(source, "sw")
    assert sources.fingerprint(source, "sw") == before
    jsonl("a.jsonl", ROWS[:1])
    assert sources.fingerprint(source, "sw") != before
