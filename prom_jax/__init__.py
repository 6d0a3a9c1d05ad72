"""prom_jax adapts English-centric LLMs to another language with PROM.

model, tokenizer = prom_jax.load("path, hub id, file.gguf or checkpoint")
logits_BTV = model(tokens_BT)
hiddens_NBTD = model.hidden_states(tokens_BT)
prom_jax.save_hf(model, tokenizer, "directory")
"""

__all__ = ["load", "save_hf"]


def __getattr__(name):
    # Imported when first asked for, so that `import prom_jax` alone does not start JAX and transformers.
    if name in __all__:
        from prom_jax.checkpoints import pretrained as models

        return getattr(models, name)
    raise AttributeError(f"module 'prom_jax' has no attribute {name!r}")
