"""Who decides λ, on models of which it is known by construction whether they pivot."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from prom_jax import prepare, regulate
from prom_jax import train as door
from prom_jax.analysis import regulation
from prom_jax.checkpoints.pretrained import open_source
from prom_jax.config import default
from prom_jax.models.config import DecoderConfig, LayerKind
from prom_jax.parallel.sharding import make_mesh
from prom_jax.training.regulation import FILE, PIVOTS_THROUGH_ENGLISH, decide
from prom_jax.training.setup import open_base
from prom_jax.utils.errors import UserError
from tests.tiny import tiny_config

WORDS = {
    "dog": "mbwa",
    "cow": "ng'ombe",
    "sun": "jua",
    "tree": "mti",
    "milk": "maziwa",
    "hand": "kono",
    "egg": "yai",
}
LLAMA2 = DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128, (LayerKind(),) * 32)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A small cloze table; its sentences do not matter to models that see one token."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "sw").mkdir()
    with (folder / "sw" / "clean.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["english", "word", "sentence"])
        writer.writerows([e, w, f'Sentensi ya {n} ina "___".'] for n, (e, w) in enumerate(WORDS.items()))
    return folder


@pytest.fixture(scope="module")
def speaks(tmp_path_factory, byte_level):
    """Makes a model whose blocks add nothing and whose head knows which token follows which in some words:
    after a quotation mark it begins one of them, in every layer."""

    def make(words):
        folder, size = tmp_path_factory.mktemp("speaks"), -(-len(byte_level) // 4) * 4
        config = transformers.LlamaConfig(
            vocab_size=size,
            hidden_size=size,
            intermediate_size=8,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            tie_word_embeddings=False,
            eos_token_id=byte_level.eos_token_id,
        )
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM(config)
        follows = torch.zeros(size, size)
        for word in words:
            tokens = byte_level(f'"{word}')["input_ids"]
            for before, after in itertools.pairwise(tokens):
                follows[after, before] = 0.3
        with torch.no_grad():
            hf.model.embed_tokens.weight.copy_(torch.eye(size))
            hf.lm_head.weight.copy_(follows)
            for layer in hf.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        hf.save_pretrained(folder)
        byte_level.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def english(speaks):
    return speaks(WORDS.keys())


@pytest.fixture(scope="module")
def swahili(speaks):
    return speaks(WORDS.values())


def auto(tiny, tables, model):
    config = tiny_config(tiny)
    config.model, config.pivot.regulate = model, "auto"
    config.probe.tables, config.probe.shots = str(tables), 2
    return config


def decided(config, workdir):
    base, mesh = open_base(config, workdir), make_mesh(**config.mesh)
    return decide(config, base.config, regulation.measured(config, base, workdir, mesh))


def test_auto_goes_opposite_ways(tiny, tables, english, swahili, tmp_path):
    kept = decided(auto(tiny, tables, english), tmp_path / "english")
    dropped = decided(auto(tiny, tables, swahili), tmp_path / "swahili")
    assert (kept.weight, dropped.weight) == (0.5, 0.0)
    for decision, side, other in ((kept, "english", "target"), (dropped, "target", "english")):
        measured = decision.measured
        assert measured[side] > 0.01 > 10 * measured[other]
        assert measured["difference"] == pytest.approx(measured["english"] - measured["target"])
        low, high = measured["interval"]
        assert low <= measured["difference"] <= high and low * high > 0
        assert f"{measured[side]:.3g}" in decision.reason and "word scoring" in decision.reason
        assert measured["rows"] == 5 and measured["layer"] == 3
    assert "WARNING" not in kept.reason + dropped.reason


def test_a_decision_is_kept_until_something_changes(tiny, tables, english, tmp_path, monkeypatch):
    config = auto(tiny, tables, english)
    first = decided(config, tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == first.measured
    with monkeypatch.context() as patch:
        patch.setattr(regulation, "probe", lambda *_, **__: pytest.fail("probed again"))
        assert decided(config, tmp_path) == first
    asked, original = [], regulation.probe
    monkeypatch.setattr(regulation, "probe", lambda *a, **k: asked.append(1) or original(*a, **k))
    config.probe.shots = 1
    decided(config, tmp_path)
    config.probe.scoring = "prefix"
    decided(config, tmp_path)
    assert len(asked) == 2
    change_row(config.model, "model.layers.1.mlp.up_proj.weight", -1)
    decided(config, tmp_path)
    assert len(asked) == 3
    change_row(config.model, "model.layers.1.mlp.up_proj.weight", -1)  # back again
    decided(config, tmp_path)
    (tmp_path / FILE).write_text("{")  # torn
    decided(config, tmp_path)
    assert len(asked) == 5


def change_row(folder, name, row):
    """Turns the sign of one row of one tensor."""
    path = Path(folder) / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors[name][row] *= -1
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_words_that_the_model_does_not_know_are_told(tiny, tables, tmp_path):
    config = auto(tiny, tables, str(tiny / "model"))
    assert "WARNING: both are close to 0" in decided(config, tmp_path).reason


def test_doubt_is_told(tiny, tables, speaks, tmp_path):
    either = [pair[n % 2] for n, pair in enumerate(WORDS.items())]  # English in every second row
    decision = decided(auto(tiny, tables, speaks(either)), tmp_path)
    low, high = decision.measured["interval"]
    assert low <= 0 <= high and "WARNING: the interval holds 0" in decision.reason


def test_without_a_pivot_the_run_is_bactrian(tiny, tables, swahili, tmp_path):
    config = auto(tiny, tables, swahili)
    config.steps, config.eval.samples = 4, 0
    summary = door.train(config, tmp_path / "prom")
    assert summary["regulation_probe"]["difference"] < 0 and "pivot.layer" not in summary
    config.method = "bactrian"
    door.train(config, tmp_path / "bactrian")
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if "per_second" not in key}
            for line in (tmp_path / method / "metrics.jsonl").read_text().splitlines()
        ]
        for method in ("prom", "bactrian")
    ]
    assert rows[0] == rows[1] and not any("english" in key and "eval" not in key for key in rows[0][1])
    records = [next((tmp_path / method / "records").iterdir()).name for method in ("prom", "bactrian")]
    assert records[0] == records[1]
    ours, theirs = (open_source(tmp_path / method / "hf")[0] for method in ("prom", "bactrian"))
    everything = (slice(None), slice(None))
    name = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(ours.read(name, everything), theirs.read(name, everything))


def test_as_in_the_paper():
    config = default()
    config.pivot.regulate = "paper"
    for language, pivots in PIVOTS_THROUGH_ENGLISH.items():
        config.language = language
        decision = decide(config, LLAMA2)
        assert decision.weight == (0.1 if pivots else 0.0) and "WARNING" not in decision.reason
        assert pivots == (language not in ("ar", "ta", "ml", "te"))  # the asterisks of the paper's tables
    small = DecoderConfig(49152, 576, 1536, 30, 9, 3, 64, (LayerKind(),) * 30)
    assert "WARNING: this model is not LLaMA-2-7B" in decide(config, small).reason
    config.language = "fi"
    with pytest.raises(UserError, match=r"no decision for language 'fi'.*regulate=auto"):
        decide(config, LLAMA2)
    config.pivot.regulate = "never"
    assert decide(config, LLAMA2).weight == 0.1


def test_a_language_without_a_table(tiny, tables, english, tmp_path):
    config = auto(tiny, tables, english)
    config.language = "fi"
    with pytest.raises(UserError, match=r"no cloze table .*fi.*clean.csv"):
        decided(config, tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.fixture
def bare(speaks, tmp_path):
    """Makes a folder of a model's configuration and tokenizer, to which `weights()` brings the rest."""

    def make(words):
        whole, folder = Path(speaks(words)), tmp_path / "bare"
        shutil.copytree(whole, folder, ignore=lambda _, names: [n for n in names if "safetensors" in n])
        return str(folder), lambda: shutil.copy(whole / "model.safetensors", folder)

    return make


