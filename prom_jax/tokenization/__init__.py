"""Tokenizers of Hugging Face folders, SentencePiece models and GGUF files."""

from prom_jax.tokenization.base import PreTrainedTokenizerFast
from prom_jax.tokenization.folder import load

__all__ = ["PreTrainedTokenizerFast", "load"]
