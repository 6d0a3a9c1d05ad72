"""From examples to encoded texts, and what becomes of each: kept, cut or dropped, counted by role."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prom_jax.data.chat_templates import find_template
from prom_jax.data.examples import Example, Recipe, role_in
from prom_jax.data.templates import Dialogue, Plain, Span, Template, Unusable
from prom_jax.data.tokens import EncodedText, encode
from prom_jax.utils.errors import UserError

COUNTS = ("examples", "tokens", "loss_tokens", "text_tokens", "bytes", "words", "truncated", "dropped")
NO_TARGET = "its target is dropped"  # why a text is dropped that could be used


@dataclass(frozen=True)
class Encoder:
    """Puts examples into a template and tokenises them.

    tokenizer: a fast transformers tokenizer.
    recipe: of the examples.
    template: what they are put into.
    """

    tokenizer: Any
    recipe: Recipe
    template: Template

    @classmethod
    def of(cls, recipe: Recipe, tokenizer) -> "Encoder":
        """With the template that a recipe names."""
        return cls(tokenizer, recipe, find_template(recipe.template, tokenizer))

    def can_use(self, example: Example) -> bool:
        """Whether something to learn is left of an example."""
        return any(True for _ in self.encode([example], {}))

    def encode(
        self, examples: list[Example], counts: dict[str, Counter]
    ) -> Iterator[tuple[Example, dict[str, EncodedText]]]:
        """(example, texts by stream) of those that keep something to learn.

        Args:
          counts: by role, gets what becomes of each text.
        """
        usable = []
        for example in examples:
            if example.unusable:
                of_role = counts.setdefault(example.role, Counter())
                of_role.update({"dropped": 1, ("reason", example.unusable): 1})
            else:
                usable.append((example, {s: self._spans(text) for s, text in example.texts.items()}))
        spans = [s for _, texts in usable for s in texts.values() if not isinstance(s, Unusable)]
        encoded = iter(encode(self.tokenizer, spans, self.recipe.seq_len, self.template))
        for example, texts in usable:
            kept: dict[str, EncodedText] = {}
            for number, (stream, rendered) in enumerate(texts.items()):
                of_role = counts.setdefault(role_in(stream, example.role), Counter())
                text = rendered if isinstance(rendered, Unusable) else next(encoded)
                if self.recipe.too_long == "drop" and isinstance(text, EncodedText) and text.truncated:
                    text = Unusable("longer than data.seq_len")
                # The others go with the first, which is the target's where there is one.
                is_kept = _count(of_role, text, with_target=number == 0 or bool(kept))
                if is_kept and isinstance(text, EncodedText):
                    kept[stream] = text
            if kept:
                yield example, kept
            for stream, whole in kept.items():
                for piece in whole.rest:
                    if _count(counts[role_in(stream, example.role)], piece):
                        yield example, {stream: piece}

    def _spans(self, text: Dialogue | Plain) -> list[Span] | Unusable:
        """What the model reads of a text, or why it cannot."""
        try:
            return self.template.spans(text)
        except Unusable as error:
            return error


def _count(counts: Counter, text: EncodedText | Unusable, with_target: bool = True) -> bool:
    """Enters a text in its role's counts; whether it is kept: it has text to learn, and its target too."""
    if isinstance(text, Unusable):
        counts.update({"dropped": 1, ("reason", str(text) if with_target else NO_TARGET): 1})
        return False
    kept = with_target and text.words > 0
    if kept:
        of_loss = int(text.loss.sum())
        counts["examples"] += 1
        counts["tokens"] += len(text.tokens)
        counts["loss_tokens"] += of_loss
        counts["text_tokens"] += of_loss - text.eos
        counts["bytes"] += text.bytes
        counts["words"] += text.words
        counts["truncated"] += text.truncated
    else:
        reason = "nothing left after cutting" if text.truncated else "no response"
        counts.update({"dropped": 1, ("reason", reason if with_target else NO_TARGET): 1})
    return kept


def summed(counts: Iterable[dict[str, Counter]]) -> dict[str, dict]:
    """Counts of several parts, by role, as JSON has them."""
    total: dict[str, Counter] = {}
    for of_part in counts:
        for role, numbers in of_part.items():
            total.setdefault(role, Counter()).update(numbers)
    return {
        role: {name: numbers[name] for name in COUNTS}
        | {"reasons": {key[1]: number for key, number in numbers.items() if isinstance(key, tuple)}}
        for role, numbers in total.items()
    }


def check_lengths(recipe: Recipe, counts: dict[str, dict]) -> None:
    """Raises UserError for texts that are too long, where these are refused."""
    long = {role: numbers["truncated"] for role, numbers in counts.items() if numbers["truncated"]}
    if recipe.too_long == "refuse" and long:
        numbers = ", ".join(f"{number:,} of {role}" for role, number in long.items())
        raise UserError(
            f"{sum(long.values()):,} texts are longer than data.seq_len={recipe.seq_len} ({numbers}): raise "
            "it, or set data.too_long to cut or drop."
        )
