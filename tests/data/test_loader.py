import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import Stream, prepare
from prom_jax.ops.attention import attention_mask
from prom_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def records(byte_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    lines = [f'{{"instruction": "{i}", "output": "{"ab" * (1 + i % 7)}"}}\n' for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "mt.tsv").write_text("en\tsw\n" + "One\tMoja\n" * 5)
    rows = (str(folder / "rows.jsonl"),)
    recipe = Recipe("sw", rows, rows, (str(folder / "mt.tsv"),), seq_len=256)
    return prepare(recipe, byte_level, folder / "r").train


def batches(records, **changes):
    return Batches(records, **{"sequences": 2, "seq_len": 256, "seed": 0, "epochs": 2.0} | changes)


def unpack(rows, before=None):
    """The texts in packed rows, each with what it continues (there, or in the rows that they are appended to,
    `before`), as (tokens, loss) by brute force."""
    for row in range(len(rows["tokens"])):
        segments = rows["segments"][row]
        for number in sorted({n for n in segments.tolist() if n & 1023}):
            (here,) = np.nonzero(segments == number)
            assert np.array_equal(here, np.arange(here[0], here[-1] + 1))
            tokens = rows["tokens"][row, here]
            assert np.array_equal(rows["labels"][row, here[:-1]], tokens[1:])
            weights = rows["weights"][row, here]
            assert rows["labels"][row, here[-1]] == 0 and weights[-1] == 0
            continued = {number >> 10 << 10, number >> 20 << 20} - {0}
            parts = [
                dict(zip(of["positions"][row, seen].tolist(), of["tokens"][row, seen].tolist()))
                for of, wanted in ((rows, continued), (before, continued), (rows, {number}))
                if of is not None
                for seen in [np.isin(of["segments"][row], list(wanted))]
            ]
            whole = {position: token for part in parts for position, token in part.items()}
            assert len(whole) == sum(map(len, parts)) and sorted(whole) == list(range(len(whole)))
            text = tuple(whole[position] for position in range(len(whole)))
            yield text, (*[0] * (len(text) - len(here) + 1), *weights[:-1].tolist())
    padding = rows["segments"] == 0
    assert not any(rows[name][padding].any() for name in rows)


def texts_of(run, step):
    """The texts of a batch by stream."""
    batch = run[step]
    before = {run.appended: batch["target"]}
    return {stream: list(unpack(rows, before.get(stream))) for stream, rows in batch.items()}


def test_an_epoch_is_every_example_once(records):
    examples = records.read(range(len(records)))
    runs = [batches(records, epochs=1.0, share_prompts=share) for share in (False, True)]
    once = [Batches.once(records, sequences=2, seq_len=256, share_prompts=share) for share in (False, True)]
    assert runs[1].appended == "english" and once[1].appended is None and once[1].saved > 0
    for run in (*runs, *once):
        assert_every_text_once(run, examples, ("target", "english"))


def assert_every_text_once(run, examples, streams):
    """An epoch of whole texts, by brute force."""
    found = [texts_of(run, i) for i in range(len(run))]
    for stream in streams:
        expected = [
            (tuple(e[f"{stream}_tokens"].tolist()), tuple(e[f"{stream}_loss"].astype(float)))
            for e in examples
            if len(e[f"{stream}_tokens"])
        ]
        assert sorted(text for texts in found for text in texts.get(stream, ())) == sorted(expected)


def test_shapes_dtypes_and_fill(records):
    run = batches(records)
    batch = run[0]
    assert batch["target"]["tokens"].shape == run.shapes["target"] == (2, 256)
    assert batch["english"]["tokens"].shape == run.shapes["english"]
    assert {k: v.dtype for k, v in batch["target"].items()} == {
        **dict.fromkeys(("tokens", "positions", "segments", "labels"), np.int32),
        "weights": np.float32,
    }
    for stream in ("target", "english"):
        real = np.mean([(run[i][stream]["segments"] > 0).mean() for i in range(len(run))])
        assert real == pytest.approx(run.fill[stream])
        weights = [run[i][stream]["weights"].sum() for i in range(len(run))]
        assert run.loss_tokens(stream).tolist() == weights
    assert run.tokens(0) == sum((rows["segments"] > 0).sum() for rows in batch.values()) and run.saved == 0


def test_shared_prompts_take_slots_once(records):
    alone, shared = batches(records), batches(records, share_prompts=True)
    assert shared.steps_per_epoch < alone.steps_per_epoch
    taken = sum((rows["segments"] > 0).sum() for i in range(len(shared)) for rows in shared[i].values())
    tokens = sum(shared.tokens(i) for i in range(len(shared)))
    assert shared.saved == pytest.approx(1 - taken / tokens) and shared.saved > 0.3
    whole = sum(
        len(text) for i in range(len(shared)) for texts in texts_of(shared, i).values() for text, _ in texts
    )
    assert whole == tokens


def test_nobody_sees_what_comes_after_it_in_a_row(records):
    """Kernels of attention rely on it."""
    run = batches(records, share_prompts=True)
    for step in range(len(run)):
        for rows in run[step].values():
            positions, segments = rows["positions"], rows["segments"]
            seen = (
                attention_mask(positions, positions, segments, segments) & (segments != 0)[:, None, :, None]
            )
            assert seen.any() and not np.triu(seen, 1).any()


def test_texts_of_an_example_meet_in_one_update(records):
    """English and target rows are equal here, so each update holds the same in both streams."""
    for share in (False, True):
        run = batches(records, share_prompts=share)
        assert run.appended == ("english" if share else None)
        for step in range(len(run)):
            texts = texts_of(run, step)
            assert set(texts["english"]) <= set(texts["target"])


def test_number_of_steps(records):
    per_epoch = batches(records).steps_per_epoch
    assert per_epoch > 2
    assert batches(records, epochs=1.0).num_steps == per_epoch
    assert batches(records, epochs=1 / per_epoch).num_steps == 1
    second = batches(records, epochs=2.0).num_steps - per_epoch
    assert batches(records, epochs=1 + 2 / second).num_steps == per_epoch + 2
    assert sorted(batches(records, epochs=2.0).examples) == sorted(2 * list(range(len(records))))
    assert batches(records, steps=3 * per_epoch + 1, epochs=1.0).num_steps == 3 * per_epoch + 1
    assert sorted(batches(records, epochs=1.0).examples) == list(range(len(records)))
    with pytest.raises(UserError, match="steps is 0 and epochs is 0"):
        batches(records, epochs=0.0)


def test_iteration_from_a_step_equals_random_access(records):
    run, same = batches(records), batches(records)
    start = run.steps_per_epoch - 1
    seen = list(run.iterate(start))
    assert len(seen) == len(run) - start
    for step, batch in enumerate(seen, start):
        for name, array in batch["target"].items():
            assert np.array_equal(array, same[step]["target"][name])
    assert list(run.iterate(len(run))) == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), min_size=1, max_size=60),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(0, 5),
)
def test_hosts_read_every_example_once_between_them(lengths, hosts, start):
    """Each host reads the rows that are its own; together they have the whole batch, of any step on."""
    run = Batches(Lengths(lengths), sequences=4, seq_len=64, seed=0, epochs=2.0)
    assert_hosts_share(run, hosts, min(start, len(run) - 1))
    seen = [first for step in range(run.steps_per_epoch) for first in first_tokens(run[step]["target"])]
    assert sorted(seen) == list(range(len(lengths)))