def english_rows(card):
    """How many English examples there are to train on."""
    return card["roles"].get("english", {}).get("examples", 0)


def test_preparing_reads_no_weights(tiny, tables, bare, tmp_path, capsys):
    model, weights = bare(WORDS.values())
    config = auto(tiny, tables, model)
    card = prepare.prepare(config, tmp_path / "run", run="--config=c.py")
    assert english_rows(card)  # it does not know yet that λ will be 0
    printed = capsys.readouterr().out
    assert "λ is not decided yet, so both streams are prepared" in printed
    assert "python -m prom_jax.regulate --config=c.py\n" in printed
    assert not (tmp_path / "run" / FILE).exists()

    weights()
    assert regulate.regulate(config, tmp_path / "run").weight == 0
    assert f"kept in {tmp_path / 'run' / FILE}" in capsys.readouterr().out
    (Path(model) / "model.safetensors").unlink()
    card = prepare.prepare(config, tmp_path / "run")
    assert not english_rows(card) and "not decided" not in capsys.readouterr().out


def test_a_decision_made_elsewhere(tiny, tables, bare, tmp_path, monkeypatch):
    model, weights = bare(WORDS.values())
    config = auto(tiny, tables, model)
    config.steps, config.eval.samples, config.compute_dtype = 1, 0, ""
    weights()
    regulate.regulate(config, tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    found = json.loads((tmp_path / "elsewhere" / FILE).read_text())
    found["compute_dtype"] = "bfloat16"  # of an accelerator
    (tmp_path / "run" / FILE).write_text(json.dumps(found))
    assert not english_rows(prepare.prepare(config, tmp_path / "run"))
    config.compute_dtype = "float32"
    assert english_rows(prepare.prepare(config, tmp_path / "run"))

    found["compute_dtype"] = "float32"
    (tmp_path / "run" / FILE).write_text(json.dumps(found))
    with monkeypatch.context() as patch:
        patch.setattr(regulation, "probe", lambda *_, **__: pytest.fail("probed again"))
        assert door.train(config, tmp_path / "run")["regulation_probe"] == found
    found["weights"] = "of another model"
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(json.dumps(found))
    assert not english_rows(prepare.prepare(config, tmp_path / "run"))  # which cannot know better
    assert door.train(config, tmp_path / "run")["regulation_probe"]["weights"] != "of another model"
