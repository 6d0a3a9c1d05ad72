"""GGUF files against plain formulas, against the models that they were made of and transformers' own reading
of them, and what is refused.

Blocks are random bytes with sane scales; what they mean is written out here once more.
"""

import struct
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, PreTrainedTokenizerFast

from prom_jax.checkpoints.gguf import _TYPES, open_gguf
from prom_jax.checkpoints.params import ParamsReader, load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.checkpoints.safetensors import save_hf
from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests import reference
from tests.reference import FAMILIES, relative_error, to_params

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hf_model(dtype=torch.float32, **settings):
    """A small Llama of transformers."""
    return reference.hf_model("llama2", **{**SIZES, **settings}).to(dtype)


def halves(data):
    """float16 numbers in pairs of bytes."""
    return data.copy().view(np.float16)[..., 0].astype(np.float32)


def nibbles(packed):
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def q8_0(b):
    return halves(b[:, :2])[:, None] * b[:, 2:].view(np.int8)


def q4_0(b):
    return halves(b[:, :2])[:, None] * (nibbles(b[:, 2:]) - 8)


def q4_1(b):
    return halves(b[:, :2])[:, None] * nibbles(b[:, 4:]) + halves(b[:, 2:4])[:, None]


def fifth_bits(packed):
    """16 where the i-th of 32 bits is set, else 0."""
    return 16 * np.unpackbits(packed, axis=-1, bitorder="little").astype(np.float32)


def q5_0(b):
    return halves(b[:, :2])[:, None] * (nibbles(b[:, 6:]) + fifth_bits(b[:, 2:6]) - 16)


def q5_1(b):
    values = nibbles(b[:, 8:]) + fifth_bits(b[:, 4:8])
    return halves(b[:, :2])[:, None] * values + halves(b[:, 2:4])[:, None]


def iq4_nl(b):
    steps = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    return halves(b[:, :2])[:, None] * steps[nibbles(b[:, 2:]).astype(int)]


