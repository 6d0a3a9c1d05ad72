"""What checkpoints say of themselves."""

import json

import pytest

from prom_jax.checkpoints.description import Description
from prom_jax.checkpoints.orbax import CheckpointReader
from prom_jax.checkpoints.training import Checkpoints
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import FORMAT


@pytest.mark.parametrize(
    "settings",
    [
        {"config": {}},
        {"heads": ["pivot_head"]},
        {"heads": {"pivot_head": "1"}},
        {"heads": {"pivot_head": 3}},
        {"heads": {"lm_head": 1}},
        {"heads": {"../pivot_head": 1}},
        {"dtype": "int32"},
        {"dtype": 7},
        {"details": None},
        {"exits": [2]},
        {"more": 1},
    ],
)
def test_a_damaged_description_is_named(tmp_path, settings):
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    whole = {
        "format": FORMAT,
        "config": config,
        "heads": {"pivot_head": 1},
        "dtype": "float32",
        "details": {},
    }
    path = tmp_path / "model.json"
    path.write_text(json.dumps(whole))
    assert Description.read(tmp_path).config.hidden_size == 8
    assert Description.read(tmp_path).heads == {"pivot_head": 1}
    for text in (json.dumps(whole | settings), json.dumps(whole)[:-1], "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"model\.json is damaged .*: give another source"):
            Description.read(tmp_path)


@pytest.mark.parametrize("number", [None, 1, FORMAT + 1, "2"])
def test_another_format_is_named_with_the_remedy(tmp_path, number):
    """None: what commit f878607 wrote, which knew no format."""
    fields = {} if number is None else {"format": number}
    (tmp_path / "model.json").write_text(json.dumps(fields | {"config": {}, "pivot_layer": 0}))
    said = (
        rf"model\.json is of a run or checkpoint of format {number or 1!r}, .* has {FORMAT} .*convert to_hf"
    )
    for read in (Description.read, CheckpointReader, Checkpoints):
        with pytest.raises(UserError, match=said):
            read(tmp_path)
