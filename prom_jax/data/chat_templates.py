"""Prompts in a chat template: the base model's own, or one of a file.

A template is a program that turns messages into text, special tokens spelled out. Which characters of that
text are an answer is found by marks: characters that no text has, put around the answers before the template
renders them, and gone again before anything is tokenised. Where the template says it itself, with
`{% generation %}`, it is taken at its word.
"""

import bisect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from prom_jax.data.rows import Turn
from prom_jax.data.templates import Alpaca, Dialogue, Plain, Span, Template, Unusable, plain
from prom_jax.tokenization.sentencepiece import serializable
from prom_jax.utils.errors import UserError

NAMES = ("alpaca", "model")  # of data.template, besides files
# Characters of Unicode's last plane for private use, which no language has.
START, STOP = "\U0010fffc", "\U0010fffd"
OWN = "\U00100000"  # from here on, a special token that the template has put there
SPELLED = "\U00102000"  # and one that a message spells, which stays text
PRIVATE = re.compile("[\U00100000-\U0010ffff]")
MARK = re.compile(f"[{START}{STOP}]")
SPACE = re.compile(r"\s*")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def find_template(name: str, tokenizer) -> Template:
    """The template of records: 'alpaca', or 'model' for the tokenizer's own.

    Raises:
      UserError: the tokenizer has none that can be used.
    """
    return Alpaca(tokenizer) if name == "alpaca" else ChatTemplate(tokenizer, own_template(tokenizer))


def own_template(tokenizer) -> str:
    """The chat template that a tokenizer comes with.

    Raises:
      UserError: it has none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"data.template=model: {tokenizer.name_or_path} has no chat template, as base models have none: "
            "set data.template=alpaca, or name a file that has one, data.template=FILE.jinja."
        )
    return tokenizer.get_chat_template()


def read_template(path: str) -> str:
    """The chat template in a file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template={path} cannot be read ({error}): expected one of {', '.join(NAMES)}, or a file "
            "with a chat template in Jinja."
        ) from error


class _Message(NamedTuple):
    """A message, and how much of the end of its content is to be found again in the text."""

    role: str
    content: str
    learnt: int = 0

    @property
    def parts(self) -> tuple[str, str]:
        """What is not learnt, and what is."""
        middle = len(self.content) - self.learnt
        return self.content[:middle], self.content[middle:]


