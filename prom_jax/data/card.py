"""The data card: what a run trains on, in numbers that a reader can check before paying for it."""

from prom_jax.data.records import COUNTS, ROLES
from prom_jax.data.translation.checks import script
from prom_jax.reporting.plots import length_histogram
from prom_jax.utils.process import is_main_process
from prom_jax.utils.workdir import write_json, write_text

# Scripts that put no space between words, so that "words" are not counted.
SPACELESS = ("Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Hans", "Hant", "Jpan")
NONE = dict.fromkeys(COUNTS, 0) | {"reasons": {}}


def write(experiment) -> dict:
    """Writes `data_card.json`, `data_card.md` and `lengths.png` into the work directory of an
    `experiment.Experiment`, in process 0; returns the card (see `make`)."""
    card = make(experiment)
    if not is_main_process():
        return card
    write_json(experiment.workdir / "data_card.json", card)
    write_text(experiment.workdir / "data_card.md", as_markdown(card))
    train = experiment.data.train
    lengths = {role: train.target_lengths[train.roles == ROLES.index(role)] for role in card["roles"]}
    english = train.english_lengths[train.english_lengths > 0]
    length_histogram(
        lengths | {"english": english}, experiment.config.data.seq_len, experiment.workdir / "lengths.png"
    )
    return card


def make(experiment) -> dict:
    """The card of an `experiment.Experiment`.

    Returns: {"model", "language", "method", "records" (fingerprint), "sources", "unmatched" (instruction
      rows without a partner), "roles": {role: counts}, "holdout" and "text": the same of these splits,
      "packing", "steps", "steps_per_epoch", "epochs", "training_flops"}. `roles` always has english,
      target and translation. Counts are those of `records.Prepared` with "tokens_per_byte" and
      "tokens_per_word" (of the text that bears loss, EOS apart; None where words have no spaces),
      and "tokens_per_english_token" where examples have both sides.
    """
    config, data, batches = experiment.config, experiment.data, experiment.batches
    roles = dict.fromkeys(("english", "target", "translation"), NONE) | data.report["train"]
    sources = ("english", "target", "translation")
    return {
        "model": config.model,
        "language": config.language,
        "method": config.method,
        "records": data.fingerprint,
        "sources": {role: list(config.data[role]) for role in sources} | {"text": list(config.eval.text)},
        "unmatched": data.report["unmatched"],
        "roles": _with_ratios(roles, config.language, data.train),
        "holdout": _with_ratios(data.report.get("holdout", {}), config.language, data.holdout),
        "text": _with_ratios(data.report.get("text", {}), config.language, data.text),
        "packing": {
            "sequences": config.batch.sequences,
            "seq_len": config.data.seq_len,
            "english_rows": batches.shapes.get("english", (0, 0))[0],
            "english_length": batches.shapes.get("english", (0, 0))[1],
            "target_fill": batches.fill["target"],
            "english_fill": batches.fill.get("english", 0.0),
            "joined": batches.joined,
            "saved": batches.saved,
        },
        "steps": batches.num_steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "epochs": len(batches.examples) / len(data.train),
        "training_flops": experiment.flops,
    }


def _with_ratios(roles: dict, language: str, records) -> dict:
    result = {}
    for role, counts in roles.items():
        spaced = role in ("english", "translation_source") or script(language) not in SPACELESS
        ratios = {
            "tokens_per_byte": _ratio(counts["text_tokens"], counts["bytes"]),
            "tokens_per_word": _ratio(counts["text_tokens"], counts["words"]) if spaced else None,
        }
        if role in ("target", "text"):
            both = (records.english_lengths > 0) & (records.roles == ROLES.index(role))
            ratios["tokens_per_english_token"] = _ratio(
                int(records.target_weights[both].sum()), int(records.english_weights[both].sum())
            )
        result[role] = counts | ratios
    return result


def _ratio(number: int, of: int) -> float | None:
    return round(number / of, 4) if of else None


