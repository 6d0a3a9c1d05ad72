"""The methods, a file each; whatever stands here is known by the name of its file.

With h_i the hidden state after block i:

  prom      λ · smoothed CE(pivot_head(h_n), English) + CE(lm_head(h_N), target)
  xllama2   CE(lm_head(h_N), English and target together)
  bactrian  CE(lm_head(h_N), target)

and its rivals and controls:

  pcgrad            xllama2's, with each language's gradient projected where it conflicts with the other's
  deep_supervision  CE(lm_head(h_N), target) + CE(lm_head(h_j), English) + CE(lm_head(h_i), English prompt)
  english_last      λ · smoothed CE(lm_head(h_N), English) + CE(lm_head(h_N), target)
  shuffled          prom's, with the English texts dealt out anew among the pairs
"""

import functools
import importlib
import pkgutil

from prom_jax.training.objective import Method
from prom_jax.utils.errors import UserError


@functools.cache
def known_methods() -> dict[str, type[Method]]:
    """The methods by name: the METHOD of every module here."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in names}


def find_method(name: str) -> type[Method]:
    """A method by its name.

    Raises:
      UserError: there is none.
    """
    if name not in known_methods():
        raise UserError(f"method={name!r}: expected one of {', '.join(known_methods())}")
    return known_methods()[name]
