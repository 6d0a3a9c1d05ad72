"""Evaluations as prom_jax.evaluate would leave them, of scores that the test chooses."""

import json

PIVOT = {"pivot.layer": 24, "pivot.label_smoothing": 0.1, "pivot.weight": 0.1, "pivot.norm": "none"}
LLAMA = "meta-llama/Llama-2-7b-hf"


def training(method, language, seed=0, base=LLAMA, regulate="auto", **pivot):
    """The rows of a model card; `pivot` are its keys, none for λ = 0."""
    keys = {f"pivot.{key}": value for key, value in pivot.items()}
    return {
        "base_model": base,
        "language": language,
        "method": method,
        **keys,
        "regulate": regulate,
        "seed": seed,
    }


def prom(language, seed=0, **changes):
    """PROM of the paper's setting, or with changes to it."""
    about = training("prom", language, seed) | PIVOT
    return about | changes


def write(folder, trained, tasks, source=LLAMA, paragraph=2, higher_is_better=None, **settings):
    """An evaluation; `tasks` are scores by task and metric, a list of numbers each.

    Documents 0 .. paragraph - 1 are of the first paragraph, and so on.
    """
    folder.mkdir(parents=True)
    results, lines = {}, []
    for task, scores in tasks.items():
        n = len(next(iter(scores.values())))
        metrics = {
            metric: {"value": sum(values) / n, "stderr": 0.01, "n": n} for metric, values in scores.items()
        }
        for metric, higher in (higher_is_better or {}).items():
            if metric in metrics:
                metrics[metric]["higher_is_better"] = higher
        results[task] = {"n": n, "metrics": metrics}
        for doc in range(n):
            lines.append(
                {
                    "task": task, "doc_id": doc, "prompt": f"{task} <b>{doc}</b>", "output": "",
                    "gold": ["x"],
                    "scores": {metric: values[doc] for metric, values in scores.items()},
                    "cluster": f"paragraph {doc // paragraph}",
                }
            )  # fmt: skip
    settings = {"compute_dtype": "float32", "bos": False, "limit": None} | settings
    model = {"source": source, "fingerprint": str(folder), "training": trained}
    content = {"model": model, "settings": settings, "versions": {}, "tasks": results}
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder
