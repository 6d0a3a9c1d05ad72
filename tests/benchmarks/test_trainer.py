"""The torch peer and transformers' Trainer beside it, on a tiny model."""

import numpy as np
import pytest

from benchmarks import peers, trainer
from prom_jax.training.methods.prom import PROM

LAYER = 2


@pytest.fixture
def texts():
    """Three updates of two texts a stream, the first half of each without loss."""
    chance = np.random.default_rng(0)
    text = lambda length: (chance.integers(3, 300, length), np.arange(length) >= length // 2)
    return [{"target": [text(300), text(90)], "english": [text(80), text(120)]} for _ in range(3)]


def test_rows_are_scaled_by_the_stream_s_weight_over_its_tokens_with_loss(texts):
    rows = peers.rows(texts[0], peers.packed, 256, PROM(LAYER, weight=0.5))
    assert [(row["stream"], row["tokens"].shape[1]) for row in rows] == [
        ("target", 256),
        ("target", 134),
        ("english", 200),
    ]
    for stream, weight in (("target", 1.0), ("english", 0.5)):
        of_stream = [row for row in rows if row["stream"] == stream]
        loss_tokens = sum(int((row["labels"] != peers.IGNORED).sum()) for row in of_stream)
        np.testing.assert_allclose([row["scale"] for row in of_stream], weight / loss_tokens)


@pytest.mark.parametrize("layout", [peers.packed, peers.padded])
def test_a_stream_without_texts_has_no_rows(texts, layout):
    some = texts[0] | {"english": []}
    assert {row["stream"] for row in peers.rows(some, layout, 256, PROM(LAYER))} == {"target"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_trainer_and_the_peer_take_the_same_updates(config, texts, remat):
    config.remat = remat
    about = config.model, PROM(LAYER, weight=0.5), config, texts
    theirs, ours = trainer.Trained(*about), trainer.Constant(*about)
    losses = [(theirs.step(), ours.step()) for _ in texts]
    np.testing.assert_allclose(*zip(*losses), rtol=1e-5)
    assert len(set(losses)) == len(texts)  # what Trainer learned counts


def test_an_error_in_the_trainer_s_thread_is_told(config, texts):
    theirs = trainer.Trained(config.model, PROM(99), config, texts)
    with pytest.raises(IndexError):
        theirs.step()
