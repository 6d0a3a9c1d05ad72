"""python launch/study_results.py RUN RESULTS [--seconds=N]

Copies the small results of a unit of launch/study.sh: settings, decision, metrics, scores by question, the
curves of the probe. Prompts and gold answers, which are others' texts, become digests, and the paths of the
machine names; all that the report and its tests read stays what it is. `unit.json` comes last: it marks a
unit as done.
"""

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

COPIED = ("summary.json", "regulation.json", "metrics.jsonl", "data_card.json", "samples_adapted.json")
EVALUATIONS = ("questions", "translations")
PATH = re.compile(r"(/[\w.{}-]+){2,}")


def main(argv=None):
    """Reads the command line and copies."""
    parser = argparse.ArgumentParser("launch/study_results.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("run", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=int, help="that the unit took")
    arguments = parser.parse_args(argv)
    run, results = arguments.run, arguments.results
    results.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (run / name).exists():
            copy(run / name, results / name)
    for name in EVALUATIONS:
        copy(run / name / "results.json", results / name / "results.json")
        copy(run / name / "samples.jsonl", results / name / "samples.jsonl", without_texts)
    for path in (run / "probe" / "probe.json", *run.glob("interference-*/interference.json")):
        copy(path, results / path.parent.name / path.name, without_rows)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    about = {"commit": commit, "seconds": arguments.seconds}
    (results / "unit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def copy(source: Path, target: Path, shortened: Callable[[Any], Any] = lambda content: content) -> None:
    """Copies a file of JSON, or of a line of it each (.jsonl), as it is shortened, and without folders."""
    is_lines, text = source.suffix == ".jsonl", source.read_text(encoding="utf-8")
    contents = [
        without_folders(shortened(json.loads(part))) for part in (text.splitlines() if is_lines else [text])
    ]
    target.parent.mkdir(exist_ok=True)
    lines = [json.dumps(content, ensure_ascii=False) for content in contents]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def without_folders(content):
    """Anything of JSON's kinds, each absolute path in it being the last part of itself."""
    if isinstance(content, dict):
        return {without_folders(key): without_folders(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_folders(value) for value in content]
    return Path(content).name if isinstance(content, str) and PATH.fullmatch(content) else content


def without_texts(sample: dict) -> dict:
    """A line of samples.jsonl with digests of prompt and gold answers."""
    return sample | {"prompt": digest(sample["prompt"]), "gold": [digest(json.dumps(sample["gold"]))]}


def without_rows(probe: dict) -> dict:
    """A probe.json without the prompts of its rows, and with their probabilities to three digits."""
    return {
        language: entry | {"rows": [shortened(row) for row in entry["rows"]]} if "rows" in entry else entry
        for language, entry in probe.items()
    }


def shortened(row: dict) -> dict:
    """A row of a probe without its prompt."""
    return {
        key: [float(f"{p:.3g}") for p in value]
        if isinstance(value, list) and value and isinstance(value[0], float)
        else value
        for key, value in row.items()
        if key != "prompt"
    }


def digest(text: str) -> str:
    """16 hexadecimal digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
