"""Records of several languages as one set."""

import numpy as np
import pytest

from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.mixture import Mixture
from prom_jax.data.records import prepare
from prom_jax.ops.attention import segment_id


@pytest.fixture
def parts(byte_level, tmp_path, jsonl):
    """Nine pairs in Swahili, and four target texts alone in Finnish."""
    english = jsonl("en.jsonl", [{"instruction": f"Say {i}", "output": f"I say {i}."} for i in range(9)])
    rows = [{"instruction": f"Say {i}", "output": f"Nasema {i}."} for i in range(9)]
    swahili = jsonl("sw.jsonl", rows)
    finnish = jsonl("fi.jsonl", [row | {"output": f"Sanon {i}!"} for i, row in enumerate(rows[:4])])
    recipes = (
        Recipe("sw", (swahili,), (english,), seq_len=512),
        Recipe("fi", (finnish,), seq_len=512, streams=("target",)),
    )
    return [prepare(recipe, byte_level, tmp_path / "records").train for recipe in recipes]


def test_every_example_is_as_in_its_own_set(parts):
    whole = Mixture(dict(zip(("sw", "fi"), parts)))
    assert len(whole) == 13 and whole.names == ("target", "english") and whole.languages == ("sw", "fi")
    np.testing.assert_array_equal(whole.groups, [0] * 9 + [1] * 4)
    assert [example["id"] for example in whole.read([12, 3, 9, 10])] == [
        *(parts[1][3]["id"], parts[0][3]["id"], parts[1][0]["id"], parts[1][1]["id"])
    ]
    for i, of_part in ((2, parts[0][2]), (9, parts[1][0]), (10, parts[1][1]), (12, parts[1][3])):
        for key, value in of_part.items():
            np.testing.assert_array_equal(whole[i][key], value)
        for name, stream in whole.streams.items():
            assert stream.lengths[i] == len(whole[i][f"{name}_tokens"])
            assert stream.weights[i] == whole[i][f"{name}_loss"].sum()
    assert not whole.streams["english"].lengths[9:].any() and whole[9]["english_tokens"].dtype == np.int32
    ids = whole.streams["target"].prefix_ids
    assert ids[0] != ids[9] and not set(ids[:9]) & set(ids[9:])  # each has its own prefixes
    lengths = whole.streams["target"].prefix_lengths
    for part, first in zip(parts, (0, 9)):
        stream = part.streams["target"]
        np.testing.assert_array_equal(lengths[ids[first]], stream.prefix_lengths[stream.prefix_ids[0]])


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_holds_both_without_mixing_them(parts, share):
    whole = Mixture(dict(zip(("sw", "fi"), parts)))
    batches = Batches(whole, sequences=2, seq_len=512, seed=0, epochs=1.0, share_prompts=share)
    found = {"target": [], "english": []}
    for batch in (batches[step] for step in range(len(batches))):
        for stream, rows in batch.items():
            for row in range(len(rows["tokens"])):
                losses = rows["weights"][row] > 0
                for segment in dict.fromkeys(rows["segments"][row][losses].tolist()):
                    here = losses & (rows["segments"][row] == segment)
                    assert segment != segment_id(1)  # of a prefix, which has no loss
                    found[stream].append(tuple(rows["labels"][row][here].tolist()))
    for stream, texts in found.items():
        wanted = [example for example in whole.read(range(13)) if example[f"{stream}_loss"].any()]
        losses = [tuple(e[f"{stream}_tokens"][e[f"{stream}_loss"]].tolist()) for e in wanted]
        assert sorted(texts) == sorted(losses)


def test_languages_are_spread_evenly(parts):
    whole = Mixture(dict(zip(("sw", "fi"), parts)))
    shares = {"sw": 0.75, "fi": 0.25}
    batches = Batches(whole, sequences=4, seq_len=512, seed=0, epochs=10.0, shares=shares)
    assert np.bincount(whole.groups[batches.first_epoch]) == pytest.approx([12, 4], abs=1)
    order = whole.groups[batches.examples]
    for number in (40, 80):  # whatever the number of examples, a quarter is Finnish
        assert abs(order[:number].sum() - number / 4) <= 3
