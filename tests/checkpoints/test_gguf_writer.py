"""GGUF files that are written here against the models they were made of, and against files that the tests
write with the package of the format."""

import json

import gguf
import jax
import numpy as np
import pytest
import torch

from prom_jax import convert
from prom_jax.checkpoints import gguf_writer
from prom_jax.checkpoints.generation import stop_tokens
from prom_jax.checkpoints.params import ParamsReader, load_params
from prom_jax.checkpoints.pretrained import open_reader, open_source
from prom_jax.models import decoder
from prom_jax.tokenization import folder
from prom_jax.utils.errors import UserError
from tests import reference
from tests.checkpoints import made_up
from tests.checkpoints.test_gguf import IN_GGUF, NOT_IN_GGUF, as_gguf_says
from tests.reference import to_model
from tests.tokenization.made_up import TEXTS
from tests.tokenization.test_sentencepiece import VARIANTS, write_model


def hf_model(family, tokenizer, **settings):
    return reference.hf_model(
        family,
        **{"vocab_size": len(tokenizer) + 3, "eos_token_id": tokenizer.eos_token_id, **settings},
    )


def write(hf, tokenizer, path, kind="f32"):
    model = to_model(hf)
    gguf_writer.write(ParamsReader(model), tokenizer, path, kind, "a template", "a name")
    return model


@pytest.mark.parametrize("family", IN_GGUF)
def test_every_family_comes_back_and_is_as_the_package_writes_it(tmp_path, byte_level, family):
    hf = hf_model(family, byte_level, **NOT_IN_GGUF.get(family, {}))
    model = write(hf, byte_level, tmp_path / "ours.gguf")
    reader, tokenizer = open_source(tmp_path / "ours.gguf")
    assert reader.config == as_gguf_says(model.config)
    offset = {"atol": 1e-7} if model.config.unit_offset_norms else {"atol": 0}
    check = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, **offset)
    jax.tree.map(check, load_params(reader), decoder.to_params(model))
    for text in TEXTS:
        assert tokenizer(text).input_ids == byte_level(text).input_ids
    assert tokenizer.chat_template == "a template"
    # The tests' own writer has names and order of rows from the package.
    made_up.to_gguf(hf, tmp_path / "theirs.gguf")
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name].data, tensor.data, rtol=0, **offset)


def test_llama3_scaling_is_written(tmp_path, byte_level):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    hf = hf_model("llama2", byte_level, head_dim=64, rope_parameters=scaling)
    model = write(hf, byte_level, tmp_path / "m.gguf")
    assert open_reader(tmp_path / "m.gguf").config == model.config
    hf.config.rope_parameters["original_max_position_embeddings"] = 1024
    with pytest.raises(UserError, match=r"unknown rope scaling|GGUF cannot say all of this model: layers"):
        write(hf, byte_level, tmp_path / "other.gguf")


def test_what_gguf_cannot_say_is_refused(tmp_path, byte_level):
    for family in ("qwen2 with windows", "dynamic", "phi3 longrope"):
        with pytest.raises(UserError, match="GGUF cannot say all of this model: "):
            write(hf_model(family, byte_level), byte_level, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="'olmo3' models are not written as GGUF"):
        write(hf_model("olmo3", byte_level), byte_level, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="exists: expected a new file"):
        write(hf_model("llama2", byte_level), byte_level, tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", gguf_writer.TYPES)
def test_types_are_the_packages_part_by_part(tmp_path, byte_level, kind, monkeypatch):
    monkeypatch.setattr(gguf_writer, "PART", 64 * 24)  # so that tensors are written in several parts
    hf = hf_model("llama2", byte_level, intermediate_size=80)  # whose down_proj has no whole blocks
    write(hf, byte_level, tmp_path / "m.gguf", kind)
    held = open_reader(tmp_path / "m.gguf")
    of_kind = gguf.GGMLQuantizationType[kind.upper()]
    for name, parameter in hf.named_parameters():
        value = parameter.detach().numpy()
        if value.ndim > 1:
            size, _ = gguf.GGML_QUANT_SIZES[of_kind]
            used = gguf.GGMLQuantizationType.F16 if value.shape[1] % size else of_kind
            value = gguf.dequantize(gguf.quantize(value, used), used)
        np.testing.assert_array_equal(held.read(name, (slice(None),) * value.ndim), value)


def test_values_beyond_float16_are_refused(tmp_path, byte_level):
    hf = hf_model("llama2", byte_level)
    hf.model.layers[1].mlp.up_proj.weight.data[2, 3:5] = 1e6
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has 2 values beyond float16"):
        write(hf, byte_level, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())
    write(hf, byte_level, tmp_path / "m.gguf", "bf16")


@pytest.mark.parametrize("name", ["llama", "extended", "no prefix", "user-defined, no prefix"])
def test_sentencepiece_models_keep_their_scores(tmp_path, name):
    (tmp_path / "tokenizer").mkdir()
    loaded = folder.load(write_model(tmp_path / "tokenizer", VARIANTS[name][0]()))
    hf = hf_model("llama2", loaded)
    write(hf, loaded, tmp_path / "m.gguf")
    reader, again = open_source(tmp_path / "m.gguf")
    assert len(again) == reader.config.vocab_size == len(loaded) + 3  # unused ones fill the embedding
    for text in TEXTS:
        assert again(text).input_ids == loaded(text).input_ids


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path, metaspace):
    with pytest.raises(UserError, match="GGUF is not written with a tokenizer of type BPE"):
        write(hf_model("llama2", metaspace), metaspace, tmp_path / "m.gguf")


def test_the_command(tiny, tmp_path, capsys):
    source = tmp_path / "hf"
    convert.main(["to_hf", str(tiny / "model"), str(source)])
    path = source / "generation_config.json"
    kept = json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.7}
    path.write_text(json.dumps(kept | {"eos_token_id": [kept["eos_token_id"], 7]}))
    convert.main(["to_gguf", str(source), str(tmp_path / "m.gguf"), "--type=q8_0"])
    assert f"wrote {tmp_path / 'm.gguf'}" in capsys.readouterr().out
    (before, tokenizer), (after, again) = open_source(source), open_source(tmp_path / "m.gguf")
    assert after.config == before.config
    assert stop_tokens(after.config, again) == stop_tokens(before.config, tokenizer)
    assert after.config.generation["temperature"] == 0.7
    assert again.chat_template == tokenizer.chat_template
    with torch.no_grad():
        hf = torch.from_numpy(before.read("model.layers.0.mlp.up_proj.weight", (slice(None),) * 2))
    read = after.read("model.layers.0.mlp.up_proj.weight", (slice(None),) * 2)
    assert np.abs(read - hf.numpy()).max() < 0.01 * np.abs(hf.numpy()).max()
