import numpy as np
import pytest

from prom_jax.data import prompts
from prom_jax.data.prompts import Span
from prom_jax.data.records import Recipe, encode, prepare
from prom_jax.data.sources import Turn
from prom_jax.errors import UserError

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


def decoded(tokenizer, record, side):
    """The text of one side, and of its loss-bearing tokens."""
    tokens, loss = record[f"{side}_tokens"], record[f"{side}_loss"]
    return tokenizer.decode(tokens), tokenizer.decode(tokens[loss])


# Tokens


def test_loss_on_the_response_alone(tokenizer):
    """An independent reading: prompt and whole text tokenised apart."""
    turn = Turn("Describe an input", "Habari ya asubuhi", "Nzuri sana")
    (side,) = encode(tokenizer, [prompts.conversation((turn,))], 1000)
    prompt = tokenizer(prompts.prompt(turn.instruction, turn.input))["input_ids"]
    assert side.tokens[: len(prompt)].tolist() == prompt
    assert not side.loss[: len(prompt)].any()
    assert side.loss[len(prompt) :].all()  # from the first response token to EOS
    assert side.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(side.tokens[side.loss]) == "Nzuri sana</s>"
    assert side.bytes == len("Nzuri sana") and not side.truncated


def test_every_turn_ends_in_eos(tokenizer):
    turns = (Turn("Say hi", "", "Nzuri"), Turn("Again", "", "asante"))
    (side,) = encode(tokenizer, [prompts.conversation(turns)], 1000)
    assert (side.tokens == tokenizer.eos_token_id).sum() == 2
    assert tokenizer.decode(side.tokens[side.loss]) == "Nzuri</s>asante</s>"
    assert (side.tokens == tokenizer.bos_token_id).sum() == bool(tokenizer.bos_token)
    assert side.bytes == len("Nzuriasante")


def test_special_tokens_in_the_data_stay_text(byte_level):
    (side,) = encode(byte_level, [prompts.conversation((Turn("a</s>b", "", "c</s>d"),))], 1000)
    assert (side.tokens == byte_level.eos_token_id).sum() == 1
    assert byte_level.decode(side.tokens[side.loss][:-1]) == "c</s>d"


def test_token_across_the_boundary_bears_loss(byte_level):
    token = byte_level("asubuhi", return_offsets_mapping=True)
    assert len(token["input_ids"]) < len("asubuhi")  # some token spans several characters
    start = next(s for s, e in token["offset_mapping"] if e - s > 1) + 1
    (side,) = encode(byte_level, [[Span("asubuhi", start, 7)]], 100)
    crossing = next(i for i, (s, e) in enumerate(token["offset_mapping"]) if s < start < e)
    assert side.loss.tolist() == [i >= max(crossing, 1) for i in range(len(side.tokens))]


def test_translation_source_is_cut_after_the_source(tokenizer):
    args = ("Good morning", "Habari", "sw", "v")
    source, whole = encode(tokenizer, [prompts.translation_source(*args), prompts.translation(*args)], 1000)
    assert source.tokens.tolist() == whole.tokens[: len(source.tokens)].tolist()
    text = tokenizer.decode(source.tokens[source.loss])
    assert text.strip() == "Good morning" and source.bytes == len("Good morning")
    assert tokenizer.decode(source.tokens).endswith("Good morning")


def test_plain_text_and_bytes(byte_level, metaspace):
    text = "ภาษาไทย ok"
    (side,) = encode(byte_level, [prompts.plain(text)], 1000)
    assert side.loss.tolist() == [False] + [True] * (len(side.tokens) - 1)
    assert side.bytes == len(text.encode()) - 3  # nothing predicts the first character
    (side,) = encode(metaspace, [prompts.plain("Habari ya")], 1000)
    assert side.tokens[0] == metaspace.bos_token_id
    assert side.loss.tolist() == [False] + [True] * (len(side.tokens) - 1)
    assert side.bytes == len("Habari ya")


def test_truncation_counts_what_is_kept(byte_level):
    spans = prompts.conversation((Turn("Say hi", "", "xyz" * 50),))
    (whole,) = encode(byte_level, [spans], 1000)
    (side,) = encode(byte_level, [spans], len(whole.tokens) - 21)
    assert side.truncated and len(side.tokens) == len(whole.tokens) - 21
    assert side.bytes == len(byte_level.decode(side.tokens[side.loss]))
    assert side.tokens[-1] != byte_level.eos_token_id


