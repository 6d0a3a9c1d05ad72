"""Thai, as the paper adapts LLaMA-2-7B to it.

python -m prom_jax.train --config=configs/th.py            # PROM; a probe decides λ (the paper's: 0.1)
python -m prom_jax.train --config=configs/th.py:bactrian   # :xllama2 :unregulated :published and more
"""

from prom_jax import config as configuration

# The other rows of the paper's table 4: label smoothing α, pivot layer n, weight λ.
ABLATION = {
    "smoothing_0": {"pivot.label_smoothing": 0.0},
    "smoothing_0.03": {"pivot.label_smoothing": 0.03},
    "smoothing_0.3": {"pivot.label_smoothing": 0.3},
    "layer_22": {"pivot.layer": 22},
    "layer_23": {"pivot.layer": 23},
    "layer_25": {"pivot.layer": 25},
    "layer_26": {"pivot.layer": 26},
    "weight_0.3": {"pivot.weight": 0.3},
    "weight_0.5": {"pivot.weight": 0.5},
    "weight_1": {"pivot.weight": 1.0},
}


def get_config(variant: str = ""):
    """The paper's configuration for Thai, or a variant of it."""
    config = configuration.default()
    config.language = "th"
    config.data.english = ("tatsu-lab/alpaca",)
    # Its translation: instruction, input and output, in the same order (or with the same ids).
    config.data.target = ("data/alpaca.th.jsonl",)
    # Aligned sentences: NTREX-128 and the dev part of FLORES-200, fetched once.
    config.data.translation = ("ntrex", "flores200")
    return configuration.apply_variant(config, variant, ABLATION)
