import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from transformers import PreTrainedTokenizerFast

from prom_jax.data import shards
from prom_jax.data.examples import Recipe, further_streams
from prom_jax.data.records import prepare
from prom_jax.utils.errors import UserError

ENGLISH = [{"instruction": f"Say {i}", "input": "now" * (i % 2), "output": f"I say {i}."} for i in range(9)]
TARGET = [
    {"instruction": f"Sema {i}", "input": "sasa" * (i % 2), "output": f"Nasema {i}, ภาษา"} for i in range(9)
]
SENTENCES = [{"id": f"s{i}", "en": f"Good morning {i}", "sw": f"Habari {i}"} for i in range(4)]


@pytest.fixture
def recipe(jsonl):
    def make(**changes):
        defaults = {
            "language": "sw",
            "english": (jsonl("en.jsonl", ENGLISH),),
            "target": (jsonl("sw.jsonl", TARGET),),
            "translation": (jsonl("mt.jsonl", SENTENCES),),
            "seq_len": 512,
        }
        return Recipe(**defaults | changes)

    return make


def decoded(tokenizer, record, stream):
    """The text of one stream, and of its loss tokens."""
    tokens, loss = record[f"{stream}_tokens"], record[f"{stream}_loss"]
    return tokenizer.decode(tokens), tokenizer.decode(tokens[loss])


def test_texts_by_role(recipe, byte_level, tmp_path):
    train = prepare(recipe(), byte_level, tmp_path / "r").train
    assert len(train) == 13
    pair, translation = train[1], train[10]
    text, learnt = decoded(byte_level, pair, "target")
    assert "Sema 1" in text and "sasa" in text and learnt == "Nasema 1, ภาษา</s>"
    assert decoded(byte_level, pair, "english")[1] == "I say 1.</s>"
    text, learnt = decoded(byte_level, translation, "target")
    assert "Good morning 1" in text and learnt == "Habari 1</s>"
    assert translation["id"] == "s1" and len(translation["english_tokens"]) == 0
    assert pair["target_tokens"].dtype == np.int32 and pair["target_loss"].dtype == bool


def test_statistics_agree_with_the_records(recipe, byte_level, tmp_path):
    train = prepare(recipe(translation_source=True), byte_level, tmp_path / "r").train
    assert train.names == tuple(train.streams) == ("target", "english")
    assert train.roles.tolist() == ["target"] * 9 + ["translation"] * 4
    for i, record in enumerate(train.read(range(len(train)))):
        for name, stream in train.streams.items():
            assert stream.lengths[i] == len(record[f"{name}_tokens"])
            assert stream.weights[i] == record[f"{name}_loss"].sum()
            learnt = decoded(byte_level, record, name)[1].removesuffix("</s>")
            assert stream.bytes[i] == len(learnt.encode())


def test_variants_of_the_english_text(recipe, byte_level, tmp_path):
    def english(**changes):
        train = prepare(recipe(**changes), byte_level, tmp_path / "r").train
        return [decoded(byte_level, train[i], "english") for i in (1, 10)]

    (text, learnt), _ = english(english_prompt="target")
    assert "Sema 1" in text and "Say 1" not in text and learnt == "I say 1.</s>"
    _, (text, learnt) = english(translation_source=True)
    assert text.endswith("Good morning 1") and learnt.strip() == "Good morning 1"
    changes = {"streams": ("target",), "translation_source": True}
    assert prepare(recipe(**changes), byte_level, tmp_path / "r").train.names == ("target",)
    assert english(**changes, holdout=1) == [("", ""), ("", "")]  # held-out examples have it


def test_conversion_asks_for_the_english_prompt(recipe, byte_level, tmp_path):
    streams = ("target", "english", "conversion")
    changes = {"streams": streams, "english_prompt": "target", "holdout": 2}
    prepared = prepare(recipe(**changes), byte_level, tmp_path / "r")
    train, counts = prepared.train, prepared.report["train"]
    assert train.names == streams and not prepared.holdout.streams["conversion"].lengths.any()
    for record in train.read(range(7)):
        text, learnt = decoded(byte_level, record, "conversion")
        number = number_in(learnt)
        assert learnt == f"Say {number}" + "\n\nnow" * (number % 2)
        asked, answer = decoded(byte_level, record, "target")
        assert text == asked.removesuffix(answer) + learnt  # after the same prompt as the target's response
    assert (counts["conversion"]["examples"], counts["english"]["examples"]) == (7, 7)
    assert not train.streams["conversion"].lengths[train.roles == "translation"].any()


