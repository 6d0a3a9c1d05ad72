"""The demo: SmolLM2-135M to Swahili on the built-in sample corpus, a few minutes on two CPU cores.

bash launch/demo.sh
python -m prom_jax.train --config=configs/demo.py --config.model=SmolLM2-135M-Instruct.Q4_1.gguf
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The demo's configuration, or a variant of it (see `prom_jax.config.VARIANTS`)."""
    config = configuration.default()
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"  # launch/demo.sh gives a local GGUF file instead
    config.language = "sw"
    config.data.english = ("sample",)
    config.data.target = ("sample",)
    config.data.translation = ("sample",)
    config.data.seq_len = 1024
    config.batch.sequences = 1
    config.optimizer.learning_rate = 1e-4  # a small model and few steps
    config.optimizer.warmup_ratio = 0.1
    config.steps = 12
    config.remat = "dots"  # as fast as "none" on two cores, in half its memory
    config.eval.every = 6
    config.eval.holdout = 20
    config.eval.samples = 3
    config.checkpoint.every = 6
    config.checkpoint.keep = 1
    return configuration.apply_variant(config, variant)
