"""Marathi, as the paper adapts LLaMA-2-7B to it.

python -m prom_jax.train --config=configs/mr.py            # PROM; a probe decides λ (the paper's: 0.1)
python -m prom_jax.train --config=configs/mr.py:bactrian   # also :xllama2 :unregulated :published
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The paper's configuration for Marathi, or a variant of it."""
    config = configuration.default()
    config.language = "mr"
    config.data.english = ("tatsu-lab/alpaca",)
    # Its translation: instruction, input and output, in the same order (or with the same ids).
    config.data.target = ("data/alpaca.mr.jsonl",)
    # Aligned sentences: NTREX-128 and the dev part of FLORES-200, fetched once.
    config.data.translation = ("ntrex", "flores200")
    return configuration.apply_variant(config, variant)
