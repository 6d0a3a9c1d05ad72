"""A model of ours as lm-evaluation-harness sees it: it generates and scores text, without torch."""

import json
from collections import defaultdict

import jinja2

from prom_jax.checkpoints.generation import stop_tokens
from prom_jax.evaluation.answers import Answers
from prom_jax.evaluation.decode import SLOTS, decode
from prom_jax.evaluation.score import score
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import quiet_loggers

with needs("eval"):
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

MAX_NEW_TOKENS = 256  # where a task does not say
NO_MATTER_IF_GREEDY = {"temperature", "top_p", "top_k", "min_p", "num_beams", "num_return_sequences"}


class HarnessModel(TemplateLM):
    """What `lm_eval.simple_evaluate(model=…)` takes.

    Every process of a mesh gets the same requests and computes its part of each batch; to the harness they
    are one (`world_size` 1), so that it needs no torch.

    Args:
      model, tokenizer: of `models.load`.
      bos: whether texts begin with the BOS token; the paper's harness leaves it out.
      max_length: tokens of a prompt and its answer; None for the model's context.
      slots: tokens whose keys and values are in memory at a time, over all devices.

    Attributes:
      answers: those already made, and where new ones go.

    Raises:
      UserError: for `bos` with a tokenizer that has no such token.
    """

    backend = "causal"

    def __init__(
        self, model, tokenizer, *, bos: bool = False, max_length: int | None = None, slots: int = SLOTS
    ):
        super().__init__()
        if bos and tokenizer.bos_token_id is None:
            raise UserError("--bos: this tokenizer has no BOS token; leave it out")
        context = model.config.max_position_embeddings
        if max_length and max_length > context:
            raise UserError(f"--max_length={max_length}: the model's context has {context} tokens; give less")
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length or context
        self.answers = Answers(None, {})
        self._bos = [tokenizer.bos_token_id] if bos else []
        self._slots = slots
        self._eos = set(stop_tokens(model.config, tokenizer))
        self._chat_template, self._told_of_system = tokenizer.chat_template, False

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after: BOS, or where there is none EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own caches."""
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids, with BOS in front if the model was made so; `add_special_tokens=False` leaves it out."""
        tokens = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        has_bos = tokens[:1] == [self.tokenizer.bos_token_id]  # of a chat template
        return tokens if add_special_tokens is False or has_bos else self._bos + tokens

    def chat_template(self, name: bool | str = True) -> str:
        """The tokenizer's chat template, or that of several which has a name; it is then used.

        Raises:
          UserError: if there is none.
        """
        try:
            template = self.tokenizer.get_chat_template(name if isinstance(name, str) else None)
        except ValueError as error:
            raise UserError(
                f"--apply_chat_template: the tokenizer has no such chat template ({error}): leave it out"
            ) from error
        self._chat_template = template
        return template

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """The prompt of a conversation, in the template that `chat_template` gave. As in the harness's own
        model, a template that knows no system role gets a conversation without it."""

        def apply(messages):
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return apply(chat_history)
        except jinja2.TemplateError:
            if not self._told_of_system:
                console.print("WARNING   the chat template takes no system instruction: it is left out")
                self._told_of_system = True
            return apply([message for message in chat_history if message["role"] != "system"])

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Greedy answers, each up to the first of its stop strings.

        A prompt that leaves too few tokens of the context for its answer is cut on the left.

        Raises:
          UserError: for sampling, or an answer as long as the whole context.
        """
        by_settings = defaultdict(list)
        for number, (prompt, settings) in enumerate(request.args for request in requests):
            by_settings[json.dumps(_generation(settings))].append((number, prompt))
        texts = {}
        for settings, group in by_settings.items():
            stops, max_new_tokens = json.loads(settings)
            answers = self._generate([prompt for _, prompt in group], stops, max_new_tokens)
            texts |= {number: text for (number, _), text in zip(group, answers)}
        return [texts[number] for number in range(len(requests))]

    def _generate(self, prompts: list[str], stops: list[str], max_new_tokens: int) -> list[str]:
        capacity = self.max_length - max_new_tokens
        if capacity < 1:
            raise UserError(
                f"max_gen_toks={max_new_tokens} leaves no token for a prompt in a context of "
                f"{self.max_length} tokens: lower it in the task"
            )
        tokens = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        _warn_if_cut(tokens, capacity)
        questions = [[prompt[-capacity:], stops, max_new_tokens] for prompt in tokens]
        ending = self._eos | tokens_with(self.tokenizer, stops)
        # A stop string of several characters can also come about between tokens.
        several = [stop for stop in stops if len(stop) > 1]

        def watch(_, answer):
            return any(stop in self._text(answer) for stop in several)

        def compute(asked: list[list]):
            contexts = [question[0] for question in asked]
            watching = watch if several else None
            made = decode(self.model, contexts, max_new_tokens, ending, watch=watching, slots=self._slots)
            for number, answer in made:
                yield number, _cut(self._text(answer), stops)

        return self.answers.ask(questions, compute, "answers")

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """Of (strings, context, continuation) in tokens: the log-likelihood, and whether it is greedy's."""
        capacity = self.max_length + 1  # the last token is only predicted
        texts = [[*context, *continuation] for _, context, continuation in requests]
        _warn_if_cut(texts, capacity)
        pairs = []
        for text, (_, _, continuation) in zip(texts, requests):
            kept = text[-capacity:]
            own = min(len(continuation), len(kept) - 1)
            pairs.append((kept[:-own], kept[-own:]))

        def compute(asked: list[tuple[list[int], list[int]]]):
            for number, log, greedy in score(self.model, asked, slots=self._slots):
                yield number, [log, greedy]

        return [tuple(answer) for answer in self.answers.ask(pairs, compute, "log-likelihoods")]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context's length."""
        windows, of = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolled = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolled]
            of += [number] * (len(windows) - len(of))
        totals = [0.0] * len(requests)
        for number, (log, _) in zip(of, self._loglikelihood_tokens(windows)):
            totals[number] += log
        return totals


def tokens_with(tokenizer, stops: list[str]) -> set[int]:
    """The tokens that hold a stop string by themselves, which therefore end an answer on the device."""
    if not stops:
        return set()
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token for token, text in enumerate(texts) if any(stop in text for stop in stops)}


def _generation(settings: dict) -> tuple[list[str], int]:
    """Stop strings and the number of new tokens of a task's generation_kwargs."""
    with quiet_loggers("lm_eval"):  # what it warns of is what it is asked for
        normal = normalize_gen_kwargs({"until": [], **settings}, MAX_NEW_TOKENS)
    until, length = normal.pop("until"), normal.pop("max_gen_toks")
    if normal.pop("do_sample") or normal.get("num_beams", 1) > 1:
        raise UserError(f"generation_kwargs {settings}: only greedy decoding is done; set do_sample: false")
    unknown = normal.keys() - NO_MATTER_IF_GREEDY
    if unknown:
        raise UserError(
            f"generation_kwargs {settings}: {', '.join(sorted(unknown))} would change the answers, and is "
            "not supported; leave it out"
        )
    return [stop for stop in until or [] if stop], length


def _cut(text: str, stops: list[str]) -> str:
    """What comes before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _warn_if_cut(texts: list[list[int]], capacity: int):
    cut = sum(len(text) > capacity for text in texts)
    if cut:
        console.print(
            f"WARNING   {cut} of {len(texts)} prompts are longer than {capacity} tokens and cut on the left"
        )
