"""Greek, as the paper adapts LLaMA-2-7B to it.

python -m prom_jax.train --config=configs/el.py            # PROM; the model pivots through English: λ = 0.1
python -m prom_jax.train --config=configs/el.py:bactrian   # also :xllama2 :unregulated :published
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The paper's configuration for Greek, or a variant of it."""
    config = configuration.default()
    config.language = "el"
    # No public set of instructions in Greek pairs with English ones: translate Alpaca into this file
    # (instruction, input, output; as many rows, in the same order).
    config.data.english = ("tatsu-lab/alpaca",)
    config.data.target = ("data/alpaca.el.jsonl",)
    config.data.translation = ("Helsinki-NLP/opus-100:el-en@train[:20000]",)
    return configuration.apply_variant(config, variant)
