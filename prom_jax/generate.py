"""python -m prom_jax.generate --model=MODEL "prompt" [--raw]

Streams a model's greedy answer, to try it by hand. The prompt becomes an instruction in the template that the
model was trained on here, Alpaca's English one for other models; --raw continues it as it is. MODEL is
whatever prom_jax loads.
"""

import argparse

from prom_jax.checkpoints import pretrained as models
from prom_jax.data.chat import chat_template
from prom_jax.evaluation.decode import decode
from prom_jax.parallel import flags
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError

CHUNK = 4  # new tokens between two looks


def main(argv=None):
    """Reads the command line and answers."""
    answer(parse(argv))


def answer(arguments: argparse.Namespace):
    """Prints the answer to a prompt as it comes."""
    reader, tokenizer = models.open_source(arguments.model)
    if arguments.raw:
        prompt = tokenizer(arguments.prompt)["input_ids"]
    else:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": arguments.prompt}],
            chat_template=chat_template(tokenizer, reader.details.get("prompts", "en")),
            add_generation_prompt=True,
            return_dict=False,
        )
    longest = reader.config.max_position_embeddings - arguments.max_new_tokens
    if not 0 < len(prompt) <= longest:
        raise UserError(
            f"The prompt has {len(prompt)} tokens: expected 1 to {longest}, which leaves "
            f"{arguments.max_new_tokens} of the model's context for the answer (--max_new_tokens)"
        )
    compute_dtype = arguments.compute_dtype or models.default_compute_dtype()
    model = models.build(reader, flags.mesh(arguments), compute_dtype, param_dtype=compute_dtype)
    show = Stream(tokenizer)
    for _, tokens in decode(
        model, [prompt], arguments.max_new_tokens, [tokenizer.eos_token_id], watch=show, chunk=CHUNK
    ):
        show(0, tokens)
    print()


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.generate", __doc__)
    add = parser.add_argument
    add("prompt", help="the instruction, or with --raw the text to continue")
    add("--model", required=True, help="whatever prom_jax loads")
    add("--raw", action="store_true", help="continue the prompt as it is, without template")
    new = cli.at_least(1)
    add("--max_new_tokens", metavar="N", type=new, default=256, help="of the answer at most")
    flags.add_compute(parser, data=-1, fsdp=1)
    return parser.parse_args(argv)


class Stream:
    """Prints what is new of an answer each time that it is called; never ends the answer."""

    def __init__(self, tokenizer):
        self._tokenizer, self._shown = tokenizer, ""

    def __call__(self, number: int, answer: list[int]) -> bool:
        text = self._tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd")  # half a character
        print(text.removeprefix(self._shown), end="", flush=True)
        self._shown = text
        return False


if __name__ == "__main__":
    cli.guard(main)
