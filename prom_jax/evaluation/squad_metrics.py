"""What tasks of the harness use of transformers.data.metrics.squad_metrics, gone since transformers 5.20."""

from prom_jax.evaluation import metrics


def normalize_answer(s: str) -> str:
    """An answer as SQuAD 1.1 compares it."""
    return " ".join(metrics.squad_tokens(s))


def compute_exact(a_gold: str, a_pred: str) -> int:
    """1 where an answer equals a gold answer, else 0."""
    return int(metrics.exact_match(a_pred, [a_gold], metrics.squad_tokens))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """F1 of an answer's words against those of a gold answer; without words 1 only if both have none."""
    return metrics.f1(a_pred, [a_gold], metrics.squad_tokens)