def lines(card: dict):
    """The card in a few lines of text."""
    for split in ("roles", "holdout", "text"):
        name = "train" if split == "roles" else split
        for role, counts in card[split].items():
            if not (counts["examples"] or counts["dropped"]):
                continue
            dropped = f", {counts['dropped']:,} dropped" * bool(counts["dropped"])
            cut = f", {counts['truncated']:,} cut" * bool(counts["truncated"])
            yield (
                f"{name}, {role}: {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
                f"{counts['loss_tokens']:,} bear loss{cut}{dropped}"
            )
    if card["unmatched"]:
        yield f"{card['unmatched']:,} instruction rows without a partner of the same id are left out"
    packing = card["packing"]
    english = (
        f", english {packing['english_rows']} × {packing['english_length']}{' behind' * packing['joined']}, "
        f"{packing['english_fill']:.0%} full"
    )
    saved = f"; shared prompts save {packing['saved']:.0%} of the tokens"
    yield (
        f"an update: target {packing['sequences']} × {packing['seq_len']}, {packing['target_fill']:.0%} full"
        + english * bool(packing["english_rows"])
        + saved * (packing["saved"] > 0)
    )


def as_markdown(card: dict) -> str:
    """The card as a document."""
    packing, epochs = card["packing"], f"{card['epochs']:.2f}".rstrip("0").rstrip(".")
    text = [
        f"# Data for {card['language']}: {card['method']} on {card['model']}",
        f"{card['steps']:,} steps, {epochs} epochs of {card['steps_per_epoch']:,} steps, "
        f"{card['training_flops']:.3g} training FLOPs.",
        *(
            f"- {role}: {', '.join(f'`{name}`' for name in names)}"
            for role, names in card["sources"].items()
            if names
        ),
        "## Examples",
        "Tokens per word and per byte are of the text that bears loss; *× English* is how many tokens it has "
        "for one of its English counterpart.",
        _table(card),
        *_left_out(card),
        "## Packing",
        f"An update takes {packing['sequences']} rows of {packing['seq_len']} target tokens, "
        f"{packing['target_fill']:.1%} full over the run (an epoch's last update takes what is left)"
        + (
            f", and {packing['english_rows']} rows of {packing['english_length']} English tokens, "
            f"{packing['english_fill']:.1%} full."
            if packing["english_rows"]
            else ". No English is trained on."
        ),
        *_saved(packing),
        "![Examples by length](lengths.png)",
        f"Records `{card['records']}`.",
    ]
    return "\n\n".join(text).replace("\n\n- ", "\n- ") + "\n"


def _saved(packing: dict):
    if packing["saved"] > 0:
        behind = "; English rows lie behind the target rows, whose prompts they continue" * packing["joined"]
        saved = f"{packing['saved']:.1%} of the tokens"
        yield f"Prompts that begin alike are computed once, which saves {saved}{behind}."


def _table(card: dict) -> str:
    head = (
        "role",
        "examples",
        "tokens",
        "bear loss",
        "cut",
        "dropped",
        "tokens/word",
        "tokens/byte",
        "× English",
    )
    rows = [list(head)]
    for split in ("roles", "holdout", "text"):
        for role, counts in card[split].items():
            numbers = [counts[key] for key in ("examples", "tokens", "loss_tokens", "truncated", "dropped")]
            ratios = ("tokens_per_word", "tokens_per_byte", "tokens_per_english_token")
            of_text = [f"{counts[key]:.2f}" if counts.get(key) else "–" for key in ratios]
            name = role if split == "roles" else f"{split}, {role}" if role != split else role
            rows.append([name, *(f"{number:,}" for number in numbers), *of_text])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    pad = lambda row: [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
    return "\n".join(f"| {' | '.join(pad(row))} |" for row in rows)


def _left_out(card: dict):
    reasons = [
        f"- {role}: {number:,} dropped, {reason}"
        for split in ("roles", "holdout", "text")
        for role, counts in card[split].items()
        for reason, number in counts["reasons"].items()
    ]
    if card["unmatched"]:
        reasons.append(f"- {card['unmatched']:,} instruction rows found no partner of the same id")
    return ["## Left out", *reasons] if reasons else []
