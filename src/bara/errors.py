"""The one error type a user of `bara` has to know."""


class BaraError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""
