"""python -m prom_jax.generate --model=MODEL "prompt" [--raw] [--compare=BASE]
python -m prom_jax.generate --model=MODEL --interactive
python -m prom_jax.generate --model=MODEL --prompts=FILE --out=FILE

Answers a prompt, talks, or answers a file of prompts (JSONL with `prompt` or `messages` in, the same rows
with `answer` out; the same command goes on after a kill). Answers are sampled if the model comes with such
settings, and greedy otherwise. A prompt becomes an instruction in the template that the model was trained on
here, in other models' own chat template, or else in Alpaca's English one; --raw continues it as it is. MODEL
is whatever prom_jax loads.
"""

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prom_jax.checkpoints import generation, params
from prom_jax.checkpoints import pretrained as models
from prom_jax.evaluation.answers import Answers
from prom_jax.evaluation.talk import TEMPLATES, Talker, ctrl_c_sets
from prom_jax.parallel import flags
from prom_jax.tokenization import folder as tokenizers
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError, printable
from prom_jax.utils.workdir import write_text

CHUNK = 4  # new tokens between two looks
HELP = "Ctrl-C ends an answer, /new begins another conversation, Ctrl-D ends."


def main(argv=None):
    """Reads the command line and answers."""
    arguments = parse(argv)
    sampling = {
        name: value for name in generation.SAMPLING if (value := getattr(arguments, name)) is not None
    }
    talkers = [
        Talker(
            source,
            template=arguments.template,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.seed,
        )
        for source in (arguments.model, arguments.compare)
        if source
    ]
    for talker in talkers:
        if talker.skipped:
            print(f"skipped   {', '.join(talker.skipped)}, which {talker.source} asks for", file=sys.stderr)
    if arguments.prompts:
        answer_file(talkers, arguments)
    elif arguments.interactive:
        load(talkers, arguments)
        converse(talkers)
    else:
        prompts = [tokens_of({"prompt": arguments.prompt}, talker, arguments.raw) for talker in talkers]
        for prompt, talker in zip(prompts, talkers):
            talker.check(prompt)
        load(talkers, arguments)
        answer(talkers, prompts)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.generate", __doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help="the instruction, or with --raw the text to continue")
    add("--model", required=True, help="whatever prom_jax loads")
    add("--raw", action="store_true", help="continue the prompt as it is, without template")
    add(
        "--template",
        choices=TEMPLATES,
        default="auto",
        help="prompts in the model's own chat template, or in that of training here",
    )
    add("--interactive", action="store_true", help="a conversation")
    add("--compare", metavar="BASE", help="another model, whose answers are shown at the side")
    add("--prompts", metavar="FILE", help="JSONL with `prompt` or `messages` a line")
    add("--out", metavar="FILE", help="of --prompts: JSONL with `answer` besides")
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
    arguments = parser.parse_args(argv)
    asked = [arguments.prompt is not None, arguments.interactive, arguments.prompts is not None]
    if sum(asked) != 1:
        raise UserError("expected one of a prompt, --interactive and --prompts=FILE")
    if (arguments.out is None) != (arguments.prompts is None):
        raise UserError("--prompts=FILE and --out=FILE go together: give both")
    if arguments.interactive and arguments.raw:
        raise UserError("--raw continues one text: leave it or --interactive out")
    return arguments


def load(talkers: list[Talker], arguments: argparse.Namespace):
    """Loads the weights."""
    for talker in talkers:
        talker.load(flags.mesh(arguments), arguments.compute_dtype or models.default_compute_dtype())


def tokens_of(row: dict, talker: Talker, raw: bool) -> list[int]:
    """The tokens of a row with `prompt` or `messages`."""
    if raw:
        return talker.continuation(row["prompt"])
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    return talker.conversation(messages)


# One prompt, or a conversation.


def answer(talkers: list[Talker], prompts: list[list[int]], stop: threading.Event | None = None) -> list[str]:
    """Answers a prompt; prints the answer of one model as it comes, those of two side by side."""
    texts = []
    for talker, prompt in zip(talkers, prompts):
        show = Stream(stop) if len(talkers) == 1 else Silent(stop)
        ((_, text),) = talker.answers([prompt], watch=show, chunk=CHUNK)
        show.finish(text)
        texts.append(text)
    if len(talkers) > 1:
        console.print(side_by_side(talkers, texts))
    return texts


class Silent:
    """Watches an answer; ends it when asked to."""

    def __init__(self, stop: threading.Event | None):
        self._stop = stop

    def __call__(self, number: int, text: str) -> bool:
        return self._stop is not None and self._stop.is_set()

    def finish(self, text: str):
        """Takes the whole answer."""