def number_in(text):
    return int(re.search(r"\d+", text)[0])


def test_shuffled_english_is_that_of_other_pairs(recipe, byte_level, tmp_path):
    def numbers(**changes):
        prepared = prepare(recipe(shuffled=True, holdout=2, **changes), byte_level, tmp_path / "r")
        return [
            [
                tuple(number_in(decoded(byte_level, record, stream)[1]) for stream in ("target", "english"))
                for record in records.read(range(len(records)))
                if len(record["english_tokens"])
            ]
            for records in (prepared.train, prepared.holdout)
        ]

    train, holdout = numbers()
    assert len(train) == 7 and all(target == english for target, english in holdout)
    assert all(target != english for target, english in train)
    target, english = map(sorted, zip(*train))
    assert target == english
    assert numbers(seed=1) != numbers() == [train, holdout]


@pytest.mark.parametrize("streams", [("target", "english"), ("target",)])
def test_held_out_pairs_leave_training_and_keep_english(recipe, byte_level, tmp_path, streams):
    changes = {"holdout": 3, "streams": streams, "english_prompt": "target"}
    prepared = prepare(recipe(**changes), byte_level, tmp_path / "r")
    assert len(prepared.train) == 10 and len(prepared.holdout) == 3
    held = {prepared.holdout[i]["id"] for i in range(3)}
    assert not held & {prepared.train[i]["id"] for i in range(10)}
    text, learnt = decoded(byte_level, prepared.holdout[0], "english")
    assert "### Instruction:\nSay" in text and learnt.startswith("I say")
    assert prepared.train.streams["english"].lengths.any() == ("english" in streams)
    other = prepare(recipe(**changes, seed=1), byte_level, tmp_path / "r")
    assert {other.holdout[i]["id"] for i in range(3)} != held


def test_a_pair_that_nothing_is_left_of_is_not_held_out(recipe, byte_level, tmp_path, jsonl):
    """The next one of the same order is, and the others stay."""
    before = prepare(recipe(holdout=3), byte_level, tmp_path / "r").holdout
    held = [int(before[i]["id"].removeprefix("#")) - 1 for i in range(3)]
    rows = [dict(row) for row in TARGET]
    rows[held[0]]["output"], rows[held[1]]["output"] = "", "ndefu " * 100
    changes = {"target": (jsonl("other.jsonl", rows),), "too_long": "drop", "translation": ()}
    made = prepare(recipe(**changes, holdout=3), byte_level, tmp_path / "r")
    now = [int(made.holdout[i]["id"].removeprefix("#")) - 1 for i in range(3)]
    assert held[2] in now and not set(held[:2]) & set(now)
    assert made.report["holdout"]["target"]["dropped"] == 0
    assert made.report["train"]["target"]["dropped"] == 2 and len(made.train) == 4
    with pytest.raises(UserError, match="8 held-out pairs were asked for and there are 9, of which 7 keep"):
        prepare(recipe(**changes, holdout=8), byte_level, tmp_path / "r")


def test_translation_alone_and_plain_text(recipe, byte_level, tmp_path, jsonl):
    only = recipe(english=(), target=(), streams=("target",), holdout=1, text=(jsonl("t.jsonl", SENTENCES),))
    prepared = prepare(only, byte_level, tmp_path / "r")
    assert (len(prepared.train), len(prepared.holdout), len(prepared.text)) == (3, 1, 4)
    assert decoded(byte_level, prepared.text[2], "english")[0] == "Good morning 2</s>"
    target = prepared.text.streams["target"]
    assert target.weights[2] == target.lengths[2] - 1


