"""Gemma-3-270M to Greek on half of XQuAD's articles, on two CPU cores; needs 11 GiB of memory.

GEMMA3=$(bash launch/model.sh gemma)
git clone https://github.com/google-deepmind/xquad
python launch/xquad.py xquad data/xquad --languages=el
python -m prom_jax.train --config=configs/gemma.py --config.model="$GEMMA3"
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The configuration, or a variant of it (see `prom_jax.config.VARIANTS`)."""
    config = configuration.default()
    config.model = "google/gemma-3-270m"
    config.language = "el"
    config.data.english = ("data/xquad/en.jsonl",)
    config.data.target = ("data/xquad/el.jsonl",)
    config.data.seq_len = 1024
    config.batch.sequences = 2
    config.optimizer.warmup_ratio = 0.1
    config.steps = 48
    config.remat = "dots"
    config.pivot.norm = "final"  # docs/method.md says why
    config.eval.every = 16
    config.eval.holdout = 40
    config.eval.samples = 3
    config.checkpoint.every = 0
    config.checkpoint.keep = 1
    return configuration.apply_variant(config, variant)
