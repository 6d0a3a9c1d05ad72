"""Choosing the next token of an answer by chance."""

import dataclasses

import jax
import jax.numpy as jnp

from prom_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws tokens as transformers does with the settings of the same names.

    Attributes:
      temperature: logits are divided by it; above 0.
      top_k: how many of the most probable tokens are left; 0 for all.
      top_p: of these, the fewest whose probabilities sum to it.
      min_p: of these, those of at least this share of the largest probability.

    Raises:
      UserError: for a temperature that is not above 0.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: expected a number above 0")

    def limit(self, logits):
        """Logits [..., V] in float32 of the distribution to draw from; -inf for tokens that are left out."""
        logits = logits.astype(jnp.float32) / self.temperature
        falling = -jnp.sort(-logits, axis=-1)
        ranks = jnp.arange(falling.shape[-1])
        kept = ranks < (self.top_k or falling.shape[-1])
        probabilities = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        if self.top_p < 1:  # rounded sums of nearly all reach 1 before the last
            kept &= before < self.top_p
        kept &= probabilities >= self.min_p * probabilities[..., :1]
        kept |= ranks == 0
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)

    def choose(self, logits, seed, numbers, step):
        """Tokens [...] drawn by logits [..., V], for the `step`-th token of the answers with these numbers
        [...]. An answer's draws depend on its number and the seed alone, not on what is drawn with it."""

        def draw(limited_V, number):
            key = jax.random.key(seed)
            for part in (number, step):
                key = jax.random.fold_in(key, part)
            return jax.random.categorical(key, limited_V)

        for _ in numbers.shape:
            draw = jax.vmap(draw)
        return draw(self.limit(logits), numbers)
