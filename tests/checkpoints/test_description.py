"""What checkpoints say of themselves."""

import json

import pytest

from prom_jax.checkpoints.description import Description
from prom_jax.utils.errors import UserError


@pytest.mark.parametrize(
    "settings",
    [{"config": {}}, {"pivot_layer": "1"}, {"dtype": "int32"}, {"dtype": 7}, {"details": None}, {"more": 1}],
)
def test_a_damaged_description_is_named(tmp_path, settings):
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    whole = {"config": config, "pivot_layer": 0, "dtype": "float32", "details": {}}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(whole))
    assert Description.read(tmp_path).config.hidden_size == 8
    for text in (json.dumps(whole | settings), json.dumps(whole)[:-1], "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"model\.json is damaged .*: give another source"):
            Description.read(tmp_path)
