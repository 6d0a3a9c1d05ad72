"""The features of a decoder: what the one implementation in decoder.py can be told to compute."""

import dataclasses
import functools

from prom_jax.utils.errors import UserError

MAX_LAYERS = 10_000  # each costs memory before any tensor is looked at


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for a longer context.

    Attributes:
      rope_type: `linear`: all by `factor`; `llama3`: by wavelength; `yarn`: by how often a wave turns in the
        original context; `longrope`: each by a factor of its own, here the short ones, which hold within the
        original context; `dynamic`: not within the context that the model has.
      attention_factor: what cosines and sines are multiplied by.
      long_factor: those of `longrope` beyond the original context, which are kept for an export alone.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings.

    Attributes:
      theta: the base of the frequencies.
      scaling: None for none.
      share: of a head's dimensions, the first ones, that are rotated.
      interleaved: whether neighbouring dimensions are turned into each other; otherwise those of one half
        into those of the other.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    share: float = 1.0
    interleaved: bool = False

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_factor if self.scaling else 1.0


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    Attributes:
      window: how many keys a query attends to at most, itself included; None for all.
      rope: None for a layer without positions.
    """

    window: int | None = None
    rope: Rope | None = Rope()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a model. Sizes have the names of a Hugging Face `config.json`.

    Which biases and norms there are follows from the family's table of tensors (`models.family.Tensor`).

    Attributes:
      layers: the kind of each layer.
      model_type: the family's name.
      attention_bias, mlp_bias: whether a family that has them by choice has them.
      unit_offset_norms: whether norms scale by 1 + weight.
      activation: of the gate: 'silu' or 'gelu_tanh'.
      embedding_scale: what embeddings are multiplied by; residual_scale: what each part of a block adds;
        logit_scale: the logits.
      attention_scale: what scores are multiplied by; None for 1 / √head_dim.
      attention_softcap, logit_softcap: x becomes c · tanh(x / c); None for no cap.
      skipped: keys of the `config.json` that were not read, as they cannot change the forward pass.
      generation: keys of a `generation_config.json`, which do not change the forward pass either
        (`checkpoints.generation`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    unit_offset_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    skipped: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)
    generation: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; check the model's config.json"
            )
        if self.head_dim % 2 or not self.head_dim:
            raise UserError(
                f"head_dim={self.head_dim}: rotary embeddings need an even number; check the model's "
                "config.json"
            )
        if len(self.layers) != self.num_hidden_layers:
            raise UserError(
                f"num_hidden_layers={self.num_hidden_layers}, and there are {len(self.layers)} layer_types; "
                "check the model's config.json"
            )
        shares = {(kind.rope.share, kind.rope.interleaved) for kind in self.kinds if kind.rope}
        if len(shares) > 1:
            raise UserError(
                f"layers rotate {sorted(shares)} of a head's dimensions: expected one share for all layers"
            )

    @property
    def rope_interleaved(self) -> bool:
        """Whether rotary embeddings turn neighbouring dimensions into each other."""
        return any(rope.interleaved for rope in self.ropes if rope)

    @functools.cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers, in the order in which they first occur."""
        return tuple(dict.fromkeys(self.layers))

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers."""
        return tuple(dict.fromkeys(kind.window for kind in self.kinds))

    @functools.cached_property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds))

    @property
    def untied(self) -> bool:
        """Whether there is an LM head of its own."""
        return not self.tie_word_embeddings

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes that shapes of tensors are made of, by the names that the families' tables use."""
        return {
            "vocabulary": self.vocab_size,
            "hidden": self.hidden_size,
            "inner": self.intermediate_size,
            "head": self.head_dim,
            "queries": self.num_attention_heads * self.head_dim,
            "keys": self.num_key_value_heads * self.head_dim,
            "queries, keys and values": (self.num_attention_heads + 2 * self.num_key_value_heads)
            * self.head_dim,
            "gate and up": 2 * self.intermediate_size,
        }
