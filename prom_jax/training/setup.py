"""What a configuration comes to before training: method and regulation, records, batches and their cost."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prom_jax import config as configuration
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.generation import with_stops
from prom_jax.data.chat import template_of
from prom_jax.data.chat_templates import ChatTemplate, own_template, read_template
from prom_jax.data.examples import Recipe, further_streams
from prom_jax.data.loader import Batches
from prom_jax.data.mixture import Mixture
from prom_jax.data.records import Prepared, Records, prepare
from prom_jax.data.shares import parse_shares
from prom_jax.models.config import DecoderConfig
from prom_jax.models.decoder import check_exit, tensors
from prom_jax.models.lora import ALL_LINEAR, LoRA, linear_maps
from prom_jax.ops.attention import supports_shared_prefixes
from prom_jax.ops.quantised import KINDS
from prom_jax.parallel.multihost import main_process_first
from prom_jax.training import budget
from prom_jax.training.methods import find_method
from prom_jax.training.objective import Method
from prom_jax.training.regulation import Regulation, decide, label_of
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process
from prom_jax.utils.workdir import as_dict, check_same_config, check_shared


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The model that a configuration adapts.

    Attributes:
      config: its architecture.
      tokenizer: a transformers tokenizer.
      layer: n, the number of blocks that English goes through.
      reader: of its weights (see `models.open_source`); None where they are not needed.
    """

    config: DecoderConfig
    tokenizer: Any
    layer: int
    reader: Any = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of its weights (`checkpoints.params.fingerprint`), which must be open."""
        return weights.fingerprint(self.reader)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one language brings to a run.

    Attributes:
      config: the configuration of this language alone.
      prefix: of the names of its results: '', or where there are several languages 'sw_'.
      regulation: why its λ is what it is.
      data: its records.
    """

    config: Any
    prefix: str
    regulation: Regulation
    data: Prepared

    @property
    def language(self) -> str:
        """Its code."""
        return self.config.language

    @property
    def label(self) -> str:
        """What goes before a line about it: '', or where there are several languages 'sw: '."""
        return f"{self.language}: " * bool(self.prefix)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration with what it names.

    Attributes:
      base: the model that is adapted.
      method: what is minimised, λ being decided.
      parts: what each language brings, in the order of the configuration.
      records: of all languages.
      batches: of the whole run.
      lora: the adapters, and heads of low rank; None for none.
      flops: of the whole run, as `budget.training_flops` counts.
    """

    config: Any
    workdir: Path
    base: BaseModel
    method: Method
    parts: tuple[Part, ...]
    records: Records | Mixture
    lora: LoRA | None
    batches: Batches
    flops: float

    @property
    def identity(self) -> dict:
        """What a work directory remembers of its run: the configuration, and what its sources hold."""
        shared = self.batches.share_prompts  # with 'auto' it depends on `attention`, which may change
        records = "+".join(part.data.fingerprint for part in self.parts)
        identity = as_dict(self.config) | {"records": records, "prompts_shared": shared}
        return identity | ({} if self.base.reader is None else {"base": self.base.fingerprint})

    @property
    def is_frozen(self) -> bool:
        """Whether the model's own parameters are not trained, but adapters."""
        return self.lora is not None and not self.lora.trains_base

    @property
    def details(self) -> dict:
        """The rows of the model card."""
        config = self.config
        codes = ",".join(part.language for part in self.parts)
        details = {"base_model": config.model, "language": codes, "method": config.method}
        details |= self.method.details()
        if self.method.exits:
            unusual = {"english_prompt": "target", "translation_source": True}  # as in the published script
            details |= {f"pivot.{key}": value for key, value in unusual.items() if config.pivot[key] == value}
        if self.lora is not None:
            adapter = {key: self.config.adapter[key] for key in ("rank", "alpha", "rslora")}
            adapter |= {"targets": ", ".join(self.lora.targets)}
            adapter |= {"base_dtype": self.lora.quantised or self.lora.base_dtype} if self.is_frozen else {}
            details |= {f"adapter.{key}": value for key, value in adapter.items()}
        return details | {
            "regulate": config.pivot.regulate,
            "regulation": "; ".join(f"{part.label}{part.regulation.reason}" for part in self.parts),
            **self._prompts,
            "steps": self.batches.num_steps,
            "seed": config.seed,
        }

    @property
    def _prompts(self) -> dict:
        """Of Alpaca's prompt the language, or that it is another one, which the tokenizer has."""
        if self.config.data.template != "alpaca":
            return {"template": self.config.data.template}
        languages = [part.language for part in self.parts] if self.config.data.prompts == "target" else ["en"]
        return {"prompts": ",".join(languages)}

    @property
    def chat_template(self) -> str:
        """What the model is asked in from now on: the template of training, in Jinja."""
        return template_of(self.base.tokenizer, self.details)


def open_base(config, workdir: Path, weights: bool = True) -> BaseModel:
    """Opens the model's files, once configuration and work directory are found to be usable.

    Args:
      config: see `prom_jax.config`.
      workdir: the work directory; nothing is written.
      weights: whether those are opened too, which then must be there.

    Returns:
      The model.

    Raises:
      UserError: for a configuration or a model that cannot be used, or a work directory that holds another
        run.
    """
    configuration.check(config)
    depth = find_method(config.method).depth
    check_same_config(workdir, as_dict(config))
    if weights:
        reader, tokenizer = models.open_source(config.model)
        model_config = reader.config
    else:
        reader, (model_config, tokenizer) = None, models.open_config(config.model)
    layer = configuration.pivot_layer(config, model_config.num_hidden_layers, depth)
    check_exit(layer, model_config.num_hidden_layers, "pivot.layer")
    if config.data.template != "alpaca":
        if config.data.template != "model":
            tokenizer.chat_template = read_template(config.data.template)
        template = ChatTemplate(tokenizer, own_template(tokenizer))
        model_config = with_stops(model_config, template.ends)  # what training teaches to end answers with
    console.print(f"model     {config.model}")
    return BaseModel(model_config, tokenizer, layer, reader)


