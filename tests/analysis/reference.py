"""The probe in plain torch: whole prompts, one word after each, nothing shared; and small tables."""

import csv
import re

import numpy as np
import torch

HEADER = ("english", "word", "sentence")
WORDS = {
    "water": "maji",
    "house": "nyumba",
    "tree": "mti",
    "in": "inzi",  # one begins the other
    "tank": "tango",  # share their first tokens
    "sun": "jua",
    "language": "ภาษา",
    "taxi": "taxi",  # are equal
    "book": "kitabu",
    "fire": "πυρ",
}
ROWS = [(english, word, f'Hili "___" ni {len(word)}.') for english, word in WORDS.items()]


def write_table(folder, rows=ROWS, header=HEADER, language="sw"):
    """Writes a table as <language>/clean.csv; returns the folder."""
    path = folder / language / "clean.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


@torch.no_grad()
def layer_log_probabilities(hf, sequences, places):
    """Log-softmax of each layer's logits at some places of each sequence: lists of [layers, places, V].

    The sequences run as one batch, padded on the right.
    """
    length = max(map(len, sequences))
    tokens = torch.zeros((len(sequences), length), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    states = hf.model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    results = []
    for row, at in enumerate(places):
        before_norm = [state[row, at] for state in states[1:-1]]
        final = [*map(hf.model.norm, before_norm), states[-1][row, at]]  # the last one is normed already
        results.append(torch.log_softmax(hf.lm_head(torch.stack(final)).float(), dim=-1).numpy())
    return results


def texts(tokenizer):
    """What each token of the vocabulary stands for: {(bytes, whether a byte fallback): id}."""
    vocabulary = tokenizer.get_vocab()
    if "Ġ" in vocabulary and "▁" not in vocabulary:  # GPT-2's alphabet: printable bytes are themselves
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable}
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
        read = lambda token: (bytes(byte_of.get(c, 0) for c in token), False)
    else:
        fallback = lambda token: re.fullmatch("<0x(..)>", token)
        read = lambda token: (
            (bytes([int(fallback(token)[1], 16)]), True)
            if fallback(token)
            else (token.replace("▁", " ").encode(), False)
        )
    return {read(token): i for token, i in vocabulary.items()}


def token_sets(tokenizer, words, scoring):
    """For each word the ids of all tokens that can begin it."""
    ids, sets = texts(tokenizer), []
    for word in words:
        prefixes = {word[:end].encode() for end in range(1, len(word) + 1)}
        wanted = {(space + prefix, False) for prefix in prefixes for space in (b"", b" ")}
        first = word.encode()[:1]
        if scoring == "byte" and first >= b"\x80":
            wanted |= {(first, True), (first, False)}
        sets.append(sorted({ids[text] for text in wanted if text in ids}))
    return sets


def probabilities(hf, tokenizer, rows, scoring, batch=1):
    """Probability of both sides' words, [rows, layers] each. rows: (prompt, English words, target words).

    With 'word' that of a row is the sum over its words, each after a prompt of its own; words of which one
    begins another's text are not for this reference.
    """
    results = []
    for column in (1, 2):
        asked = [(row[0], word, number) for number, row in enumerate(rows) for word in row[column]]
        if scoring == "word":
            encoded = [tokenizer(prompt + word, return_offsets_mapping=True) for prompt, word, _ in asked]
            sequences = [e["input_ids"] for e in encoded]
            starts = [
                next(i for i, (_, end) in enumerate(e["offset_mapping"]) if end > len(prompt))
                for e, (prompt, _, _) in zip(encoded, asked)
            ]
            places = [list(range(start - 1, len(s) - 1)) for start, s in zip(starts, sequences)]
            owners = [number for _, _, number in asked]
        else:
            sequences = [tokenizer(row[0])["input_ids"] for row in rows]
            places = [[len(sequence) - 1] for sequence in sequences]
            sets = [set().union(*token_sets(tokenizer, row[column], scoring)) for row in rows]
            owners = range(len(rows))
        values = np.zeros((len(rows), hf.config.num_hidden_layers))
        for start in range(0, len(sequences), batch):
            part = slice(start, start + batch)
            for i, logs in enumerate(layer_log_probabilities(hf, sequences[part], places[part]), start):
                if scoring == "word":
                    tokens = [sequences[i][place + 1] for place in places[i]]
                    values[owners[i]] += np.exp(logs[:, range(len(tokens)), tokens].sum(axis=1))
                else:
                    values[owners[i]] += np.exp(logs[:, 0, sorted(sets[i])]).sum(axis=1)
        results.append(values)
    return results
