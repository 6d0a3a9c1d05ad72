"""The door to data: card, inspection, and a translation that becomes training data."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from prom_jax import prepare as door
from prom_jax.checkpoints.generation import stop_tokens
from prom_jax.data import inspection
from prom_jax.data.records import Records
from prom_jax.data.translation import engines, translate
from prom_jax.training.methods import find_method
from prom_jax.training.setup import open_base, recipe, resolve
from prom_jax.utils.errors import UserError
from tests.data.translation.test_translate import Toy, spell_thai
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepare") / "run"
    return door.prepare(tiny_config(tiny), workdir), workdir


def test_the_card_counts_what_the_records_hold(prepared):
    card, workdir = prepared
    assert json.loads((workdir / "data_card.json").read_text()) == card
    train = Records(workdir / "records" / card["records"], "train")
    target, english = (train.streams[stream] for stream in ("target", "english"))
    expected = {
        "target": (target.lengths[train.roles == "target"], target.weights[train.roles == "target"]),
        "translation": tuple(c[train.roles == "translation"] for c in (target.lengths, target.weights)),
        "english": (english.lengths[train.roles == "target"], english.weights[train.roles == "target"]),
    }
    for name, (lengths, weights) in expected.items():
        counts = card["roles"][name]
        assert counts["examples"] == len(lengths) and counts["tokens"] == lengths.sum()
        assert counts["loss_tokens"] == weights.sum() and counts["dropped"] == 0
        assert counts["tokens_per_byte"] == pytest.approx(counts["text_tokens"] / counts["bytes"], abs=1e-4)
        assert counts["tokens_per_word"] == pytest.approx(counts["text_tokens"] / counts["words"], abs=1e-4)
    both = expected["target"][1].sum() / expected["english"][1].sum()
    assert card["roles"]["target"]["tokens_per_english_token"] == pytest.approx(both, abs=1e-4)
    assert card["steps"] == 8 and card["training_flops"] > 0 and 0 < card["packing"]["target_fill"] <= 1
    assert set(card["holdout"]) == {"target", "english"} and card["text"] == {}


def test_the_card_as_a_document(prepared):
    card, workdir = prepared
    text = (workdir / "data_card.md").read_text()
    counts = card["roles"]["translation"]
    row = next(line for line in text.splitlines() if line.startswith("| translation"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == [
        f"{counts[key]:,}" for key in ("examples", "tokens", "loss_tokens")
    ]
    assert (workdir / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "8 steps" in text and card["records"] in text


def test_what_is_left_out_is_told(tiny, tmp_path):
    config = tiny_config(tiny)
    rows = [json.loads(line) for line in (tiny / "sw.jsonl").read_text().splitlines()]
    rows[0]["output"], rows[1]["id"] = "", "alone"
    (tmp_path / "sw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.data.target, config.eval.holdout = (str(tmp_path / "sw.jsonl"),), 0
    card = door.prepare(config, tmp_path / "run")
    assert card["unmatched"] == 2 and card["roles"]["target"]["reasons"] == {"no response": 1}
    text = (tmp_path / "run" / "data_card.md").read_text()
    assert "target: 1 dropped, no response" in text and "2 instruction rows found no partner" in text
    rows[2]["output"] = None
    (tmp_path / "sw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.data.bad_rows = "skip"
    card = door.prepare(config, tmp_path / "skipped")
    assert card["rows"][config.data.target[0]]["bad"] == {
        "no text under 'output' (keys found: id, instruction, output)": 1
    }
    text = (tmp_path / "skipped" / "data_card.md").read_text()
    assert "1 of 40 rows of `" in text and "left out: no text under 'output'" in text


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_records_in_a_chat_template(tiny, tmp_path):
    config = tiny_config(tiny)
    config.data.template = str(tmp_path / "own.jinja")
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    base = open_base(config, tmp_path / "run", weights=False)
    experiment = resolve(config, tmp_path / "run", base)
    record, tokenizer = experiment.parts[0].data.train[0], base.tokenizer
    rows = {str(row["id"]): row for row in read(tiny / "sw.jsonl")}
    row = rows[record["id"]]
    said = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    assert record["target_tokens"].tolist() == tokenizer.apply_chat_template(said, return_dict=False)
    assert tokenizer.decode(record["target_tokens"][record["target_loss"]]) == f"{row['output']}</s>"
    assert experiment.chat_template == TEMPLATE and "prompts" not in experiment.details
    assert stop_tokens(base.config, tokenizer) == (tokenizer.eos_token_id,)
    plain = tiny_config(tiny)
    other = resolve(plain, tmp_path / "other", open_base(plain, tmp_path / "other", weights=False))
    assert other.identity["records"] != experiment.identity["records"] and other.details["prompts"] == "en"
    config.data.prompts = "target"
    with pytest.raises(UserError, match=r"data.prompts='target' is the language of Alpaca's prompt"):
        open_base(config, tmp_path / "run", weights=False)


def test_languages_without_spaces_have_no_words(tiny, tmp_path):
    config = tiny_config(tiny)
    config.language = "th"
    config.data.translation = ()
    card = door.prepare(config, tmp_path / "run")
    assert card["roles"]["target"]["tokens_per_word"] is None
    assert card["roles"]["english"]["tokens_per_word"] > 1


def test_inspection_shows_rows_as_they_are_trained_on(prepared, tiny, monkeypatch):
    _, workdir = prepared
    config = tiny_config(tiny)
    config.data.seq_len = 256  # so that a row has several texts
    experiment = resolve(config, workdir, open_base(config, workdir, weights=False))
    printed = io.StringIO()
    monkeypatch.setattr(inspection, "console", Console(file=printed, markup=False, soft_wrap=True, width=200))
    inspection.show(experiment.batches, experiment.records, experiment.base.tokenizer, 3)
    text = printed.getvalue()
    assert text.count(" row ") == 3 and "target row 1 of 8" in text and "english row 1 of" in text
    batch = experiment.batches[0]
    for side, row in (("target", 0), ("english", 0), ("target", 1)):
        rows = {name: array[row] for name, array in batch[side].items()}
        for segment in set(rows["segments"][rows["weights"] > 0]):
            here = rows["segments"] == segment
            learnt = rows["labels"][here][rows["weights"][here] > 0]
            assert f"⟦{experiment.base.tokenizer.decode(learnt)}⟧" in text
    assert "[target " in text and "[english " in text and "[translation " in text


def test_further_streams_are_those_of_the_method(tiny):
    config = tiny_config(tiny)
    config.data.streams = ("replay=nowhere.jsonl",)
    for name, streams in (("prom", ("target", "english")), ("bactrian", ("target",))):
        method = find_method(name).from_config(config, 3, 0.1)
        made = recipe(config, method)
        assert (made.streams, made.more) == (streams, ())  # no term of theirs takes it
    config.data.streams = ("nowhere.jsonl",)
    with pytest.raises(UserError, match=r"data.streams has 'nowhere\.jsonl': expected 'name=source'"):
        recipe(config, method)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def config_to_translate(tiny, tmp_path):
    config = tiny_config(tiny)
    config.language, config.data.translation = "th", ()
    config.data.target = (str(tmp_path / "out" / "alpaca.th.jsonl"),)
    config.batch.sequences, config.eval.samples = 2, 0
    return config


def test_translation_becomes_training_data(tiny, tmp_path, capsys):
    config = config_to_translate(tiny, tmp_path)
    cache = translate.Cache(tmp_path / "cache.sqlite")
    engine = Toy(lambda text: "" if "grass" in text else spell_thai(text))
    door.translate_sources(config, engine, cache, agreed=lambda: True, dry_run=False)
    english = read(tiny / "en.jsonl")
    rows = read(tmp_path / "out" / "alpaca.th.jsonl")
    rejected = read(tmp_path / "out" / "alpaca.th.rejected.jsonl")
    kept = [row for row in english if "grass" not in row["instruction"] + row["output"]]
    assert [row["id"] for row in rows] == [str(row["id"]) for row in kept]
    assert len(rows) + len({row["id"] for row in rejected}) == len(english) and rejected
    assert all(row["reason"] == "empty" and "grass" in row["source"] for row in rejected)
    by_id = {str(row["id"]): row for row in kept}
    for row in rows:
        assert row["output"] == spell_thai(by_id[row["id"]]["output"])
    assert "empty" in capsys.readouterr().out

    sent = len(engine.sent)
    door.translate_sources(config, engine, cache, agreed=lambda: pytest.fail("was asked"), dry_run=False)
    assert len(engine.sent) == sent
    card = door.prepare(config, tmp_path / "run")
    assert card["unmatched"] == 40 - len(rows)
    assert card["roles"]["target"]["examples"] == len(rows) - 6
    assert card["roles"]["english"]["examples"] == 40 - 6  # those without a translation train on their own


def test_nothing_is_sent_unasked(tiny, tmp_path, capsys):
    config = config_to_translate(tiny, tmp_path)
    engine, cache = Toy(), translate.Cache(tmp_path / "cache.sqlite")
    door.translate_sources(config, engine, cache, agreed=lambda: False, dry_run=False)
    door.translate_sources(config, engine, cache, agreed=lambda: pytest.fail("was asked"), dry_run=True)
    assert not engine.sent and not (tmp_path / "out").exists()
    assert "$0.0" in capsys.readouterr().out


@pytest.mark.parametrize("engine", door.ENGINES)
def test_a_dry_run_needs_no_client_and_no_account(tiny, tmp_path, capsys, monkeypatch, engine):
    for name in ("Google", "NLLB"):
        monkeypatch.setattr(getattr(engines, name), "__init__", lambda *_, **__: pytest.fail("was made"))
    sources = (f"--config.data.english={tiny / 'en.jsonl'}", f"--config.data.target={tmp_path / 'th.jsonl'}")
    cache = f"--cache={tmp_path / 'cache.sqlite'}"
    door.main(["--config=configs/th.py", *sources, f"--translate={engine}", "--dry_run", cache])
    printed = " ".join(capsys.readouterr().out.split())
    texts = {row[key] for row in read(tiny / "en.jsonl") for key in ("instruction", "output")}
    characters = sum(map(len, texts))
    assert f"{len(texts):,} texts and {characters:,} characters to go" in printed
    price = 20 * characters / 1e6 if engine == "google" else 0
    assert f"about ${price:,.2f}" in printed and not (tmp_path / "th.jsonl").exists()


def test_a_corrected_translation_is_not_overwritten(tiny, tmp_path):
    config = config_to_translate(tiny, tmp_path)
    cache = translate.Cache(tmp_path / "cache.sqlite")
    door.translate_sources(config, Toy(), cache, agreed=lambda: True, dry_run=False)
    path = tmp_path / "out" / "alpaca.th.jsonl"
    mended = path.read_text("utf-8").replace('"id": "3"', '"id": "3b"')
    path.write_text(mended, "utf-8")
    with pytest.raises(UserError, match="exists and differs"):
        door.translate_sources(config, Toy(), cache, agreed=lambda: True, dry_run=False)
    assert path.read_text("utf-8") == mended


def test_nothing_is_paid_for_what_cannot_be_used(tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny / "en.jsonl").read_text().splitlines()]
    rows[1]["id"] = rows[0]["id"]
    (tmp_path / "en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    engine, cache = Toy(), translate.Cache(tmp_path / "cache.sqlite")
    for key, value, message in (
        ("data.english", (str(tmp_path / "en.jsonl"),), "'0' occurs twice"),
        ("data.target", (f"{tmp_path}/x.jsonl",), "is a folder"),
        ("language", "xx", "'xx' is not known"),
        ("batch.sequences", 0, "expected 1 or more"),
    ):
        (tmp_path / "x.jsonl").mkdir(exist_ok=True)
        config = config_to_translate(tiny, tmp_path)
        config.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=message):
            door.translate_sources(config, engine, cache, agreed=lambda: True, dry_run=False)
    assert not engine.sent


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", ("a.jsonl", "b.jsonl"), "needs one .jsonl file to write"),
        ("target", ("owner/name",), "needs one .jsonl file to write"),
        ("english", (), "data.english is empty"),
    ],
)
def test_translation_needs_a_source_and_a_file(tiny, tmp_path, key, value, message):
    config = config_to_translate(tiny, tmp_path)
    config.data[key] = value
    with pytest.raises(UserError, match=message):
        door.translate_sources(config, Toy(), translate.Cache(tmp_path / "c.sqlite"), None, False)
    assert not np.any(list(tmp_path.glob("out/*")))
