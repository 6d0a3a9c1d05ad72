"""The configuration: every key with its default and meaning, the variants, and the checks.

A file in `configs/` starts from `default()`, sets what is its own, and applies a variant. Each key keeps one
type, so that each can be overridden on the command line: `--config.pivot.weight=0.3`.
"""

import functools
import math
import re
from pathlib import Path

from ml_collections import ConfigDict

from prom_jax.utils.errors import UserError

# What stands for a language's code in the names of sources, and the keys that have them.
PLACEHOLDER = "{language}"
SOURCES = (
    ("data", "english"),
    ("data", "target"),
    ("data", "translation"),
    ("data", "text"),
    ("data", "english_text"),
    ("data", "streams"),
    ("eval", "text"),
)
REGULATE = ("auto", "mean", "paper", "never")
METHODS = sorted(path.stem for path in (Path(__file__).parent / "training" / "methods").glob("[!_]*.py"))

# Differences from the default, by name of the variant.
VARIANTS = {
    "": {},
    # Every method, by the name of its file.
    **{name: {"method": name} for name in METHODS},
    "deep_supervision": {"method": "deep_supervision", "pivot.english_prompt": "target"},
    # PROM without regulation: λ is kept whatever a probe says.
    "unregulated": {"pivot.regulate": "never"},
    # Controls for the pivot head: one that does not learn, and none besides the main head.
    "frozen_head": {"pivot.head": "frozen"},
    "shared_head": {"pivot.head": "shared"},
    # Adapters in place of all parameters, with the rate at which they usually learn; on a model in 4 bits.
    "lora": {"adapter.kind": "lora", "optimizer.learning_rate": 2e-4},
    "qlora": {"adapter.kind": "lora", "optimizer.learning_rate": 2e-4, "adapter.base_dtype": "nf4"},
    # The script that the paper's authors published, where it differs from the paper's text.
    "published": {
        "pivot.layer": 23,
        "pivot.regulate": "paper",
        "pivot.english_prompt": "target",
        "pivot.translation_source": True,
        "data.seq_len": 2048,
        "optimizer.schedule": "linear",
        "optimizer.clip": 0.0,
    },
}


