"""python -m prom_jax.evaluate --model=MODEL --tasks=xquad_th,mgsm_th --out=DIR [--data_dir=DATA] [--limit=N]

Evaluates a model through lm-evaluation-harness, on one device or a mesh. DIR gets results.json, samples.jsonl
(every prompt, answer and score) and answers.jsonl, from which a killed evaluation goes on when the same
command is given again. MODEL is whatever prom_jax loads; tasks are the project's own (docs/evaluation.md),
any of the harness's, YAML files of yours, or `english`.
"""

import argparse
import json
import time
from pathlib import Path

from rich import box
from rich.table import Table

from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.data.chat import template_of
from prom_jax.data.templates import language_name
from prom_jax.evaluation import harness
from prom_jax.evaluation.answers import Answers
from prom_jax.evaluation.decode import SLOTS
from prom_jax.evaluation.lm import HarnessModel
from prom_jax.parallel import flags
from prom_jax.parallel.multihost import main_process_first
from prom_jax.parallel.sharding import describe
from prom_jax.tokenization import folder as tokenizer
from prom_jax.utils import cli
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import check_shared, make_directory, write_json, write_text


def main(argv=None):
    """Reads the command line and evaluates."""
    arguments = parse(argv)
    with flags.processes(arguments):
        evaluate(arguments)


def evaluate(arguments: argparse.Namespace):
    """Answers all tasks and writes what came out; several processes go through this in step."""
    out = Path(arguments.out)
    with main_process_first("out"):
        make_directory(out)
        check_shared(out)
    tasks = harness.load_tasks(  # before any weights
        arguments.tasks,
        arguments.data_dir,
        words=arguments.words,
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
    )
    lm, header = load_model(arguments)
    prompting = prompt_settings(arguments)
    depends_on = header["settings"] | {"model": header["model"]["fingerprint"]}
    lm.answers = Answers(out / "answers.jsonl", depends_on)
    begun = time.perf_counter()
    results, samples = harness.evaluate(
        lm,
        tasks,
        arguments.limit,
        chat=arguments.apply_chat_template,
        multiturn=arguments.fewshot_as_multiturn,
        system=arguments.system_instruction,
        language=arguments.language,
    )
    seconds = time.perf_counter() - begun
    header["settings"] |= prompting | {"limit": arguments.limit}
    lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
    write_text(out / "samples.jsonl", "".join(lines))
    write_json(out / "results.json", header | {"tasks": results})
    console.print(results_table(results))
    console.print(f"{seconds:,.0f} s; wrote {out}/results.json and {out}/samples.jsonl")


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.evaluate", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="whatever prom_jax loads")
    add("--tasks", metavar="NAMES", type=cli.names, required=True, help="such as xquad_th,mgsm_th")
    add("--out", metavar="DIR", required=True, help="a folder for the results")
    add(
        "--data_dir",
        metavar="DIR",
        help="folder with the official files below it (default: the hub)",
    )
    add("--words", metavar="FILE", help="words of prompts by language, JSON (default: the project's own)")
    add("--include_path", metavar="DIR", help="folder with YAML files of further tasks (default: none)")
    add(
        "--num_fewshot",
        metavar="N",
        type=cli.at_least(0),
        help="examples in a prompt (default: what the task says, or none)",
    )
    add(
        "--apply_chat_template",
        metavar="NAME",
        nargs="?",
        const=True,
        default=False,
        type=template,
        help="prompts go through the tokenizer's chat template (of several, that of this name)",
    )
    add(
        "--fewshot_as_multiturn",
        metavar="BOOL",
        nargs="?",
        const=True,
        type=boolean,
        help="examples are turns of the conversation (default: with --apply_chat_template)",
    )
    add("--system_instruction", metavar="TEXT", help="before every prompt (default: none)")
    add(
        "--language",
        metavar="CODE",
        help="that replies should be in, of tasks that do not say it: right_script and right_language",
    )
    number = cli.at_least(1)
    add(
        "--limit",
        metavar="N",
        type=number,
        help="only the first N documents of each task (default: all)",
    )
    add("--bos", action="store_true", help="texts begin with the BOS token; the paper's do not")
    add(
        "--max_length",
        metavar="N",
        type=number,
        help="tokens of a prompt and its answer (default: the model's context)",
    )
    add("--places", metavar="N", type=number, default=SLOTS, help="tokens in memory at a time")
    flags.add_compute(parser, data=-1, fsdp=1)  # whole weights on every device: the fastest where they fit
    flags.add_processes(parser)
    arguments = parser.parse_args(argv)
    if arguments.fewshot_as_multiturn and not arguments.apply_chat_template:
        raise UserError("--fewshot_as_multiturn is for chat templates: give --apply_chat_template too")
    if arguments.language:
        language_name(arguments.language)
    return arguments


def boolean(text: str) -> bool:
    """The type of a flag that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"={text}: expected true or false")
    return text.lower() == "true"


def template(text: str) -> bool | str:
    """The type of --apply_chat_template: true, false, or the name of a template."""
    return boolean(text) if text.lower() in ("true", "false") else text


def prompt_settings(arguments: argparse.Namespace) -> dict:
    """What results are to say of the flags that change prompts and measures, where they are given."""
    given = {
        name: getattr(arguments, name)
        for name in (
            "num_fewshot",
            "apply_chat_template",
            "fewshot_as_multiturn",
            "system_instruction",
            "language",
        )
    }
    return {name: value for name, value in given.items() if value not in (None, False)}


def load_model(arguments: argparse.Namespace):
    """The model as the harness sees it; and what results are to say of it: the model and the settings that
    answers depend on."""
    mesh = flags.mesh(arguments)
    reader, model_tokenizer = models.open_source(arguments.model)
    model_tokenizer.chat_template = template_of(model_tokenizer, reader.details)
    compute_dtype = arguments.compute_dtype or models.default_compute_dtype()
    model = models.build(reader, mesh, compute_dtype, param_dtype=compute_dtype)
    limits = {"max_length": arguments.max_length, "slots": arguments.places}
    lm = HarnessModel(model, model_tokenizer, bos=arguments.bos, **limits)
    console.print(
        f"model     {arguments.model}: {model.config.num_hidden_layers} layers, computed in {compute_dtype}\n"
        f"mesh      {describe(mesh)}\n"
        f"context   {lm.max_length} tokens, {'with' if arguments.bos else 'without'} BOS; "
        f"{arguments.places:,} tokens in memory at a time, "
        f"{arguments.places * model.cache_bytes(1) / 2**30:.2f} GiB of keys and values"
    )
    header = {
        "model": {
            "source": str(arguments.model),
            "fingerprint": f"{weights.fingerprint(reader)}-{tokenizer.fingerprint(model_tokenizer)}",
            "training": reader.details if "method" in reader.details else None,
        },
        "settings": {"compute_dtype": compute_dtype, "bos": arguments.bos, "max_length": lm.max_length},
        "versions": cli.versions("lm_eval"),
    }
    return lm, header


def results_table(results: dict[str, dict]) -> Table:
    """Every metric of every task, in per cent where it is a share."""
    table = Table("task", "metric", "n", "value", "± standard error", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for task, result in results.items():
        for metric, entry in result["metrics"].items():
            form = "{:.2%}" if 0 <= entry["value"] <= 1 else "{:.4g}"
            numbers = ("" if entry[key] is None else form.format(entry[key]) for key in ("value", "stderr"))
            table.add_row(task, metric, str(entry["n"]), *numbers)
            task = ""
    return table


if __name__ == "__main__":
    cli.guard(main)
