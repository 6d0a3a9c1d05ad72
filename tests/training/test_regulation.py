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
from prom_jax.analysis.probe import Probe
from prom_jax.analysis.tasks import NoRows, Row
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


def probed(tiny, tables, model, rule="mean"):
    config = tiny_config(tiny)
    config.model, config.pivot.regulate = model, rule
    config.probe.tables, config.probe.shots = str(tables), 2
    return config


def decided(config, workdir):
    base, mesh = open_base(config, workdir), make_mesh(**config.mesh)
    found = regulation.measured(config, base, workdir, mesh)
    return decide(config, base.config, found[config.language])


def test_the_mean_goes_opposite_ways(tiny, tables, english, swahili, tmp_path):
    kept = decided(probed(tiny, tables, english), tmp_path / "english")
    dropped = decided(probed(tiny, tables, swahili), tmp_path / "swahili")
    assert (kept.weight, dropped.weight) == (0.5, 0.0)
    for decision, side, other in ((kept, "english", "target"), (dropped, "target", "english")):
        measured = decision.measured
        assert measured[side] > 0.01 > 10 * measured[other]
        assert measured["difference"] == pytest.approx(measured["english"] - measured["target"])
        low, high = measured["interval"]
        assert low <= measured["difference"] <= high
        assert f"{measured[side]:.3g}" in decision.reason and "cloze, word scoring" in decision.reason
        assert measured["rows"] == 5 and measured["layer"] == 3
        # Five rows cannot tell, whatever they say.
        assert "WARNING: the model can do no task" in decision.reason and "by hand" not in decision.reason


def test_a_decision_is_kept_until_something_changes(tiny, tables, english, tmp_path, monkeypatch):
    config = probed(tiny, tables, english)
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


def test_doubt_is_told(tiny, tables, speaks, tmp_path):
    either = [pair[n % 2] for n, pair in enumerate(WORDS.items())]  # English in every second row
    decision = decided(probed(tiny, tables, speaks(either)), tmp_path)
    low, high = decision.measured["interval"]
    assert low <= 0 <= high and "WARNING: the interval holds 0" in decision.reason


# What 'auto' asks, and what it takes from it.


class Asked:
    """In place of the probe: means of P_en and P_target after block n and of P_target after N, by task, of so
    many rows; None where no row of the task can be measured. Remembers what it was asked."""

    def __init__(self, monkeypatch, rows=60, spread=0.3, **means):
        self.means, self.rows, self.spread, self.asked = means, rows, spread, []
        monkeypatch.setattr(regulation, "probe", self)

    def __call__(self, model, tokenizer, table, *, task, sources, scoring, shots, seed, layers):
        self.asked.append((task, seed, len(sources)))
        if self.means[task] is None:
            raise NoRows("none")
        rows = [(Row((str(n),), (f"w{n}",), "", ""), "") for n in range(seed % 3, self.rows)]
        random = np.random.default_rng(seed)
        values = [
            np.minimum(1, mean * random.lognormal(-(self.spread**2) / 2, self.spread, len(rows)))
            for mean in self.means[task]
        ]
        english = np.stack([values[0], values[0]], axis=1)
        target = np.stack(values[1:], axis=1)
        return Probe(
            "sw", task, (), scoring, layers, rows, english, target, np.zeros_like(target), {}, seed=seed
        )


@pytest.fixture
def ask(tiny, tables, english, tmp_path, monkeypatch):
    """Decides by 'auto' what `Asked` answers; returns the decision and what was asked."""

    def decide_by(seed=0, **answers):
        config = probed(tiny, tables, english, "auto")
        config.seed = seed
        asked = Asked(monkeypatch, **answers)
        return decided(config, tmp_path), asked.asked

    return decide_by


def test_auto_drops_english_where_all_of_the_interval_says_so(ask):
    decision, asked = ask(cloze=(0.01, 0.3, 0.5))
    assert decision.weight == 0 and "WARNING" not in decision.reason
    assert asked == [("cloze", seed, 0) for seed in (0, 1, 2)]
    found = decision.measured
    assert found["task"] == "cloze" and found["can_do"] and found["interval"][1] < 0
    assert found["rows"] == 60 and [s["rows"] for s in found["sets"]] == [60, 59, 58]
    assert [s["seed"] for s in found["sets"]] == [0, 1, 2]
    assert found["last"]["target"] == pytest.approx(0.5, rel=0.1)
    assert found["last"]["effective_rows"] > 50


def test_auto_asks_for_translations_where_cloze_is_too_hard(ask):
    decision, asked = ask(cloze=(1e-5, 3e-4, 5e-3), translation=(0.04, 1e-6, 0.3), seed=2)
    assert decision.weight == 0.5 and "(translation, word scoring, 60 rows)" in decision.reason
    assert asked == [("cloze", s, 0) for s in (6, 7, 8)] + [("translation", s, 8) for s in (6, 7, 8)]
    found = decision.measured
    assert found["task"] == "translation" and found["english"] == found["tasks"]["translation"]["english"]
    assert not found["tasks"]["cloze"]["can_do"] and len(found["tasks"]["cloze"]["sets"]) == 3