def assert_hosts_share(run, hosts, start):
    """Of any step from `start` on, hosts with every so-manieth row have together the whole batch."""
    shares = []
    for host in range(hosts):
        wanted = {stream: np.arange(rows) % hosts == host for stream, (rows, _) in run.shapes.items()}
        shares.append(list(run.iterate(start, wanted)))
    for step, parts in enumerate(zip(*shares, strict=True), start):
        for stream, whole in run[step].items():
            for name, array in whole.items():
                assert np.array_equal(sum(part[stream][name] for part in parts), array)
                for host, part in enumerate(parts):
                    assert not part[stream][name][np.arange(len(array)) % hosts != host].any()


class Lengths:
    """Records of given lengths by stream, whose tokens say which example they are. Texts longer than `prompt`
    begin with one of that length, the same in all streams of an example, and its first half in all examples.
    """

    def __init__(self, lengths, prompt=0):
        self.names = ("target", "english", "replay")[: len(lengths[0])]
        self.prompt, columns = prompt, np.array(lengths).T
        self.streams = {
            name: Stream(column, column, column, np.where(column > prompt, 0, -1), np.array([prompt // 2]))
            for name, column in zip(self.names, columns)
        }
        both = [(columns[0] > prompt) & (column > prompt) for column in columns]
        self.repeats = np.ones(len(lengths), np.int64)
        # The prompt's last token predicts what is each text's own.
        common = [np.where(has, max(0, prompt - 1), 0) for has in both]
        self.common_prompts = dict(zip(self.names[1:], common[1:]))
        self.groups, self.languages = np.zeros(len(lengths), np.int64), ()

    def example(self, i):
        """What is read of an example."""
        texts = {}
        for name, stream in self.streams.items():
            place, has_prompt = np.arange(stream.lengths[i]), stream.lengths[i] > self.prompt
            texts[f"{name}_tokens"] = np.where(has_prompt & (place < self.prompt // 2), -1, i)
            texts[f"{name}_loss"] = (place > 0) & ~(has_prompt & (place < self.prompt))
        return texts

    def read(self, indices):
        return [self.example(i) for i in indices]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(*[st.integers(0, 64)] * 3), min_size=1, max_size=60).filter(
        lambda lengths: np.any(lengths)
    ),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 5),
    st.booleans(),
)
def test_three_streams(lengths, hosts, start, share):
    """Of which an example may lack any: every text once an epoch, whole and by itself, on any hosts."""
    records = Lengths(lengths, prompt=16)
    run = Batches(records, sequences=4, seq_len=64, seed=0, epochs=1.0, share_prompts=share)
    assert set(run.shapes) == {"target", *(n for n in records.names if records.streams[n].lengths.any())}
    assert set(run.fill) == set(run.shapes) == set(run[0]) and (share or run.appended is None)
    assert_every_text_once(run, [records.example(i) for i in range(len(lengths))], records.names)
    assert sorted(run.examples) == list(range(len(lengths)))
    taken = sum((rows["segments"] > 0).sum() for i in range(len(run)) for rows in run[i].values())
    tokens = sum(run.tokens(i) for i in range(len(run)))
    assert tokens == np.sum(lengths) and run.saved == pytest.approx(1 - taken / tokens)
    assert_hosts_share(run, hosts, min(start, len(run) - 1))


def test_a_third_stream_is_appended_or_beside_an_appended_one():
    """Both are tried above; here it is sure."""
    lengths = [(40, 24, 0)] * 30 + [(0, 0, 30)] * 10
    run = Batches(Lengths(lengths, 16), sequences=4, seq_len=64, seed=0, epochs=1.0, share_prompts=True)
    assert run.appended == "english" and run.shapes["english"] == (4, 16) and "replay" in run.shapes
    lengths = [(32, 0, 24)] * 30 + [(0, 0, 9)] * 10
    run = Batches(Lengths(lengths, 16), sequences=4, seq_len=64, seed=0, epochs=1.0, share_prompts=True)
    assert run.appended == "replay" and set(run.shapes) == {"target", "replay"}
    records = Lengths(lengths, 16)
    assert_every_text_once(run, [records.example(i) for i in range(40)], records.names)


def first_tokens(rows):
    begins = (rows["positions"] == 0) & (rows["segments"] > 0)
    return rows["tokens"][begins].tolist()


def test_a_host_reads_no_others_examples(records, monkeypatch):
    run = batches(records)
    read, original = [], records.read
    monkeypatch.setattr(records, "read", lambda indices: read.append(list(indices)) or original(indices))
    mine = {stream: np.arange(rows) == 0 for stream, (rows, _) in run.shapes.items()}
    run.read(0, mine)
    expected = {e for stream in run.shapes for e, row, *_ in zip(*run.slots(0, stream)) if row == 0}
    assert set(read[0]) == expected and len(read[0]) == len(expected) < len(records)


def test_english_is_absent_where_there_is_none(byte_level, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    recipe = Recipe("sw", (str(path),), (str(path),), seq_len=256, streams=("target",))
    run = batches(prepare(recipe, byte_level, tmp_path / "r").train)
    assert set(run.shapes) == set(run.fill) == set(run[0]) == {"target"}


# Whole runs, as the code before streams had names made them: (streams, language of the English prompt,
# whether prompts are shared) → digests of training, of held-out pairs and of plain text.
DIGESTS = {
    (("target", "english"), "english", False): "d83f5819ab372100 c6a85cbca242c4b3 b44b8ac476e8b5de",
    (("target", "english"), "english", True): "35c41e2d4442ec17 afb0c6654a5c2d8b b44b8ac476e8b5de",
    (("target", "english"), "target", False): "5fc4cb17d01f7bd5 c6a85cbca242c4b3 b44b8ac476e8b5de",
    (("target", "english"), "target", True): "3d1f91ba22011153 afb0c6654a5c2d8b b44b8ac476e8b5de",
    (("target",), "english", False): "df2297c570a53f22 c6a85cbca242c4b3 b44b8ac476e8b5de",
    (("target",), "english", True): "00bfb4d98fe37c09 afb0c6654a5c2d8b b44b8ac476e8b5de",
}


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer that is the same whatever made it: a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(("streams", "prompt"), sorted({key[:2] for key in DIGESTS}))
def test_the_sample_corpus_is_batched_as_ever(bytewise, tmp_path, streams, prompt):
    """To the last bit: rows, order, shapes, fill and savings."""
    sample = ("sample",)
    changes = {"english_prompt": prompt, "translation_source": prompt == "target", "streams": streams}
    recipe = Recipe("sw", sample, sample, sample, seq_len=1024, holdout=20, text=sample, **changes)
    data = prepare(recipe, bytewise, tmp_path / "r")
    for share in (False, True):
        train = Batches(data.train, sequences=4, seq_len=1024, seed=0, epochs=1.5, share_prompts=share)
        shape = {"sequences": 2, "seq_len": 1024, "share_prompts": share}
        runs = (train, Batches.once(data.holdout, **shape), Batches.once(data.text, **shape))
        assert " ".join(map(digest, runs)) == DIGESTS[streams, prompt, share]
    assert train.appended == ("english" if prompt == "target" else None)


def digest(run) -> str:
    """16 digits of all that a run gives."""
    found = hashlib.sha256()
    for step in range(len(run)):
        for stream, rows in run[step].items():
            found.update(stream.encode())
            for name, array in rows.items():
                found.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    found.update(run.examples.tobytes())
    tokens = [run.tokens(step) for step in range(len(run))]
    numbers = [run.shapes, run.fill, run.saved, run.steps_per_epoch, run.num_steps, tokens]
    found.update(json.dumps(numbers).encode())
    return found.hexdigest()[:16]


def test_keys_are_those_of_a_text_however_it_is_packed(records, monkeypatch):
    """Tokens that others share have one key, which is that of each text in its own row."""

    def found(step=0, **changes):
        run = batches(records, epochs=2.0, keys=True, **changes)
        named = ("positions", "tokens", "keys")
        return {
            values
            for rows in run[step].values()
            for values in zip(*(rows[name][rows["segments"] > 0].tolist() for name in named))
        }

    whole = found(sequences=40)
    assert len({key for *_, key in whole}) == len(whole)
    assert whole == found(sequences=60, share_prompts=True)
    with monkeypatch.context() as patch:
        patch.setattr(records, "repeats", 3 * records.repeats)
        copies = found(sequences=120)
        assert copies > whole and copies == found(sequences=180, share_prompts=True)
    keys = lambda found: {key for *_, key in found}
    for other in (found(step=1, sequences=40), found(seed=1, sequences=40)):
        assert {values[:2] for values in other} == {values[:2] for values in whole}
        assert not keys(other) & keys(whole)
    assert "keys" not in batches(records)[0]["target"]