def scale_and_minimum(s, j):
    """The j-th of eight pairs of six bits in twelve bytes."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)


def q2_k(blocks):
    out = np.empty((len(blocks), 256), np.float32)
    for row, b in zip(out, blocks, strict=True):
        scales, q, d, d_min = b[:16].astype(int), b[16:80], halves(b[80:82]), halves(b[82:84])
        for i in range(256):
            half, quarter, at = i // 128, i % 128 // 32, i % 32
            value = q[32 * half + at] >> (2 * quarter) & 3
            row[i] = d * (scales[i // 16] & 15) * value - d_min * (scales[i // 16] >> 4)
    return out


def q3_k(blocks):
    out = np.empty((len(blocks), 256), np.float32)
    for row, b in zip(out, blocks, strict=True):
        high, q, s, d = b[:32], b[32:96].astype(int), b[96:108].astype(int), halves(b[108:110])
        for i in range(256):
            half, quarter, at, group = i // 128, i % 128 // 32, i % 32, i // 16
            low_bits = s[group % 8] >> (4 * (group // 8)) & 15
            scale = low_bits | (s[8 + group % 4] >> (2 * (group // 4)) & 3) << 4
            value = (q[32 * half + at] >> (2 * quarter) & 3) - (0 if high[at] >> (i // 32) & 1 else 4)
            row[i] = d * (scale - 32) * value
    return out


def q4_k(blocks):
    out = np.empty((len(blocks), 256), np.float32)
    for row, b in zip(out, blocks, strict=True):
        d, d_min, s, q = halves(b[:2]), halves(b[2:4]), b[4:16].astype(int), b[16:]
        for j in range(8):
            scale, minimum = scale_and_minimum(s, j)
            chunk = q[32 * (j // 2) : 32 * (j // 2) + 32]
            values = chunk >> 4 if j % 2 else chunk & 15
            row[32 * j : 32 * j + 32] = d * scale * values - d_min * minimum
    return out


def q5_k(blocks):
    out = np.empty((len(blocks), 256), np.float32)
    for row, b in zip(out, blocks, strict=True):
        d, d_min, s, high, q = halves(b[:2]), halves(b[2:4]), b[4:16].astype(int), b[16:48], b[48:]
        for j in range(8):
            scale, minimum = scale_and_minimum(s, j)
            chunk = q[32 * (j // 2) : 32 * (j // 2) + 32]
            values = (chunk >> 4 if j % 2 else chunk & 15) | (high >> j & 1) << 4
            row[32 * j : 32 * j + 32] = d * scale * values - d_min * minimum
    return out


def q6_k(blocks):
    out = np.empty((len(blocks), 256), np.float32)
    for row, b in zip(out, blocks, strict=True):
        low, high, scales, d = b[:128], b[128:192], b[192:208].view(np.int8), halves(b[208:210])
        for i in range(256):
            half, quarter, at = i // 128, i % 128 // 32, i % 32
            low_bits = low[64 * half + 32 * (quarter % 2) + at] >> (4 * (quarter // 2)) & 15
            high_bits = high[32 * half + at] >> (2 * quarter) & 3
            row[i] = d * int(scales[i // 16]) * (int(low_bits | high_bits << 4) - 32)
    return out


# type: (values and bytes of a block, where its float16 numbers are, what it means)
BLOCKS = {
    "F32": (1, 4, (), lambda b: b.view(np.float32)),
    "F16": (1, 2, (), lambda b: b.view(np.float16).astype(np.float32)),
    "BF16": (1, 2, (), lambda b: b.view(jnp.bfloat16).astype(np.float32)),
    "Q8_0": (32, 34, (0,), q8_0),
    "Q4_0": (32, 18, (0,), q4_0),
    "Q4_1": (32, 20, (0, 2), q4_1),
    "Q5_0": (32, 22, (0,), q5_0),
    "Q5_1": (32, 24, (0, 2), q5_1),
    "Q2_K": (256, 84, (80, 82), q2_k),
    "Q3_K": (256, 110, (108,), q3_k),
    "Q4_K": (256, 144, (0, 2), q4_k),
    "Q5_K": (256, 176, (0, 2), q5_k),
    "Q6_K": (256, 210, (208,), q6_k),
    "IQ4_NL": (32, 18, (0,), iq4_nl),
}
GGUF_SIZES = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def write_gguf(path, settings, arrays, architecture="llama"):
    """`arrays`: name -> array, or (type name, its blocks [rows, bytes])."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key if "." in key and key.startswith(("tokenizer", "split")) else f"{architecture}.{key}", value)
    for name, array in arrays.items():
        if isinstance(array, tuple):
            kind, data = array
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # in GGUF where it is not the model_type
KEYS = {  # in GGUF, by transformers' names
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": gguf.Keys.Attention.LAYERNORM_RMS_EPS,
    "sliding_window": gguf.Keys.Attention.SLIDING_WINDOW,
    "_sliding_window_pattern": gguf.Keys.Attention.SLIDING_WINDOW_PATTERN,
    "attn_logit_softcapping": gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING,
    "final_logit_softcapping": gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
    "embedding_multiplier": gguf.Keys.LLM.EMBEDDING_SCALE,
    "residual_multiplier": gguf.Keys.LLM.RESIDUAL_SCALE,
    "logits_scaling": gguf.Keys.LLM.LOGIT_SCALE,
    "attention_multiplier": gguf.Keys.Attention.SCALE,
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


def gguf_settings(config, **settings):
    """Of a transformers config what a GGUF file says; settings that are None are left out."""
    held = {theirs.removeprefix("{arch}."): getattr(config, ours, None) for ours, theirs in KEYS.items()}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    held["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        held |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    held["attention.key_length"] = head_dim_of(config)
    return {key: value for key, value in {**held, **settings}.items() if value is not None}


def head_dim_of(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def gguf_name(hf_name, architecture, layers):
    """A tensor's name, as the package of the format has it."""
    (kind,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    module, _, parameter = hf_name.rpartition(".")
    return f"{gguf.get_tensor_name_map(kind, layers).get_name(module)}.{parameter}"


def interleave(rows, head_dim):
    """Rows of q or k as GGUF has them: of each head 0, d/2, 1, d/2 + 1, …"""
    order = [
        head + half * head_dim // 2 + i
        for head in range(0, len(rows), head_dim)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return rows[order]


def to_gguf(model, path, kind=None, **settings):
    """Writes a transformers model as GGUF; matrices in the type `kind`."""
    config, arrays = model.config, {}
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    for name, value in model.named_parameters():
        value = value.detach().float().numpy()
        if "norm" in name and architecture in ("gemma2", "gemma3"):
            value = 1 + value
        if architecture in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
            value = interleave(value, head_dim_of(config))
        if kind and value.ndim > 1:
            value = (kind, gguf.quantize(value, gguf.GGMLQuantizationType[kind]))
        arrays[gguf_name(name, architecture, config.num_hidden_layers)] = value
    return write_gguf(path, gguf_settings(config, **settings), arrays, architecture)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_gguf_type_against_its_formula(tmp_path, kind):
    random = np.random.default_rng(0)
    values, num_bytes, scales, formula = BLOCKS[kind]
    model = hf_model(**GGUF_SIZES, tie_word_embeddings=True)
    arrays, expected = {}, {}
    for name, parameter in model.named_parameters():
        theirs, shape = gguf_name(name, "llama", 2), tuple(parameter.shape)
        if len(shape) == 1:
            arrays[theirs] = expected[name] = random.normal(size=shape).astype(np.float32)
            continue
        rows, columns = shape
        if scales:
            blocks = random.integers(0, 256, (rows * columns // values, num_bytes), dtype=np.uint8)
            for at in scales:
                scale = random.uniform(1e-4, 1e-2, len(blocks)).astype(np.float16)
                blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
        else:
            floats = random.normal(size=(rows * columns, 1)).astype(np.float32)
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[kind]
            blocks = floats.astype(dtype).view(np.uint8)
        matrix = formula(blocks).reshape(shape)
        if "q_proj" in name or "k_proj" in name:
            back = np.argsort(interleave(np.arange(rows), 64))
            matrix = matrix[back]
        arrays[theirs] = (kind, blocks.reshape(rows, -1))
        expected[name] = matrix
    settings = gguf_settings(model.config, **{"attention.key_length": None})  # older files have none
    path = write_gguf(tmp_path / "m.gguf", settings, arrays)

    reader = open_reader(path)
    assert reader.config == config_from_hf(model.config.to_dict())
    assert reader.config.tie_word_embeddings
    assert reader.config.head_dim == 64
    assert reader.config.rms_norm_eps == 1e-6
    assert reader.config.layers[0].rope.theta == 5e5
    assert reader.dtype == {"F16": np.float16, "BF16": jnp.bfloat16}.get(kind, np.float32)
    params = load_params(reader, dtype=np.float32)
    for layer in (0, 1):
        for ours in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix = expected[f"model.layers.{layer}.self_attn.{ours}.weight"]
            np.testing.assert_allclose(params["stack0"][ours][layer], matrix, rtol=1e-5, atol=1e-6)
        for ours in ("gate_proj", "up_proj", "down_proj"):
            matrix = expected[f"model.layers.{layer}.mlp.{ours}.weight"]
            np.testing.assert_allclose(params["stack0"][ours][layer], matrix, rtol=1e-5, atol=1e-6)
        norm = expected[f"model.layers.{layer}.input_layernorm.weight"]
        np.testing.assert_array_equal(params["stack0"]["attention_norm"][layer], norm)
    embedding = expected["model.embed_tokens.weight"]
    np.testing.assert_allclose(params["embed_tokens"], embedding, rtol=1e-5, atol=1e-6)
    # Columns of a shard begin and end inside a block: 256 columns in 8 are 32.
    parts = load_params(reader, sharding.make_mesh(fsdp=4, tensor=2), dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, parts, params)


def random_blocks(kind, rows, columns):
    """Finite values of a type that the package alone knows, [rows, bytes]: made by it of random numbers where
    it can, or else of random bytes, of which none that could be one of float16's exponents is large."""
    random = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(random.normal(size=(rows, columns)).astype(np.float32), kind)
    except NotImplementedError:
        values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        return random.integers(0, 0x40, (rows, columns // values * num_bytes), dtype=np.uint8)


@pytest.mark.parametrize("kind", sorted(set(_TYPES) - set(BLOCKS)))
def test_other_gguf_types_are_as_the_package_reads_them(tmp_path, kind):
    model = hf_model(**GGUF_SIZES)
    arrays, expected = {}, {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "down_proj" in name:
            array = (kind, random_blocks(kind, *array.shape))
            expected[name] = gguf.dequantize(array[1], gguf.GGMLQuantizationType[kind])
        arrays[gguf_name(name, "llama", 2)] = array
    reader = open_reader(write_gguf(tmp_path / "m.gguf", gguf_settings(model.config), arrays))
    params = load_params(reader)
    for layer in (0, 1):
        matrix = expected[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert np.isfinite(matrix).all() and matrix.std() > 0
        np.testing.assert_array_equal(params["stack0"]["down_proj"][layer], matrix)
    parts = load_params(reader, sharding.make_mesh(fsdp=4, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, parts["stack0"]["down_proj"], params["stack0"]["down_proj"])


def test_all_types_that_the_package_dequantises_are_known():
    known = set()
    for kind in gguf.GGMLQuantizationType:
        _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        known.add(kind.name)
    assert known == set(_TYPES)


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
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "gemma3 with a cap": {"query_pre_attn_scalar": 8},
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_of_each_family(tmp_path, family):
    """Against the model that it was made of, and as transformers reads the file where it does."""
    model = reference.hf_model(family, **NOT_IN_GGUF.get(family, {}))
    path = to_gguf(model, tmp_path / "m.gguf")
    reader = open_reader(path)
    assert reader.config == config_from_hf(model.config.to_dict())
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
    bad("'yarn'", **{"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0})
    bad("rope.dimension_count=4", **{"rope.dimension_count": 4})
    bad("one of 2 parts", **{"split.count": 2})
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
        ({"attention.head_count": 0}, "num_attention_heads=0"),
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
