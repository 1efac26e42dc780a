"""The one exception that means 'the user can fix this': commands print it as one line and exit with status 1."""


class InputError(ValueError):
    """A bad file, option or shape. Its message names the value, what was expected and the way out."""
