"""Reading a `config.json`: each key is taken by who knows what it means, and none is ignored in silence."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from prom_jax.models.config import Rope, RopeScaling
from prom_jax.models.known_keys import FIXED, METADATA, WITHOUT_EFFECT, check_kinds, is_number
from prom_jax.utils.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"  # as `layer_types` names them
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


class Settings:
    """The keys of a `config.json` that were not taken yet.

    Args:
      values: the content of the file.
      defaults: what absent keys mean.

    Raises:
      UserError: for a value of the wrong kind, or where a key of REQUIRED is absent and has no default.
    """

    def __init__(self, values: dict, defaults: dict):
        check_kinds(values)
        self._rest, self._defaults = dict(values), defaults
        known = {**defaults, **values}
        missing = [key for key in REQUIRED if key not in known]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}; is it a whole model's config?")
        self._required = {key: known[key] for key in REQUIRED}

    def __getitem__(self, key: str):
        """A key of REQUIRED, taken or not; the family's default where it is absent."""
        return self._required[key]

    def take(self, key: str, default=None):
        """Removes a key and returns its value; the family's default where it is absent, or else `default`."""
        return self._rest.pop(key, self._defaults.get(key, default))

    def take_rope(self, partial: bool = False) -> Rope:
        """The rotary embedding of all layers: `rope_parameters` (transformers 5) or `rope_theta` and
        `rope_scaling` (4).

        Args:
          partial: whether the family can rotate a share of a head's dimensions. The models of transformers
            that cannot read over that key.

        Raises:
          UserError: for a scaling that is not supported, or whose keys are not those expected, and for a
            share where the family knows none.
        """
        rope = dict(self._rest.pop("rope_parameters", None) or self._rest.pop("rope_scaling", None) or {})
        self._rest.pop("rope_scaling", None)
        theta = self._rest.pop("rope_theta", None)
        share = self.take("partial_rotary_factor")
        rope.setdefault("rope_theta", theta)
        return self._rope(rope, share, partial)

    def take_ropes(self, theta_keys: Mapping[str, str]) -> dict[str, Rope]:
        """The rotary embedding of each type of layer: `rope_parameters` by type (transformers 5), or a base
        for each type, and `rope_scaling` for the layers of full attention alone (4).

        Args:
          theta_keys: of each type of layer the key of its base in transformers 4.

        Returns:
          The rotary embedding of each of these types.

        Raises:
          UserError: as `take_rope`, and for a type of layer that is not among them.
        """
        by_type = dict(self._rest.pop("rope_parameters", None) or {})
        scaling = self._rest.pop("rope_scaling", None)
        share = self._rest.pop("partial_rotary_factor", None)
        thetas = {key: self.take(key) for key in set(theta_keys.values())}
        ropes = {}
        for layer_type, key in theta_keys.items():
            values = by_type.pop(layer_type, None) or {}
            if not isinstance(values, dict):
                raise UserError(
                    f"config.json sets {layer_type}={values!r:.100} in rope_parameters: expected an object"
                )
            if layer_type == FULL and scaling:
                values = {**values, **scaling}
            theta = self._defaults.get(key) if thetas[key] is None else thetas[key]
            if values.get("rope_theta") is None:
                values = {**values, "rope_theta": theta}
            ropes[layer_type] = self._rope(dict(values), share)
        if by_type:
            raise UserError(
                f"config.json sets rope_parameters with {sorted(by_type)!r:.100}: expected those of "
                f"{' and '.join(theta_keys)}"
            )
        return ropes

    def _rope(self, rope: dict, share, partial: bool = False) -> Rope:
        check_kinds(rope)
        theta = float(rope.pop("rope_theta", None) or self._defaults.get("rope_theta", 10000.0))
        own_share = rope.pop("partial_rotary_factor", None)
        share = float((share if own_share is None else own_share) or 1.0)
        rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        fields = _ROPE_FIELDS.get(rope_type)
        if fields is None:
            raise UserError(
                f"config.json asks for rope scaling {rope_type!r:.100}: expected {', '.join(_ROPE_FIELDS)}"
            )
        # Some files have it at the top, outside the scaling that it belongs to.
        original = self._known("original_max_position_embeddings")
        rope.setdefault(
            "original_max_position_embeddings", original or self._known("max_position_embeddings")
        )
        scaling = self._scaling(rope_type, rope, *fields) if fields else None
        if share != 1.0 and not partial:
            raise UserError(
                f"config.json sets partial_rotary_factor={share}, which is not supported in this "
                "family: expected 1.0"
            )
        return Rope(theta, scaling, share)

    def _known(self, key: str):
        return self._rest.get(key, self._defaults.get(key))

    def _scaling(self, rope_type: str, rope: dict, required: tuple, optional: tuple) -> RopeScaling | None:
        longest, original = self._known("max_position_embeddings"), rope["original_max_position_embeddings"]
        if rope.get("factor") is None and rope_type in ("yarn", "longrope"):
            rope["factor"] = longest / original
        rest = set(rope) - {*required, *optional, *_MSCALES, "original_max_position_embeddings"}
        if (
            rest
            or not set(required) <= set(rope)
            or (rope_type != "yarn" and not rope.keys().isdisjoint(_MSCALES))
        ):
            raise UserError(
                f"config.json's rope scaling {rope_type!r} has {sorted(rope)!r:.300}: expected "
                f"{sorted(required)}"
            )
        if rope_type == "dynamic" and original != longest:
            raise UserError(
                f"config.json's rope scaling 'dynamic' has original_max_position_embeddings={original}: "
                f"expected the model's context, {longest}, up to which it changes nothing"
            )
        rope["attention_factor"] = rope.get("attention_factor") or _attention_factor(rope_type, rope)
        given = {key: rope[key] for key in (*required, *optional) if rope.get(key) is not None}
        lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        return RopeScaling(rope_type, **{**given, **lists})

    def take_number(self, key: str, default: float, optional: bool = False) -> float | None:
        """Takes a number above 0; null only where it is optional.

        Raises:
          UserError: for another value.
        """
        value = self.take(key, default)
        if not is_number(value) and not (optional and value is None):
            expected = "a number above 0 or null" if optional else "a number above 0"
            raise UserError(f"config.json sets {key}={value!r:.100}: expected {expected}")
        return value

    def take_layer_types(self, default: Sequence[str], known: Sequence[str]) -> Sequence[str]:
        """The kind of attention of each layer by its name.

        Args:
          default: of each layer, where the file does not say it.
          known: what the family knows.

        Raises:
          UserError: for another one.
        """
        layers = self._rest.pop("layer_types", None) or default
        if others := set(layers) - set(known):
            raise UserError(
                f"config.json sets layer_types with {sorted(others)!r:.100}, which is not supported in this "
                f"family: expected {' or '.join(map(repr, known))}"
            )
        return layers

    def finish(self) -> tuple[str, ...]:
        """Ends the reading; returns the keys that are skipped, as they cannot change the forward pass.

        Raises:
          UserError: for a key that is left and may change the forward pass.
        """
        skipped = []
        for key, value in self._rest.items():
            if key in FIXED and value not in FIXED[key]:
                raise UserError(
                    f"config.json sets {key}={value!r:.100}, which is not supported: expected "
                    f"{FIXED[key][0]!r}"
                )
            if key in WITHOUT_EFFECT:
                skipped.append(key)
            elif key not in FIXED and key not in METADATA:
                raise UserError(
                    f"config.json sets {key:.100}={value!r:.100}, which this model does not know; "
                    "remove the key if it does not change what the model computes"
                )
        return tuple(skipped)


