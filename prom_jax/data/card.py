"""The data card: what a run trains on, in numbers that a reader can check before paying for it.

It is written by `reporting.card`.
"""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from prom_jax.data import quality
from prom_jax.data.encoding import COUNTS
from prom_jax.data.examples import ENGLISH, role_in
from prom_jax.data.loader import Batches
from prom_jax.data.mixture import Mixture
from prom_jax.data.records import Prepared, Records
from prom_jax.data.translation.checks import script

# Scripts that put no space between words, so that "words" are not counted.
SPACELESS = ("Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Hans", "Hant", "Jpan")
IN_LANGUAGE = ("target", "translation", "text")  # roles of texts in the target language
RARE = 0.5  # a share of the updates below which a role is said to be rare
MANY_CUT = 0.02  # a share of texts that are cut from which on it is said
SPLITS = ("roles", "holdout", "text")  # of a card; the first is what is trained on
NONE = dict.fromkeys(COUNTS, 0) | {"reasons": {}}


def make(config, data: Mapping[str, Prepared], records, batches: Batches, flops: float) -> dict:
    """The card of a run.

    Args:
      config: see `prom_jax.config`.
      data: what was prepared, by language.
      records, batches: of all languages, and the batches of the whole run.
      flops: of the whole run.

    Returns:
      {"model", "language", "method", "records" (fingerprint), "sources", "unmatched" (instruction rows
      without a partner), "rows" (`sources.Tally.as_dict`), "checks" (`quality.Look`), "roles": {role:
      counts}, "holdout" and "text": the same of these splits, "packing", "update" ({role: "examples" and
      "loss_tokens" of an update on average, and the number of "updates" that have any}), "steps",
      "steps_per_epoch", "epochs", "training_flops"}. `roles` always has english, target and translation.
      Counts are those of `records.Prepared` with "tokens_per_byte" and "tokens_per_word" (of the text that
      has a loss, EOS apart; None where words have no spaces, and of several languages together), and
      "tokens_per_english_token" where examples have English too. With several languages also "languages":
      {code: {"examples" of an epoch, "records", "unmatched", "rows", "checks", "roles", "holdout", "text"}}.
    """
    parts = {code: _of_language(code, prepared) for code, prepared in data.items()}
    first, *others = parts.values()
    examples = np.bincount(records.groups[batches.first_epoch], minlength=len(parts)).tolist()
    by_language = {code: {"examples": number} | part for (code, part), number in zip(parts.items(), examples)}
    sources = ("english", "target", "translation", "english_text", "streams")
    raw = {"raw_text": list(config.data.text), "text": list(config.eval.text)}
    return {
        "model": config.model,
        "language": ",".join(parts),
        "method": config.method,
        "sources": {key: list(config.data[key]) for key in sources} | raw,
        **(_together(list(parts.values())) if others else first),
        **({"languages": by_language} if others else {}),
        "packing": _packing(config, batches),
        "update": _update(batches, records),
        "steps": batches.num_steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "epochs": len(batches.examples) / batches.examples_per_epoch,
        "training_flops": flops,
    }


def _of_language(language: str, data: Prepared) -> dict:
    """The part of a card that is of one language."""
    roles = dict.fromkeys(("english", "target", "translation"), NONE) | data.report["train"]
    return {
        "records": data.fingerprint,
        "unmatched": data.report["unmatched"],
        "rows": data.report.get("rows", {}),
        "checks": data.report.get("checks", {}),
        "roles": _with_ratios(roles, language, data.train),
        "holdout": _with_ratios(data.report.get("holdout", {}), language, data.holdout),
        "text": _with_ratios(data.report.get("text", {}), language, data.text),
    }


def _together(parts: list[dict]) -> dict:
    """The same of several languages."""
    whole = {
        "records": "+".join(part["records"] for part in parts),
        "unmatched": sum(part["unmatched"] for part in parts),
        "checks": {},
        "rows": {source: counts for part in parts for source, counts in part["rows"].items()},
    }
    for split in SPLITS:
        roles = dict.fromkeys(role for part in parts for role in part[split])
        whole[split] = {role: _summed([part[split].get(role, NONE) for part in parts]) for role in roles}
    return whole


def _summed(counts: list[dict]) -> dict:
    """Counts of one role, added."""
    reasons = sum((Counter(each["reasons"]) for each in counts), Counter())
    total = {name: sum(each[name] for each in counts) for name in COUNTS}
    per_byte = _ratio(total["text_tokens"], total["bytes"])
    return total | {"reasons": dict(reasons), "tokens_per_byte": per_byte, "tokens_per_word": None}


def _entries(card: dict):
    """Each split and role of a card with its counts: of each language where there are several."""
    for language, part in card.get("languages", {"": card}).items():
        for split in SPLITS:
            for role, counts in part[split].items():
                yield language, split, role, counts