# Records


def test_sides_by_role(recipe, byte_level, tmp_path):
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
    for i, record in enumerate(train.read(range(len(train)))):
        for side in ("target", "english"):
            assert getattr(train, f"{side}_lengths")[i] == len(record[f"{side}_tokens"])
            assert getattr(train, f"{side}_weights")[i] == record[f"{side}_loss"].sum()
            learnt = decoded(byte_level, record, side)[1].removesuffix("</s>")
            assert getattr(train, f"{side}_bytes")[i] == len(learnt.encode())


def test_variants_of_the_english_side(recipe, byte_level, tmp_path):
    def english(**changes):
        train = prepare(recipe(**changes), byte_level, tmp_path / "r").train
        return [decoded(byte_level, train[i], "english") for i in (1, 10)]

    (text, learnt), _ = english(english_prompt="target")
    assert "Sema 1" in text and "Say 1" not in text and learnt == "I say 1.</s>"
    _, (text, learnt) = english(translation_source=True)
    assert text.endswith("Good morning 1") and learnt.strip() == "Good morning 1"
    assert english(use_english=False, translation_source=True) == [("", ""), ("", "")]


@pytest.mark.parametrize("use_english", [True, False])
def test_held_out_pairs_leave_training_and_keep_english(recipe, byte_level, tmp_path, use_english):
    changes = {"holdout": 3, "use_english": use_english, "english_prompt": "target"}
    prepared = prepare(recipe(**changes), byte_level, tmp_path / "r")
    assert len(prepared.train) == 10 and len(prepared.holdout) == 3
    held = {prepared.holdout[i]["id"] for i in range(3)}
    assert not held & {prepared.train[i]["id"] for i in range(10)}
    text, learnt = decoded(byte_level, prepared.holdout[0], "english")
    assert "### Instruction:\nSay" in text and learnt.startswith("I say")
    assert (prepared.train.english_lengths > 0).any() == use_english
    other = prepare(recipe(**changes, seed=1), byte_level, tmp_path / "r")
    assert {other.holdout[i]["id"] for i in range(3)} != held


def test_translation_alone_and_plain_text(recipe, byte_level, tmp_path, jsonl):
    only = recipe(english=(), target=(), holdout=1, text=(jsonl("t.jsonl", SENTENCES),))
    prepared = prepare(only, byte_level, tmp_path / "r")
    assert (len(prepared.train), len(prepared.holdout), len(prepared.text)) == (3, 1, 4)
    assert decoded(byte_level, prepared.text[2], "english")[0] == "Good morning 2</s>"
    assert prepared.text.target_weights[2] == prepared.text.target_lengths[2] - 1


def test_dropped_and_truncated_are_counted(recipe, byte_level, tmp_path, jsonl):
    english = [dict(row) for row in ENGLISH]
    target = [dict(row) for row in TARGET]
    english[0]["output"] = ""  # the English side alone is lost
    target[1]["output"] = ""  # the pair is lost
    target[2]["output"] = "x" * 3000
    english[3]["instruction"] = "y" * 3000
    sides = {"english": (jsonl("e.jsonl", english),), "target": (jsonl("t.jsonl", target),)}
    prepared = prepare(recipe(**sides), byte_level, tmp_path / "r")
    report = prepared.report["train"]
    assert (report["target"]["examples"], report["target"]["dropped"]) == (8, 1)
    assert (report["english"]["examples"], report["english"]["dropped"]) == (6, 3)
    assert report["target"]["truncated"] == 1
    tokens = report["target"]["tokens"] + report["translation"]["tokens"]
    assert tokens == prepared.train.target_lengths.sum()
    assert report["english"]["loss_tokens"] == prepared.train.english_weights.sum()


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
    monkeypatch.setattr(np, "savez", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(recipe(), byte_level, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 8}, "Nothing is left of the 13 examples for train.*seq_len = 8"),
        ({"holdout": 9}, "9 held-out pairs were asked for and there are 9"),
        ({"target": ()}, "has no target-language counterpart"),
        ({"target": (), "english": (), "translation": ()}, "nothing to train on"),
        ({"english_prompt": "thai"}, "english_prompt is 'thai'"),
    ],
)
def test_bad_recipes(recipe, byte_level, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(recipe(**changes), byte_level, tmp_path / "r")
