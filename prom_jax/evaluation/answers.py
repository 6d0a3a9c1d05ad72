"""Answers of a model, kept as they are made, so that a killed command goes on where it was."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prom_jax.parallel.multihost import barrier, main_process_first
from prom_jax.utils.console import console, progress
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process
from prom_jax.utils.workdir import make_directory


class Answers:
    """Answers by what was asked; each is written to a file at once, by process 0.

    The file's first line says what the answers depend on. All processes read it.

    Args:
      path: of the file, made if missing; None to keep answers in memory alone.
      settings: what the answers depend on, in JSON's types.

    Raises:
      UserError: if the file's answers depend on something else, or it cannot be read or written.
    """

    def __init__(self, path: Path | None, settings: dict):
        self._answers: dict[str, object] = {}
        self._file = None
        if path is None:
            return
        make_directory(path.parent)
        try:
            with main_process_first("answers"):
                self._read(path, settings)
            barrier("answers read")
            if is_main_process():
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (it stays open)
                if not self._file.tell():
                    self._write({"settings": settings})
        except OSError as error:
            raise UserError(f"{path} cannot be used ({error.strerror}): give another --out") from error

    def __len__(self):
        return len(self._answers)

    def get(self, question):
        """The answer to a question (anything in JSON's types), or None."""
        return self._answers.get(_key(question))

    def add(self, question, answer):
        """Keeps an answer.

        Raises:
          UserError: if it cannot be written.
        """
        self._answers[_key(question)] = answer
        if self._file:
            try:
                self._write({"question": _key(question), "answer": answer})
            except OSError as error:
                raise UserError(
                    f"{self._file.name} cannot be written ({error.strerror}): free some space and run the "
                    "same command again; the answers before are kept"
                ) from error

    def ask(self, questions: list, compute: Callable[[list], Iterable], what: str) -> list:
        """The answers to questions in their order. Each different one is computed once, or taken from those
        kept, and kept as soon as it is there.

        Args:
          questions: anything in JSON's types.
          compute: gives of some questions (index, answer), in any order.
          what: the plural of an answer, for messages.
        """
        different = {json.dumps(question): question for question in questions}
        missing = [question for question in different.values() if self.get(question) is None]
        done = len(different) - len(missing)
        if done:
            console.print(f"kept      {done:,} of {len(different):,} {what} from before")
        begun = time.perf_counter()
        with progress(len(different), done, what) as show:
            for made, (number, answer) in enumerate(compute(missing), 1):
                self.add(missing[number], answer)
                seconds = time.perf_counter() - begun
                left = seconds / made * (len(missing) - made)
                show(done + made, f"{made / seconds:.2f} a second, {left / 60:.1f} min left")
        return [self.get(question) for question in questions]

    def close(self):
        """Closes the file."""
        if self._file:
            self._file.close()

    def _write(self, content):
        self._file.write(json.dumps(content, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, path: Path, settings: dict):
        """Reads what is there; a line that a kill cut short is cut off."""
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole and is_main_process():
            with open(path, "r+b") as file:
                file.truncate(len(kept))
        try:
            lines = [json.loads(line) for line in kept.splitlines()]
            theirs = lines[0]["settings"] if lines else settings
            self._answers = {line["question"]: line["answer"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or give another --out") from error
        for name in settings | theirs:
            if settings.get(name) != theirs.get(name):
                raise UserError(
                    f"{path} holds answers with {name}={theirs.get(name)!r}, now "
                    f"{settings.get(name)!r}: give another --out, or remove it"
                )


def _key(question) -> str:
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()
