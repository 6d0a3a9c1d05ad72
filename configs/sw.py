"""Swahili, as the paper adapts LLaMA-2-7B to it.

python -m prom_jax.train --config=configs/sw.py            # PROM; the model pivots through English: λ = 0.1
python -m prom_jax.train --config=configs/sw.py:bactrian   # also :xllama2 :unregulated :published
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The paper's configuration for Swahili, or a variant of it."""
    config = configuration.default()
    config.language = "sw"
    # Alpaca and Dolly, with responses in either language. Your own translation of Alpaca is as good: name it.
    config.data.english = ("MBZUAI/Bactrian-X:en",)
    config.data.target = ("MBZUAI/Bactrian-X:sw",)
    # Aligned sentences of your own, such as a .tsv with the columns en and sw; OPUS-100 has no Swahili.
    config.data.translation = ()
    return configuration.apply_variant(config, variant)
