"""python -m prom_jax.generate --model=MODEL "prompt" [--raw]

Streams a model's answer, to try it by hand: sampled if the model comes with such settings, greedy otherwise.
The prompt becomes an instruction in the template that the model was trained on here, Alpaca's English one for
other models; --raw continues it as it is. MODEL is whatever prom_jax loads.
"""

import argparse
import sys

from prom_jax.checkpoints import generation
from prom_jax.checkpoints import pretrained as models
from prom_jax.data.chat import chat_template
from prom_jax.data.tokens import bos_ids
from prom_jax.evaluation.decode import decode
from prom_jax.evaluation.sampling import Sampling
from prom_jax.parallel import flags
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError

CHUNK = 4  # new tokens between two looks
INCOMPLETE = 3  # tokens at most that the beginning of a character is, in bytes
# Settings of generation that are not done here, at the values at which they do nothing.
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1.0}


def main(argv=None):
    """Reads the command line and answers."""
    answer(parse(argv))


def answer(arguments: argparse.Namespace):
    """Prints the answer to a prompt as it comes."""
    reader, tokenizer = models.open_source(arguments.model)
    prompt, sampling = _prompt(arguments, reader, tokenizer), _sampling(arguments, reader.config)
    longest = reader.config.max_position_embeddings - arguments.max_new_tokens
    if not 0 < len(prompt) <= longest:
        raise UserError(
            f"The prompt has {len(prompt)} tokens: expected 1 to {longest}, which leaves "
            f"{arguments.max_new_tokens} of the model's context for the answer (--max_new_tokens)"
        )
    compute_dtype = arguments.compute_dtype or models.default_compute_dtype()
    model = models.build(reader, flags.mesh(arguments), compute_dtype, param_dtype=compute_dtype)
    stops, show = generation.stop_tokens(reader.config, tokenizer), Stream(tokenizer)
    for _, tokens in decode(
        model,
        [prompt],
        arguments.max_new_tokens,
        stops,
        sampling=sampling,
        seed=arguments.seed,
        watch=show,
        chunk=CHUNK,
    ):
        show(0, tokens[:-1] if tokens[-1] in stops else tokens)
    print()


def _prompt(arguments, reader, tokenizer) -> list[int]:
    """The prompt's tokens, with BOS as the tokenizer adds it, and never with EOS."""
    if arguments.raw:
        ids = tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"]
        return bos_ids(tokenizer) + ids if ids else []
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.prompt}],
        chat_template=chat_template(tokenizer, reader.details.get("prompts", "en")),
        add_generation_prompt=True,
        return_dict=False,
    )


def _sampling(arguments, config) -> Sampling | None:
    """How tokens are drawn: as the model comes with it, but for what the flags say; None for greedily."""
    given = {key: value for key in generation.SAMPLING if (value := getattr(arguments, key)) is not None}
    settings = generation.sampling(config) | generation.check(given, "the command line")
    skipped = [key for key, neutral in NEUTRAL.items() if config.generation.get(key, neutral) != neutral]
    if skipped:
        print(f"skipped   {', '.join(skipped)}, which the model asks for", file=sys.stderr)
    if not settings or settings.get("temperature") == 0:
        return None
    return Sampling(**settings)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.generate", __doc__)
    add = parser.add_argument
    add("prompt", help="the instruction, or with --raw the text to continue")
    add("--model", required=True, help="whatever prom_jax loads")
    add("--raw", action="store_true", help="continue the prompt as it is, without template")
    new = cli.at_least(1)
    add("--max_new_tokens", metavar="N", type=new, default=256, help="of the answer at most")
    sampled = parser.add_argument_group("sampling", "Default: as the model comes with it, or else greedy.")
    add = sampled.add_argument
    add("--temperature", metavar="X", type=cli.number, help="logits are divided by it; 0: greedy")
    add("--top_k", metavar="N", type=cli.integer, help="tokens that are left; 0: all")
    add("--top_p", metavar="X", type=cli.number, help="probability that is left")
    add("--min_p", metavar="X", type=cli.number, help="least share of the largest probability")
    add("--seed", metavar="N", type=cli.integer, default=0, help="of the draws")
    flags.add_compute(parser, data=-1, fsdp=1)
    return parser.parse_args(argv)


class Stream:
    """Prints what is new of an answer each time that it is called; never ends the answer, and never prints
    again what is shown.

    The last character of a text may be there in part, and its bytes then make others unreadable that are
    whole: so much of the answer is shown as reads well.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self._shown = tokenizer, ""

    def __call__(self, number: int, answer: list[int]) -> bool:
        for left_out in range(INCOMPLETE + 1):
            tokens = answer[: len(answer) - left_out]
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if text.startswith(self._shown) and not text.endswith("\ufffd"):
                print(text.removeprefix(self._shown), end="", flush=True)
                self._shown = text
                break
        return False


if __name__ == "__main__":
    cli.guard(main)
