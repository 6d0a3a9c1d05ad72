"""The types of GGUF's blocks against plain formulas and the format's own package.

Blocks are random bytes with sane scales; what they mean is written out here once more.
"""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prom_jax.checkpoints.gguf import _TYPES
from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.models.auto import config_from_hf
from prom_jax.parallel import sharding
from tests.checkpoints.made_up import SIZES, gguf_name, gguf_settings, hf_model, interleave, write_gguf


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
