"""The scores of one document: what the tasks name as `process_results`.

Each function takes a document of `documents.py` and a list of one answer, and returns the metrics that the
task's YAML lists. A metric that does not count the document is left out.
"""

from functools import partial

from prom_jax.evaluation import metrics, replies


def squad(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match and F1 by the rules of SQuAD 1.1, as in the paper."""
    return _answer(doc, results, metrics.squad_tokens)


def squad_thai(doc: dict, results: list[str]) -> dict[str, float]:
    """As `squad`, and F1 of words that a dictionary finds: by spaces a Thai answer is nearly all or
    nothing."""
    segmented = metrics.f1(results[0], doc["golds"], metrics.thai_tokens)
    return {**squad(doc, results), "f1_segmented": segmented}


def indicqa(doc: dict, results: list[str]) -> dict[str, float]:
    """As `squad`, and the same of those questions alone that have an answer."""
    scores = squad(doc, results)
    answerable = {f"{name}_answerable": score for name, score in scores.items()} if doc["golds"] else {}
    return scores | answerable


def mlqa(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match and F1 by the rules of MLQA for the document's language."""
    return _answer(doc, results, partial(metrics.mlqa_tokens, language=doc["language"]))


def mgsm(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the last number is the right one: read as in the paper (`accuracy`), and with all its
    digits."""
    (gold,) = map(metrics.last_number, doc["golds"])
    return {
        "accuracy": float(metrics.last_integer(results[0]) == gold),
        "accuracy_numeric": float(metrics.last_number(results[0]) == gold),
    }


def translation(doc: dict, results: list[str]) -> dict[str, float]:
    """chrF against the one translation that there is."""
    return {"chrf": replies.chrf(results[0], doc["golds"])}


def _answer(doc: dict, results: list[str], tokens: metrics.Tokens) -> dict[str, float]:
    return {
        "exact_match": metrics.exact_match(results[0], doc["golds"], tokens),
        "f1": metrics.f1(results[0], doc["golds"], tokens),
    }