@pytest.mark.parametrize(
    "answers",
    [
        {"cloze": (0.2, 0.21, 0.5), "spread": 0.8},  # the interval holds 0
        {"cloze": (1e-4, 0.02, 0.3), "spread": 0.1},  # as few words might lead as cannot be ruled out
    ],
)
def test_auto_does_not_obey_noise(ask, answers):
    decision, asked = ask(**answers)
    assert decision.measured["difference"] < 0 < decision.measured["interval"][1]
    assert decision.weight == 0.5 and len(asked) == 3


@pytest.mark.parametrize(
    "answers",
    [
        {"cloze": (1e-18, 1e-15, 2e-3), "translation": (1e-9, 1e-6, 2e-3)},
        {"cloze": (0.0, 0.02, 0.02), "translation": (0.0, 0.02, 0.02), "spread": 3},  # of a few rows
        {"cloze": (0.01, 0.3, 0.5), "translation": (0.01, 0.3, 0.5), "rows": 12},
        {"cloze": None, "translation": (0.0, 0.005, 0.005)},
    ],
)
def test_auto_keeps_lambda_where_the_model_can_do_neither(ask, answers):
    decision, asked = ask(**answers)
    assert decision.weight == 0.5 and decision.decision.startswith("λ = 0.5 as configured: after block 3")
    (warning,) = decision.warnings
    assert "the model can do no task that would tell" in warning and "it takes 0.01 and 20" in warning
    assert "translation (P(target word) after the last block is" in warning
    assert "pivot.regulate=never, which keeps λ, or pivot.weight=0" in warning
    assert {task for task, _, _ in asked} == {"cloze", "translation"}


def test_what_is_far_out_of_reach_is_asked_once(ask):
    decision, asked = ask(cloze=(1e-18, 1e-15, 1e-5), translation=(1e-9, 1e-6, 5e-4))
    assert decision.weight == 0.5 and not decision.measured["can_do"]
    assert asked == [("cloze", 0, 0), ("translation", 0, 8)]


def test_auto_with_no_row_at_all(ask):
    with pytest.raises(UserError, match="none"):
        ask(cloze=None, translation=None)


def test_auto_on_a_real_probe(tiny, tables, swahili, tmp_path):
    """Seven words cannot tell, though the model knows them and the mean is below 0."""
    config = probed(tiny, tables, swahili, "auto")
    config.probe.sources = ("el", "th")
    decision = decided(config, tmp_path)
    found = decision.measured
    assert decision.weight == 0.5 and not found["can_do"]
    assert found["difference"] < 0 and found["last"]["target"] > 0.01
    assert found["task"] == "cloze" and set(found["tasks"]) == {"cloze", "translation"}
    assert set(found["sources"]) == {"el", "th"}
    assert found["rows"] == len(WORDS)  # each word was asked for with some of the demonstrations
    assert json.loads((tmp_path / FILE).read_text()) == found
    config.probe.sources = ("el",)
    assert set(decided(config, tmp_path).measured["sources"]) == {"el"}
    config.pivot.regulate = "mean"
    decision = decided(config, tmp_path)
    assert decision.weight == 0 and set(decision.measured["tasks"]) == {"cloze"}


@pytest.mark.slow
def test_without_a_pivot_the_run_is_bactrian(tiny, tables, swahili, tmp_path):
    config = probed(tiny, tables, swahili)
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
    config = probed(tiny, tables, english)
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
    config = probed(tiny, tables, model)
    card = prepare.prepare(config, tmp_path / "run", run="--config=c.py")
    assert english_rows(card)  # it does not know yet that λ will be 0
    printed = capsys.readouterr().out
    assert "λ is not decided yet, so both streams are prepared" in printed
    assert "python -m prom_jax.regulate --config=c.py\n" in printed
    assert not (tmp_path / "run" / FILE).exists()

    weights()
    assert regulate.regulate(config, tmp_path / "run")["sw"].weight == 0
    assert f"kept in {tmp_path / 'run' / FILE}" in capsys.readouterr().out
    (Path(model) / "model.safetensors").unlink()
    card = prepare.prepare(config, tmp_path / "run")
    assert not english_rows(card) and "not decided" not in capsys.readouterr().out


def test_preparing_without_english_names_what_decides(tiny, tables, bare, tmp_path):
    model, weights = bare(WORDS.values())
    config = probed(tiny, tables, model)
    config.data.english = ()
    message = (
        r"have none of it: set data.english.* λ is not decided yet, .* prom_jax.regulate --config=c.py asks"
    )
    with pytest.raises(UserError, match=message):
        prepare.prepare(config, tmp_path / "run", run="--config=c.py")
    weights()
    regulate.regulate(config, tmp_path / "run")
    assert not english_rows(prepare.prepare(config, tmp_path / "run"))
    config.pivot.regulate = "never"
    with pytest.raises(UserError, match=r"none of it: set data.english, or use the variant :bactrian\.$"):
        prepare.prepare(config, tmp_path / "never")


def test_a_decision_made_elsewhere(tiny, tables, bare, tmp_path, monkeypatch):
    model, weights = bare(WORDS.values())
    config = probed(tiny, tables, model)
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
