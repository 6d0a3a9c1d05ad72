"""GGUF files against the models that they were made of and transformers' own reading of them, and what is
refused."""

import dataclasses
import shutil
import struct
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, PreTrainedTokenizerFast

from prom_jax.checkpoints.gguf import open_gguf
from prom_jax.checkpoints.params import ParamsReader, load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.checkpoints.safetensors import save_hf
from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.utils.errors import UserError
from tests import reference
from tests.checkpoints.made_up import SIZES, gguf_settings, hf_model, to_gguf, write_gguf
from tests.reference import FAMILIES, relative_error, to_params


@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_gguf_equals_the_folder_it_was_made_of(tmp_path, kind, dtype):
    model = hf_model(dtype, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "folder")
    folder, file = open_reader(tmp_path / "folder"), open_reader(to_gguf(model, tmp_path / "m.gguf", kind))
    assert file.config == folder.config
    assert file.dtype == folder.dtype
    jax.tree.map(np.testing.assert_array_equal, load_params(file), load_params(folder))
    loaded = decoder.with_params(decoder.abstract(file.config, param_dtype=file.dtype), load_params(file))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>"
    )
    out = tmp_path / "out"
    save_hf(ParamsReader(loaded), tokenizer, out, dtype=file.dtype, chat_template=None, card={})
    for name, tensor in load_file(tmp_path / "folder" / "model.safetensors").items():
        exported = load_file(out / "model.safetensors")[name]
        assert (exported.dtype, exported.tobytes()) == (tensor.dtype, tensor.tobytes())


def test_gguf_rope_scaling_is_recovered(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model = hf_model(head_dim=64, rope_parameters=scaling)
    model.save_pretrained(tmp_path / "folder")
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(32, rel=1e-5)
    divisors[divisors > 31.9] = 32  # the writer has the exact factor
    plain_file = to_gguf(model, tmp_path / "plain.gguf")
    arrays = {tensor.name: tensor.data for tensor in gguf.GGUFReader(plain_file).tensors}

    def write(divisors):
        settings = gguf_settings(model.config, **{"rope.dimension_count": 64})
        return write_gguf(tmp_path / "m.gguf", settings, {**arrays, "rope_freqs.weight": divisors})

    assert open_reader(plain_file).config.layers[0].rope.scaling is None
    assert open_reader(write(divisors)).config == open_reader(tmp_path / "folder").config
    with pytest.raises(UserError, match="unknown rope scaling"):
        open_reader(write(np.linspace(1, 32, 32, dtype=np.float32)))


# Changes to what GGUF cannot say: windows of Qwen; scalings of another original length than 8192; layers of
# SmolLM 3 without positions but every fourth; scales of Gemma's queries that are not its heads' size.
NOT_IN_GGUF = {
    "qwen2 with windows": {"use_sliding_window": False, "sliding_window": None},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "smollm3": {"no_rope_layer_interval": 4},
    "dynamic": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "phi3 longrope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "glm4": {"eos_token_id": 2},  # of several, those that the format has no name for
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "gemma3 with a cap": {"query_pre_attn_scalar": 8},
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")


IN_GGUF = [family for family in FAMILIES if family != "olmo3"]


def as_gguf_says(config):
    """Where a Mistral without a window is a Llama."""
    llama = config.model_type == "mistral" and config.windows == (None,)
    return dataclasses.replace(config, model_type="llama") if llama else config


@pytest.mark.parametrize("family", IN_GGUF)
def test_gguf_of_each_family(tmp_path, family):
    """Against the model that it was made of, and as transformers reads the file where it does."""
    model = reference.hf_model(family, **NOT_IN_GGUF.get(family, {}))
    path = to_gguf(model, tmp_path / "m.gguf")
    reader = open_reader(path)
    assert reader.config == as_gguf_says(config_from_hf(model.config.to_dict()))
    params = load_params(reader)
    expected = to_params(dict(model.named_parameters()), reader.config)
    if model.config.model_type in ("gemma2", "gemma3_text"):  # 1 + w - 1
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-7), params, expected
        )
    else:
        jax.tree.map(np.testing.assert_array_equal, params, expected)

    if model.config.model_type in READ_BY_TRANSFORMERS:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, config=model.config, dtype=torch.float32
        )
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 150))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    ours = decoder.with_params(decoder.abstract(reader.config), params)
    assert relative_error(ours(tokens), logits) <= 1e-4