# Of each scaling the keys that it must have, and those that it may have.
_ORIGINAL = "original_max_position_embeddings"
_ROPE_FIELDS = {
    "default": (),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (("factor", _ORIGINAL), ("beta_fast", "beta_slow", "truncate", "attention_factor")),
    "longrope": (("factor", _ORIGINAL, "short_factor", "long_factor"), ("attention_factor",)),
}
_MSCALES = ("mscale", "mscale_all_dim")  # of which an attention factor follows


def _attention_factor(rope_type: str, rope: dict) -> float:
    """What cosines and sines are multiplied by where a file does not say it (YaRN eq. 22, LongRoPE)."""
    stretch = math.log(max(rope["factor"], 1.0))
    if rope_type == "longrope":
        return math.sqrt(1 + stretch / math.log(rope[_ORIGINAL]))
    if rope_type != "yarn":
        return 1.0
    above, below = (rope.get(key) for key in _MSCALES)
    above, below = (above, below) if above and below else (1.0, 0.0)
    return (0.1 * above * stretch + 1) / (0.1 * below * stretch + 1)


def rope_keys(rope: Rope) -> dict:
    """The keys of a `config.json` for a rotary embedding, which transformers 4 and 5 both read."""
    keys = {"rope_theta": rope.theta, "rope_scaling": _scaling_keys(rope) if rope.scaling else None}
    if rope.share != 1.0:
        keys["partial_rotary_factor"] = rope.share
    return keys


def rope_keys_by_type(ropes: Mapping[str, Rope], theta_keys: Mapping[str, str]) -> dict:
    """The keys of a `config.json` for a rotary embedding of each type of layer: the inverse of `take_ropes`.

    Args:
      ropes: the rotary embedding of each type of layer.
      theta_keys: of each type of layer the key of its base in transformers 4.

    Returns:
      Keys that transformers 4 and 5 both read; only 5 where another type than full attention has a scaling,
      which the keys of 4 cannot say.
    """
    if any(rope.scaling for layer_type, rope in ropes.items() if layer_type != FULL):
        return {
            "rope_parameters": {
                layer_type: {"rope_theta": rope.theta, **_scaling_keys(rope)}
                for layer_type, rope in ropes.items()
            }
        }
    thetas = {theta_keys[layer_type]: rope.theta for layer_type, rope in ropes.items()}
    return {**thetas, "rope_scaling": rope_keys(ropes[FULL])["rope_scaling"] if FULL in ropes else None}


def _scaling_keys(rope: Rope) -> dict:
    if rope.scaling is None:
        return {"rope_type": "default"}
    scaling = dataclasses.asdict(rope.scaling)
    rope_type = scaling["rope_type"]
    required, optional = _ROPE_FIELDS[rope_type]
    usual = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
    usual["attention_factor"] = _attention_factor(rope_type, scaling)
    keys = {key: scaling[key] for key in required}
    keys |= {key: scaling[key] for key in optional if scaling[key] != usual[key]}
    if rope_type == "longrope":  # it follows from the two contexts
        del keys["factor"]
    lists = {key: list(value) for key, value in keys.items() if isinstance(value, tuple)}
    return {"rope_type": rope_type, **keys, **lists}
