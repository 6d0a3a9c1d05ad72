"""Figures, drawn with matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

LABELS = {
    "target": "target",
    "english": "English",
    "text_target": "target, plain text",
    "text_english": "English, plain text",
}


def learning_curves(rows: list[dict], path: Path):
    """Draws training loss (nats per token) and held-out bits per byte by step, from metrics.jsonl's rows."""
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("loss_target", "target, last layer"), ("loss_english", "English, smoothed")):
        weight = name.replace("loss", "weight")
        points = [(row["step"], row[name]) for row in training if row.get(weight, 0) > 0]
        if points:
            left.plot(*zip(*points), label=label)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    for name, label in LABELS.items():
        key = f"eval_{name}_bits_per_byte"
        points = [(row["step"], row[key]) for row in evaluations if key in row]
        if points:
            right.plot(*zip(*points), marker="o", label=label)
    right.set(xlabel="step", ylabel="held-out bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
