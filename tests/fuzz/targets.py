"""What reads files of strangers, each with a few small valid inputs to begin from."""

import contextlib
import csv
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save
from sentencepiece import sentencepiece_model_pb2

from prom_jax.analysis import tables, tasks
from prom_jax.checkpoints import generation, peft, safetensors
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.adapter import Merged
from prom_jax.data import sources, tokens
from prom_jax.data.templates import Plain, plain
from prom_jax.evaluation.answers import Answers
from prom_jax.evaluation.tasks import documents
from prom_jax.tokenization.folder import fingerprint
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import FORMAT
from tests.fuzz import mutation


@dataclass(frozen=True)
class Target:
    """
    place: the file that an input becomes, below a folder of its own;
    read: reads the folder, as a command would;
    seeds: valid inputs;
    mutate: how they are changed;
    encode: from an input to the file (None: `place` is {file name: content} in JSON);
    beside: other files of the folder.
    """

    place: str
    read: Callable[[Path], None]
    seeds: tuple[bytes, ...]
    mutate: Callable = mutation.raw
    encode: Callable[[bytes], bytes] = bytes
    beside: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path, data: bytes):
        """Writes the folder's files; ValueError for an input that stands for none."""
        files = self.beside | ({self.place: self.encode(data)} if self.place else _files(data))
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # what is mapped of the last one stays
            path.write_bytes(content)


def _files(data: bytes) -> dict[str, bytes]:
    files = {name: content for name, content in json.loads(data).items() if name in FILES}
    return {
        name: content.encode(errors="surrogatepass")
        if isinstance(content, str)
        else mutation.written(content)
        for name, content in files.items()
    }


# Models ------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 24, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": [2], "hidden_act": "silu", "torch_dtype": "float32", "use_cache": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}  # fmt: skip
LLAMA3 = {
    **CONFIG, "prom_jax": {"method": "prom"}, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }, "rope_theta": 5e5,
}  # fmt: skip
del LLAMA3["rope_parameters"]
MISTRAL = {
    **CONFIG, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8,
    "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "trust_remote_code": True,
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0], "long_factor": [1.0, 8.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.0}
# Of the other families what Llama has not; their tensors are not there, so that they end at the first.
OTHERS = {
    ("qwen3", "Qwen3ForCausalLM"): {"use_sliding_window": True, "max_window_layers": 1, **WINDOWS},
    ("gemma2", "Gemma2ForCausalLM"): {
        "query_pre_attn_scalar": 4, "attn_logit_softcapping": 50.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    ("gemma3_text", "Gemma3ForCausalLM"): {
        "query_pre_attn_scalar": 4, "sliding_window_pattern": 2, "sliding_window": 8,
        "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": None,
    },
    ("gemma3", "Gemma3ForConditionalGeneration"): {
        "text_config": {**CONFIG, "model_type": "gemma3_text", "rope_parameters": None, **WINDOWS},
        "vision_config": {"image_size": 8}, "rope_parameters": None,
    },
    ("olmo3", "Olmo3ForCausalLM"): {
        **WINDOWS, "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}},
    },
    ("smollm3", "SmolLM3ForCausalLM"): {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    ("granite", "GraniteForCausalLM"): {
        "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1,
        "logits_scaling": 6.0, "rope_parameters": YARN,
    },
    ("phi3", "Phi3ForCausalLM"): {
        "rope_parameters": LONG, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 32,
    },
    ("glm4", "Glm4ForCausalLM"): {"partial_rotary_factor": 0.5, "attention_bias": True},
}  # fmt: skip
CONFIGS = [CONFIG, LLAMA3, MISTRAL] + [
    {**CONFIG, "model_type": model_type, "architectures": [architecture], **settings}
    for (model_type, architecture), settings in OTHERS.items()
]
SHAPES = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8), "mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16),
    "input_layernorm": (8,), "post_attention_layernorm": (8,),
}  # fmt: skip
TENSORS = {
    **{f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in SHAPES.items()},
    "model.embed_tokens.weight": (24, 8), "lm_head.weight": (24, 8), "model.norm.weight": (8,),
}  # fmt: skip
WEIGHTS = save({name: np.ones(shape, np.float32) for name, shape in TENSORS.items()})
PIVOT = save({weights.head_tensor("pivot_head"): np.ones((24, 8), np.float32)}, {"pivot_layer": "1"})
HALF = save({name: np.ones(TENSORS[name], np.float16) for name in sorted(TENSORS)[:9]})
OTHER_HALF = save({name: np.ones(TENSORS[name], np.float16) for name in sorted(TENSORS)[9:]})
SHARDS = {"a.safetensors": HALF, "b.safetensors": OTHER_HALF, "pytorch_model.bin": b"\x80\x04."}
INDEX = {
    "metadata": {"total_size": 1},
    "weight_map": {name: "ab"[i >= 9] + ".safetensors" for i, name in enumerate(sorted(TENSORS))},
}


