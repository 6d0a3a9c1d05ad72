"""python -m benchmarks.synthetic DIRECTORY [--shape=7b|1b] [--layers=N] [--tokenizer=MODEL]

Writes a Hugging Face folder with random bfloat16 weights of the shapes of LLaMA-2-7B (13.5 GB in many files)
or Llama-3.2-1B, with as many blocks as those or `layers`. With the tokenizer of a model it can be trained on
text, and its vocabulary is that tokenizer's; without one it has three tokens.
"""

import argparse
import dataclasses
import zlib
from types import MappingProxyType

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.params import hf_shapes
from prom_jax.checkpoints.safetensors import save_hf
from prom_jax.models.config import DecoderConfig, LayerKind, Rope
from prom_jax.utils import cli

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")),
    bos_token="<s>",
    eos_token="</s>",
)


def llama2_7b(layers: int = 32) -> DecoderConfig:
    """LLaMA-2-7B's architecture, or a shorter one."""
    return _llama(layers, vocab_size=32000, hidden_size=4096, intermediate_size=11008, head_dim=128)


def llama32_1b(layers: int = 16) -> DecoderConfig:
    """Llama-3.2-1B's architecture but for its rotary scaling, or a shorter one."""
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
    return _llama(layers, **sizes, num_key_value_heads=8, rope_theta=5e5, tie_word_embeddings=True)


def _llama(layers: int, num_key_value_heads: int = 32, rope_theta: float = 10000.0, **rest) -> DecoderConfig:
    return DecoderConfig(
        num_hidden_layers=layers,
        layers=(LayerKind(rope=Rope(rope_theta)),) * layers,
        num_attention_heads=32,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=4096,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        **rest,
    )


SHAPES = {"7b": llama2_7b, "1b": llama32_1b}


class Synthetic:
    """Random weights behind the interface of `prom_jax.checkpoints.reader`: normal, σ = 0.02, as those of
    real models about are, so that they compress as badly."""

    source, heads = "synthetic weights", MappingProxyType({})

    def __init__(self, config: DecoderConfig):
        self.config, self.details, self.dtype = config, {}, np.dtype(ml_dtypes.bfloat16)
        self._shapes = hf_shapes(config)
        self.names = set(self._shapes)
        self._values = (0.02 * np.random.default_rng(0).standard_normal(2**24, np.float32)).astype(self.dtype)

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor."""
        return self._shapes[name]

    def where(self, name) -> str:
        """What holds a tensor."""
        return self.source

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor: the same random numbers over and over, from a place that the name gives."""
        values = np.roll(self._values, zlib.crc32(name.encode()) % len(self._values))
        return np.resize(values, self._shapes[name])[index]


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokenizer", metavar="MODEL")
    arguments = parser.parse_args(argv)
    shape = SHAPES[arguments.shape]
    write(arguments.directory, shape(arguments.layers) if arguments.layers else shape(), arguments.tokenizer)


def write(directory, config: DecoderConfig, tokenizer: str | None = None):
    """Writes the folder, in files of at most 1 GB; `tokenizer` is a model whose tokenizer it gets."""
    if tokenizer is None:
        tokenizer = TOKENIZER
    else:
        tokenizer = models.load_tokenizer(tokenizer)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
        config = dataclasses.replace(config, vocab_size=len(tokenizer), **ids)
    reader = Synthetic(config)
    options = {"dtype": reader.dtype, "chat_template": "{{ messages }}", "card": {}}
    save_hf(reader, tokenizer, directory, max_shard_bytes=10**9, **options)


if __name__ == "__main__":
    cli.guard(main)
