"""lm-evaluation-harness: its tasks and ours, and what comes out of them."""

import contextlib
import logging
import statistics
import types
from pathlib import Path

import yaml

from prom_jax.evaluation import replies, squad_metrics
from prom_jax.evaluation.lm import HarnessModel
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import environment, modules, no_prints, no_progress_bars, quiet_loggers

with needs("eval"):
    import lm_eval.api.metrics
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # the harness's own
RESAMPLES = 1000  # of the harness's bootstrap, for metrics whose standard error has no formula
# How much English is left, in one word: questions to choose an answer to, and ours to answer.
ENGLISH = ("arc_easy", "hellaswag", "piqa", "winogrande", "xquad_en", "mgsm_en")


def load_tasks(
    names: list[str],
    data_dir: str | None = None,
    *,
    words: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
) -> dict:
    """Tasks with their data, by name: ours, the harness's own, those of a folder or of a YAML file; groups as
    their members, and 'english' as those of ENGLISH.

    Args:
      data_dir: where the data files of our tasks are; None for the hub.
      words: a file like `words.json`, whose languages come before those of ours.
      include_path: a folder with YAML files of further tasks, anywhere below it.
      num_fewshot: examples in the prompt. As in the harness, not of tasks whose own number is 0; of tasks
        without a number 0 if None.

    Raises:
      UserError: for an unknown task, or one whose data cannot be had.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError("--tasks is empty: for example --tasks=xquad_th,mgsm_th")
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"--include_path={include_path}: there is no such folder")
    names = list(dict.fromkeys(one for name in names for one in (ENGLISH if name == "english" else [name])))
    with _quiet(), modules(_gone_from_transformers()):
        tasks = _load_tasks(names, include_path, {"data_dir": data_dir, "words_file": words})
    for name, task in tasks.items():
        _set_fewshot(name, task, num_fewshot)
    return tasks


def _load_tasks(names: list[str], include_path: str | None, metadata: dict) -> dict:
    folders = [str(TASKS), *([include_path] if include_path else [])]

    def manage(defaults: bool) -> TaskManager:
        return TaskManager(include_path=folders, include_defaults=defaults, metadata=metadata)

    files = {name: path for path in _yaml_files(include_path) for name in _names_in(path)}
    files |= {name: Path(name) for name in names if Path(name).is_file()}
    manager = manage(False)
    ours = set(manager.all_tasks) | files.keys()
    if not ours.issuperset(names):
        manager = manage(True)  # the harness has thousands, whose names take seconds to read
    tasks = {}
    for name in names:
        if name not in files and name not in manager.task_index:
            raise UserError(
                f"--tasks: {name!r} is no task of ours ({', '.join(sorted(ours))}), none of the harness's "
                "and no YAML file"
            )
        try:
            found = manager.load([read_task(files[name]) if name in files else name])["tasks"]
            if name in files and (twice := found.keys() & tasks.keys()):
                raise UserError(f"--tasks: {name!r} is a second task {twice.pop()!r}: give it another name")
            tasks |= found
        except UserError:
            raise
        except Exception as error:  # whatever a task of others' raises
            cause = str(error).strip().splitlines()
            raise UserError(
                f"--tasks: {name!r} cannot be loaded ({type(error).__name__}: {cause[0] if cause else ''}): "
                f"{_remedy(error)}"
            ) from error
    return tasks


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "it needs a package that is not installed"
    if isinstance(error, (yaml.YAMLError, KeyError, ValueError, TypeError)):
        return "correct the file, as docs/evaluation.md shows it"
    return "its data may not be reachable; for our own tasks give --data_dir"


def read_task(path: Path, including: tuple[Path, ...] = ()) -> dict:
    """The content of a task's YAML file, with what it includes: a file next to it, or else one of ours
    (`_xquad`). `file` of `dataset_kwargs` may be a path from the YAML's folder.

    Raises:
      UserError: for a file that includes itself, or one that is not there.
    """
    path = path.expanduser().resolve()
    if path in including:
        raise UserError(f"{path} includes itself: leave that out")
    content = load_yaml(path, recursive=False)
    included = content.pop("include", [])
    merged = {}
    for name in [included] if isinstance(included, str) else included:
        found = next((f for f in (path.parent / name, TASKS / name) if f.is_file()), None)
        if found is None:
            shared = ", ".join(sorted(file.name for file in TASKS.glob("_[a-z]*")))
            raise UserError(f"{path} includes {name!r}: expected a file next to it, or one of {shared}")
        merged |= read_task(found, (*including, path))
    merged |= content
    data, metadata = merged.get("dataset_kwargs"), merged.get("metadata")
    if isinstance(data, dict) and isinstance(data.get("file"), str):
        merged["dataset_kwargs"] = data | {"file": str(path.parent / Path(data["file"]).expanduser())}
    if isinstance(data, dict) and isinstance(metadata, dict):  # the harness gives both to one function
        for key in data.keys() & metadata.keys():
            if data[key] != metadata[key]:
                raise UserError(
                    f"{path}: {key} is {data[key]!r} in dataset_kwargs and {metadata[key]!r} in metadata: "
                    "give it once"
                )
        merged["metadata"] = {key: value for key, value in metadata.items() if key not in data}
    return merged


def _yaml_files(folder: str | None) -> list[Path]:
    return (
        sorted(path for end in ("yaml", "yml") for path in Path(folder).rglob(f"*.{end}")) if folder else []
    )


def _names_in(path: Path) -> list[str]:
    """The name of a file's task, if it has one."""
    try:
        content = load_yaml(path, resolve_func=False, recursive=False)
    except (OSError, ValueError, yaml.YAMLError):
        return []  # a folder may hold other YAML files too
    name = content.get("task")
    return [name] if isinstance(name, str) else []


