"""Checks of values from options, arguments in Python and files."""


def is_number(value: object, kind: type) -> bool:
    """Return whether a value is a number of a kind, such as ``numbers.Integral``. True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)
