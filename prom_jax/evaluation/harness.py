"""lm-evaluation-harness: its tasks and ours, and what comes out of them."""

import contextlib
import logging
from pathlib import Path

from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from prom_jax.evaluation.lm import HarnessModel
from prom_jax.utils.errors import UserError
from prom_jax.utils.temporary import no_progress_bars, quiet_loggers

TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # the harness's own
RESAMPLES = 1000  # of the harness's bootstrap, for metrics whose standard error has no formula


def load_tasks(names: list[str], data_dir: str | None = None) -> dict:
    """Tasks with their data, by name: ours, the harness's own, or of a YAML file; groups as their members.

    Args:
      data_dir: where the data files of our tasks are; None for the hub.
    Raises:
      UserError: for an unknown task, or one whose data cannot be had.
    """
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise UserError("--tasks is empty: for example --tasks=xquad_th,mgsm_th")
    with _quiet():
        return _load_tasks(names, data_dir)


def _load_tasks(names: list[str], data_dir: str | None) -> dict:
    def manage(defaults: bool) -> TaskManager:
        return TaskManager(
            include_path=str(TASKS), include_defaults=defaults, metadata={"data_dir": data_dir}
        )

    manager = manage(False)
    ours = set(manager.all_tasks)
    if not all(name in manager.task_index or Path(name).suffix == ".yaml" for name in names):
        manager = manage(True)  # the harness has thousands, whose names take seconds to read
    tasks = {}
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise UserError(
                f"--tasks: {name!r} is no task of ours ({', '.join(sorted(ours))}), none of the harness's "
                "and no YAML file"
            )
        try:
            tasks |= manager.load([name])["tasks"]
        except UserError:
            raise
        except Exception as error:  # whatever a task of others' raises
            cause = str(error).strip().splitlines()
            raise UserError(
                f"--tasks: {name!r} cannot be loaded ({type(error).__name__}: {cause[0] if cause else ''}): "
                "its data may not be reachable; for our own tasks give --data_dir"
            ) from error
    return tasks


def evaluate(lm: HarnessModel, tasks: dict, limit: int | None = None) -> tuple[dict, list[dict]]:
    """Runs tasks, each with its own number of examples in the prompt.

    Args:
      limit: how many documents of each, the first ones.
    Returns:
      By task {'n', 'metrics': {name: {'value', 'stderr', 'n'}}}, shares as 0 … 1; and of every document
      {'task', 'doc_id', 'prompt', 'output', 'gold', 'scores', 'cluster'}.
    """
    for task in tasks.values():  # as the harness's own command does, which needs torch for its seeds
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    with _quiet():
        results = evaluator.evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=RESAMPLES)
    samples = {task: _samples(task, results["samples"][task]) for task in tasks}
    summaries = {task: _summary(results["results"][task], samples[task]) for task in tasks}
    return summaries, [sample for task in tasks for sample in samples[task]]


@contextlib.contextmanager
def _quiet():
    """In the block, the harness and what it stands on report errors alone."""
    with quiet_loggers("lm_eval", "datasets", "root", level=logging.ERROR), no_progress_bars():
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


def _summary(results: dict, samples: list[dict]) -> dict:
    metrics = {}
    for key, value in results.items():
        metric, _, of_filter = key.partition(",")
        if of_filter and not metric.endswith("_stderr"):
            name, error = _name(metric, of_filter), results.get(f"{metric}_stderr,{of_filter}")
            metrics[name] = {
                "value": value,
                "stderr": error if isinstance(error, float) else None,  # 'N/A' where there is none
                "n": sum(name in sample["scores"] for sample in samples),
            }
    return {"n": len(samples), "metrics": metrics}


def _name(metric: str, of_filter: str) -> str:
    return metric if of_filter == "none" else f"{metric} ({of_filter})"
