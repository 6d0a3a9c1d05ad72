"""python launch/xquad.py DATA_DIR OUT --languages=el,ar

Divides XQuAD by articles into instructions to train on and questions to evaluate on, equal for all languages.

Every other one of the 48 articles is for training: OUT/LANGUAGE.jsonl has a row for each question, with its
`id` (the same in all languages), the question as `instruction`, the paragraph as `input`, and the first
answer as `output`. The other articles are for evaluation: OUT/test/xquad.LANGUAGE.json has XQuAD's own
form, which `python -m prom_jax.evaluate --tasks=xquad_LANGUAGE --data_dir=OUT/test` reads. So no paragraph is
in both.

DATA_DIR has xquad.LANGUAGE.json of https://github.com/google-deepmind/xquad (CC BY-SA 4.0). English is always
read.
"""

import argparse
import json
from pathlib import Path


def main(argv=None):
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser("launch/xquad.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("data_dir", type=Path, help="folder with xquad.LANGUAGE.json")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--languages", required=True, help="codes, separated by commas; en is added")
    arguments = parser.parse_args(argv)
    (arguments.out / "test").mkdir(parents=True, exist_ok=True)
    for language in dict.fromkeys(["en", *arguments.languages.split(",")]):
        source = arguments.data_dir / f"xquad.{language}.json"
        if not source.is_file():
            parser.error(f"{source} is not there: it comes from https://github.com/google-deepmind/xquad")
        divide(source, language, arguments.out)


def divide(source: Path, language: str, out: Path) -> None:
    """Writes a language's rows to train on and its questions to evaluate on."""
    data = json.loads(source.read_text(encoding="utf-8"))
    training, test = data["data"][::2], data["data"][1::2]
    rows = list(instructions(training))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / f"{language}.jsonl").write_text(lines, encoding="utf-8")
    rest = json.dumps(data | {"data": test}, ensure_ascii=False)
    (out / "test" / f"xquad.{language}.json").write_text(rest, encoding="utf-8")
    questions = sum(len(paragraph["qas"]) for article in test for paragraph in article["paragraphs"])
    print(f"{language}: {len(rows)} instructions, {questions} questions to evaluate on")


def instructions(articles: list[dict]):
    """A row for each question of the articles."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {
                    "id": question["id"],
                    "instruction": question["question"].strip(),
                    "input": paragraph["context"].strip(),
                    "output": question["answers"][0]["text"].strip(),
                }


if __name__ == "__main__":
    main()