GENERATION = {
    "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1,
    "_from_model_config": True, "transformers_version": "5.0.0",
}  # fmt: skip
LORA = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj", "down_proj"], "bias": "none", "use_rslora": True, "lora_dropout": 0.0,
}  # fmt: skip
ADAPTER = save({
    f"base_model.model.model.layers.{i}.{name}.lora_{side}.weight": np.ones(shape, np.float32)
    for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    for side, shape in (("A", (2, SHAPES[name][1])), ("B", (SHAPES[name][0], 2)))
})  # fmt: skip


BASE = {"base/config.json": json.dumps(CONFIG).encode(), "base/model.safetensors": WEIGHTS}


def read_generation(folder: Path):
    """What a folder says of generation, and what an export says after it."""
    config, _ = safetensors.read_config(folder)
    tokenizer = SimpleNamespace(eos_token_id=2)
    generation.sampling(config)
    json.dumps(generation.keys(config, tokenizer))
    json.dumps(generation.keys(generation.with_stops(config, (5,)), tokenizer))


def read_adapter(folder: Path):
    """An adapter, merged into its model."""
    read_weights(Merged(safetensors.SafetensorsReader(folder / "base"), peft.PEFTReader(folder)))


def read_weights(reader):
    """All weights, each through half a slice and whole."""
    for param in jax.tree.leaves(weights.lazy_params(reader, heads=reader.heads)):
        param.read(tuple(slice(0, size) for size in param.shape))
        param.read(tuple(slice(0, (size + 1) // 2) for size in param.shape))
    weights.fingerprint(reader)


def read_model(folder: Path):
    """A model with all of its weights."""
    read_weights(models.open_reader(next(folder.glob("*.gguf"), folder)))


# GGUF --------------------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", *"▁abcdehijnrstu", "▁a", "ha", "ba", "aba", "▁haba", "ri"]
SETTINGS = {
    "block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "context_length": 64,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 16, "rope.freq_base": 1e4,
}  # fmt: skip
SENTENCEPIECE = {
    "model": "llama", "pre": "default", "tokens": PIECES, "scores": [-float(i) for i in range(len(PIECES))],
    "token_type": [2, 3, 3, 6] + [1] * (len(PIECES) - 4), "bos_token_id": 1, "eos_token_id": 2,
    "unknown_token_id": 0, "add_bos_token": True, "add_space_prefix": True, "padding_token_id": 0,
}  # fmt: skip
BYTE_LEVEL = {
    "model": "gpt2", "pre": "llama-bpe", "tokens": ["<s>", "</s>", *"abcdehijnrstuĠ", "ha", "ba", "aba"],
    "token_type": [3, 4] + [1] * 17, "merges": ["h a", "b a", "a ba"], "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GGUF_SHAPES = {
    "attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32), "ffn_gate": (32, 32),
    "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,),
}  # fmt: skip
WIDTHS = {4: "<I", 6: "<f", 7: "<?", 10: "<Q", 11: "<q"}


def gguf_document(vocabulary: dict, kind: int, part: int | None = None) -> bytes:
    """What `encode_gguf` makes a file of.

    Args:
      vocabulary: settings of the tokenizer.
      kind: of its matrices (0 float32, 1 float16, 8 Q8_0).
      part: 0 or 1 for one file of two; None for the whole model.
    """
    fields = {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in SETTINGS.items()}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()}
    fields["tokenizer.chat_template"] = "{{ messages }}"
    vocab = len(vocabulary["tokens"])
    shapes = {"token_embd": (32, vocab), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in GGUF_SHAPES.items()}
    if part is not None:
        fields |= {"split.no": part, "split.count": 2, "split.tensors.count": len(shapes)}
        shapes = {name: shape for i, (name, shape) in enumerate(shapes.items()) if i % 2 == part}
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        of = kind if len(shape) > 1 else 0
        tensors[f"{name}.weight"] = {"type": of, "shape": shape, "offset": offset}
        offset += math.ceil(math.prod(shape) * {0: 4, 1: 2, 8: 34 / 32}[of] / 32) * 32
    return json.dumps({"fields": fields, "tensors": tensors, "bytes": offset}).encode()


def encode_gguf(data: bytes) -> bytes:
    """A GGUF file as the JSON says, be it nonsense."""
    document = json.loads(data)
    fields, tensors = document["fields"], document["tensors"]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        kind, content = _gguf_value(value)
        parts += [_gguf_string(key), struct.pack("<I", kind), content]
    for name, tensor in tensors.items():
        shape = [_integer(size) % 2**64 for size in tensor["shape"]]
        parts += [_gguf_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts += [struct.pack("<IQ", _integer(tensor["type"]) % 2**32, _integer(tensor["offset"]) % 2**64)]
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + b"\x01\x3c" * min(_integer(document["bytes"]) // 2, 2**20)


def _gguf_string(value) -> bytes:
    content = str(value).encode(errors="surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _gguf_value(value, kind: int | None = None) -> tuple[int, bytes]:
    if isinstance(value, list) and kind in (None, 9):
        first = _gguf_value(value[0])[0] if value else 4
        return 9, struct.pack("<IQ", first, len(value)) + b"".join(_gguf_value(v, first)[1] for v in value)
    kinds = {bool: 7, float: 6, str: 8}
    number = _integer(value)
    kind = kind or kinds.get(type(value)) or (4 if 0 <= number < 2**32 else 10 if number > 0 else 11)
    if kind in (8, 9):
        return 8, _gguf_string(value)
    with contextlib.suppress(struct.error, OverflowError, ValueError, TypeError):
        return kind, struct.pack(WIDTHS[kind], value)
    return kind, bytes(struct.calcsize(WIDTHS[kind]))


def _integer(value) -> int:
    return value if isinstance(value, int) else 1


def read_gguf(folder: Path):
    """The tokenizer and the model of a file, each on its own."""
    for read in (read_tokenizer, read_model):
        with contextlib.suppress(UserError):
            read(folder)


# Tokenizers --------------------------------------------------------------------------------------

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "chat_template.jinja", "additional_chat_templates/x.jinja", "tokenizer.model", "vocab.json", "merges.txt",
    "generation_config.json", "processor_config.json", "model.safetensors.index.json", "tokenization_x.py",
)  # fmt: skip


def tokenizer_files(**changes) -> bytes:
    """A folder's files: a byte-level BPE."""
    special = [
        {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, content in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(BYTE_LEVEL["tokens"])},
                  "merges": [["h", "a"], ["b", "a"], ["a", "ba"]]},
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": None, "model_max_length": 64, "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
        "added_tokens_decoder": {"0": special[0] | {"id": 0}, "1": special[1]},
    }  # fmt: skip
    files = {"tokenizer.json": content, "tokenizer_config.json": config, **changes}
    return json.dumps(files).encode()


# Most kinds of part that a tokenizer.json can have besides.
UNIGRAM = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": 4, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<unk>"},
    "added_tokens": [{"id": 1, "content": "</s>", "single_word": False, "lstrip": True, "rstrip": False,
                      "normalized": True, "special": True}],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Prepend", "prepend": "▁"}, {"type": "Strip", "strip_left": True, "strip_right": True}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        {"type": "Split", "pattern": {"Regex": "a+|\\s"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"}]},
    "post_processor": {"type": "Sequence", "processors": [
        {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["</s>", 1], "trim_offsets": True,
         "add_prefix_space": True}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}]},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": [
        ["<unk>", 0.0], ["</s>", 0.0], *([piece, -float(i)] for i, piece in enumerate(PIECES[3:]))]},
}  # fmt: skip


