"""Halves of XQuAD: what is trained on and what is evaluated on have no article in common."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "xquad.py"


def write_xquad(folder, language):
    """Three articles with a paragraph and two questions each."""
    articles = [
        {
            "title": f"article {i}",
            "paragraphs": [
                {
                    "context": f" paragraph {i} in {language} ",
                    "qas": [
                        {
                            "id": f"{i}-{j}",
                            "question": f"{language} question {i}-{j}?",
                            "answers": [{"text": f"answer {i}-{j}", "answer_start": 0}, {"text": "another"}],
                        }
                        for j in range(2)
                    ],
                }
            ],
        }
        for i in range(3)
    ]
    (folder / f"xquad.{language}.json").write_text(json.dumps({"version": "1.1", "data": articles}))


@pytest.fixture
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_halves(main, tmp_path):
    for language in ("en", "el"):
        write_xquad(tmp_path, language)
    main([str(tmp_path), str(tmp_path / "out"), "--languages=el"])
    for language in ("en", "el"):
        lines = (tmp_path / "out" / f"{language}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["id"] for row in rows] == ["0-0", "0-1", "2-0", "2-1"]
        assert rows[3] == {
            "id": "2-1",
            "instruction": f"{language} question 2-1?",
            "input": f"paragraph 2 in {language}",
            "output": "answer 2-1",
        }
        test = json.loads((tmp_path / "out" / "test" / f"xquad.{language}.json").read_text())
        assert test["version"] == "1.1" and [article["title"] for article in test["data"]] == ["article 1"]


def test_a_language_that_is_not_there(main, tmp_path, capsys):
    write_xquad(tmp_path, "en")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "out"), "--languages=el"])
    assert "xquad.el.json is not there" in capsys.readouterr().err
