"""transformers' class of tokenizers, imported without its advice."""

from prom_jax.utils.temporary import environment

# transformers is here for tokenizers and configurations; that it finds no torch is as it should be.
with environment(TRANSFORMERS_NO_ADVISORY_WARNINGS="1"):
    from transformers import PreTrainedTokenizerFast

__all__ = ["PreTrainedTokenizerFast"]