def default() -> ConfigDict:
    """The paper's setting, without a language and its data."""
    c = ConfigDict()
    # Hugging Face directory or hub id, .gguf file, or Orbax checkpoint directory.
    c.model = "meta-llama/Llama-2-7b-hf"
    # ISO 639-1 code of the target language, or several of them, 'sw,th', which then are learnt together. In
    # the sources of `data` and in eval.text `{language}` stands for each one's code.
    c.language = ""
    # One of prom_jax/training/methods: 'prom' (English at the pivot head, target at the main one), 'bactrian'
    # (target alone), 'xllama2' (both at the main head), 'pcgrad' (the same, with projected gradients),
    # 'deep_supervision' (English in lower blocks, through the main head), and controls for PROM:
    # 'english_last' (its English at the last layer), 'shuffled' (its pairs broken up).
    c.method = "prom"

    c.pivot = ConfigDict()
    # n: English leaves after this many blocks. 0: three quarters of the model's, rounded (with the method
    # 'deep_supervision' 15 of 32).
    c.pivot.layer = 0
    # λ, the weight of the pivot loss.
    c.pivot.weight = 0.1
    # α, the label smoothing of the pivot loss.
    c.pivot.label_smoothing = 0.1
    # Norm before the pivot head: 'none' (the raw residual stream) or 'final' (the model's last norm).
    c.pivot.norm = "none"
    # The pivot head: 'own' (a copy of the main head, trained), 'lora' (the main head and a trained difference
    # of low rank, as `adapter` says), 'frozen' (a copy as it is) or 'shared' (the main head itself); '':
    # 'own', with adapters 'lora'.
    c.pivot.head = ""
    # Language of the prompt before an English response: 'english' or 'target'.
    c.pivot.english_prompt = "english"
    # Whether the English sentence of a translation also feeds the pivot head.
    c.pivot.translation_source = False
    # Who decides whether λ is 0: 'auto' (a probe of the base model, where it can tell), 'mean' (a probe, by
    # its mean alone: the paper's rule), 'paper' (its table for LLaMA-2-7B) or 'never' (λ as set).
    c.pivot.regulate = "auto"

    # The probe that 'auto' and 'mean' ask: see docs/probe.md.
    c.probe = ConfigDict()
    # What counts as the word: 'word', 'prefix' or 'byte'.
    c.probe.scoring = "word"
    # Demonstrations in each prompt.
    c.probe.shots = 5
    # Folder with <language>/clean.csv; '': the project's own tables.
    c.probe.tables = ""
    # Codes of the languages that its second task, translation, translates from; (): all that have a table.
    c.probe.sources = ()

    c.data = ConfigDict()
    # Sources of each role: a .json .jsonl .csv .tsv .parquet (.gz .zst), a folder, a pattern, a hub id
    # `owner/name[:config][@split]`, or 'sample'; `?ours=theirs&…` after it renames columns. `prepare
    # --translate` writes data.target from data.english.
    c.data.english = ()
    c.data.target = ()
    # Aligned sentences (keys 'en' and the language): as above, a .tmx, or 'english|target', each a text file
    # or a source with a column 'text'.
    c.data.translation = ()
    # Which English and target instructions are counterparts: those of the same 'id' (without ids: in order),
    # in 'order', or 'none'. Those without one train on their own.
    c.data.pairing = "id"
    # Raw text (a key 'text', or the lines of a text file) of the target language, and of English, which
    # leaves where English does: continued pre-training.
    c.data.text = ()
    c.data.english_text = ()
    # Further streams of instruction rows with the English template, for methods that have a term for them:
    # 'name=source', such as 'replay=rows.jsonl'.
    c.data.streams = ()
    # Rows that cannot be used: 'refuse' (all are counted, some named) or 'skip' (counted in the card).
    c.data.bad_rows = "refuse"
    # What examples are put into: 'alpaca', 'model' (the model's own chat template, the right one for a model
    # that can chat already), or a file with a chat template, FILE.jinja.
    c.data.template = "alpaca"
    # Language of Alpaca's template and its translation requests around target text: 'english' or 'target'.
    c.data.prompts = "english"
    # Of the examples of an epoch, the share that has a stream or is of a language: 'english=0.25', 'sw=0.5'.
    # They come more or less often than once for it. Of several languages, where all are named, weights:
    # 'sw=1','th=3'. (): as they are, once each.
    c.data.share = ()
    # Tokens a row; examples are packed into rows.
    c.data.seq_len = 1024
    # What is done with longer ones: 'cut' (at their end), 'drop' or 'refuse'. All are counted.
    c.data.too_long = "cut"

    c.batch = ConfigDict()
    # Rows of target tokens an update; English takes the few rows that it needs.
    c.batch.sequences = 32
    # Whether prompt prefixes are computed once: 'auto' (unless attention is 'splash') or 'never'.
    c.batch.share_prompts = "auto"
    # Into how many parts an update is split to fit memory. Never changes the result.
    c.batch.accumulation = 1

    # What is trained in place of the model's own parameters, which then are frozen: see docs/lora.md.
    c.adapter = ConfigDict()
    # 'none' (all parameters are trained) or 'lora' (a difference of low rank to each target).
    c.adapter.kind = "none"
    c.adapter.rank = 16
    # What the difference is multiplied by: alpha / rank, or with rslora alpha / √rank.
    c.adapter.alpha = 32.0
    c.adapter.rslora = False
    # The share of an adapter's inputs that are 0 in training.
    c.adapter.dropout = 0.0
    # Matrices of the blocks that have an adapter: their names, such as ('q_proj', 'v_proj'), or 'all-linear'.
    c.adapter.targets = ("all-linear",)
    # In which the frozen parameters are kept: 'float32', 'bfloat16'; '': as they are computed with; 'int8' or
    # 'nf4': the blocks' matrices in 8 or 4 bits, and the others as they are computed with.
    c.adapter.base_dtype = ""

    c.optimizer = ConfigDict()  # AdamW, betas 0.9 and 0.999
    c.optimizer.learning_rate = 2e-5
    # Share of the steps over which the learning rate rises from 0.
    c.optimizer.warmup_ratio = 0.03
    # How it falls to 0 afterwards: 'cosine' or 'linear'.
    c.optimizer.schedule = "cosine"
    c.optimizer.weight_decay = 0.0
    # Largest gradient norm; 0 for no clipping.
    c.optimizer.clip = 1.0
    c.optimizer.epochs = 3.0
    # Of parameters and AdamW's moments: 'float32', or in half the memory 'bfloat16', with stochastic rounding
    # so that small updates count.
    c.optimizer.dtype = "float32"
    # Number of updates; 0: as many as the epochs have.
    c.steps = 0

    # Devices along each axis; -1: all that are left.
    c.mesh = ConfigDict()
    c.mesh.data = 1  # parameters replicated, rows split
    c.mesh.fsdp = -1  # parameters and rows split
    c.mesh.tensor = 1  # each layer's matrices split

    # 'float32' or 'bfloat16'; '': float32 on CPU, bfloat16 elsewhere. (Parameters: optimizer.dtype.)
    c.compute_dtype = ""
    # What the backward pass recomputes: 'none', 'dots' (all but matrix products), 'full' (whole blocks).
    c.remat = "full"
    # Attention backend: 'auto' ('blocks' on CPU, 'splash' on TPU, 'tokamax' on GPU), one of these, 'xla' or
    # 'cudnn'.
    c.attention = "auto"

    c.eval = ConfigDict()
    # Steps between evaluations; 0: only before the first and after the last.
    c.eval.every = 100
    # Pairs taken off the training data to evaluate on; 0: none.
    c.eval.holdout = 100
    # Aligned sentences (as data.translation) to evaluate on as plain text besides.
    c.eval.text = ()
    # Held-out prompts answered by the base and the adapted model.
    c.eval.samples = 0

    c.checkpoint = ConfigDict()
    # Steps between checkpoints; 0: only the last.
    c.checkpoint.every = 200
    # How many of the latest are kept.
    c.checkpoint.keep = 2
    # How many are kept besides of those with the lowest held-out loss, where eval.every falls on them.
    c.checkpoint.keep_best = 0
    # Steps that are multiples of it are kept besides; 0: none.
    c.checkpoint.keep_every = 0
    # Where they go: a path or gs://bucket/…; '': into the work directory.
    c.checkpoint.directory = ""

    # Where a run can be watched besides metrics.jsonl: some of prom_jax/training/trackers.
    c.trackers = ("tensorboard",)

    c.export = ConfigDict()
    # Of the exported weights: 'float32', 'bfloat16', 'float16'; '': as the source has them.
    c.export.dtype = ""
    # Whether adapters are exported too, as PEFT has them, into adapter/ next to hf/, where they are merged.
    c.export.adapter = True
    # Where the export is pushed to on the hub, owner/name, and adapter/ to owner/name-lora; '': nowhere. New
    # repositories are private.
    c.export.hub = ""

    c.seed = 0
    return c


