"""python -m benchmarks.synthetic DIRECTORY [--layers=32]

Writes a Hugging Face folder of LLaMA-2-7B's shapes with random bfloat16 weights: 13.5 GB in many files.
"""

import argparse
import zlib

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prom_jax import llama, weights
from prom_jax.architecture import LlamaConfig

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")),
    bos_token="<s>",
    eos_token="</s>",
)


def llama2_7b(layers: int = 32) -> LlamaConfig:
    """LLaMA-2-7B's architecture, or a shorter one."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


class Synthetic:
    """Random weights behind the interface of `prom_jax.readers`: normal, σ = 0.02, as those of real models
    about are, so that they compress as badly."""

    source, pivot_layer = "synthetic weights", 0

    def __init__(self, config: LlamaConfig):
        self.config, self.details, self.dtype = config, {}, np.dtype(ml_dtypes.bfloat16)
        self._shapes = weights.hf_shapes(llama.to_params(llama.abstract(config)))
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
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args(argv)
    write(arguments.directory, arguments.layers)


def write(directory, layers: int = 32):
    """Writes the folder, in files of at most 1 GB."""
    reader = Synthetic(llama2_7b(layers))
    options = {"dtype": reader.dtype, "chat_template": "{{ messages }}", "card": {}}
    weights.save_hf(reader, TOKENIZER, directory, max_shard_bytes=10**9, **options)


if __name__ == "__main__":
    main()
