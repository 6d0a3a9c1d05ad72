"""Files as people have them: named, packed and encoded as they happen to be."""

import gzip
import json

import datasets
import pyarrow
import pytest

from prom_jax.data import sources
from prom_jax.data.rows import Row, Sentence, Turn
from prom_jax.utils.errors import UserError

ROWS = [{"id": "a", "instruction": "Hi", "output": "yo"}, {"id": "b", "instruction": "Bye", "output": "ta"}]
EXPECTED = [Row("a", (Turn("Hi", "", "yo"),)), Row("b", (Turn("Bye", "", "ta"),))]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


FILES = {
    "lines.jsonl": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "LINES.JSONL": LINES.encode(),
    "lines.json": LINES.encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "pretty_data.json": json.dumps({"data": ROWS}, indent=2).encode(),
    "wide.jsonl": LINES.encode("utf-16"),
    "marked.jsonl": LINES.encode("utf-8-sig"),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.jsonl.zst": zstd(LINES.encode()),
    "packed.jsonl": gzip.compress(LINES.encode()),
    "excel.csv": b"id;instruction;output\na;Hi;yo\nb;Bye;ta\n",
    "tabs.csv": b"id\tinstruction\toutput\na\tHi\tyo\nb\tBye\tta\n",
    "spare.csv": b"id,instruction,output,,\na,Hi,yo,,\n\nb,Bye,ta,,,\n",
    "table.tsv.gz": gzip.compress(b"id\tinstruction\toutput\na\tHi\tyo\nb\tBye\tta\n"),
    "pipe|name.jsonl": LINES.encode(),
    "what?.jsonl": LINES.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_what_it_is(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert sources.read_instructions((str(path),), "vi") == EXPECTED
    renamed = f"{path}?instruction=output"
    assert [row.turns[0].instruction for row in sources.read_instructions((renamed,), "vi")] == ["yo", "ta"]
    assert sources.fingerprint(str(path), "vi") == sources.fingerprint(renamed, "vi")


def test_folders_patterns_and_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "d" / ".git").mkdir(parents=True)
    for name, row in zip(("d/1.jsonl", "d/2.json"), ROWS):
        (tmp_path / name).write_text(json.dumps([row]))
    (tmp_path / "d" / "README.md").write_text("Notes")
    (tmp_path / "d" / ".git" / "3.json").write_text("[]")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (f"{tmp_path}/d", f"{tmp_path}/d/*.js*", f"{tmp_path}/**/[12].json*", "~/d"):
        assert sources.read_instructions((source,), "vi") == EXPECTED
        assert sources.fingerprint(source, "vi") == sources.fingerprint(f"{tmp_path}/d", "vi")
    assert sources.read_instructions((f"{tmp_path}/d?take=1",), "vi") == EXPECTED[:1]
    with pytest.raises(UserError, match=r"There is no file '\S*x\*.jsonl'"):
        sources.read_instructions((f"{tmp_path}/x*.jsonl",), "vi")
    (tmp_path / "d" / "1.jsonl").unlink(), (tmp_path / "d" / "2.json").unlink()
    with pytest.raises(UserError, match=r"has no file that ends in \.json, \.jsonl"):
        sources.read_instructions((f"{tmp_path}/d",), "vi")


def test_sides_whose_names_have_bars(tmp_path):
    for name, text in (("a|b.txt", "One\n"), ("c.txt.gz", "Một\n")):
        packed = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        (tmp_path / name).write_bytes(packed)
    source = f"{tmp_path}/a|b.txt|{tmp_path}/c.txt.gz"
    assert sources.read_parallel((source,), "vi") == [Sentence(None, "One", "Một")]
    with pytest.raises(UserError, match=r"names 3 files: expected 'english\|target'"):
        sources.read_parallel((f"{tmp_path}/a|{tmp_path}/b|{tmp_path}/c",), "vi")


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("a.csv", "instruction,output\nHi,yo\nName two fruits,Apples, pears and plums.\n", "3 cells"),
        ("a.tsv", "instruction\toutput\nHi\tyo\nName two fruits\tApples\tpears\n", "3 cells"),
    ],
)
def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path, name, text, number):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{name}, row 2 has {number} where there are 2 columns"):
        sources.read_instructions((str(path),), "vi")
    (row,) = sources.read_instructions((str(path),), "vi", sources.Tally("skip"))
    assert row.turns == (Turn("Hi", "", "yo"),)


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output,output\na,b,c\n")
    with pytest.raises(UserError, match="has the column 'output' twice"):
        sources.read_instructions((str(path),), "vi")


def test_a_parallel_file_without_a_header_loses_no_row(tmp_path):
    path = tmp_path / "p.tsv"
    expected = [Sentence(None, "Hello", "Xin chào"), Sentence(None, "Good bye", "Tạm biệt")]
    path.write_text("Hello\tXin chào\nGood bye\tTạm biệt\n")
    with pytest.raises(
        UserError, match=r"begins with 'Hello \| Xin chào', .*none of en, vi: .*'\?header=no'"
    ):
        sources.read_parallel((str(path),), "vi")
    assert sources.read_parallel((f"{path}?header=no",), "vi") == expected
    path.write_text("en\tvi\nHello\tXin chào\nGood bye\tTạm biệt\n")
    assert sources.read_parallel((str(path),), "vi") == expected
    with pytest.raises(UserError, match="instructions need a header"):
        sources.read_instructions((f"{path}?header=no",), "vi")


def test_lines_that_are_no_json_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{half\n" + LINES + "[1]\n")
    with pytest.raises(UserError, match=r"row 1 has no valid JSON; \S*, row 4 has \[1\] in place of an"):
        sources.read_instructions((str(path),), "vi")
    assert sources.read_instructions((str(path),), "vi", sources.Tally("skip")) == EXPECTED


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_packed_files_that_mean_harm(tmp_path, pack):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(b"[" + b" " * (1 << 27)))
    with pytest.raises(UserError, match=r"cannot be read .*unpacks to more than 1000 times its size"):
        sources.read_instructions((str(path),), "vi")
    path.write_bytes(pack(LINES.encode() * 1000)[:-20])
    with pytest.raises(UserError, match=r"cannot be read|no valid JSON"):
        sources.read_instructions((str(path),), "vi")


def test_a_revision_of_a_hub_data_set(monkeypatch, tmp_path):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = sources.read_instructions(("own/set:sw@test?revision=v1.0&take=1&instruction=output",), "sw")
    assert [row.turns[0].instruction for row in found] == ["yo"]
    assert calls == [("own/set", "sw", {"split": "test", "revision": "v1.0"})]
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(UserError, match="sets a revision, and is no hub data set"):
        sources.read_instructions((f"{tmp_path}/a.jsonl?revision=v1",), "sw")
    with pytest.raises(UserError, match="sets take=none: expected a number of rows"):
        sources.read_instructions((f"{tmp_path}/a.jsonl?take=none",), "sw")
