"""Answers are kept, and only those to the same evaluation."""

import pytest

from prom_jax.evaluation.answers import Answers
from prom_jax.utils.errors import UserError

SETTINGS = {"model": "0123", "bos": False}


def test_what_was_answered_is_kept(tmp_path):
    path = tmp_path / "eval" / "answers.jsonl"
    answers = Answers(path, SETTINGS)
    answers.add([[1, 2], "\n"], "jibu\n“ndio”")
    answers.add([[1, 2], [3]], [-1.5, True])
    with open(path, "ab") as file:
        file.write(b'{"question": "12')  # a kill in the middle of a line

    later = Answers(path, SETTINGS)
    assert later.get([[1, 2], "\n"]) == "jibu\n“ndio”"
    assert later.get([[1, 2], [3]]) == [-1.5, True]
    assert later.get([[1, 2], [4]]) is None
    later.add("another", 1)
    assert len(Answers(path, SETTINGS)) == 3


def test_answers_under_other_settings_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    Answers(path, SETTINGS).add("question", "answer")
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds answers with bos=False, now True: give another --out"):
        Answers(path, SETTINGS | {"bos": True})
    with pytest.raises(UserError, match="with max_length=None, now 512"):
        Answers(path, SETTINGS | {"max_length": 512})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["no json\n", '{"answer": 1}\n', "[]\n", '{"settings": {}}\n{}\n'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"answers.jsonl is damaged .*: remove it"):
        Answers(path, {})


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another"):
        Answers(tmp_path / "file" / "answers.jsonl", {})