def sentencepiece_model(kind: int = 2, slope: float = -1.0) -> bytes:
    """A small SentencePiece model: 2 for BPE, 1 for unigram; without a slope all its scores are one."""
    proto = sentencepiece_model_pb2.ModelProto()
    for i, piece in enumerate(PIECES):
        proto.pieces.add(piece=piece, score=slope * i, type=SENTENCEPIECE["token_type"][i])
    proto.trainer_spec.model_type = kind
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    return proto.SerializeToString()


REMOTE = {
    "tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
    "trust_remote_code": True, "eos_token": "</s>", "extra_special_tokens": ["<x>"],
    "chat_template": "{{ 1 }}",
}  # fmt: skip


ELSEWHERE = {
    "tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "tokenizer_file": "/etc/hosts",
    "vocab_file": "/etc/hosts", "fast_tokenizer_files": ["../../../etc/tokenizer.4.0.json"],
    "init_inputs": [], "legacy": True, "add_bos_token": False,
}  # fmt: skip


def read_tokenizer(folder: Path):
    """A tokenizer, and what training and evaluation ask of it."""
    loaded = models.load_tokenizer(next(folder.glob("*.gguf"), folder))
    fingerprint(loaded)
    tokens.encode(loaded, [plain(Plain("habari ya asubuhi")), plain(Plain(""))], 16)
    loaded.decode(loaded("aba\n")["input_ids"], skip_special_tokens=True)


