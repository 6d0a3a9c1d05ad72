"""Stop tokens and sampling settings, from everything that says something of them."""

import json
import shutil

import pytest
from transformers import GenerationConfig

import prom_jax
from prom_jax import convert, generate
from prom_jax.checkpoints import generation, pretrained
from prom_jax.checkpoints.gguf import GGUFReader
from prom_jax.evaluation.decode import greedy
from prom_jax.evaluation.lm import HarnessModel
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import hf_model, to_gguf

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def with_generation(tiny, path, **content):
    shutil.copytree(tiny / "model", path)
    (path / generation.FILE).write_text(json.dumps(content))
    return path


def test_all_stop_tokens_end_answers_and_are_exported(tiny, tmp_path):
    source = with_generation(tiny, tmp_path / "a", eos_token_id=[7, 9], repetition_penalty=1.1, **SAMPLING)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [11, 9]}))
    model, tokenizer = prom_jax.load(source)
    stops = (tokenizer.eos_token_id, 11, 9, 7)
    assert generation.stop_tokens(model.config, tokenizer) == stops
    assert generation.sampling(model.config) == {"temperature": 0.6, "top_p": 0.9}
    assert HarnessModel(model, tokenizer)._eos == set(stops)
    # Through an export and a checkpoint and back.
    prom_jax.save_hf(model, tokenizer, tmp_path / "b")
    convert.main(["from_hf", str(tmp_path / "b"), str(tmp_path / "c")])
    convert.main(["to_hf", str(tmp_path / "c"), str(tmp_path / "d")])
    for folder in ("b", "d"):
        kept = GenerationConfig.from_pretrained(tmp_path / folder)
        assert kept.eos_token_id == list(stops)
        assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.6, 0.9)
        assert kept.repetition_penalty == 1.1


def test_settings_in_config_json_count_where_there_is_no_other_file(tiny, tmp_path):
    source = with_generation(tiny, tmp_path / "a")
    (source / generation.FILE).unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | SAMPLING))
    assert generation.sampling(pretrained.open_config(source)[0]) == {"temperature": 0.6, "top_p": 0.9}
    (source / generation.FILE).write_text("{}")
    assert generation.sampling(pretrained.open_config(source)[0]) == {}


def test_gguf_knows_ends_of_turns_and_sampling(tmp_path):
    path = to_gguf(
        hf_model(),
        tmp_path / "m.gguf",
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in (("eos", 2), ("eot", 5), ("eom", 6))},
        **{"general.sampling.temp": 0.7, "general.sampling.top_k": 20},
    )
    config = GGUFReader(path).config
    assert config.generation["eos_token_id"] == [2, 5, 6]
    assert generation.sampling(config) == {"temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize(
    "content",
    [
        {"temperature": "hot"}, {"top_p": 2}, {"eos_token_id": [1, "x"]}, {"top_k": 0.5}, {"min_p": -1},
        {"top_k": float("inf")}, {"temperature": float("nan")}, {"temperature": 10**400},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(tiny, tmp_path, content):
    source = with_generation(tiny, tmp_path / "a", **content)
    with pytest.raises(UserError, match=rf"generation_config.json sets {next(iter(content))}="):
        pretrained.open_source(source)
    (source / generation.FILE).write_text("[1]")
    with pytest.raises(UserError, match="is not valid JSON"):
        pretrained.open_source(source)


def test_generate_follows_the_model_and_its_flags(tiny, tmp_path, capsys):
    model, tokenizer = prom_jax.load(tiny / "model")
    (answer,) = greedy(model, [tokenizer("maziwa")["input_ids"]], 12, [])
    stop = next(token for token in answer[2:] if token not in answer[:2])  # not the first one
    text = tokenizer.decode(answer[: answer.index(stop)], skip_special_tokens=True)

    def run(source, *more):
        generate.main(["maziwa", f"--model={source}", "--raw", "--max_new_tokens=12", *more])
        return capsys.readouterr()

    source = with_generation(tiny, tmp_path / "a", eos_token_id=stop, repetition_penalty=1.1)
    printed = run(source)
    assert printed.out == text.rstrip("\ufffd") + "\n"
    assert "repetition_penalty" in printed.err
    source = with_generation(tiny, tmp_path / "b", do_sample=True, temperature=1.5)
    assert len({run(source, f"--seed={seed}").out for seed in (1, 2, 3)}) == 3
    assert run(source, "--temperature=0").out == run(tiny / "model").out
    with pytest.raises(UserError, match=r"the command line sets top_p=3\.0"):
        run(source, "--top_p=3")
