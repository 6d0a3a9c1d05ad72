"""Updates of records that are mixed of all that there may be, beside a plain computation in torch."""

import json

import numpy as np
import pytest

from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import prepare
from prom_jax.training.methods.prom import PROM
from tests.reference import gradients, hf_model, to_model
from tests.training.test_methods import assert_same, copied_head, torch_loss

PIVOT = 3


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return (str(path),)


def example(record, stream):
    """The tokens of a text, and of each whether the next one has a loss."""
    loss = np.append(record[f"{stream}_loss"][1:], False)
    return record[f"{stream}_tokens"].astype(np.int64), loss.astype(np.float32)


@pytest.mark.slow
def test_losses_and_gradients_of_a_mixture_equal_torch(byte_level, tmp_path):
    """Pairs, rows without a counterpart, translations and raw text of both languages, packed and shared."""
    ids = {"english": range(3), "target": range(2, 5)}
    rows = {
        name: [{"id": i, "instruction": f"Say {i}", "output": "Habari" * (1 + i)} for i in numbers]
        for name, numbers in ids.items()
    }
    recipe = Recipe(
        "sw",
        english=write(tmp_path / "en.jsonl", rows["english"]),
        target=write(tmp_path / "sw.jsonl", rows["target"]),
        translation=write(tmp_path / "mt.jsonl", [{"en": "Good", "sw": "Nzuri"}]),
        raw=write(tmp_path / "raw.jsonl", [{"text": "Habari ya asubuhi. " * 30}]),
        raw_english=write(tmp_path / "raw_en.jsonl", [{"text": "Below is a task. " * 30}]),
        seq_len=192,
    )
    train = prepare(recipe, byte_level, tmp_path / "records").train
    batches = Batches(train, sequences=12, seq_len=192, seed=0, epochs=1.0, share_prompts=True)
    assert len(batches) == 1 and set(train.roles) == {
        "target",
        "english",
        "translation",
        "text",
        "english_text",
    }
    method = PROM(layer=PIVOT, weight=0.3, label_smoothing=0.1)
    hf = hf_model("smollm2", vocab_size=len(byte_level))
    pivot_head = copied_head(hf)
    model = to_model(hf, PIVOT, pivot_head.weight)
    records = train.read(range(len(train)))
    streams = {
        stream: [example(record, stream) for record in records if len(record[f"{stream}_tokens"])]
        for stream in train.names
    }
    ours = gradients(model, method, batches[0], appended=batches.appended)
    assert_same(ours, torch_loss(hf, pivot_head, method, **streams), 1e-4)
