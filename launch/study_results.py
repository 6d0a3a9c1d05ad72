"""python launch/study_results.py RUN RESULTS [--seconds=N]

Copies the small results of a unit of launch/study.sh: settings, decision, metrics, scores by question, the
curves of the probe. Prompts and gold answers, which are others' texts, become digests; all that the report
and its tests read stays what it is. `unit.json` comes last: it marks a unit as done.
"""

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

COPIED = ("summary.json", "regulation.json", "metrics.jsonl", "data_card.json", "samples_adapted.json")
EVALUATIONS = ("questions", "translations")


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
            (results / name).write_bytes((run / name).read_bytes())
    for name in EVALUATIONS:
        (results / name).mkdir(exist_ok=True)
        (results / name / "results.json").write_bytes((run / name / "results.json").read_bytes())
        with (run / name / "samples.jsonl").open(encoding="utf-8") as file:
            lines = [json.dumps(without_texts(json.loads(line)), ensure_ascii=False) for line in file]
        (results / name / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in (run / "probe" / "probe.json", *run.glob("interference-*/interference.json")):
        target = results / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(
            json.dumps(without_rows(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    about = {"commit": commit, "seconds": arguments.seconds}
    (results / "unit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


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