def test_dropped_and_truncated_are_counted(recipe, byte_level, tmp_path, jsonl):
    english = [dict(row) for row in ENGLISH]
    target = [dict(row) for row in TARGET]
    english[0]["output"] = ""  # the English text alone is lost
    target[1]["output"] = ""  # the pair is lost
    target[2]["output"] = "x" * 3000
    english[3]["instruction"] = "y" * 3000
    sides = {"english": (jsonl("e.jsonl", english),), "target": (jsonl("t.jsonl", target),)}
    prepared = prepare(recipe(**sides), byte_level, tmp_path / "r")
    report = prepared.report["train"]
    assert (report["target"]["examples"], report["target"]["dropped"]) == (8, 1)
    assert (report["english"]["examples"], report["english"]["dropped"]) == (6, 3)
    assert report["target"]["truncated"] == 1
    assert report["target"]["reasons"] == {"no response": 1}
    assert report["english"]["reasons"] == {
        "no response": 1,
        "its target is dropped": 1,
        "nothing left after cutting": 1,
    }
    assert report["translation"]["words"] == 2 * 4 and report["translation"]["bytes"] == 8 * 4
    assert report["translation"]["text_tokens"] == report["translation"]["loss_tokens"] - 4
    tokens = report["target"]["tokens"] + report["translation"]["tokens"]
    assert tokens == prepared.train.streams["target"].lengths.sum()
    assert report["english"]["loss_tokens"] == prepared.train.streams["english"].weights.sum()


def test_texts_that_are_too_long(recipe, byte_level, tmp_path, jsonl):
    target = [row | {"output": "x" * 3000} if i < 2 else row for i, row in enumerate(TARGET)]
    sides = {"target": (jsonl("t.jsonl", target),)}
    cut = prepare(recipe(**sides), byte_level, tmp_path / "r").report["train"]
    assert (cut["target"]["examples"], cut["target"]["truncated"]) == (9, 2)
    dropped = prepare(recipe(**sides, too_long="drop"), byte_level, tmp_path / "r").report["train"]
    assert (
        dropped["target"]["reasons"] == {"longer than data.seq_len": 2} and not dropped["target"]["truncated"]
    )
    assert dropped["target"]["examples"] == dropped["english"]["examples"] == 7
    with pytest.raises(UserError, match=r"2 texts are longer than data.seq_len=512 \(2 of target\)"):
        prepare(recipe(**sides, too_long="refuse"), byte_level, tmp_path / "r")


def test_folder_is_reused_until_something_changes(recipe, byte_level, metaspace, tmp_path, jsonl):
    directory = tmp_path / "r"

    def folders():
        return {(path.name, path.stat().st_mtime_ns) for path in directory.iterdir()}

    prepare(recipe(), byte_level, directory)
    first = folders()
    prepare(recipe(), byte_level, directory)
    assert folders() == first and len(first) == 1
    prepare(recipe(seq_len=500), byte_level, directory)
    prepare(recipe(), metaspace, directory)
    unchanged = recipe()
    jsonl("sw.jsonl", [*TARGET[:-1], TARGET[0]])
    prepare(unchanged, byte_level, directory)
    assert len(folders()) == 4


