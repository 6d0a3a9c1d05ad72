"""The documents of the tasks, from the benchmarks' official files or from the hub.

Each public function is a task's `custom_dataset`. The harness calls it with the task's `dataset_kwargs` and
with all of its metadata, of which `data_dir` and `words_file` are ours. The official file is read where
`file` of `dataset_kwargs` says, or else anywhere below `data_dir`; without these the data set is fetched from
the hub. They return {"test": data set} with the columns

- `question` and, but for MGSM, `context`: as the benchmark has them, zero-width characters included;
- `golds`: the acceptable answers, none where the question has no answer;
- `cluster`: the paragraph, whose questions are not independent of each other; in MGSM the problem;
- `id`; `language`; `words`: those of the prompts, of `words.json`, `words_file` or `dataset_kwargs`.

They raise UserError for a file that is missing, there twice or not what it should be, and for a hub that
cannot be reached.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prom_jax.data.languages import find_code
from prom_jax.data.templates import translation, wording
from prom_jax.evaluation.metrics import NUMBER, last_number
from prom_jax.utils.errors import UserError
from prom_jax.utils.temporary import quiet_loggers

WORDS = Path(__file__).with_name("words.json")


def xquad(language: str, data_dir: str | None = None, file: str | None = None, **given) -> dict:
    """XQuAD (Artetxe et al. 2020): 1190 questions about 240 paragraphs in each language."""
    name = f"xquad.{language}.json"
    found = _squad_data(data_dir, name, file, "google/xquad", f"xquad.{language}", "validation")
    return _questions(found, language, **given)


def mlqa(language: str, data_dir: str | None = None, file: str | None = None, **given) -> dict:
    """MLQA (Lewis et al. 2020), the test part whose contexts and questions are both in `language`."""
    name = f"test-context-{language}-question-{language}.json"
    found = _squad_data(data_dir, name, file, "facebook/mlqa", f"mlqa.{language}.{language}", "test")
    return _questions(found, language, **given)


def indicqa(language: str, data_dir: str | None = None, file: str | None = None, **given) -> dict:
    """IndicQA (Doddapaneni et al. 2023), with and without answers."""
    name = f"indicqa.{language}.json"
    # On the hub it is these same files with a script, which `datasets` rightly refuses to run.
    directory = data_dir or file or _hub_file(name, "ai4bharat/IndicQA", f"data/{name}")
    return _questions(_squad_file(directory, name, file), language, **given)


def mgsm(language: str, data_dir: str | None = None, file: str | None = None, **given) -> dict:
    """MGSM (Shi et al. 2023): 250 problems in each language, whose answers are numbers."""
    name = f"mgsm_{language}.tsv"
    if file or data_dir:
        source, rows = _mgsm_file(data_dir, name, file)
    else:
        source, rows = _hub_data_set(name, "juletxara/mgsm", language, "test")
    return _documents(source, _checked(source, rows, _problem), language, ("problem", "solution"), **given)


def flores(language: str, data_dir: str | None = None, **_) -> dict:
    """FLORES-200 (NLLB Team 2022), devtest: 1012 sentences to translate from English, asked for as
    translations are in training (`data.templates`). The column `prompt` is the whole prompt."""
    from datasets import Dataset

    if not data_dir:
        raise UserError("FLORES-200 is read from files alone: give --data_dir, a folder with its *.devtest.")
    source = _find(data_dir, "eng_Latn.devtest", None)
    codes = sorted(path.stem for path in source.parent.glob("*.devtest"))
    target = source.with_name(f"{find_code(language, codes)}.devtest")
    sides = [_lines(path) for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{source} has {len(sides[0])} lines and {target} {len(sides[1])}: get them again.")
    english = wording("en")
    asked = [translation(text, "", language, "0", "en").turns[0] for text in sides[0]]
    documents = [
        {
            "id": f"sentence {number}",
            "prompt": english.prompt(turn.instruction, turn.input),
            "golds": [translated],
            "cluster": f"sentence {number}",
            "language": language,
        }
        for number, (turn, translated) in enumerate(zip(asked, sides[1]), 1)
    ]
    return {"test": Dataset.from_list(documents)}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def _questions(found: tuple[str, Iterable[dict]], language: str, **given) -> dict:
    source, rows = found
    questions = _checked(source, rows, _question)
    paragraphs: dict[str, int] = {}
    for question in questions:
        number = paragraphs.setdefault(question["context"], len(paragraphs) + 1)
        question["cluster"] = f"paragraph {number}"
    return _documents(source, questions, language, ("background", "question", "answer"), **given)


def _documents(
    source: str,
    documents: list[dict],
    language: str,
    kinds: tuple[str, ...],
    words: dict | None = None,
    words_file: str | None = None,
    **_,
) -> dict:
    from datasets import Dataset

    if not documents:
        raise UserError(f"{source} has no questions: get it again.")
    words = _words(language, words, words_file)
    missing = [kind for kind in kinds if not isinstance(words.get(kind), str)]
    if missing:
        raise UserError(
            f"There are no words for {', '.join(missing)} in '{language}': give them in the task's file, as "
            "dataset_kwargs: {language: …, words: {…: …}}, or in a file of --words, by language like "
            f"{WORDS.name} next to {Path(__file__).name}."
        )
    common = {"language": language, "words": words}
    return {"test": Dataset.from_list([{**document, **common} for document in documents])}


def _words(language: str, given: dict | None, file: str | None) -> dict:
    """The words of a language's prompts: ours, over these those of a file, over these those of the task."""
    words = dict(json.loads(WORDS.read_text(encoding="utf-8")).get(language, {}))
    if file:
        try:
            words |= json.loads(Path(file).expanduser().read_text(encoding="utf-8")).get(language, {})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"--words={file} cannot be read ({error}): expected JSON of words by language, such as "
                '{"es": {"question": "Pregunta:", …}}'
            ) from error
    return words | (given or {})


