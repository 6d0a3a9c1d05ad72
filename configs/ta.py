"""Tamil, as the paper adapts LLaMA-2-7B to it.

python -m prom_jax.train --config=configs/ta.py            # PROM; the model does not pivot: λ = 0
python -m prom_jax.train --config=configs/ta.py:bactrian   # also :xllama2 :unregulated :published
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The paper's configuration for Tamil, or a variant of it."""
    config = configuration.default()
    config.language = "ta"
    # Alpaca and Dolly, with responses in either language. Your own translation of Alpaca is as good: name it.
    config.data.english = ("MBZUAI/Bactrian-X:en",)
    config.data.target = ("MBZUAI/Bactrian-X:ta",)
    config.data.translation = ("Helsinki-NLP/opus-100:en-ta@train[:20000]",)
    return configuration.apply_variant(config, variant)
