"""The one exception for everything a user can put right."""


class InputError(ValueError):
    """Unusable input: a file, a value or a call that the user can correct.

    The message is one line that names the file, the value and the remedy; the command line prints it and exits with
    code 2.
    """


def short(value: object) -> str:
    """How a message shows a value: what a user passes may be of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an exception on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def error_line(error: object) -> str:
    """How every command reports an error, on one line."""
    return "visualrwkv: error: " + " ".join(str(error).split())