@pytest.mark.parametrize(
    ("config_class", "architecture", "layers"),
    [(Gemma2Config, "gemma2", 46), (Gemma3TextConfig, "gemma3", 62)],
)
def test_gguf_of_the_largest_gemma(tmp_path, config_class, architecture, layers):
    """Whose queries are not scaled by the size of its heads, which the file does not say."""
    sizes = {**SIZES, "num_hidden_layers": layers, "head_dim": 16, "query_pre_attn_scalar": 8}
    config = config_class(**sizes, pad_token_id=None)
    embedding = {"token_embd.weight": np.ones((64, 32), np.float32)}
    reader = open_reader(write_gguf(tmp_path / "m.gguf", gguf_settings(config), embedding, architecture))
    assert reader.config == config_from_hf(config.to_dict())
    assert reader.config.attention_scale == 8**-0.5


def test_bad_gguf_files_are_refused(tmp_path):
    model, path = hf_model(), tmp_path / "m.gguf"

    def bad(error, **settings):
        to_gguf(model, path, **settings)
        with pytest.raises(UserError, match=error):
            open_reader(path)

    bad("expert_count=8", expert_count=8)
    bad("'longrope'", **{"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0})
    bad(r"partial_rotary_factor=0\.5", **{"rope.dimension_count": 4})
    bad("one of 2 parts.*give them their names back", **{"split.count": 2})
    to_gguf(model, path)
    whole = path.read_bytes()
    for cut in (0, 3, 20, 300, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            open_reader(path)
    path.write_bytes(whole.replace(b"output_norm", b"output_nrom"))
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
        load_params(open_reader(path))
    path.write_bytes(whole.replace(b"token_embd", b"token_emdb"))
    with pytest.raises(UserError, match=r"lacks the tensor token_embd\.weight"):
        open_reader(path)
    path.write_bytes(b"not a gguf file at all, but long enough to look at")
    with pytest.raises(UserError, match="not a whole GGUF file"):
        open_reader(path)
    write_gguf(path, {}, {"a": np.ones(3, np.float32)}, architecture="gpt2")
    with pytest.raises(UserError, match="'gpt2'"):
        open_reader(path)
    q8 = ("Q8_K", np.zeros((64, 292), np.uint8))  # of sums on the way, not of models
    write_gguf(path, gguf_settings(hf_model().config), {"token_embd.weight": q8})
    with pytest.raises(UserError, match=r"token_embd\.weight is of type Q8_K"):
        open_reader(path)


def test_a_damaged_length_in_a_gguf_file_ends_at_once(tmp_path):
    """An array that claims more elements than the file has bytes: the package alone would read on."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = path.read_bytes()
    length = data.index(b"token_type") + len("token_type") + 8  # after the types of array and element
    path.write_bytes(data[:length] + (2**40).to_bytes(8, "little") + data[length + 8 :])
    with pytest.raises(UserError, match=r"not a whole GGUF file .*ends early"):
        open_reader(path)


def gguf_header(fields: bytes, fields_count: int, tensors: bytes = b"", tensors_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors_count, fields_count) + fields + tensors


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def test_gguf_counts_cost_nothing(tmp_path):
    """A few bytes that speak of many."""
    path, array = tmp_path / "m.gguf", gguf_string(b"a") + struct.pack("<I", 9)
    tensor = gguf_string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)
    for content, error in (
        (gguf_header(b"", 2**60), "Duplicate"),
        (gguf_header(b"", 0, b"", 2**60), "ends early"),
        (gguf_header(array + struct.pack("<IQ", 8, 2**60), 1), "ends early"),
        (gguf_header(array + struct.pack("<IQ", 0, 2**60), 1), "ends early"),
        (gguf_header(array + struct.pack("<IQ", 9, 1) * 10_000, 1), "arrays in arrays"),
        (gguf_header(gguf_string(b"a") + struct.pack("<I", 8) + gguf_string(b"\xff"), 1), "utf-8"),
        (gguf_header(b"", 0, tensor, 1), "reshape"),
        (gguf_header(b"", 0, gguf_string(b"a") + struct.pack("<IQ", 2**31, 0), 1), "ends early"),
    ):
        path.write_bytes(content + bytes(64))
        with pytest.raises(UserError, match=f"not a whole GGUF file .*{error}"):
            open_reader(path)


def test_gguf_tensors_do_not_share_their_bytes(tmp_path):
    fields = gguf_string(b"general.architecture") + struct.pack("<I", 8) + gguf_string(b"llama")
    info = b"".join(gguf_string(b"t%d" % i) + struct.pack("<IQIQ", 1, 1024, 0, 0) for i in range(100))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_header(fields, 1, info, 100) + bytes(5000))
    with pytest.raises(UserError, match="its tensors overlap"):
        open_reader(path)


def test_gguf_numbers_of_an_array_take_little_memory(tmp_path):
    path = tmp_path / "m.gguf"
    array = gguf_string(b"a") + struct.pack("<IIQ", 9, 0, 2**20) + bytes(2**20)
    path.write_bytes(gguf_header(array, 1) + bytes(64))
    tracemalloc.start()
    file = open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.metadata["a"] == [0] * 2**20
    assert peak < 40 * 2**20


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"block_count": 10**6}, "num_hidden_layers=1000000"),
        ({"block_count": "1"}, "num_hidden_layers='1'"),
        ({"attention.head_count": 0}, "head_count=0: expected a whole number above 0"),
        ({"rope.dimension_count": "x"}, r"rope\.dimension_count='x': expected a whole number above 0"),
        ({"attention.layer_norm_rms_epsilon": "x"}, "rms_norm_eps='x'"),
        ({"attention.key_length": 7}, "head_dim=7"),
    ],
)
def test_values_that_gguf_settings_cannot_have_are_named(tmp_path, settings, error):
    with pytest.raises(UserError, match=error):
        open_reader(to_gguf(hf_model(), tmp_path / "m.gguf", **settings))


def test_gguf_tensors_of_other_dimensions_are_refused(tmp_path):
    for shape in ((2, 2, 2), (0,)):
        path = write_gguf(
            tmp_path / "m.gguf",
            gguf_settings(hf_model().config),
            {"token_embd.weight": np.ones(shape, np.float32)},
        )
        with pytest.raises(UserError, match=r"has 3 dimensions|vocab_size=0"):
            open_reader(path)
    arrays = {"token_embd.weight": np.ones((64, 32), np.float32), "rope_freqs.weight": np.ones(0, np.float32)}
    with pytest.raises(UserError, match=r"rope_freqs of the shape \[0\]"):
        open_reader(write_gguf(tmp_path / "m.gguf", gguf_settings(hf_model().config), arrays))


def test_a_model_in_parts(tmp_path):
    model, whole = hf_model(), tmp_path / "whole.gguf"
    to_gguf(model, whole)
    arrays = {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(whole).tensors}
    names, paths = list(arrays), [tmp_path / f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for number, path in enumerate(paths):
        settings = gguf_settings(model.config) if number == 0 else {}
        settings |= {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        write_gguf(path, settings, {name: arrays[name] for name in names[number::3]})
    expected = load_params(open_reader(whole))
    for path in paths:  # any of them
        jax.tree.map(np.testing.assert_array_equal, load_params(open_reader(path)), expected)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(UserError, match="is not part 3 of 3"):
        open_reader(paths[1])
    paths[2].unlink()
    with pytest.raises(UserError, match=r"m-00003-of-00003\.gguf does not exist: expected all 3 parts"):
        open_reader(paths[0])