def test_interrupted_writing_leaves_nothing(recipe, byte_level, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda *arrays, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(recipe(), byte_level, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


def test_a_translation_without_its_source_is_dropped(recipe, byte_level, tmp_path, jsonl):
    rows = [*SENTENCES, {"en": " ", "sw": "Habari"}, {"en": "Hello", "sw": " "}]
    prepared = prepare(recipe(translation=(jsonl("m.jsonl", rows),)), byte_level, tmp_path / "r")
    report = prepared.report["train"]["translation"]
    assert report["examples"] == 4
    assert report["reasons"] == {"no source sentence": 1, "no response": 1}


def test_threads_do_not_mix_tokenizers(recipe, byte_level, metaspace, tmp_path):
    both, same = {"a": byte_level, "b": metaspace}, recipe(seq_len=300)

    def make(name):
        return prepare(same, both[name[0]], tmp_path / name).train.streams["target"].lengths.sum()

    alone = [make("a1"), make("b1")]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(make, ["a2", "b2"])) == alone


def test_a_place_that_cannot_be_written(recipe, byte_level, tmp_path, monkeypatch):
    class Full(shards.ArrayRecordWriter):
        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"cannot be written into .*No space left.*free some space"):
        prepare(recipe(), byte_level, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


def contents(records):
    return [
        {key: value.tolist() if key != "id" else value for key, value in record.items()}
        for record in records.read(range(len(records)))
    ]


def test_processes_write_the_same_records(recipe, byte_level, tmp_path, monkeypatch):
    one = prepare(recipe(holdout=2), byte_level, tmp_path / "one")
    monkeypatch.setattr(shards, "PARALLEL", 0)
    monkeypatch.setattr(shards, "SHARD", 4)
    many = prepare(recipe(holdout=2), byte_level, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*/prom-train.array_record-*-of-00003"))) == 3
    assert contents(many.train) == contents(one.train) and contents(many.holdout) == contents(one.holdout)
    assert many.report == one.report and many.fingerprint == one.fingerprint
    assert np.array_equal(many.train.roles, one.train.roles)
    for stream, expected in one.train.streams.items():
        for found, column in zip(many.train.streams[stream], expected, strict=True):
            assert np.array_equal(found, column)
    for stream, expected in one.train.common_prompts.items():
        assert np.array_equal(many.train.common_prompts[stream], expected)


class Deadly(PreTrainedTokenizerFast):
    """Kills the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_killed_process_is_one_error(recipe, byte_level, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PARALLEL", 0)
    monkeypatch.setattr(shards, "SHARD", 4)
    deadly = Deadly(tokenizer_object=byte_level.backend_tokenizer, eos_token="</s>")
    with pytest.raises(UserError, match="processes that tokenise was killed"):
        prepare(recipe(), deadly, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


SCRIPT = """
import sys
from transformers import PreTrainedTokenizerFast
from prom_jax.data.examples import Recipe, further_streams
from prom_jax.data.records import prepare
tokenizer, rows, folder = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
sys.stdin.read(1)
prepared = prepare(Recipe("sw", target=(rows,), streams=("target",), seq_len=512), tokenizer, folder)
tokens = sum(prepared.train[i]["target_tokens"].sum() for i in range(9))
print(prepared.fingerprint, len(prepared.train), tokens)
"""


@pytest.mark.slow
def test_two_processes_at_once_and_one_killed(jsonl, byte_level, tmp_path):
    """The others find the same whole records; what a killed one leaves is in nobody's way."""
    byte_level.save_pretrained(tmp_path / "tokenizer")
    rows, folder = jsonl("rows.jsonl", TARGET * 300), tmp_path / "r"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "tokenizer"), rows, str(folder)]
    three = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in three:
        process.stdin.write(b"x")
        process.stdin.flush()
    while not (folder.is_dir() and any(folder.iterdir())) and three[0].poll() is None:
        time.sleep(0.01)
    three[0].kill()
    said = [process.communicate()[0] for process in three]
    assert said[1] == said[2] and said[1].split()[1] == b"2700"
    whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert [path.name for path in whole] == [said[1].split()[0].decode()]


def test_further_streams(recipe, byte_level, tmp_path, jsonl):
    """Rows of a further stream are examples of it alone; what no method trains on is not made."""
    rows = [{"id": f"r{i}", "instruction": f"Recall {i}", "output": f"Yes {i}"} for i in range(5)]
    rows.append({"instruction": "Recall", "output": ""})
    more = (("replay", (jsonl("replay.jsonl", rows),)), ("other", ("nowhere.jsonl",)))
    changes = {"streams": ("target", "english", "replay"), "more": more, "holdout": 2}
    prepared = prepare(recipe(**changes), byte_level, tmp_path / "r")
    train = prepared.train
    assert train.names == ("target", "english", "replay") == tuple(train.streams)
    assert tuple(train.common_prompts) == ("english", "replay")
    assert train.roles.tolist() == ["target"] * 7 + ["translation"] * 4 + ["replay"] * 5
    alone = train.roles == "replay"
    for stream in train.names:
        has = train.streams[stream].lengths > 0
        assert np.array_equal(has, alone if stream == "replay" else has & ~alone)
        assert (train.streams[stream].prefix_ids[~has] == -1).all()
    record = train[12]
    assert record["id"] == "r1" and not len(record["target_tokens"]) and not len(record["english_tokens"])
    text, learnt = decoded(byte_level, record, "replay")
    assert "### Instruction:\nRecall 1" in text and learnt == "Yes 1</s>"
    assert not train.common_prompts["replay"].any() and train.common_prompts["english"].any()
    counts = prepared.report["train"]["replay"]
    assert (counts["examples"], counts["reasons"]) == (5, {"no response": 1})
    assert counts["loss_tokens"] == train.streams["replay"].weights.sum()
    assert not prepared.holdout.streams["replay"].lengths.any()
    assert prepare(recipe(**changes | {"more": more[:1]}), byte_level, tmp_path / "r").fingerprint != (
        prepare(recipe(holdout=2), byte_level, tmp_path / "r").fingerprint
    )
    builder = tfds.builder_from_directory(str(tmp_path / "r" / prepared.fingerprint))
    assert set(builder.info.features) == {
        "id",
        *(f"{n}_{w}" for n in train.names for w in ("tokens", "loss")),
    }


