"""Figures, drawn with matplotlib."""

import io
import itertools
import re
from pathlib import Path

import numpy as np

from prom_jax.training.methods import find_method
from prom_jax.utils.extras import needs
from prom_jax.utils.workdir import write_bytes

with needs("report"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

LABELS = {
    "target": "target",
    "english": "English",
    "text_target": "target, plain text",
    "text_english": "English, plain text",
}
COLOURS = {"target": "tab:blue", "english": "tab:orange", "translation": "tab:green"}
OTHER_COLOURS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")  # in this order
ROLES = ("target", "english")
BITS = re.compile(r"eval_(\w+)_bits_per_byte")
FAINT, FLOOR = 0.05, 1e-20


def learning_curves(rows: list[dict], path: Path):
    """Draws the training loss of either language and held-out bits per byte, from metrics.jsonl's rows.

    The losses have axes of their own: the pivot head begins far from its optimum.
    """
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    streams = dict.fromkeys(key.removeprefix("loss_") for row in training for key in row if "loss_" in key)
    roles = sorted(
        streams, key=lambda stream: (stream not in ROLES, ROLES.index(stream) if stream in ROLES else 0)
    )
    colours = dict(zip((role for role in roles if role not in COLOURS), OTHER_COLOURS)) | COLOURS
    labels = {role: role for role in roles} | LABELS
    figure = Figure(figsize=(4 * len(roles) + 4, 3.5), layout="constrained")
    *panels, right = figure.subplots(1, len(roles) + 1)
    for role, axes in zip(roles, panels):
        points = [(row["step"], row[f"loss_{role}"]) for row in training if row.get(f"weight_{role}", 0) > 0]
        axes.plot(*zip(*points), label=labels[role], color=colours.get(role))
        axes.set(xlabel="step", ylabel="training loss (nats per token)")
    for number, (name, points) in enumerate(_held_out(evaluations).items()):
        style = "--" if "text_" in name else "-"
        # of several languages, 'sw_target', each curve has its own colour
        colour = colours.get(name.removeprefix("text_"), f"C{number}")
        label = labels.get(name, name.replace("_", " "))
        right.plot(*zip(*points), style, marker="o", label=label, color=colour)
    right.set(xlabel="step", ylabel="held-out bits per byte")
    for axes in (*panels, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
    _save(figure, path)


def _held_out(evaluations: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """(step, bits per byte) of each held-out text, such as 'target'."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in evaluations:
        for key in row:
            if match := BITS.fullmatch(key):
                found.setdefault(match[1], []).append((row["step"], row[key]))
    return found


def length_histogram(lengths: dict, seq_len: int, path: Path, dropped: dict | None = None):
    """Draws how many texts of each role or stream have how many tokens, and where rows end.

    Args:
      lengths: tokens of each text, by role or stream.
      seq_len: tokens a row.
      dropped: how many texts besides are not trained on, by role or stream; they are in the titles alone.
    """
    lengths = {role: values for role, values in lengths.items() if len(values)}
    figure = Figure(figsize=(6, 1 + 1.3 * len(lengths)), layout="constrained")
    longest = max(seq_len, *(values.max() for values in lengths.values()))
    shortest = min(values.min() for values in lengths.values())
    bins = np.geomspace(max(1, shortest), longest + 1, 41)
    panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False).ravel()
    others = [role for role in lengths if role not in COLOURS]
    colours = COLOURS | dict(zip(others, itertools.cycle(OTHER_COLOURS)))
    for axes, (role, values) in zip(panels, lengths.items()):
        axes.hist(values, bins, color=colours[role])
        axes.axvline(np.median(values), color="black", lw=1, label=f"median {np.median(values):,.0f}")
        axes.axvline(seq_len, color="black", lw=1, ls=":", label=f"row {seq_len:,}")
        left_out = (dropped or {}).get(role, 0)
        number = f"{len(values):,}{f', and {left_out:,} dropped' * bool(left_out)}"
        axes.set(xscale="log", ylabel="examples", title=f"{LABELS.get(role, role)} ({number})")
        axes.legend(frameon=False)
    panels[-1].set(xlabel="tokens")
    few = (1, 2, 5) if longest > 20 * shortest else (1, 1.5, 2, 3, 4, 5, 7)
    panels[-1].xaxis.set_major_locator(LogLocator(subs=few))
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    panels[-1].xaxis.set_minor_formatter(NullFormatter())
    _save(figure, path)


def probe_curves(panels: dict[str, list[dict]], path: Path):
    """Draws mean probabilities of the English and the target word by layer, with 95 % intervals as bands.

    Where no mean reaches FAINT all would be on the zero line: the axis is logarithmic then, down to FLOOR.

    Args:
      panels: by language, the entry of a probe.json, or an earlier one (drawn dashed) and a later one.
    """
    columns = min(len(panels), 3)
    figure = Figure(figsize=(3.6 * columns + 1.4, 2.6 * -(-len(panels) // columns) + 1), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey=True)
    entries = [entry for pair in panels.values() for entry in pair]
    means = [mean for entry in entries for role in ROLES for mean in entry[f"{role}_mean"]]
    for axes, (language, pair) in zip(grid.ravel(), panels.items()):
        for entry, style, when in zip(pair[::-1], ("-", "--"), ("after", "before")):
            for role in ROLES:
                _band(axes, entry, role, style, f"{LABELS[role]}{f' {when}' * (len(pair) > 1)}")
        axes.set_title(f"{language}, {len(pair[-1]['rows'])} words", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if max(means) < FAINT:
        grid[0, 0].set(yscale="log", ylim=(max(FLOOR, min(means) / 2), FAINT))
    else:  # once all are drawn, as they share it
        grid[0, 0].set_ylim(bottom=0)
    for axes in grid.ravel()[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("layer")
    asked = ", ".join(dict.fromkeys(entry.get("task", "cloze") for entry in entries))
    figure.supylabel(f"mean probability ({asked}, {entries[0]['scoring']} scoring)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    _save(figure, path)


def _band(axes, entry: dict, role: str, style: str, label: str):
    """One curve over layers 1 … N and its interval."""
    low, high = zip(*entry["intervals"][role])
    layers = range(1, len(low) + 1)
    axes.plot(layers, entry[f"{role}_mean"], style, color=COLOURS[role], label=label)
    axes.fill_between(layers, low, high, color=COLOURS[role], alpha=0.2, linewidth=0)


def interference_by_layer(results: dict[str, dict], path: Path):
    """Draws the cosine between gradients by layer, with 95 % intervals as bands, and as bars that of the last
    layer and of the last that PROM's English reaches; where a method has none, it says so.

    Args:
      results: entries of an interference.json by method.
    """
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    last = sorted({entry["last_shared_layer"] for entry in results.values()})
    for number, (method, entry) in enumerate(results.items()):
        label = f"{find_method(method).label}: {' · '.join(entry['compared'])}"
        reached = entry["layers"][: entry["last_shared_layer"]]
        layers, means = range(1, 1 + len(reached)), [layer["mean"] for layer in reached]
        curves.plot(layers, means, marker=".", color=find_method(method).colour, label=label)
        band = zip(*(layer["interval"] for layer in reached))
        curves.fill_between(layers, *band, color=find_method(method).colour, alpha=0.2, linewidth=0)
        for group, layer in enumerate(last):
            _interference_bar(bars, group + 0.25 * (number - (len(results) - 1) / 2), entry, layer, method)
    bars.set_xticks(range(len(last)), [f"layer {layer}" for layer in last])
    bars.set_xlim(-0.5, len(last) - 0.5)
    curves.set(xlabel="layer", ylabel="cosine between gradients, 95 %")
    for axes in (curves, bars):
        axes.axhline(0, color="black", lw=0.8)
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def _interference_bar(axes, place: float, entry: dict, layer: int, method: str):
    """One method in one layer, with its interval."""
    of_layer = entry["layers"][layer - 1]
    if of_layer["mean"] is None:
        place_of_text = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": "small"}
        axes.text(place, 0, " no English gradient", color=find_method(method).colour, **place_of_text)
        return
    low, high = of_layer["interval"]
    axes.bar(place, of_layer["mean"], 0.22, color=find_method(method).colour)
    axes.vlines(place, low, high, color="black", lw=1.2)


def _save(figure: "Figure", path: Path):
    """Writes a figure whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes(path, content.getvalue())