class ChatTemplate:
    """A chat template, with its tokenizer.

    Args:
      tokenizer: a transformers tokenizer.
      template: in Jinja.

    Attributes:
      ends: the ids of the tokens that end answers.

    Raises:
      UserError: a template that cannot render a question and its answer, or ends no answer.
    """

    def __init__(self, tokenizer, template: str):
        self._template = template
        self._constants = dict(tokenizer.special_tokens_map)
        self._says_itself = bool(GENERATION.search(template))
        special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._own = {name: chr(ord(OWN) + i) for i, name in enumerate(special)}
        self._spelled = {name: chr(ord(SPELLED) + i) for i, name in enumerate(special)}
        self._names = list(special)
        names, last = _any_of(special), chr(ord(SPELLED) + len(special))
        self._special = re.compile(names)
        self._special_or_spelled = re.compile(f"{names}|[{SPELLED}-{last}]")
        self._backend = _backend(tokenizer, {self._own[name]: token for name, token in special.items()})
        self._ids = {
            self._backend.token_to_id(mark): tokenizer.convert_tokens_to_ids(name)
            for name, mark in self._own.items()
        }
        self.ends = self._check(tokenizer)

    def spans(self, text: Dialogue | Plain) -> list[Span]:
        """See `Template`."""
        if isinstance(text, Plain):
            _check_private(text.text)
            return plain(text)
        return [self._conversation(text)]

    def _conversation(self, dialogue: Dialogue) -> Span:
        messages = self._messages(dialogue)
        text = self._render(messages)
        if self._says_itself and dialogue.learns == "output" and dialogue.ended:
            found = self._generated(messages)
        else:
            found = self._located(messages, text)
            if not found:
                raise Unusable("no response")
            if dialogue.learns == "input" or not dialogue.ended:
                text = text[: found[-1][1]]
            else:
                found = [(start, self._end(text, stop)) for start, stop in found]
        return self._span(text, found)

    def tokenise(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """See `Template`."""
        encoded = self._backend.encode_batch(texts, add_special_tokens=False)
        ids = [[self._ids.get(number, number) for number in text.ids] for text in encoded]
        return ids, [text.offsets for text in encoded]

    def _check(self, tokenizer) -> tuple[int, ...]:
        """Renders a question and its answer; the ids of the tokens that end the answer."""
        try:
            (span,) = self.spans(Dialogue((Turn("a", "", "b"),)))
        except Unusable as error:
            raise UserError(
                f"The chat template of {tokenizer.name_or_path} cannot be trained with: {error}. Set "
                "data.template=alpaca, or name a file with another one."
            ) from error
        if not span.ends:
            raise UserError(
                f"The chat template of {tokenizer.name_or_path} ends answers with no special token, so that "
                "a model would not learn to stop: add one, such as {{ eos_token }}, after answers, in a file "
                "of your own (data.template)."
            )
        names = {mark: name for name, mark in self._own.items()}
        return tuple(
            dict.fromkeys(tokenizer.convert_tokens_to_ids(names[span.text[start]]) for start, _ in span.ends)
        )

    # Messages and their text.

    def _messages(self, dialogue: Dialogue) -> list[_Message]:
        messages = [_Message("system", self._safe(dialogue.system))] if dialogue.system else []
        for turn in dialogue.turns:
            asked = "\n\n".join(filter(None, (turn.instruction, turn.input)))
            if dialogue.learns == "input":
                messages.append(_Message("user", self._safe(asked), len(self._safe(turn.input))))
            else:
                answer = self._safe(turn.output)
                learnt = len(answer) * bool(answer.strip())
                messages += [_Message("user", self._safe(asked)), _Message("assistant", answer, learnt)]
        return messages

    def _safe(self, content: str) -> str:
        """A content in which special tokens that it spells are single characters."""
        _check_private(content)
        return self._special.sub(lambda name: self._spelled[name[0]], content)

    def _render(self, messages: list[_Message], generation_prompt: bool = False) -> str:
        return self._rendered(messages, add_generation_prompt=generation_prompt)[0]

    def _rendered(self, messages: list[_Message], **settings) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text, and its ranges in `{% generation %}` where they are asked for."""
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            texts, generated = render_jinja_template(
                [conversation], chat_template=self._template, **self._constants, **settings
            )
        except Exception as error:  # a template is a program of others'
            raise Unusable(f"the chat template refuses it ({error})") from error
        return texts[0], generated[0] if generated else []

    # Where the answers are.

    def _generated(self, messages: list[_Message]) -> list[tuple[int, int]]:
        """As the template says itself."""
        return self._rendered(messages, return_assistant_tokens_mask=True)[1]

    def _located(self, messages: list[_Message], text: str) -> list[tuple[int, int]]:
        """The ranges of what is learnt in the text of the messages."""
        learnt = [i for i, message in enumerate(messages) if message.learnt]
        places = self._marks(messages, text, both=True)
        if len(places) != 2 * len(learnt):
            return self._after_prompts(messages, text)
        return [
            (
                start - self._kept(messages, i, str.lstrip, text),
                stop + self._kept(messages, i, str.rstrip, text),
            )
            for i, start, stop in zip(learnt, places[::2], places[1::2])
        ]

    def _kept(self, messages: list[_Message], i: int, strip: Callable[[str], str], text: str) -> int:
        """How much of the white space at one end of what is learnt the template has kept."""
        before, learnt = messages[i].parts
        if strip(learnt) == learnt:
            return 0
        stripped = messages[i]._replace(content=before + strip(learnt))
        return len(text) - len(self._render([*messages[:i], stripped, *messages[i + 1 :]]))

    def _after_prompts(self, messages: list[_Message], text: str) -> list[tuple[int, int]]:
        """The same where the template changes answers, as some do with thoughts: from the end of the prompt
        that it makes for each answer."""
        answers = [i for i, message in enumerate(messages) if message.learnt]
        prompts = [self._render(messages[:i], generation_prompt=True) for i in answers]
        stops = self._marks(messages, text, both=False)
        if len(stops) != len(answers) or not all(map(text.startswith, prompts)):
            raise Unusable("an answer that the chat template changes")
        return [(len(prompt), stop) for prompt, stop in zip(prompts, stops)]

    def _marks(self, messages: list[_Message], text: str, both: bool) -> list[int]:
        """Where in the text marks stand that are put around what is learnt, or after it alone; none where the
        text is another one with them."""
        marked = self._render([_with_marks(message, START * both) for message in messages])
        if MARK.sub("", marked) != text:
            return []
        return [match.start() - number for number, match in enumerate(MARK.finditer(marked))]

    def _end(self, text: str, stop: int) -> int:
        """The end of an answer with the special token that ends its turn."""
        space = SPACE.match(text, stop)
        assert space  # perhaps of no length
        following = self._special.match(text, space.end())
        return following.end() if following else stop

    def _span(self, text: str, learnt: list[tuple[int, int]]) -> Span:
        """The text to tokenise, in which the template's special tokens are single characters, and those that
        a message spells are spelled again."""
        parts, ends, shifts = [], [], [(0, 0)]  # from which character on positions move by how many
        last = 0
        for match in self._special_or_spelled.finditer(text):
            name = match[0]
            parts += text[last : match.start()], self._own.get(name) or self._names[ord(name) - ord(SPELLED)]
            if name in self._own and any(a <= match.start() and match.end() <= b for a, b in learnt):
                start = match.start() + shifts[-1][1]
                ends.append((start, start + 1))
            last = match.end()
            shifts.append((last, shifts[-1][1] + len(parts[-1]) - len(name)))
        parts.append(text[last:])

        def moved(position: int) -> int:
            return position + shifts[bisect.bisect_right(shifts, (position, sys.maxsize)) - 1][1]

        ranges = tuple((moved(start), moved(stop)) for start, stop in learnt)
        return Span("".join(parts), _without(ranges, ends), ends=tuple(ends), whole=True)


def _check_private(text: str) -> None:
    if PRIVATE.search(text):
        raise Unusable("a character for private use, which the marks of chat templates need")


def _any_of(names) -> str:
    """A pattern for any of the names, a longer one first where one begins as another does; by their first
    letters, so that it is fast for thousands."""
    by_letter: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        by_letter.setdefault(name[0], []).append(re.escape(name[1:]))
    return "|".join(f"{re.escape(a)}(?:{'|'.join(rest)})" for a, rest in by_letter.items()) or r"(?!)"


def _with_marks(message: _Message, start: str) -> _Message:
    """A message with marks around what is learnt, within the white space around it, which templates trim."""
    if not message.learnt:
        return message
    before, learnt = message.parts
    bare = learnt.strip()
    if not bare:
        return message
    return message._replace(content=before + learnt.replace(bare, start + bare + STOP, 1))


def _without(ranges, ends) -> tuple[tuple[int, int], ...]:
    """The ranges without the special tokens in them."""
    found = []
    for start, stop in ranges:
        for begin, end in ends:
            if start <= begin and end <= stop:
                found.append((start, begin))
                start = end
        found.append((start, stop))
    return tuple((start, stop) for start, stop in found if start < stop)


def _backend(tokenizer, marks: dict) -> Tokenizer:
    """A copy of what cuts a tokenizer's text, which knows marks in place of special tokens.

    Args:
      marks: {mark: the special token that it stands for}.
    """
    with serializable(tokenizer) as by_library:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if by_library:
        backend.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    backend.no_truncation(), backend.no_padding()
    backend.add_tokens(
        [
            AddedToken(mark, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)
            for mark, token in marks.items()
        ]
    )
    backend.encode_special_tokens = True  # those that are spelled are text
    return backend
