"""Whether other terms of a loss drown that of the primary stream: in their sum, or by clipping."""

from prom_jax.data.examples import PRIMARY
from prom_jax.training.objective import Method, Term

OUTCLIPPED = 2  # how many times smaller clipping makes the primary gradient than it would alone
REMEDY = "what helps is in docs/method.md, What pulls on an update"


def line(metrics: dict) -> str:
    """The loss and, where it has several parts, each of them: 'loss 13.01  target 3.44  english 95.7'."""
    parts = {key.removeprefix("loss_"): value for key, value in metrics.items() if key.startswith("loss_")}
    ordered = sorted(parts.items(), key=lambda part: part[0] != PRIMARY) if len(parts) > 1 else []
    return "  ".join([f"loss {metrics['loss']:.3f}", *(f"{name} {value:.3g}" for name, value in ordered)])


def warnings(method: Method, metrics: dict, clip: float) -> dict[str, str]:
    """What is to be said of an update, by kind: 'loss' and 'clipping'.

    Args:
      method: that made it.
      metrics: of the update, with `grad_norm_<name>` where they were measured.
      clip: the largest gradient norm; 0 for no clipping.
    """
    found = {}
    parts = [(term, _part(term, metrics)) for term in method.terms]
    ours = next((part for term, part in parts if PRIMARY in term.names), 0.0)
    for term, part in parts:
        if PRIMARY not in term.names and part > ours > 0:
            found["loss"] = (
                f"{' and '.join(term.names)} outweighs {PRIMARY} in the loss: {term.weight:g} · "
                f"{part / term.weight:.3g} = {part:.3g} against {ours:.3g}; {REMEDY}"
            )
    alone, together = metrics.get(f"grad_norm_{PRIMARY}"), metrics["grad_norm"]
    smaller = max(together, clip) / max(alone, clip) if clip and alone else 1.0
    if smaller > OUTCLIPPED:
        found["clipping"] = (
            f"clipping makes the gradient of {PRIMARY} {smaller:.1f} times smaller than it would be without "
            f"the other terms: its norm is {alone:.3g}, that of all {together:.3g}; {REMEDY}"
        )
    return found


def _part(term: Term, metrics: dict) -> float:
    """What a term adds to the loss of an update."""
    counts = {name: metrics.get(f"weight_{name}", 0.0) for name in term.names}
    total = sum(metrics[f"loss_{name}"] * count for name, count in counts.items() if count)
    return term.weight * total / sum(counts.values()) if total else 0.0
