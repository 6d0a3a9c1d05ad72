"""prom_jax adapts English-centric LLMs to another language with PROM.

model, tokenizer = prom_jax.load("path, hub id, file.gguf or checkpoint")
logits_BTV = model(tokens_BT)
hiddens_NBTD = model.hidden_states(tokens_BT)
prom_jax.save_hf(model, tokenizer, "directory")
"""

import importlib
import sys

if sys.platform == "win32":  # with this name, `python -m` tells the sentence without a traceback
    raise ImportError("prom_jax runs on Linux and macOS: on Windows, install it within WSL", name=__name__)

if sys.argv[:1] == ["-m"]:  # a command begins, whose imports take seconds: Ctrl-C then is one line too
    sys.excepthook = lambda kind, error, trace: (
        print("interrupted", file=sys.stderr)
        if issubclass(kind, KeyboardInterrupt)
        else sys.__excepthook__(kind, error, trace)
    )

# What others import: its module, and its name there. (`probe` and `prepare` are commands of this package.)
_EXPORTS = {
    "load": ("checkpoints.pretrained", "load"),
    "save_hf": ("checkpoints.pretrained", "save_hf"),
    "Decoder": ("models.decoder", "Decoder"),
    "DecoderConfig": ("models.config", "DecoderConfig"),
    "LayerKind": ("models.config", "LayerKind"),
    "make_mesh": ("parallel.sharding", "make_mesh"),
    "greedy": ("evaluation.decode", "greedy"),
    "cloze_probe": ("analysis.probe", "probe"),
    "read_table": ("analysis.tables", "read_table"),
    "Recipe": ("data.examples", "Recipe"),
    "Batches": ("data.loader", "Batches"),
    "prepare_records": ("data.records", "prepare"),
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    # Imported when first asked for, so that `import prom_jax` alone does not start JAX and transformers.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prom_jax' has no attribute {name!r}")
    module, original = _EXPORTS[name]
    return getattr(importlib.import_module(f"prom_jax.{module}"), original)


def __dir__():
    return sorted({*globals(), *__all__})
