"""The one error type a user of `bara` has to know, and how others' errors are told."""


class BaraError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What it says last: Ray's errors begin with the traceback of another process."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return (str(error).strip() or type(error).__name__).splitlines()