def _packing(config, batches: Batches) -> dict:
    """The rows of an update: the fields of target and English text, and all streams."""
    rows, length = batches.shapes.get(ENGLISH, (0, 0))
    return {
        "sequences": config.batch.sequences,
        "seq_len": config.data.seq_len,
        "english_rows": rows,
        "english_length": length,
        "target_fill": batches.fill["target"],
        "english_fill": batches.fill.get(ENGLISH, 0.0),
        "joined": batches.appended is not None,
        "appended": batches.appended,
        "saved": batches.saved,
        "streams": {
            stream: {"rows": shape[0], "length": shape[1], "fill": batches.fill[stream]}
            for stream, shape in batches.shapes.items()
        },
    }


def _update(batches: Batches, records: Records | Mixture) -> dict:
    """What updates hold, by role."""
    steps, taken = batches.steps_of_examples, batches.examples
    roles, of_example = np.unique(records.roles, return_inverse=True)
    found = {}
    for stream in batches.shapes:
        weights = records.streams[stream].weights[taken]
        names = np.array([role_in(stream, role) for role in roles])
        for role in dict.fromkeys(names.tolist()):
            ours = (names == role)[of_example][taken] & (weights > 0)
            if ours.any():
                found[role] = {
                    "examples": round(int(ours.sum()) / batches.num_steps, 2),
                    "loss_tokens": round(int(weights[ours].sum()) / batches.num_steps, 1),
                    "updates": len(np.unique(steps[ours])),
                }
    return found


def _with_ratios(roles: dict, language: str, records: Records | None) -> dict:
    result = {}
    for role, counts in roles.items():
        spaced = role not in IN_LANGUAGE or script(language) not in SPACELESS
        ratios = {
            "tokens_per_byte": _ratio(counts["text_tokens"], counts["bytes"]),
            "tokens_per_word": _ratio(counts["text_tokens"], counts["words"]) if spaced else None,
        }
        if records and role in ("target", "text"):
            ratios["tokens_per_english_token"] = _tokens_per_english_token(records, role)
        result[role] = counts | ratios
    return result


def _tokens_per_english_token(records: Records, role: str) -> float | None:
    """Of the examples of a role that have English, loss tokens for one of English."""
    if ENGLISH not in records.streams:
        return None
    primary, english = records.streams[records.names[0]], records.streams[ENGLISH]
    both = (english.lengths > 0) & (records.roles == role)
    return _ratio(int(primary.weights[both].sum()), int(english.weights[both].sum()))


def _ratio(number: int, of: int) -> float | None:
    return round(number / of, 4) if of else None


def lines(card: dict):
    """The card in a few lines of text."""
    for language, split, role, counts in _entries(card):
        if not (counts["examples"] or counts["dropped"]):
            continue
        name = "train" if split == "roles" else split
        dropped = f", {counts['dropped']:,} dropped" * bool(counts["dropped"])
        cut = f", {counts['truncated']:,} cut" * bool(counts["truncated"])
        yield (
            f"{language}{' ' * bool(language)}{name}, {role}: {counts['examples']:,} examples, "
            f"{counts['tokens']:,} tokens, {counts['loss_tokens']:,} loss tokens{cut}{dropped}"
        )
    for source, counts in card["rows"].items():
        if bad := sum(counts["bad"].values()):
            yield f"{bad:,} of {counts['rows']:,} rows of {source} cannot be used and are left out"
    if "languages" in card:
        yield f"an epoch: {_shares(card)}"
    if card["unmatched"]:
        yield f"{card['unmatched']:,} instruction rows found no partner of the same id"
    packing = card["packing"]
    primary = next(iter(packing["streams"]))
    appended = {packing["appended"]: f" appended to {primary} rows"}
    streams = (
        f"{stream} {rows['rows']} × {rows['length']}{appended.get(stream, '')}, "
        f"{rows['fill'] * 100:.0f} % filled"
        for stream, rows in packing["streams"].items()
    )
    saved = f"; shared prompts save {packing['saved'] * 100:.0f} % of the tokens"
    yield f"an update: {', '.join(streams)}{saved * (packing['saved'] > 0)}"


