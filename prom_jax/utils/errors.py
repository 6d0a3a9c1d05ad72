"""The one exception that a command turns into a single line for its user."""


class UserError(ValueError):
    """Something the user can fix: names the offending value, what was expected, and the remedy.

    Line breaks and terminal codes, which may come out of a stranger's file, show as escapes.
    """

    def __str__(self):
        return printable(super().__str__())


def printable(text: str) -> str:
    """A text whose line breaks and terminal codes show as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
