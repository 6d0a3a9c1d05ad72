"""What a model family is: how its `config.json` is read, and the table of its tensors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prom_jax.models.config import DecoderConfig, LayerKind, Rope
from prom_jax.models.settings import FULL, SLIDING, Settings

LAYER_HF, LAYER_GGUF = "model.layers.{layer}.", "blk.{layer}."
HEAD_SHAPE, HEAD_AXES = ("vocabulary", "hidden"), ("tensor", "fsdp")  # of every LM head


class Tensor(NamedTuple):
    """A row of a family's table.

    Attributes:
      name: of the parameter in `models.decoder`, which computes with what it finds.
      shape: names of `DecoderConfig.sizes`; in Hugging Face's orientation, [out, in].
      axes: the mesh axis of each dimension, or None.
      hf, gguf: its names in either format, `{layer}` standing for the layer's number from 0 on.
      needs: the property of `DecoderConfig` without which there is no such tensor; '' for none.
    """

    name: str
    shape: tuple[str, ...]
    axes: tuple[str | None, ...]
    hf: str
    gguf: str
    needs: str = ""

    @property
    def in_layers(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.hf


def in_layer(name: str, shape, axes, hf: str, gguf: str, needs: str = "") -> Tensor:
    """A row for a tensor that each layer has, by its names within the layer."""
    return Tensor(name, shape, axes, f"{LAYER_HF}{hf}", f"{LAYER_GGUF}{gguf}", needs)


def no_settings(config: DecoderConfig) -> dict:
    """The settings in GGUF of a family that adds none."""
    return {}


@dataclass(frozen=True)
class GGUF:
    """How GGUF files hold a family.

    Attributes:
      architecture: the value of `general.architecture`.
      config_keys: from the architecture's settings and the names of all tensors, the keys of a `config.json`
        beyond sizes, RoPE and special tokens; `model_type` among them.
      settings: names of further settings that `config_keys` reads.
      settings_of: the inverse: of a model the settings beyond sizes and RoPE.
      interleaved: whether rows of q and k alternate between the two halves that RoPE turns into each other.
      norms_with_offset: whether norms are held as 1 + weight.
      windows: whether llama.cpp computes the family's sliding windows; if not, it looks at all tokens.
    """

    architecture: str
    config_keys: Callable[[Mapping, Collection[str]], dict]
    settings: tuple[str, ...] = ()
    settings_of: Callable[[DecoderConfig], dict] = no_settings
    interleaved: bool = False
    norms_with_offset: bool = False
    windows: bool = True


@dataclass(frozen=True)
class Multimodal:
    """A model of text and other things, whose language model is of a family. Of its folder the language model
    alone is read.

    Attributes:
      model_type, architecture: as its `config.json` has them, in which `text_config` is the language model's.
      keys: further keys of its `config.json`, which say nothing of the language model.
      renames: prefixes of the names of the language model's tensors, and what they are in the family's
        own; of two that fit the first counts.
      others: prefixes of the names of all other tensors.
    """

    model_type: str
    architecture: str
    keys: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    others: tuple[str, ...]

    def text_tensor(self, name: str) -> str | None:
        """A tensor's name in the family's own models; None for a tensor of another part."""
        if name.startswith(self.others):
            return None
        return next((new + name.removeprefix(old) for old, new in self.renames if name.startswith(old)), name)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      model_type, architecture: as a `config.json` has them.
      tensors: all that a model of the family may have.
      defaults: what an absent key of `config.json` means, as in transformers.
      read: takes the family's own keys out of the settings and returns fields of `DecoderConfig`, `layers`
        among them.
      write: the family's own keys of a `config.json`, the inverse of `read`.
      gguf: None where GGUF files are not read.
      multimodal: models that have one of this family as their language model; None for none.
    """

    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    defaults: dict[str, Any]
    read: Callable[[Settings], dict]
    write: Callable[[DecoderConfig], dict]
    gguf: GGUF | None = None
    multimodal: Multimodal | None = None

    def tensors_of(self, config: DecoderConfig) -> tuple[Tensor, ...]:
        """The rows of the table that a model has."""
        return tuple(row for row in self.tensors if not row.needs or getattr(config, row.needs))


def same_layers(
    settings: Settings, window: int | None = None, partial: bool = False
) -> tuple[LayerKind, ...]:
    """Layers that are all of one kind, with the rotary embedding that the settings describe, of a share of
    each head's dimensions if it may be `partial`."""
    layer_type, number = FULL if window is None else SLIDING, settings["num_hidden_layers"]
    settings.take_layer_types([layer_type] * number, [layer_type])
    return (LayerKind(window, settings.take_rope(partial)),) * number


def layers_of_types(
    settings: Settings, default: Sequence[str], window: int | None, ropes: Mapping[str, Rope] | None = None
) -> tuple[LayerKind, ...]:
    """Layers of which some have the window.

    Args:
      settings: what is left of the `config.json`.
      default: the type of each layer, where the file does not say it.
      window: of the layers of sliding attention.
      ropes: the rotary embedding of each type of layer; None for the one that the settings describe.

    Returns:
      The kind of each layer.
    """
    if ropes is None:
        ropes = dict.fromkeys((FULL, SLIDING), settings.take_rope())
    types = settings.take_layer_types(default, (FULL, SLIDING))
    return tuple(
        LayerKind(window if layer_type == SLIDING else None, ropes[layer_type]) for layer_type in types
    )


def layer_type_keys(config: DecoderConfig) -> dict:
    """Keys of a `config.json` for layers of which some have a window."""
    windows = [kind.window for kind in config.layers]
    return {
        "sliding_window": next(filter(None, windows), None),
        "layer_types": [SLIDING if window else FULL for window in windows],
    }
