"""GGUF files against plain formulas and against the folders they were made of, and what is refused.

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

from prom_jax.checkpoints.gguf import open_gguf
from prom_jax.checkpoints.params import load_params
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests.checkpoints.test_safetensors import SIZES, hf_model, save, tensors


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


def q4_k(blocks):
    out = np.empty((len(blocks), 256), np.float32)
    for row, b in zip(out, blocks, strict=True):
        d, d_min, s, q = halves(b[:2]), halves(b[2:4]), b[4:16].astype(int), b[16:]
        for j in range(8):
            if j < 4:
                scale, minimum = s[j] & 63, s[j + 4] & 63
            else:
                scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4)
                minimum = (s[j + 4] >> 4) | (s[j] >> 6 << 4)
            chunk = q[32 * (j // 2) : 32 * (j // 2) + 32]
            values = chunk >> 4 if j % 2 else chunk & 15
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
    "Q4_K": (256, 144, (0, 2), q4_k),
    "Q6_K": (256, 210, (208,), q6_k),
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


def gguf_settings(sizes, **settings):
    return {
        "vocab_size": sizes["vocab_size"],
        "embedding_length": sizes["hidden_size"],
        "feed_forward_length": sizes["intermediate_size"],
        "block_count": sizes["num_hidden_layers"],
        "attention.head_count": sizes["num_attention_heads"],
        "attention.head_count_kv": sizes["num_key_value_heads"],
        "context_length": sizes["max_position_embeddings"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 5e5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **settings,
    }


def gguf_names(layers):
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(layers):
        hf, ours = f"model.layers.{i}.", f"blk.{i}."
        names[hf + "input_layernorm"] = ours + "attn_norm"
        names[hf + "post_attention_layernorm"] = ours + "ffn_norm"
        for letter in "qkv":
            names[f"{hf}self_attn.{letter}_proj"] = f"{ours}attn_{letter}"
        names[hf + "self_attn.o_proj"] = ours + "attn_output"
        for name in ("gate", "up", "down"):
            names[f"{hf}mlp.{name}_proj"] = f"{ours}ffn_{name}"
    return {f"{hf}.weight": f"{theirs}.weight" for hf, theirs in names.items()}


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
    names = gguf_names(model.config.num_hidden_layers)
    arrays = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = value.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            value = interleave(value, model.config.head_dim)
        if kind and value.ndim > 1:
            value = (kind, gguf.quantize(value, gguf.GGMLQuantizationType[kind]))
        arrays[names[name]] = value
    return write_gguf(path, gguf_settings(model.config.to_dict(), **settings), arrays)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_gguf_type_against_its_formula(tmp_path, kind):
    random = np.random.default_rng(0)
    values, num_bytes, scales, formula = BLOCKS[kind]
    model = hf_model(**{**GGUF_SIZES, "initializer_range": 0.02}, tie_word_embeddings=True)
    arrays, expected = {}, {}
    for name, theirs in gguf_names(2).items():
        if name == "lm_head.weight":
            continue
        shape = tuple(model.state_dict()[name].shape)
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
    path = write_gguf(tmp_path / "m.gguf", gguf_settings(GGUF_SIZES), arrays)

    reader = open_reader(path)
    assert reader.config.tie_word_embeddings
    assert reader.config.head_dim == 64
    assert reader.config.rms_norm_eps == 1e-6
    assert reader.config.rope_theta == 5e5
    assert reader.dtype == {"F16": np.float16, "BF16": jnp.bfloat16}.get(kind, np.float32)
    params = load_params(reader, dtype=np.float32)
    for layer in (0, 1):
        for ours in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix = expected[f"model.layers.{layer}.self_attn.{ours}.weight"]
            np.testing.assert_allclose(params["lower"][ours][layer], matrix, rtol=1e-5, atol=1e-6)
        for ours in ("gate_proj", "up_proj", "down_proj"):
            matrix = expected[f"model.layers.{layer}.mlp.{ours}.weight"]
            np.testing.assert_allclose(params["lower"][ours][layer], matrix, rtol=1e-5, atol=1e-6)
        norm = expected[f"model.layers.{layer}.input_layernorm.weight"]
        np.testing.assert_array_equal(params["lower"]["input_layernorm"][layer], norm)
    embedding = expected["model.embed_tokens.weight"]
    np.testing.assert_allclose(params["embed_tokens"], embedding, rtol=1e-5, atol=1e-6)
    # Columns of a shard begin and end inside a block: 256 columns in 8 are 32.
    parts = load_params(reader, sharding.make_mesh(fsdp=4, tensor=2), dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, parts, params)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_gguf_equals_the_folder_it_was_made_of(tmp_path, kind, dtype):
    model = hf_model(dtype, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=5e5)
    model.save_pretrained(tmp_path / "folder")
    folder, file = open_reader(tmp_path / "folder"), open_reader(to_gguf(model, tmp_path / "m.gguf", kind))
    assert file.config == folder.config
    assert file.dtype == folder.dtype
    jax.tree.map(np.testing.assert_array_equal, load_params(file), load_params(folder))
    save(load_params(file), file, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "folder")


def test_gguf_rope_scaling_is_recovered(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model = hf_model(head_dim=64, rms_norm_eps=1e-6, rope_parameters=scaling)
    model.save_pretrained(tmp_path / "folder")
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(32, rel=1e-5)
    divisors[divisors > 31.9] = 32  # the writer has the exact factor
    plain_file = to_gguf(model, tmp_path / "plain.gguf", **{"attention.key_length": 64})
    arrays = {tensor.name: tensor.data for tensor in gguf.GGUFReader(plain_file).tensors}

    def write(divisors):
        settings = gguf_settings(SIZES, **{"attention.key_length": 64, "rope.dimension_count": 64})
        return write_gguf(tmp_path / "m.gguf", settings, {**arrays, "rope_freqs.weight": divisors})

    assert open_reader(plain_file).config.rope_scaling is None
    assert open_reader(write(divisors)).config == open_reader(tmp_path / "folder").config
    with pytest.raises(UserError, match="unknown rope scaling"):
        open_reader(write(np.linspace(1, 32, 32, dtype=np.float32)))


def test_gguf_of_mistral(tmp_path):
    model = hf_model(mistral=True, sliding_window=8, head_dim=8, rms_norm_eps=1e-6, rope_theta=5e5)
    path = to_gguf(model, tmp_path / "m.gguf", **{"attention.sliding_window": 8})
    config = open_reader(path).config
    assert (config.model_type, config.sliding_window) == ("mistral", 8)


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
    q5 = ("Q5_0", np.zeros((64, 22), np.uint8))
    write_gguf(path, gguf_settings(SIZES), {"token_embd.weight": q5})
    with pytest.raises(UserError, match=r"token_embd\.weight is of type Q5_0"):
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
            tmp_path / "m.gguf", gguf_settings(SIZES), {"token_embd.weight": np.ones(shape, np.float32)}
        )
        with pytest.raises(UserError, match=r"has 3 dimensions|vocab_size=0"):
            open_reader(path)
    arrays = {"token_embd.weight": np.ones((64, 32), np.float32), "rope_freqs.weight": np.ones(0, np.float32)}
    with pytest.raises(UserError, match=r"rope_freqs of the shape \[0\]"):
        open_reader(write_gguf(tmp_path / "m.gguf", gguf_settings(SIZES), arrays))