class Stream(Silent):
    """Prints what is new of an answer each time that it is called, and never again what is shown."""

    def __init__(self, stop: threading.Event | None = None):
        super().__init__(stop)
        self._shown = ""

    def __call__(self, number: int, text: str) -> bool:
        if text.startswith(self._shown):
            print(text.removeprefix(self._shown), end="", flush=True)
            self._shown = text
        return super().__call__(number, text)

    def finish(self, text: str):
        """Prints what is left."""
        self(0, text)
        print(flush=True)


def side_by_side(talkers: list[Talker], texts: list[str]) -> Table:
    """Answers in columns."""
    table = Table(box=box.SIMPLE, expand=True)
    for talker in talkers:
        table.add_column(Text(printable(talker.source)), ratio=1, overflow="fold")
    table.add_row(*map(Text, texts))
    return table


def converse(talkers: list[Talker]):
    """Talks until the user ends it; each model sees what it has said itself."""
    print(HELP)
    histories = [[] for _ in talkers]
    while True:
        try:
            said = input("> ").encode(errors="surrogateescape").decode(errors="replace").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("That was not UTF-8.")
            continue
        if said == "/new":
            histories = [[] for _ in talkers]
        if not said or said == "/new":
            continue
        asked = [[*history, {"role": "user", "content": said}] for history in histories]
        try:
            prompts = [talker.conversation(messages) for talker, messages in zip(talkers, asked)]
            for talker, prompt in zip(talkers, prompts):
                talker.check(prompt, "The conversation")
        except UserError as error:
            print(f"{error}; /new begins another one")
            continue
        stop = threading.Event()
        with ctrl_c_sets(stop):
            texts = answer(talkers, prompts, stop)
        histories = [
            [*messages, {"role": "assistant", "content": text}] for messages, text in zip(asked, texts)
        ]


# A file of prompts.


def answer_file(talkers: list[Talker], arguments: argparse.Namespace):
    """Answers all rows of a file. What is made so far is kept in a file next to --out until all is there."""
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out={out} is there already: give another one, or remove it")
    rows = read_rows(Path(arguments.prompts), arguments.raw)
    names = ("answer", "compared")[: len(talkers)]
    asked = [questions(rows, names, talker, arguments.raw) for talker in talkers]
    load(talkers, arguments)
    part = out.with_name(f"{out.name}.part")
    depends_on: dict[str, Any] = {
        f"model {number}": f"{params.fingerprint(talker.reader)}-{tokenizers.fingerprint(talker.tokenizer)}"
        for number, talker in enumerate(talkers, 1)
    }
    depends_on |= {
        "compute_dtype": arguments.compute_dtype or models.default_compute_dtype(),
        "max_new_tokens": arguments.max_new_tokens,
        "sampling": [str(talker.sampling) for talker in talkers],
        "seed": arguments.seed,
    }
    answers = Answers(part, depends_on)
    for name, talker, of_talker in zip(names, talkers, asked):

        def compute(missing, talker=talker):
            prompts, numbers = ([question[place] for question in missing] for place in (1, 2))
            return talker.answers(prompts, numbers)

        for row, text in zip(rows, answers.ask(of_talker, compute, f"answers of {printable(talker.source)}")):
            row[name] = text
    answers.close()
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.unlink()
    console.print(f"wrote {out}")


def read_rows(path: Path, raw: bool) -> list[dict]:
    """The rows of a JSONL file.

    Raises:
      UserError: for a file that cannot be read, or a row that is none; it is named by its line.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path} cannot be read ({error}): expected JSONL in UTF-8") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not (isinstance(row.get("prompt"), str) or (not raw and is_conversation(row.get("messages")))):
                raise ValueError("no text `prompt`" + " and no list `messages`" * (not raw))
        except (ValueError, AttributeError, RecursionError) as error:
            example = '{"prompt": "…"}' + ' or {"messages": [{"role": "user", "content": "…"}]}' * (not raw)
            raise UserError(f"{path}, line {number} ({error}): expected {example}") from error
        rows.append(row)
    if not rows:
        raise UserError(f"--prompts={path} has no rows: expected one JSON object a line")
    return rows


def is_conversation(messages) -> bool:
    """Whether something is a list of messages, each with a role and a text."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict) and {type(message.get(key)) for key in ("role", "content")} == {str}
            for message in messages
        )
    )


def questions(rows: list[dict], names, talker: Talker, raw: bool) -> list[list]:
    """What `Answers` keeps answers by: the model, the tokens, and if answers are drawn the row's number.

    Raises:
      UserError: for a row that has an answer already, or that is too long or empty.
    """
    found = []
    for number, row in enumerate(rows):
        if taken := [name for name in names if name in row]:
            raise UserError(f"row {number + 1} has {taken[0]!r} already: rename it")
        tokens = tokens_of(row, talker, raw)
        talker.check(tokens, f"row {number + 1}")
        found.append([talker.source, tokens, number if talker.sampling else 0])
    return found


if __name__ == "__main__":
    cli.guard(main)
