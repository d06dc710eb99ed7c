"""The one exception for everything a user can put right."""


class InputError(ValueError):
    """Unusable input: a file, a value or a call that the user can correct.

    The message is one line that names the file, the value and the remedy; the command line prints it and exits with
    code 2.
    """