# One row ---------------------------------------------------------------------------------------


def _checked(source: str, rows: Iterable[dict], convert: Callable[[dict], dict]) -> list[dict]:
    try:
        return [convert(row) for row in rows]
    except KeyError as error:
        reason = f"{error} is missing"
    except (OSError, TypeError, ValueError) as error:  # among them bytes not UTF-8, and text not JSON
        reason = str(error)
    raise UserError(f"{source} is not as its benchmark publishes it ({reason}): get it again.")


def _question(raw: dict) -> dict:
    answers = raw["answers"]  # the hub has one dict of lists, a file a list of dicts
    texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
    return {
        "id": str(raw["id"]),
        "context": _text(raw["context"]),
        "question": _text(raw["question"]),
        "golds": [text for text in map(_text, texts) if text.strip()],
    }


def _problem(raw: dict) -> dict:
    answer = str(raw["answer_number"])
    if not NUMBER.fullmatch(answer.strip()):
        raise ValueError(f"{raw['id']} has the answer '{answer}', not a number")
    identity = {"id": raw["id"], "cluster": raw["id"]}
    return {**identity, "question": _text(raw["question"]), "golds": [str(last_number(answer))]}


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    value.encode()  # refuses half a character
    return value


# Official files --------------------------------------------------------------------------------


def _squad_data(data_dir: str | None, name: str, file: str | None, *on_hub: str):
    """As `_squad_file` where there is a folder or a file, else of a data set on the hub."""
    return _squad_file(data_dir, name, file) if file or data_dir else _hub_data_set(name, *on_hub)


def _squad_file(directory: str | Path | None, name: str, file: str | None) -> tuple[str, Iterator[dict]]:
    path = _find(directory, name, file)

    def rows():
        for article in json.loads(path.read_text(encoding="utf-8-sig"))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {**question, "context": paragraph["context"]}

    return str(path), rows()


def _mgsm_file(directory: str | None, name: str, file: str | None) -> tuple[str, Iterable[dict]]:
    path = _find(directory, name, file)

    def rows():
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        for number, line in enumerate(filter(None, lines), 1):
            question, tab, answer = line.partition("\t")
            if not tab:
                raise ValueError(f"line {number} has no tab")
            yield {"id": f"problem {number}", "question": question, "answer_number": answer}

    return str(path), rows()


def _find(directory: str | Path | None, name: str, file: str | None) -> Path:
    """A task's own file, or else that of the benchmark's name anywhere below a directory."""
    if file:
        if not Path(file).is_file():
            raise UserError(f"There is no file '{file}', which the task names: put it there.")
        return Path(file)
    if directory is None or not Path(directory).is_dir():
        raise UserError(f"There is no directory '{directory}': give --data_dir one that has {name} below it.")
    found = sorted(Path(directory).rglob(name))
    if not found:
        raise UserError(
            f"There is no {name} below '{directory}': put it there, or leave --data_dir out to fetch it."
        )
    if len(found) > 1:
        paths = ", ".join(map(str, found))
        raise UserError(f"There are {len(found)} files {name} below '{directory}' ({paths}): leave one.")
    return found[0]


# The hub ---------------------------------------------------------------------------------------


def _hub_data_set(name: str, repository: str, config: str, split: str) -> tuple[str, Iterable[dict]]:
    import datasets

    with quiet_loggers("datasets"):  # what it logs, it raises too
        rows = _fetched(repository, name, lambda: datasets.load_dataset(repository, config, split=split))
    # MGSM's rows have no id of their own
    return f"{repository}:{config}", ({"id": f"problem {n}", **row} for n, row in enumerate(rows, 1))


def _hub_file(name: str, repository: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        _fetched(repository, name, lambda: hf_hub_download(repository, path, repo_type="dataset"))
    ).parent


def _fetched(repository: str, name: str, fetch: Callable):
    try:
        return fetch()
    except Exception as error:  # the libraries raise a dozen kinds, and not all of them their own
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{repository} cannot be fetched from the hub ({type(error).__name__}: {reason}): give "
            f"--data_dir=DIR, a directory that has {name} somewhere below it."
        ) from error