def warnings(card: dict):
    """What a reader should know before training, in sentences."""
    for role, counts in card["roles"].items():
        if counts["truncated"] > MANY_CUT * counts["examples"]:
            yield (
                f"{counts['truncated']:,} of {counts['examples']:,} texts of {role} are cut at data.seq_len="
                f"{card['packing']['seq_len']}: raise it, or leave them out with data.too_long=drop"
            )
    for language, part in card.get("languages", {"": card}).items():
        for sentence in quality.warnings(part["checks"]):
            yield f"{language}{': ' * bool(language)}{sentence}"
    for role, counts in card["update"].items():
        if counts["updates"] < RARE * card["steps"]:
            stream = ENGLISH if role in ("english", "english_text", "translation_source") else role
            remedy = f": data.share={stream}=0.25 would bring it more often" if stream == ENGLISH else ""
            yield f"only {counts['updates']:,} of {card['steps']:,} updates have any {role}{remedy}"


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
        "Tokens per word and per byte are of the text that has a loss; *× English* is how many tokens it has "
        "for one of its English counterpart.",
        _table(card),
        *([f"An epoch takes {_shares(card)}."] if "languages" in card else []),
        *_left_out(card),
        *_checks(card),
        "## Packing",
        _rows(packing),
        *_saved(packing),
        "What an update holds on average, and in how many it is:",
        _held(card),
        "![Examples by length](lengths.png)",
        f"Records `{card['records']}`.",
    ]
    return re.sub("^(- .*\n)\n(?=- )", r"\1", "\n\n".join(text), flags=re.MULTILINE) + "\n"


def _shares(card: dict) -> str:
    """How many examples an epoch has of each language."""
    numbers = {code: part["examples"] for code, part in card["languages"].items()}
    return ", ".join(
        f"{number:,} examples of {code} ({number / sum(numbers.values()):.0%})"
        for code, number in numbers.items()
    )


def _rows(packing: dict) -> str:
    """What an update takes of each stream."""
    labels = {ENGLISH: "English"}
    first, *others = (
        f"{rows['rows']} rows of {rows['length']} {labels.get(stream, stream)} tokens, "
        f"{rows['fill'] * 100:.1f} % filled"
        for stream, rows in packing["streams"].items()
    )
    without = "" if ENGLISH in packing["streams"] else " No English is trained on."
    over = " over the run (an epoch's last update takes what is left)"
    return f"An update takes {first}{over}{''.join(f', and {other}' for other in others)}.{without}"


def _saved(packing: dict):
    if packing["saved"] > 0:
        primary, label = next(iter(packing["streams"])), packing["appended"] or ""
        label = "English" if label == ENGLISH else label
        appended = f"; {label} rows are appended to the {primary} rows, whose prompts they continue" * bool(
            label
        )
        saved = f"{packing['saved'] * 100:.1f} % of the tokens"
        yield f"Prompt prefixes that texts share are computed once, which saves {saved}{appended}."


def _table(card: dict) -> str:
    head = (
        "role",
        "examples",
        "tokens",
        "loss tokens",
        "cut",
        "dropped",
        "tokens/word",
        "tokens/byte",
        "× English",
    )
    rows = [list(head)]
    for language, split, role, counts in _entries(card):
        numbers = [counts[key] for key in ("examples", "tokens", "loss_tokens", "truncated", "dropped")]
        ratios = ("tokens_per_word", "tokens_per_byte", "tokens_per_english_token")
        of_text = [f"{counts[key]:.2f}" if counts.get(key) else "–" for key in ratios]
        name = role if split == "roles" else f"{split}, {role}" if role != split else role
        rows.append(
            [" ".join(filter(None, (language, name))), *(f"{number:,}" for number in numbers), *of_text]
        )
    return _as_table(rows)


def _as_table(rows: list) -> str:
    """Rows of cells, the first the head, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = list(rows)
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])

    def padded(row):
        return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]

    return "\n".join(f"| {' | '.join(padded(row))} |" for row in rows)


def _held(card: dict) -> str:
    """The table of what an update holds."""
    head = ("role", "examples", "loss tokens", "updates")
    rows = [
        (role, f"{counts['examples']:,}", f"{counts['loss_tokens']:,}", f"{counts['updates']:,}")
        for role, counts in card["update"].items()
    ]
    return _as_table([head, *rows])


def _checks(card: dict):
    """What is suspicious, with examples."""
    found = [
        f"- {' '.join(filter(None, (language, role)))}: {check['rows']:,} of {check['of']:,} "
        f"{quality.MEANING[name]}: {'; '.join(f'“{example}”' for example in check['examples'])}"
        for language, part in card.get("languages", {"": card}).items()
        for role, of in part["checks"].items()
        for name, check in of.items()
    ]
    return ["## To look at", *found] if found else []


def _left_out(card: dict):
    reasons = [
        f"- {' '.join(filter(None, (language, role)))}: {number:,} dropped, {reason}"
        for language, _, role, counts in _entries(card)
        for reason, number in counts["reasons"].items()
    ]
    for source, counts in card["rows"].items():
        of = f"of {counts['rows']:,} rows of `{source}`"
        reasons += [f"- {number:,} {of} left out: {reason}" for reason, number in counts["bad"].items()]
        reasons += [f"- {number:,} {what} left out {of}" for what, number in counts["left_out"].items()]
    if card["unmatched"]:
        reasons.append(f"- {card['unmatched']:,} instruction rows found no partner of the same id")
    return ["## Left out", *reasons] if reasons else []
