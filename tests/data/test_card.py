"""Card and inspection of any number of streams; those of a run are in tests/test_prepare.py."""

import io

import pytest
from rich.console import Console

from prom_jax.config import default
from prom_jax.data import card, inspection
from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import prepare
from prom_jax.reporting.card import lengths
from prom_jax.reporting.plots import length_histogram

ROWS = [{"instruction": f"Say {i}", "output": f"I say {i}."} for i in range(12)]


@pytest.fixture
def run(byte_level, tmp_path, jsonl):
    """Three streams: configuration, data and batches."""
    english = jsonl("en.jsonl", ROWS)
    target = jsonl("sw.jsonl", [row | {"output": f"Nasema {i}"} for i, row in enumerate(ROWS)])
    replay = jsonl("replay.jsonl", [row | {"output": "yes " * 40} for row in ROWS[:8]])
    config = default()
    config.language, config.data.target, config.data.english = "sw", (target,), (english,)
    config.data.streams = (f"replay={replay}",)
    config.batch.sequences, config.data.seq_len = 2, 512
    more = {"streams": ("target", "english", "replay"), "more": (("replay", (replay,)),)}
    recipe = Recipe("sw", (target,), (english,), seq_len=512, **more)
    data = prepare(recipe, byte_level, tmp_path / "r")
    shape = {"sequences": 2, "seq_len": 512, "share_prompts": True}
    return config, data, Batches(data.train, **shape, seed=0, epochs=1.0)


def test_the_card_has_every_stream(run):
    config, data, batches = run
    made = card.make(config, {"sw": data}, data.train, batches, 1e9)
    assert set(made["packing"]["streams"]) == {"target", "english", "replay"} == set(batches.shapes)
    for stream, rows in made["packing"]["streams"].items():
        assert (rows["rows"], rows["length"]) == batches.shapes[stream]
        assert rows["fill"] == batches.fill[stream]
    assert made["packing"]["joined"] and made["packing"]["appended"] == batches.appended == "english"
    assert made["packing"]["english_rows"] == batches.shapes["english"][0] == 2
    assert made["roles"]["replay"]["examples"] == 8 and made["roles"]["replay"]["tokens_per_word"] > 1
    assert made["sources"]["streams"] == list(config.data.streams)
    *_, packing = card.lines(made)
    _, length = batches.shapes["english"]
    fill = f"{batches.fill['english'] * 100:.0f} % filled"
    assert f"english 2 × {length} appended to target rows, {fill}, replay " in packing
    text = card.as_markdown(made)
    assert "replay tokens" in text and "English rows are appended to the target rows" in text
    assert next(card.lines(made)).endswith(" loss tokens")


def test_lengths_by_role_and_stream(run, tmp_path):
    _, data, _ = run
    roles = ("english", "target", "translation", "replay")
    found = lengths(data.train, roles)
    assert tuple(found) == roles
    assert {name: len(values) for name, values in found.items()} == {
        "english": 12,
        "target": 12,
        "translation": 0,
        "replay": 8,
    }
    assert all((values > 0).all() for values in found.values())
    length_histogram(found, 512, tmp_path / "lengths.png", {"english": 3, "target": 0})
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_inspection_shows_every_stream(run, byte_level, monkeypatch):
    _, data, batches = run
    printed = io.StringIO()
    monkeypatch.setattr(inspection, "console", Console(file=printed, markup=False, soft_wrap=True, width=200))
    inspection.show(batches, data.train, byte_level, 100)
    text = printed.getvalue()
    for stream, examples in (("target", 12), ("english", 12), ("replay", 8)):
        assert text.count(f"[{stream} ") == examples and f", {stream} row 1 of " in text
    assert text.count(f"⟦{'yes ' * 40}</s>⟧") == 8
