"""A model that is talked to: how it is asked, and how its answers end and are drawn."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from prom_jax.checkpoints import generation
from prom_jax.checkpoints import pretrained as models
from prom_jax.data.chat import chat_template, template_of
from prom_jax.data.tokens import bos_ids
from prom_jax.evaluation.decode import CHUNK, decode
from prom_jax.evaluation.sampling import Sampling
from prom_jax.models.decoder import Decoder
from prom_jax.utils.errors import UserError

TEMPLATES = ("auto", "model", "training")
INCOMPLETE = 3  # tokens at most that the beginning of a character is, in bytes
# Settings of generation that are not done here, at the values at which they do nothing.
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1.0}


class Talker:
    """A model with its tokenizer; the weights are loaded by `load`, so that mistakes in prompts show before.

    Args:
      source: whatever prom_jax loads.
      template: 'training' for the prompt of training, in English if the model was not trained here; 'model'
        for the tokenizer's own chat template; 'auto' for the first of models that were trained here, the
        second where there is one, else the first.
      max_new_tokens: of an answer at most.
      sampling: settings by name, in place of those that the model comes with; a temperature of 0 is greedy.
      seed: of the draws.

    Attributes:
      skipped: names of settings that the model asks for and that are not done.

    Raises:
      UserError: for a source that cannot be read, or a template or settings that cannot be used.
    """

    def __init__(self, source, *, template: str, max_new_tokens: int, sampling: dict, seed: int = 0):
        self.source, self.max_new_tokens, self.seed = str(source), max_new_tokens, seed
        self.reader, self.tokenizer = models.open_source(source)
        config, details = self.reader.config, self.reader.details
        self.stops = generation.stop_tokens(config, self.tokenizer)
        self._template = self.tokenizer.chat_template
        if template == "model" and not self._template:
            raise UserError(f"--template=model: {source} has no chat template of its own; leave it out")
        if template == "training":
            self._template = chat_template(self.tokenizer, str(details.get("prompts", "en")))
        elif template == "auto":
            self._template = template_of(self.tokenizer, details) or chat_template(self.tokenizer)
        settings = generation.sampling(config) | generation.check(sampling, "the command line")
        greedy = not settings or settings.get("temperature") == 0
        self.sampling = None if greedy else Sampling(**settings)
        self.skipped = [
            key for key, neutral in NEUTRAL.items() if config.generation.get(key, neutral) != neutral
        ]
        self._model: Decoder | None = None

    def load(self, mesh, compute_dtype: str):
        """Loads the weights."""
        self._model = models.build(self.reader, mesh, compute_dtype, param_dtype=compute_dtype)

    def continuation(self, text: str) -> list[int]:
        """The tokens of a text to continue, with BOS as the tokenizer adds it, and never with EOS."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return bos_ids(self.tokenizer) + ids if ids else []

    def conversation(self, messages: list[dict]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
          UserError: if the chat template refuses it.
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # a template is a program of others'
            raise UserError(
                f"{self.source}: its chat template does not take the conversation ({error}): change the "
                "roles, or give another --template"
            ) from error

    def check(self, prompt: list[int], name: str = "The prompt"):
        """Raises UserError for a prompt of no token, or one that leaves too few of the context to answer."""
        longest = self.reader.config.max_position_embeddings - self.max_new_tokens
        if not 0 < len(prompt) <= longest:
            raise UserError(
                f"{name} has {len(prompt)} tokens: expected 1 to {longest}, which leaves "
                f"{self.max_new_tokens} of the model's context for the answer (--max_new_tokens)"
            )

    def answers(
        self,
        prompts: Sequence[list[int]],
        numbers: Sequence[int] | None = None,
        watch: Callable[[int, str], bool] | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[tuple[int, str]]:
        """Answers as they become ready: a prompt's index and the text.

        Args:
          prompts: tokens.
          numbers: what their draws depend on besides the seed (`decode`).
          watch: called every `chunk` tokens with a prompt's index and its text so far; true ends the answer.
        """

        def seen(number, tokens):
            return watch(number, readable(self.tokenizer, tokens))

        found = decode(
            self._model,
            prompts,
            self.max_new_tokens,
            self.stops,
            sampling=self.sampling,
            seed=self.seed,
            numbers=numbers,
            watch=seen if watch else None,
            chunk=chunk,
        )
        for number, tokens in found:
            yield number, readable(self.tokenizer, tokens[:-1] if tokens[-1] in self.stops else tokens)


def readable(tokenizer, tokens: list[int]) -> str:
    """The text of tokens, but for a last character that is there in part: its bytes make others unreadable
    that are whole."""
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    texts = [whole]
    while texts[-1].endswith("\ufffd") and len(texts) <= min(INCOMPLETE, len(tokens)):
        texts.append(tokenizer.decode(tokens[: -len(texts)], skip_special_tokens=True))
    return next((text for text in texts if not text.endswith("\ufffd")), whole)


@contextlib.contextmanager
def ctrl_c_sets(event: threading.Event):
    """In the block, the first Ctrl-C sets the event in place of raising KeyboardInterrupt."""

    def handler(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
