"""The study of docs/study.md: Gemma-3-270M to Arabic, Greek and Thai, 48 updates each, in 11 GiB of memory.

bash launch/study.sh --data=DIR
python -m prom_jax.train --config=configs/study.py:xllama2 --config.model="$GEMMA3" --config.language=th
"""

from prom_jax import config as configuration


def get_config(variant: str = ""):
    """The configuration, or a variant of it (see `prom_jax.config.VARIANTS`)."""
    config = configuration.default()
    config.model = "google/gemma-3-270m"
    config.language = "el"
    config.data.english = ("data/study/en.jsonl",)
    config.data.target = ("data/study/{language}.jsonl",)
    config.data.translation = ("data/study/ntrex.{language}.tsv",)
    config.data.seq_len = 1024
    config.batch.sequences = 2
    config.optimizer.learning_rate = 2e-5  # docs/study.md says how it was chosen
    config.optimizer.warmup_ratio = 0.1
    config.steps = 48
    config.remat = "dots"
    config.pivot.norm = "final"
    config.eval.every = 0
    config.eval.holdout = 40
    config.eval.samples = 5
    config.checkpoint.every = 0
    config.checkpoint.keep = 2
    config.trackers = ()
    return configuration.apply_variant(config, variant)