def _gone_from_transformers() -> dict[str, types.ModuleType]:
    package = types.ModuleType("transformers.data.metrics")
    vars(package)["squad_metrics"] = squad_metrics
    return {package.__name__: package, f"{package.__name__}.squad_metrics": squad_metrics}


def _set_fewshot(name: str, task, number: int | None):
    """As the harness's own command sets it, which needs torch for its seeds."""
    own = task.get_config("num_fewshot")
    if number is not None and own == 0 != number:
        console.print(f"WARNING   {name} stays without examples in its prompts: its file says num_fewshot: 0")
    elif number is not None or own is None:
        task.set_config(key="num_fewshot", value=number or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)


def evaluate(
    lm: HarnessModel,
    tasks: dict,
    limit: int | None = None,
    *,
    chat: bool | str = False,
    multiturn: bool | None = None,
    system: str | None = None,
    language: str | None = None,
) -> tuple[dict, list[dict]]:
    """Runs tasks, each with its own number of examples in the prompt.

    Args:
      limit: how many documents of each, the first ones.
      chat: whether prompts go through the tokenizer's chat template; the name of one of several.
      multiturn: whether examples are turns of their own then; None: yes.
      system: a system instruction before every prompt.
      language: the code of the language that replies should be in, of tasks that do not say it.

    Returns:
      By task {'n', 'metrics': {name: {'value', 'stderr', 'n', 'higher_is_better'}}}, shares as 0 … 1; and of
      every document {'task', 'doc_id', 'prompt', 'output', 'gold', 'scores', 'cluster'}. Replies have the
      measures of `replies` besides.
    """
    if chat:
        lm.chat_template(chat)
    more = {
        "apply_chat_template": chat,
        "fewshot_as_multiturn": bool(chat) if multiturn is None else multiturn,
        "system_instruction": system,
    }
    # The harness's bootstrap would fork this process, in which JAX has threads.
    with _quiet(), environment(DISABLE_MULTIPROC="1"):
        results = evaluator.evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=RESAMPLES, **more)
    summaries, found = {}, []
    for name, task in tasks.items():
        samples = _samples(name, results["samples"][name])
        summaries[name] = _summary(results["results"][name], samples, task.higher_is_better())
        if task.get_config("output_type") == "generate_until":
            of_task = (task.get_config("metadata") or {}).get("language")
            _add_measures(summaries[name], samples, results["samples"][name], language or of_task)
        found += samples
    return summaries, found


def _add_measures(summary: dict, samples: list[dict], logged: list[dict], language: str | None):
    """Adds the measures of `replies` to scores and metrics, but for those that the task has itself."""
    of_document = {entry["doc_id"]: entry["doc"].get("language") for entry in logged}
    values: dict[str, list[float]] = {}
    for sample in samples:
        golds = sample["gold"] if isinstance(sample["gold"], list) else [sample["gold"]]
        if not isinstance(sample["output"], str):
            continue
        found = replies.measures(sample["output"], golds, language or of_document[sample["doc_id"]])
        for name in found.keys() - summary["metrics"].keys():
            sample["scores"][name] = found[name]
            values.setdefault(name, []).append(found[name])
    for name, scores in sorted(values.items()):
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        entry = {"value": statistics.fmean(scores), "stderr": error, "n": len(scores)}
        summary["metrics"][name] = entry | {"higher_is_better": True}


@contextlib.contextmanager
def _quiet():
    """In the block, the harness and what it stands on report errors alone."""
    loggers = quiet_loggers("lm_eval", "datasets", "root", level=logging.ERROR)
    with loggers, no_progress_bars(), no_prints(lm_eval.api.metrics):
        yield


def _samples(task: str, logged: list[dict]) -> list[dict]:
    """One a document, in order; the harness logs one a document and filter."""
    by_document = {}
    for entry in sorted(logged, key=lambda entry: entry["doc_id"]):
        document, number = entry["doc"], entry["doc_id"]
        answers = [answer for answers in entry["resps"] for answer in answers]
        sample = by_document.setdefault(
            number,
            {
                "task": task,
                "doc_id": number,
                "prompt": entry["arguments"][0][0],
                "output": answers[0] if len(answers) == 1 else answers,
                "gold": document.get("golds", entry["target"]),
                "scores": {},
                "cluster": str(document.get("cluster", number)),
            },
        )
        scores = {metric: entry[metric] for metric in entry["metrics"]}
        sample["scores"] |= {_name(metric, entry["filter"]): score for metric, score in scores.items()}
    return list(by_document.values())


def _summary(results: dict, samples: list[dict], higher_is_better: dict) -> dict:
    metrics = {}
    for key, value in results.items():
        metric, _, of_filter = key.partition(",")
        if of_filter and not metric.endswith("_stderr"):
            name, error = _name(metric, of_filter), results.get(f"{metric}_stderr,{of_filter}")
            metrics[name] = {
                "value": value,
                "stderr": error if isinstance(error, float) else None,  # 'N/A' where there is none
                "n": sum(name in sample["scores"] for sample in samples),
                "higher_is_better": higher_is_better.get(metric, True),
            }
    return {"n": len(samples), "metrics": metrics}


def _name(metric: str, of_filter: str) -> str:
    return metric if of_filter == "none" else f"{metric} ({of_filter})"
