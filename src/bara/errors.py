"""The one error type a user of `bara` has to know, and how others' errors are told."""


class BaraError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