def test_a_stream_of_which_nothing_is_left(recipe, byte_level, tmp_path, jsonl):
    more = (("replay", (jsonl("replay.jsonl", [{"instruction": "Recall", "output": ""}]),)),)
    changes = {"streams": ("target", "replay"), "more": more}
    with pytest.raises(UserError, match="trains on the stream 'replay', and the data have none of it"):
        prepare(recipe(**changes), byte_level, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


def test_entries_of_further_streams():
    entries = ("replay=a.jsonl", "code=owner/name?instruction=question", "replay=b=c.jsonl")
    expected = (("replay", ("a.jsonl", "b=c.jsonl")), ("code", ("owner/name?instruction=question",)))
    assert further_streams(entries) == expected and further_streams(()) == ()
    for entry in ("replay", "=a.jsonl", "Re play=a.jsonl", "replay="):
        with pytest.raises(UserError, match=f"data.streams has '{entry}': expected 'name=source'"):
            further_streams((entry,))
    with pytest.raises(UserError, match="'english' is taken"):
        further_streams(("english=a.jsonl",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 8}, "Nothing is left of the 13 examples for train.*seq_len = 8"),
        ({"holdout": 9}, "9 held-out pairs were asked for and there are 9"),
        ({"target": (), "english_prompt": "target"}, r"pivot.english_prompt=target asks for pairs, .*'None'"),
        ({"target": (), "holdout": 2}, "eval.holdout=2 asks for pairs, and no English row has a target"),
        ({"target": (), "english": (), "translation": ()}, "nothing to train on"),
        ({"english_prompt": "thai"}, "english_prompt is 'thai'"),
        ({"streams": ("english", "target")}, "expected different ones, the first 'target'"),
        ({"english": ()}, "trains on the stream 'english', and the data have none of it: set data.english"),
        ({"streams": ("target", "replay")}, "stream 'replay', .* none of it: set data.streams=replay=FILE"),
    ],
)
def test_bad_recipes(recipe, byte_level, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(recipe(**changes), byte_level, tmp_path / "r")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("features.json", "tensorflow_datasets.core.features.text_feature.Text", "spoiled.Feature"),
        ("dataset_info.json", '"{DATASET}-', '"../../{DATASET}-'),
        ("dataset_info.json", '"prom"', '"../prom"'),
        ("dataset_info.json", '"splits"', '"parts"'),
        ("train.npz", "PK", "KP"),
        ("report.json", "{", "["),
    ],
)
def test_records_of_others_run_and_open_nothing(recipe, byte_level, tmp_path, monkeypatch, name, old, new):
    made = prepare(recipe(), byte_level, tmp_path / "r")
    (tmp_path / "spoiled.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "r" / made.fingerprint / name
    content = path.read_bytes().replace(old.encode(), new.encode())
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"The records in .* are damaged .*: remove the folder"):
        prepare(recipe(), byte_level, tmp_path / "r")


