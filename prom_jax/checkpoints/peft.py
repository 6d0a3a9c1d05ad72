"""Adapters as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`, in and out."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prom_jax.checkpoints import hub, model_card, safetensors
from prom_jax.checkpoints.adapter import AdapterReader
from prom_jax.checkpoints.params import head_tensor, is_of_head
from prom_jax.models.lora import LoRA, is_of_adapter, peft_names
from prom_jax.tokenization import folder
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process

CONFIG, WEIGHTS = safetensors.ADAPTER, "adapter_model.safetensors"
# Keys of the configuration whose values change nothing that is computed, as the tensors say the same, and
# those that are read.
_ANY = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "use_rslora",
}  # fmt: skip
# What others must be; those that are not here, empty or false.
_ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Others (pissa, olora, corda, loftq) change the model too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class PEFTReader:
    """An adapter in a folder. An `AdapterReader`.

    Args:
      directory: that holds it.

    Attributes:
      base: the model that it is for: a path or a hub id.

    Raises:
      UserError: if it is damaged, or of a kind that is not supported.
    """

    def __init__(self, directory):
        self.source = Path(directory)
        content, self.base = read_config(self.source)
        self.details: dict = {}
        self._files = dict(self._open())
        self.heads = dict(self._open_heads())
        self.tensors = set(self._files)
        self.lora = self._kind(content)

    def _open(self):
        """Its tensors, and the open file and path of each."""
        path = self.source / WEIGHTS
        if not path.exists():
            raise UserError(
                f"{self.source} has no {WEIGHTS}: expected the weights as safetensors; save the adapter "
                "again with peft's `save_pretrained`"
            )
        file = safetensors.open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if not is_of_adapter(name):
                raise UserError(
                    f"{path} holds {name!r:.100}: expected adapters of linear maps alone; merge it with "
                    "peft's `merge_and_unload`, and save the result"
                )
            yield name, (file, path)
        text = (file.metadata() or {}).get(safetensors.DETAILS_KEY, "{}")
        with contextlib.suppress(ValueError, RecursionError):  # a stranger's; it is for people alone
            details = json.loads(text)
            self.details = details if isinstance(details, dict) else {}

    def _open_heads(self):
        """Further heads, and after which block each reads."""
        for path in sorted(self.source.glob("*_head.safetensors")):
            whole, low_rank = [head_tensor(path.stem)], list(peft_names(head_tensor(path.stem)))
            held = set(safetensors.open_safetensors(path).keys())
            names = whole if set(whole) <= held else low_rank
            file, layer = safetensors.open_head(path, names)
            self._files |= dict.fromkeys(names, (file, path))
            yield path.stem, layer

    def _kind(self, content: Mapping) -> LoRA:
        rank: Any = content.get("r")
        alpha: Any = content.get("lora_alpha")
        is_number = type(alpha) in (int, float) and math.isfinite(alpha)
        if type(rank) is not int or rank < 1 or not is_number:
            raise UserError(
                f"{self.source / CONFIG} sets r={rank!r:.50} and lora_alpha={alpha!r:.50}: expected a whole "
                "number of at least 1, and a number"
            )
        targets = sorted({name.split(".")[-3] for name in self.tensors if is_of_adapter(name)})
        return LoRA(rank, float(alpha), tuple(targets), rslora=bool(content.get("use_rslora")))

    def shape(self, name) -> tuple[int, ...]:
        return tuple(self._files[name][0].get_slice(name).get_shape())

    def where(self, name) -> Path:
        return self._files[name][1]

    def read(self, name, index) -> np.ndarray:
        return self._files[name][0].get_slice(name)[index]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter alone, and no model."""
    return (path / CONFIG).exists() and not (path / "config.json").exists()


def read_config(directory: Path) -> tuple[dict, str]:
    """The content of `adapter_config.json`, and the path or hub id of the model that the adapter is for.

    Raises:
      UserError: if it names none, or is of a kind that is not supported.
    """
    path = directory / CONFIG
    content = safetensors.read_json(path)
    for key, value in content.items():
        allowed = value in _ALLOWED[key] if key in _ALLOWED else key in _ANY or not value
        if not allowed:
            raise UserError(
                f"{path} sets {key}={value!r:.100}: expected plain LoRA of linear maps; merge the adapter "
                "with peft's `merge_and_unload`, and save the result"
            )
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path} sets base_model_name_or_path={base!r:.100}: expected the path or hub id of the model "
            "that the adapter is for; write it there"
        )
    return content, f"{base}@{revision}" if revision and not Path(base).exists() else base


def save(
    adapter: AdapterReader,
    model_tokenizer,
    directory,
    *,
    base: str,
    dtype,
    chat_template: str | None,
    card: Mapping[str, object],
):
    """Writes an adapter as a folder that PEFT loads as it is, with tokenizer and model card. A further head
    goes into a file of its own, which PEFT does not read. All processes must call it.

    Args:
      adapter: what is written.
      model_tokenizer, directory, dtype, chat_template, card: as in `safetensors.save_hf`.
      base: the model that the adapter is for: a path or hub id.

    Raises:
      UserError: as `safetensors.save_hf`.
    """
    dtype, card = safetensors.checked_dtype(dtype), model_card.public(card)
    names = sorted(name for name in adapter.tensors if not is_of_head(name))
    size = dtype.itemsize * sum(math.prod(adapter.shape(name)) for name in adapter.tensors)
    with hub.whole_folder(directory, size) as partial:
        if is_main_process():
            safetensors.write_json(partial / CONFIG, _config(adapter.lora, names, base))
            folder.save(model_tokenizer, partial, chat_template)
            text = model_card.model_card(card, Path(directory).resolve().name, adapter=True)
            (partial / "README.md").write_text(text, encoding="utf-8")
        path = partial / WEIGHTS if is_main_process() else os.devnull
        safetensors.write_tensors(path, adapter, names, dtype, {safetensors.DETAILS_KEY: json.dumps(card)})
        for head, layer in adapter.heads.items():
            own = sorted(name for name in adapter.tensors if name.startswith(f"{head}."))
            safetensors.write_head(partial, adapter, own, dtype, layer)


def _config(lora: LoRA, names: list[str], base: str) -> dict:
    """The content of `adapter_config.json`."""
    path = Path(base).expanduser()
    base, _, revision = (str(path.resolve()), "", "") if path.exists() else base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted({name.split(".")[-3] for name in names}),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "inference_mode": True,
    }