def apply_variant(config: ConfigDict, variant: str, variants: dict | None = None) -> ConfigDict:
    """`config` with the changes of a variant, or of several with '+' between, such as 'bactrian+lora', one
    after the other; `variants` are the file's own, besides VARIANTS.

    Raises:
      UserError: for a name that neither has.
    """
    known = VARIANTS | (variants or {})
    for name in variant.split("+"):
        if name not in known:
            raise UserError(f"unknown variant {name!r}: expected one of {', '.join(filter(None, known))}")
        config.update_from_flattened_dict(known[name])
    return config


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no run could use; each module checks its own keys."""
    at_least = {
        "data.seq_len": 2, "batch.sequences": 1, "batch.accumulation": 1, "steps": 0, "pivot.layer": 0,
        "optimizer.learning_rate": 0, "optimizer.warmup_ratio": 0, "optimizer.weight_decay": 0,
        "optimizer.clip": 0, "optimizer.epochs": 0, "eval.every": 0, "eval.holdout": 0, "eval.samples": 0,
        "checkpoint.every": 0, "checkpoint.keep": 1,
        "checkpoint.keep_best": 0, "checkpoint.keep_every": 0, "probe.shots": 0, "seed": 0,
        "adapter.rank": 1, "adapter.alpha": 0, "adapter.dropout": 0,
    }  # fmt: skip
    one_of = {
        "data.prompts": ("english", "target"),
        "data.too_long": ("cut", "drop", "refuse"),
        "data.bad_rows": ("refuse", "skip"),
        "data.pairing": ("id", "order", "none"),
        "batch.share_prompts": ("auto", "never"),
        "pivot.regulate": REGULATE,
        "adapter.kind": ("none", "lora"),
        "adapter.base_dtype": ("", "float32", "bfloat16", "int8", "nf4"),
        "optimizer.schedule": ("cosine", "linear"),
        "optimizer.dtype": ("float32", "bfloat16"),
        "export.dtype": ("", "float32", "bfloat16", "float16"),
    }
    for key, least in at_least.items():
        if not least <= _get(config, key) < math.inf:
            raise UserError(f"{key}={_get(config, key)}: expected {least} or more")
    for key, allowed in one_of.items():
        if _get(config, key) not in allowed:
            raise UserError(f"{key}={_get(config, key)!r}: expected one of {', '.join(map(repr, allowed))}")
    _check_languages(config)
    if config.data.prompts != "english" and config.data.template != "alpaca":
        raise UserError(
            f"data.prompts={config.data.prompts!r} is the language of Alpaca's prompt, and data.template is "
            f"{config.data.template!r}: leave data.prompts as it is, or set data.template=alpaca"
        )
    if config.batch.sequences % config.batch.accumulation:
        raise UserError(
            f"batch.sequences={config.batch.sequences} does not split into "
            f"batch.accumulation={config.batch.accumulation} equal parts; change either"
        )
    if config.adapter.base_dtype and config.adapter.kind == "none":
        raise UserError(
            f"adapter.base_dtype={config.adapter.base_dtype!r} is of frozen parameters, and with "
            "adapter.kind='none' they are trained: set adapter.kind='lora', or optimizer.dtype"
        )
    if config.adapter.dropout >= 1:
        raise UserError(f"adapter.dropout={config.adapter.dropout}: expected a share, less than 1")
    if config.optimizer.warmup_ratio > 1:
        raise UserError(f"optimizer.warmup_ratio={config.optimizer.warmup_ratio}: expected a share, 0 to 1")


def _check_languages(config) -> None:
    codes = languages(config)
    if not codes:
        raise UserError("language is not set: give its code, such as --config.language=sw")
    if len(set(codes)) < len(codes):
        raise UserError(f"language={config.language!r} names one twice: give each code once")
    own = (*config.data.target, *config.data.translation, *config.data.text)
    if len(codes) > 1 and own and not any(PLACEHOLDER in source for source in own):
        raise UserError(
            f"language={config.language!r} has several, and data.target and data.translation have no "
            f"{PLACEHOLDER}: write it where the code stands in their names, such as "
            f"data/alpaca.{PLACEHOLDER}.jsonl"
        )


def languages(config) -> tuple[str, ...]:
    """The codes of the target languages."""
    return tuple(re.findall(r"[\w-]+", config.language))


def of_language(config: ConfigDict, language: str) -> ConfigDict:
    """The configuration of one of its languages alone: a copy whose sources have its code in their names."""
    part = config.copy_and_resolve_references()
    part.language = language
    for group, key in SOURCES:
        part[group][key] = tuple(source.replace(PLACEHOLDER, language) for source in part[group][key])
    return part


def only_language(config: ConfigDict, command: str) -> ConfigDict:
    """As `of_language`, for what works on one language at a time.

    Args:
      config: the configuration.
      command: what needs one language, for the message.

    Raises:
      UserError: it has several.
    """
    first, *others = languages(config)
    if others:
        raise UserError(
            f"language={config.language!r}: {command} works on one language at a time: add "
            f"--config.language={first}"
        )
    return of_language(config, first)


def pivot_layer(config: ConfigDict, num_layers: int, depth: float = 0.75) -> int:
    """n, the number of blocks that English goes through: as set, or this share of the model's."""
    return config.pivot.layer or round(depth * num_layers)


def _get(config, dotted):
    return functools.reduce(lambda node, key: node[key], dotted.split("."), config)