@pytest.mark.parametrize("length", [0, 65536, 131071])
def test_a_cut_file_of_records_is_told(recipe, byte_level, tmp_path, length):
    made = prepare(recipe(), byte_level, tmp_path / "r")
    (path,) = (tmp_path / "r" / made.fingerprint).glob("*train.array_record*")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"The records in .* are damaged .*: remove the folder"):
        prepare(recipe(), byte_level, tmp_path / "r").train.read(range(len(made.train)))


def texts_of(tokenizer, train):
    """(role, stream, what is learnt) of every text."""
    return {
        (str(role), stream, decoded(tokenizer, record, stream)[1].removesuffix("</s>"))
        for role, record in zip(train.roles, train.read(range(len(train))))
        for stream in train.names
        if len(record[f"{stream}_tokens"])
    }


def test_rows_without_a_counterpart_train_on_their_own(recipe, byte_level, tmp_path, jsonl):
    english = [{"id": i, "instruction": f"Say {i}", "output": f"Hi {i}"} for i in range(3)]
    target = [{"id": i, "instruction": f"Sema {i}", "output": f"Habari {i}"} for i in range(2, 6)]
    sides = {"english": (jsonl("e.jsonl", english),), "target": (jsonl("t.jsonl", target),)}

    def made(**changes):
        return prepare(recipe(**sides, **{"translation": (), **changes}), byte_level, tmp_path / "r")

    prepared = made()
    expected = {("target", "target", f"Habari {i}") for i in range(2, 6)} | {("target", "english", "Hi 2")}
    alone = {("english", "english", "Hi 0"), ("english", "english", "Hi 1")}
    assert texts_of(byte_level, prepared.train) == expected | alone and prepared.report["unmatched"] == 5
    assert prepared.report["train"]["english"]["examples"] == 3
    assert texts_of(byte_level, made(streams=("target",)).train) == expected - {("target", "english", "Hi 2")}
    none = made(pairing="none")
    assert texts_of(byte_level, none.train) == expected - {("target", "english", "Hi 2")} | alone | {
        ("english", "english", "Hi 2")
    }
    after_prompts = made(english_prompt="target")
    assert texts_of(byte_level, after_prompts.train) == expected
    assert after_prompts.report["train"]["english"]["reasons"] == {
        "no counterpart, whose prompt it is to follow": 2
    }


def test_raw_text(recipe, byte_level, metaspace, tmp_path, jsonl):
    """Texts longer than a row continue in further examples, and every token is predicted once."""
    target, english = "Habari ya asubuhi. " * 9, "Good morning. " * 40
    sources = {
        "raw": (jsonl("t.jsonl", [{"text": target}, {"text": "Nzuri"}]),),
        "raw_english": (jsonl("e.jsonl", [{"text": english}]),),
    }
    only = {"english": (), "target": (), "translation": (), "seq_len": 20}
    for tokenizer in (byte_level, metaspace):
        prepared = prepare(recipe(**only, **sources), tokenizer, tmp_path / "r")
        train, report = prepared.train, prepared.report["train"]
        for role, stream, text in (("text", "target", target), ("english_text", "english", english)):
            ours = [i for i in np.flatnonzero(train.roles == role) if train[i]["id"].endswith("-0")]
            records = train.read(ours)
            pieces = [record[f"{stream}_tokens"].tolist() for record in records]
            bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            assert len(pieces) > 1 and all(len(piece) <= 20 for piece in pieces)
            assert pieces[0] + [token for piece in pieces[1:] for token in piece[1:]] == whole
            assert [piece[-1] for piece in pieces[:-1]] == [piece[0] for piece in pieces[1:]]
            assert all(record[f"{stream}_loss"][1:].all() for record in records)
            assert report[role]["loss_tokens"] == train.streams[stream].weights.sum()
            first = 0 if bos else len(tokenizer.decode(whole[:1]).encode())  # which nothing predicts
            assert train.streams[stream].bytes[ours].sum() == len(text.encode()) - first
    with pytest.raises(UserError, match="trains on the stream 'english'"):
        prepare(recipe(**only, raw=sources["raw"]), byte_level, tmp_path / "r")
    alone = prepare(
        recipe(**only, raw=sources["raw"], streams=("target",), holdout=1), byte_level, tmp_path / "r"
    )
    assert len(alone.holdout) == 1 and alone.holdout.roles.tolist() == ["text"]