# Data --------------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "instruction": "Say hi", "input": "now", "output": "Hi"},
    {"id": "b", "instruction": "Add", "input": "", "output": "3"},
]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
PARALLEL = [{"translation": {"en": "One", "sw": "Moja"}}, {"en": "Two", "sw": "Mbili"}]
TMX = b"""<?xml version="1.0" encoding="utf-8"?><!DOCTYPE tmx [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>
<tmx version="1.4"><header/><body><tu tuid="7"><tuv xml:lang="en-US"><seg>Wash <bpt i="1">x</bpt><hi>two
<hi>hands</hi></hi>&b;</seg></tuv><tuv lang="sw"><seg>Osha &amp; uso</seg></tuv></tu></body></tmx>"""
EXTERNAL = TMX.replace(b'"aa"', b'SYSTEM "file:///etc/passwd"')
EXTERNAL = EXTERNAL.replace(b"tmx [", b'tmx SYSTEM "http://127.0.0.1/x" [')


def parquet(rows, **options) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def jsonl(rows) -> bytes:
    """A line a row."""
    return "\n".join(map(json.dumps, rows)).encode()


def table(rows, delimiter: str) -> bytes:
    """CSV or TSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_data(folder: Path):
    """The file as instructions and as aligned sentences, one that is aligned by line too."""
    (path,) = folder.iterdir()
    for read in (sources.read_instructions, sources.read_parallel):
        with contextlib.suppress(UserError):
            if path.suffix != ".tmx" or read is sources.read_parallel:
                read((str(path),), "sw")


def data(name: str, *seeds: bytes, mutate=mutation.raw) -> Target:
    """A data file."""
    return Target(name, read_data, seeds, mutate)


SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "A river.", "qas": [
    {"id": "0", "question": "Which?", "answers": [{"text": "the Nile", "answer_start": 0}]}]}]}]}  # fmt: skip
CLOZE = b'english,word,sentence\nbook,kitabu,"Wasoma ""___"" jioni."\ncow,ng\'ombe,"Maziwa ya ""___""."\n'
WENDLER = (
    b"word_original,word_translation,blank_prompt_translation_masked\n"
    b'cloud,nuage,"Un ""___"" est gris. R: ""nuage""."\n'
)
ANSWERS = {"model": "0123", "bos": False}


def read_cloze(folder: Path):
    """A table and its prompts."""
    table = tables.read_table("sw", folder)
    for task in ("cloze", "repetition"):
        tasks.prompts(tasks.ask(task, table), 1, seed=0)


def read_answers(folder: Path):
    """The answers of an evaluation that is to go on."""
    Answers(folder / "answers.jsonl", ANSWERS).get("x")


DESCRIPTION = {"format": FORMAT, "config": CONFIG, "heads": {"pivot_head": 1}, "dtype": "float32"}
DESCRIPTION["details"] = {"method": "prom"}

TARGETS = {
    "config": Target(
        "config.json", read_model, tuple(json.dumps(config).encode() for config in CONFIGS),
        mutation.tree, beside={"model.safetensors": WEIGHTS},
    ),
    "generation": Target(
        "generation_config.json", read_generation, (json.dumps(GENERATION).encode(),), mutation.tree,
        beside={"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS},
    ),
    "safetensors": Target(
        "model.safetensors", read_model, (WEIGHTS,), mutation.header,
        beside={"config.json": json.dumps(CONFIG).encode()},
    ),
    "pivot_head": Target(
        "pivot_head.safetensors", read_model, (PIVOT,), mutation.header,
        beside={"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS},
    ),
    "index": Target(
        "model.safetensors.index.json", read_model, (json.dumps(INDEX).encode(),), mutation.tree,
        beside={"config.json": json.dumps(CONFIG).encode(), **SHARDS},
    ),
    "adapter": Target(
        "adapter_config.json", read_adapter, (json.dumps(LORA).encode(),), mutation.tree,
        beside={"adapter_model.safetensors": ADAPTER, **BASE},
    ),
    "adapter_model": Target(
        "adapter_model.safetensors", read_adapter, (ADAPTER,), mutation.header,
        beside={"adapter_config.json": json.dumps(LORA).encode(), **BASE},
    ),
    "gguf": Target(
        "m.gguf", read_gguf,
        tuple(encode_gguf(gguf_document(v, k)) for v, k in ((SENTENCEPIECE, 8), (BYTE_LEVEL, 0))),
    ),
    "gguf_fields": Target(
        "m.gguf", read_gguf, (gguf_document(SENTENCEPIECE, 8), gguf_document(BYTE_LEVEL, 1)), mutation.tree,
        encode_gguf,
    ),
    "gguf_first": Target(
        "m-00001-of-00002.gguf", read_gguf, (gguf_document(SENTENCEPIECE, 8, 0),), mutation.tree, encode_gguf,
        beside={"m-00002-of-00002.gguf": encode_gguf(gguf_document(SENTENCEPIECE, 8, 1))},
    ),
    "gguf_second": Target(
        "m-00002-of-00002.gguf", read_gguf, (gguf_document(SENTENCEPIECE, 8, 1),), mutation.tree, encode_gguf,
        beside={"m-00001-of-00002.gguf": encode_gguf(gguf_document(SENTENCEPIECE, 8, 0))},
    ),
    "tokenizer": Target(
        "", read_tokenizer,
        (
            tokenizer_files(),
            tokenizer_files(**{
                "tokenizer_config.json": REMOTE, "tokenization_x.py": "raise SystemExit('code was run')",
                "special_tokens_map.json": {"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
                "added_tokens.json": {"<x>": 30}, "chat_template.jinja": "{{ messages }}",
                "additional_chat_templates/x.jinja": "{{ messages }}", "config.json": CONFIG,
            }),
            tokenizer_files(**{"config.json": MISTRAL, "tokenizer_config.json": {"eos_token": "</s>"}}),
            tokenizer_files(**{"config.json": CONFIG, "tokenizer_config.json": ELSEWHERE}),
            tokenizer_files(**{"tokenizer.json": UNIGRAM}),
        ),
        mutation.tree,
    ),
    "sentencepiece": Target(
        "tokenizer.model", read_tokenizer,
        (sentencepiece_model(), sentencepiece_model(slope=0.0), sentencepiece_model(kind=1)),
    ),
    "json": data(
        "a.json", json.dumps(ROWS).encode(), json.dumps(CHAT + PARALLEL).encode(), mutate=mutation.tree
    ),
    "jsonl": data("a.jsonl", jsonl(ROWS), jsonl(CHAT), jsonl(PARALLEL), mutate=mutation.lines),
    "csv": data("a.csv", table(ROWS, ","), table(PARALLEL[1:], ",")),
    "tsv": data("a.tsv", table(ROWS, "\t"), table(PARALLEL[1:], "\t")),
    "parquet": data(
        "a.parquet", parquet(ROWS), parquet(CHAT, compression="zstd"),
        parquet(PARALLEL[1:], compression="none", use_dictionary=False),
    ),
    "tmx": data("a.tmx", TMX, EXTERNAL),
    "cloze": Target("sw/clean.csv", read_cloze, (CLOZE, WENDLER)),
    "squad": Target(
        "xquad.th.json", lambda folder: documents.xquad("th", str(folder)),
        (json.dumps(SQUAD).encode(),), mutation.tree,
    ),
    "mgsm": Target("mgsm_th.tsv", lambda folder: documents.mgsm("th", str(folder)), (b"How many?\t2,125\n",)),
    "answers": Target(
        "answers.jsonl", read_answers, (jsonl([{"settings": ANSWERS}, {"question": "x", "answer": 1}]),),
        mutation.lines,
    ),
    "checkpoint": Target(
        "model.json", models.open_source, (json.dumps(DESCRIPTION).encode(),), mutation.tree,
        beside={"0/params/x": b""} | {f"tokenizer/{k}": v for k, v in _files(tokenizer_files()).items()},
    ),
}  # fmt: skip
