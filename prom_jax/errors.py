"""The one exception that a command turns into a single line for its user."""


class UserError(ValueError):
    """Something the user can mend: names the offending value, what was expected, and the remedy."""
