"""Several languages in one run: what each has of its own, and that none changes another's loss."""

import json
import random

import jax
import pytest

from prom_jax import prepare
from prom_jax import train as door
from prom_jax.config import languages, of_language
from prom_jax.data.mixture import Mixture
from prom_jax.evaluation.heldout import HeldOut
from prom_jax.training import regulation
from prom_jax.training.methods.prom import PROM
from prom_jax.utils.errors import UserError
from tests.tiny import tiny_config

FINNISH = "lehmä syö ruohoa ja antaa maitoa joka aamu pienellä tilalla joen lähellä".split()


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Twenty pairs in Finnish beside the forty in Swahili, which get twice as many examples."""
    folder, chance = tmp_path_factory.mktemp("languages"), random.Random(1)
    for language in ("sw", "en"):
        (folder / f"{language}.jsonl").write_bytes((tiny / f"{language}.jsonl").read_bytes())
    rows = [
        {"id": i, **{key: " ".join(chance.choices(FINNISH, k=5)) for key in ("instruction", "output")}}
        for i in range(20)
    ]
    (folder / "fi.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tiny_config(tiny)
    config.language, config.data.translation, config.data.share = "sw,fi", (), ("sw=2", "fi=1")
    config.data.english, config.data.target = (str(folder / "en.jsonl"),), (str(folder / "{language}.jsonl"),)
    return config


@pytest.fixture(scope="module")
def finnish_does_not_pivot():
    """λ is 0 for Finnish, as if a probe had said so."""
    decide = regulation.decide

    def zero_for_finnish(part, *arguments):
        if part.language == "sw":
            return decide(part, *arguments)
        return regulation.Regulation(0.0, "λ = 0: as the test wants it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prom_jax.training.setup.decide", zero_for_finnish)
        yield


@pytest.fixture(scope="module")
def job(config, finnish_does_not_pivot, tmp_path_factory):
    """A run that is planned."""
    return door.plan(config, tmp_path_factory.mktemp("runs") / "planned")


@pytest.mark.slow
def test_each_language_has_its_own_results(config, finnish_does_not_pivot, tmp_path):
    summary = door.train(config, tmp_path)
    assert languages(config) == ("sw", "fi") and summary["language"] == "sw,fi"
    kinds = ("target_nats", "target_bits_per_byte", "english_nats", "english_bits_per_byte", "pivot_nats")
    keys = {f"eval_{code}_{kind}" for code in ("sw", "fi") for kind in kinds}
    assert set(summary["final"]) == {"step", *keys}
    for code in ("sw", "fi"):
        key = f"eval_{code}_target_nats"
        assert summary["final"][key] < summary["base"][key]
    assert summary["regulation"].startswith("sw: λ = 0.5 as configured; fi: λ = 0: as")
    answers = json.loads((tmp_path / "samples_adapted.json").read_text())
    assert [answer["language"] for answer in answers] == ["sw"] * 2 + ["fi"] * 2
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "language:\n- sw\n- fi\n" in card and "fi.jsonl" in card
    again = door.train(config, tmp_path)
    assert again["final"] == summary["final"]


def test_only_the_language_that_pivots_trains_on_english(job):
    workdir, swahili = job.workdir, job.records.groups == 0
    assert job.method == PROM(3, 0.5, 0.1, "none")
    assert job.records.streams["english"].lengths[swahili].all()
    assert not job.records.streams["english"].lengths[~swahili].any()
    card = json.loads((workdir / "data_card.json").read_text())
    assert {code: part["examples"] for code, part in card["languages"].items()} == {"sw": 34, "fi": 17}
    assert card["languages"]["fi"]["roles"]["target"]["examples"] == 14  # of which three are there twice
    assert card["roles"]["target"]["examples"] == 34 + 14
    markdown = (workdir / "data_card.md").read_text()
    assert "34 examples of sw (67%), 17 examples of fi (33%)" in markdown and "| fi target " in markdown


def test_each_ones_rows_get_the_loss_that_they_get_alone(job):
    """The sums over both languages' texts, packed together, are those of each one's, packed alone."""
    with jax.set_mesh(job.mesh):
        params = door.load(job)

        def sums(records):
            held_out = HeldOut(job.model, job.method, job.mesh, records, sequences=8, seq_len=192)
            found, streams = held_out(params), records.streams
            tokens = {name: int(streams[name].weights.sum()) for name in streams}
            return {name: found[f"eval_{name}_nats"] * number for name, number in tokens.items() if number}

        swahili, finnish = (sums(part.data.train) for part in job.parts)
        sizes = [len(part.data.train) for part in job.parts]
        both = sums(Mixture({part.language: part.data.train for part in job.parts}))
    assert both["target"] == pytest.approx(swahili["target"] + finnish["target"], rel=1e-6)
    assert both["english"] == pytest.approx(swahili["english"], rel=1e-6) and sizes == [34, 14]
    assert set(finnish) == {"target"}


def test_the_best_checkpoint_is_by_the_mean_of_the_languages(job):
    results = {"eval_sw_target_nats": 1.0, "eval_fi_target_nats": 3.0, "eval_sw_english_nats": 9.0}
    assert door.held_out_loss(job, results) == 2.0
    assert door.held_out_loss(job, None) is None and door.held_out_loss(job, {"step": 4}) is None


def test_what_cannot_be_several(config, tmp_path):
    for language, target, message in (
        ("sw,sw", config.data.target, "names one twice"),
        ("sw,fi", ("rows.jsonl",), r"have no \{language\}"),
        (",", config.data.target, "language is not set"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.language, wrong.data.target = language, target
        with pytest.raises(UserError, match=message):
            prepare.prepare(wrong, tmp_path / "wrong")
    part = of_language(config, "fi")
    assert part.language == "fi" and part.data.target[0].endswith("/fi.jsonl")
    assert config.data.target[0].endswith("/{language}.jsonl")
    config = config.copy_and_resolve_references()
    config.language = "('sw','fi')"  # as a tuple is written
    assert languages(config) == ("sw", "fi")
