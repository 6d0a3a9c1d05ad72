"""The one exception that a command turns into a single line for its user."""


class UserError(ValueError):
    """Something the user can fix: names the offending value, what was expected, and the remedy.

    Line breaks and terminal codes, which may come out of a stranger's file, show as escapes.
    """

    def __str__(self):
        return "".join(
            character if character.isprintable() else repr(character)[1:-1] for character in super().__str__()
        )
