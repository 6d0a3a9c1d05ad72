"""The probe against plain torch, row by row and layer by layer."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prom_jax.analysis.probe import SCORINGS, Probe, averaged, probe, word_starts
from prom_jax.analysis.tables import read_sources, read_table
from prom_jax.analysis.tasks import TASKS, Row
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests.analysis import reference
from tests.analysis.reference import ROWS
from tests.reference import hf_model, place_params, to_model

MAX_ERROR = 1e-4


def models_for(tokenizer, family="llama3", pivot_layer=0, **settings):
    hf = hf_model(family, vocab_size=len(tokenizer), **settings)
    return to_model(hf, pivot_layer), hf


def assert_parity(result: Probe, hf, tokenizer, batch=1):
    rows = [(prompt, row.english, row.words) for row, prompt in result.rows]
    english, target = reference.probabilities(hf, tokenizer, rows, result.scoring, batch)
    for ours, theirs in ((result.english, english), (result.target, target)):
        assert ours.shape == theirs.shape == (len(rows), hf.config.num_hidden_layers)
        assert np.abs(ours - theirs).max() <= MAX_ERROR
        # Most are far smaller than that; below 1e-37 float32 has fewer digits.
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-37)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", ["byte_level", "metaspace", "byte_fallback"])
def test_parity_with_torch(request, tables, name, scoring):
    tokenizer = request.getfixturevalue(name)
    model, hf = models_for(tokenizer)
    result = probe(model, tokenizer, read_table("sw", tables()), scoring=scoring, shots=2, batch=3)
    assert_parity(result, hf, tokenizer)


@pytest.mark.parametrize("scoring", ["word", "prefix"])
def test_parity_of_several_right_words(byte_level, tables, scoring):
    model, hf = models_for(byte_level)
    rows = [
        ("water", "maji, tone, ภาษา", 'Kunywa "___".'),
        ("tree, wood; log", "mti", 'Kata "___".'),
        ("big, large", "kubwa, kuu", 'Si ndogo, ni "___".'),
        ("sun", "jua", 'Kali "___".'),
    ]
    result = probe(model, byte_level, read_table("sw", tables(rows)), scoring=scoring, shots=1)
    assert len(result.rows) == 3 and sum(len(row.english + row.words) > 2 for row, _ in result.rows) >= 2
    assert_parity(result, hf, byte_level)


def test_a_word_that_begins_with_another_is_there_with_it(byte_level, tables):
    model, _ = models_for(byte_level)
    one, two = (
        probe(model, byte_level, read_table("sw", tables([("sun", words, 'Kali "___".')])), shots=0)
        for words in ("vuq", "vuqza, vuq")
    )
    assert byte_level("vuqza")["input_ids"][:3] == byte_level("vuq")["input_ids"]
    np.testing.assert_allclose(one.target, two.target, rtol=1e-5)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "cloze"])
def test_parity_of_the_other_tasks(byte_level, tables, task):
    model, hf = models_for(byte_level)
    tables([(english, word[::-1]) for english, word, _ in ROWS], ("english", "word"), "th")
    folder = tables()
    sources = read_sources(("th",), "sw", folder) if task == "translation" else ()
    result = probe(model, byte_level, read_table("sw", folder), task=task, sources=sources, shots=2)
    assert (result.task, result.sources) == (task, ("th",) * len(sources))
    assert len(result.rows) >= 6
    assert_parity(result, hf, byte_level)


def test_some_layers_are_those_of_all(byte_level, tables):
    model, _ = models_for(byte_level, pivot_layer=3)
    table = read_table("sw", tables())
    whole, some = (probe(model, byte_level, table, shots=2, layers=layers) for layers in ((), (2, 4)))
    assert some.layers == (2, 4) and whole.layers == (1, 2, 3, 4)
    np.testing.assert_allclose(some.english, whole.english[:, [1, 3]], rtol=1e-6)
    assert some.difference(4) == pytest.approx(whole.difference(4), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama2", {}), ("mistral", {"sliding_window": 40})],  # the window ends within the demonstrations
)
@pytest.mark.parametrize("demonstrations", ["shared", "row"])
def test_parity_of_both_kinds_of_demonstrations(byte_level, tables, family, settings, demonstrations):
    model, hf = models_for(byte_level, family, pivot_layer=3, **settings)
    table = read_table("sw", tables())
    result = probe(model, byte_level, table, shots=3, demonstrations=demonstrations)
    assert len(result.rows) >= len(ROWS) - 4
    assert_parity(result, hf, byte_level)


@pytest.mark.slow
def test_eight_devices_and_any_batch_give_the_same(byte_fallback, tables):
    model, _ = models_for(byte_fallback, pivot_layer=3)
    table = read_table("sw", tables())
    for scoring in ("word", "byte"):
        one = probe(model, byte_fallback, table, scoring=scoring, shots=2, batch=16)
        few = probe(model, byte_fallback, table, scoring=scoring, shots=2, batch=1)
        np.testing.assert_allclose(few.target, one.target, rtol=1e-4)
        for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
            mesh = sharding.make_mesh(**sizes)
            spread = decoder.with_params(model, place_params(mesh, decoder.to_params(model), model.config))
            many = probe(spread, byte_fallback, table, scoring=scoring, shots=2, batch=5)
            assert many.rows == one.rows
            np.testing.assert_allclose(many.english, one.english, rtol=1e-4)
            np.testing.assert_allclose(many.target, one.target, rtol=1e-4)


def test_the_same_seed_gives_the_same(byte_level, tables):
    model, _ = models_for(byte_level)
    table = read_table("sw", tables())
    summaries = [probe(model, byte_level, table, shots=2, seed=seed).summary() for seed in (0, 0, 1)]
    assert summaries[0] == summaries[1] != summaries[2]


def test_rows_that_cannot_be_measured(byte_level, metaspace, tables):
    model, _ = models_for(byte_level)
    table = dataclasses.replace(read_table("sw", tables()), dropped={"earlier": 1})
    dropped = lambda *args, **kwargs: probe(*args, table, shots=0, **kwargs).dropped
    assert dropped(model, byte_level) == {"earlier": 1, "its English and target word are equal": 1}
    # πυρ begins with no token but bytes; in byte-level BPE these are pieces of characters.
    assert dropped(model, byte_level, scoring="prefix") == {
        "earlier": 1,
        "one token begins both of its words": 3,
        "no token begins its target word": 1,
    }
    assert dropped(model, byte_level, scoring="byte") == {
        "earlier": 1,
        "one token begins both of its words": 3,
    }
    model, _ = models_for(metaspace)
    assert dropped(model, metaspace)["the tokenizer cannot spell one of its words"] == 1


def test_word_starts(byte_level, byte_fallback):
    spelled = lambda tokenizer, *args: tokenizer.convert_ids_to_tokens(word_starts(tokenizer, *args))
    assert spelled(byte_level, "task", "prefix") == ["t", "tas", "Ġtas", "Ġtask"]
    assert spelled(byte_level, "task", "byte") == ["t", "tas", "Ġtas", "Ġtask"]
    assert spelled(byte_level, "ภาษา", "byte") == ["Ġà¸łà¸²", "à"]
    assert spelled(byte_fallback, "ภาษา", "byte") == ["ภ", "ภา", "▁ภา", "<0xE0>"]
    assert spelled(byte_fallback, "πυρ", "prefix") == []
    assert spelled(byte_fallback, "πυρ", "byte") == ["<0xCF>"]


def test_a_row_of_which_nothing_is_left(byte_level, tables):
    model, _ = models_for(byte_level)
    table = read_table("sw", tables([("taxi", "taxi", 'Ni "___".')]))
    with pytest.raises(UserError, match=r"no row .* 'sw' .*\(1 × its English and target word are equal\)"):
        probe(model, byte_level, table, shots=0)


@pytest.mark.parametrize("setting", [{"scoring": "first"}, {"batch": 0}, {"shots": 99}])
def test_settings_that_cannot_be(byte_level, tables, setting):
    model, _ = models_for(byte_level)
    with pytest.raises(UserError, match="{}={!r}".format(*next(iter(setting.items())))):
        probe(model, byte_level, read_table("sw", tables()), **setting)


def a_probe(english, target, shared=0.0):
    english, target = np.array(english), np.array(target)
    rows = [(Row((str(i),), ("",), "", ""), "") for i in range(len(english))]
    shared = np.broadcast_to(shared, english.shape)
    layers = tuple(range(1, 1 + english.shape[1]))
    return Probe("sw", "cloze", (), "byte", layers, rows, english, target, shared, {}, seed=0)


def test_the_difference_and_its_peak():
    noise = np.random.default_rng(0).normal(0, 0.1, (200, 2))
    english, target = np.column_stack([noise[:, 0] + 0.5, noise[:, 1] + 0.2]), np.full((200, 2), 0.2)
    result = a_probe(english, target)
    mean, low, high = result.difference(1)
    assert mean == pytest.approx(noise[:, 0].mean() + 0.3)
    # A normal mean, and with an exponential weight of a 201st one row that is as low as -1, or as high as 1.
    random = np.random.default_rng(1)
    normal, weight = random.normal(0, 0.1 / np.sqrt(200), 10**6), random.exponential(1 / 201, 10**6)
    assert mean - low == pytest.approx(-np.quantile(normal - 1.3 * weight, 0.025), rel=0.1)
    assert high - mean == pytest.approx(np.quantile(normal + 0.7 * weight, 0.975), rel=0.1)
    assert result.peak() == (1, 1, 1)
    assert a_probe(target, english).peak() == (2, 2, 2)
    assert a_probe(noise, np.zeros_like(noise)).peak()[1:] == (1, 2)
    assert result.strength().layer == 1 and result.strength().share > 0.99
    summary = result.summary()
    assert summary["intervals"]["difference"][0] == pytest.approx([low, high], rel=1e-5)
    assert summary["english_mean"] == pytest.approx(english.mean(axis=0), rel=1e-5)


def test_a_lead_does_not_hang_on_one_row_or_on_next_to_nothing():
    english = [[0.9, 0.02, 1e-5], [1e-7, 0.03, 1e-6], [1e-7, 0.02, 1e-6], [1e-7, 1e-7, 1e-6]]
    result = a_probe(english, np.full((4, 3), 1e-9))
    assert [result.lead(layer).share for layer in (1, 2, 3)] == [0.25, 0.75, 0.0]
    assert result.strength() == result.lead(2)
    assert result.lead(2).low < 0.75 < result.lead(2).high
    assert result.peak()[0] == 1
    effective = result.summary()["effective_rows"]["english"]
    assert effective[0] == pytest.approx(1, rel=1e-5) and 2.5 < effective[1] < 3
    nothing = a_probe(np.full((4, 2), [1e-9, 1e-8]), np.zeros((4, 2)))
    assert nothing.strength()[:2] == (2, 0.0)  # of equals, where the mean leads most


def test_the_average_counts_each_word_once():
    first, second = a_probe([[0.1], [0.2]], [[0.0], [0.4]]), a_probe([[0.5], [0.4]], [[0.2], [0.0]])
    rows = [(Row((name,), ("",), "", ""), "") for name in ("1", "2")]
    both = averaged([first, dataclasses.replace(second, rows=rows)])
    assert [row.english for row, _ in both.rows] == [("0",), ("1",), ("2",)]
    np.testing.assert_allclose(both.english[:, 0], [0.1, (0.2 + 0.5) / 2, 0.4])
    np.testing.assert_allclose(both.target[:, 0], [0.0, (0.4 + 0.2) / 2, 0.0])


def test_a_target_of_shared_tokens_is_not_reliable(byte_fallback, tables):
    shared = np.array([[0.2, 0.01], [0.2, 0.2], [0.01, 0.01]])
    result = a_probe(np.zeros((3, 2)), np.full((3, 2), 0.3), shared)
    assert result.unreliable(1) and not result.unreliable(2)
    assert result.summary()["unreliable_layers"] == [1]

    # Greek words that begin with the same byte, of which the vocabulary has no character.
    model, _ = models_for(byte_fallback)
    words = {"a": "πυρ", "b": "ρόδα", "c": "πόλη", "d": "φως", "e": "maji"}
    rows = [(english, word, f'Na "___" ni {i}.') for i, (english, word) in enumerate(words.items())]
    table = read_table("sw", tables(rows))
    result = probe(model, byte_fallback, table, scoring="byte", shots=0)
    np.testing.assert_array_equal(result.shared[:4], result.target[:4])
    assert not result.shared[4].any()
    assert all(result.unreliable(layer) for layer in range(1, 5))
    assert not probe(model, byte_fallback, table, shots=0).unreliable(1)


def few(table, number=10):
    return dataclasses.replace(table, concepts=table.concepts[:number])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_smollm2(smollm2, task):
    model, tokenizer, _, hf = smollm2
    sources = read_sources(("el", "th"), "sw") if task == "translation" else ()
    for scoring in SCORINGS:
        result = probe(model, tokenizer, few(read_table("sw")), task=task, sources=sources, scoring=scoring)
        assert_parity(result, hf, tokenizer, batch=8)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "language"), [("cloze", "el"), ("translation", "th"), ("repetition", "ar")])
def test_gemma3(gemma3, task, language):
    model, tokenizer, path = gemma3
    hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    sources = read_sources(("el", "ar"), language) if task == "translation" else ()
    result = probe(model, tokenizer, few(read_table(language)), task=task, sources=sources)
    assert_parity(result, hf, tokenizer, batch=4)