def resolve(
    config, workdir: Path, base: BaseModel, measured: Mapping[str, dict | None] = MappingProxyType({})
) -> Experiment:
    """Decides λ of each language, makes the records where they are missing, and plans the batches.

    No weights are read.

    Args:
      config: see `prom_jax.config`.
      workdir: the work directory, which gets the records.
      base: the model, as `open_base` gives it.
      measured: by language what the probe found, where one decides λ; none: not yet.

    Returns:
      The experiment.

    Raises:
      UserError: for data that cannot be used, or a work directory that holds another run.
    """
    kind, codes = find_method(config.method), configuration.languages(config)
    configs = {code: configuration.of_language(config, code) for code in codes}
    decisions = {code: decide(configs[code], base.config, measured.get(code)) for code in codes}
    exits = f", n = {base.layer} of {base.config.num_hidden_layers}"
    console.print(f"method    {config.method}{exits * kind.regulated}")
    for code, regulation in decisions.items() if kind.regulated else ():
        console.print(regulation.lines(label_of(code, codes)))
    methods = {code: kind.from_config(config, base.layer, decisions[code].weight) for code in codes}
    # λ of a language is as configured or 0, and then its records have no English.
    method = kind.from_config(config, base.layer, max(each.weight for each in decisions.values()))
    lora = find_lora(config, base.config, method)
    if config.data.seq_len > base.config.max_position_embeddings:
        console.print(
            f"WARNING   data.seq_len={config.data.seq_len} is more than the "
            f"{base.config.max_position_embeddings} positions that the model was made for"
        )
    with main_process_first("records"):
        if not is_main_process():
            check_shared(workdir / "records")
        parts = tuple(
            Part(
                configs[code],
                f"{code}_" * (len(codes) > 1),
                decisions[code],
                prepare(recipe(configs[code], methods[code]), base.tokenizer, workdir / "records"),
            )
            for code in codes
        )
    sets = {part.language: part.data.train for part in parts}
    records = Mixture(sets) if len(sets) > 1 else parts[0].data.train
    batches = Batches(
        records,
        sequences=config.batch.sequences,
        seq_len=config.data.seq_len,
        seed=config.seed,
        epochs=config.optimizer.epochs,
        steps=config.steps,
        shares=parse_shares(config.data.share, codes),
        plans=workdir / "records",
        share_prompts=config.batch.share_prompts == "auto" and supports_shared_prefixes(config.attention),
        keys=lora is not None and lora.dropout > 0,
    )
    flops = budget.training_flops(base.config, method, records, batches.examples, lora)
    experiment = Experiment(
        config=config,
        workdir=workdir,
        base=base,
        method=method,
        parts=parts,
        records=records,
        lora=lora,
        batches=batches,
        flops=flops,
    )
    check_same_config(workdir, experiment.identity)
    return experiment


def find_lora(config, base: DecoderConfig, method: Method) -> LoRA | None:
    """The adapters that a configuration asks for, and the method's heads of low rank.

    Args:
      config: see `prom_jax.config`.
      base: the architecture of the model.
      method: as configured.

    Returns:
      What `models.decoder.Decoder` takes; None where there is neither.

    Raises:
      UserError: for targets that the model has not.
    """
    adapter, maps = config.adapter, linear_maps(tensors(base))
    targets = maps if tuple(adapter.targets) == (ALL_LINEAR,) else tuple(dict.fromkeys(adapter.targets))
    if adapter.kind == "none":
        targets = ()
    elif not targets or not set(targets) <= set(maps):
        raise UserError(
            f"adapter.targets={tuple(adapter.targets)}: expected {ALL_LINEAR!r} or some of "
            f"{', '.join(maps)}, which a {base.model_type!r} has"
        )
    if not targets and not method.low_rank_heads:
        return None
    computed = config.compute_dtype or models.default_compute_dtype()
    quantised = adapter.base_dtype in KINDS
    return LoRA(
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=(*targets, *method.low_rank_heads),
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        trains_base=adapter.kind == "none",
        base_dtype=computed if quantised else adapter.base_dtype or computed,
        quantised=adapter.base_dtype if quantised else "",
    )


def recipe(config, method: Method) -> Recipe:
    """What the examples are made from, of one language."""
    more = further_streams(tuple(config.data.streams))
    return Recipe(
        language=config.language,
        english=tuple(config.data.english),
        target=tuple(config.data.target),
        translation=tuple(config.data.translation),
        seq_len=config.data.seq_len,
        prompts=config.data.prompts,
        english_prompt=config.pivot.english_prompt,
        translation_source=config.pivot.translation_source and bool(method.exits),
        streams=method.streams,
        more=tuple((stream, names) for stream, names in more if stream in method.streams),
        holdout=config.eval.holdout,
        text=tuple(config.eval.text),
        seed=config.seed,
        shuffled=method.shuffles_english,
        bad_rows=config.data.bad_rows,
        pairing=config.data.pairing,
        too_long=config.data.too_long,
        raw=tuple(config.data.text),
        raw_english=tuple(config.data.english_text),
        template="alpaca" if config.data.template == "alpaca" else "model",
    )
