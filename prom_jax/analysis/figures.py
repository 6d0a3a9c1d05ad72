"""Figures, drawn with matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

LABELS = {
    "target": "target",
    "english": "English",
    "text_target": "target, plain text",
    "text_english": "English, plain text",
}
COLOURS = {"target": "tab:blue", "english": "tab:orange"}


def learning_curves(rows: list[dict], path: Path):
    """Draws the training loss of either language and held-out bits per byte, from metrics.jsonl's rows.

    The losses have axes of their own: the pivot head begins far from its optimum.
    """
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    roles = [role for role in ("target", "english") if any(f"loss_{role}" in row for row in training)]
    figure = Figure(figsize=(4 * len(roles) + 4, 3.5), layout="constrained")
    *panels, right = figure.subplots(1, len(roles) + 1)
    for role, axes in zip(roles, panels):
        points = [(row["step"], row[f"loss_{role}"]) for row in training if row.get(f"weight_{role}", 0) > 0]
        axes.plot(*zip(*points), label=LABELS[role], color=COLOURS[role])
        axes.set(xlabel="step", ylabel="training loss (nats per token)")
    for name, label in LABELS.items():
        key = f"eval_{name}_bits_per_byte"
        points = [(row["step"], row[key]) for row in evaluations if key in row]
        if points:
            style = "--" if name.startswith("text") else "-"
            colour = COLOURS[name.removeprefix("text_")]
            right.plot(*zip(*points), style, marker="o", label=label, color=colour)
    right.set(xlabel="step", ylabel="held-out bits per byte")
    for axes in (*panels, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
