"""Values checked where they enter: a message names the parameter, the value and what is allowed.

Imports nothing, so that every module can use it.
"""

import difflib
import math
import numbers
import operator


def whole(name: str, value, least: int = 1, most: int | None = None) -> int:
    """The value as an int, whatever type of integer it is; ValueError for a bool, a float, a string, or one out of range.

    >>> whole("k", 8, most=64)
    8
    """
    allowed = f"of at least {least}" if most is None else f"from {least:,} to {most:,}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or is_bool(value) or number < least or most is not None and number > most:
        raise ValueError(f"{name}={value!r}: it has to be a whole number {allowed}")
    return number


def real(name: str, value, least: float = -math.inf, most: float = math.inf, above: float | None = None) -> float:
    """The value as a float; ValueError for a bool, a string, NaN, infinity, or one out of range.

    least, most: allowed themselves. above: not allowed itself.
    """
    limits = [f"of at least {least:g}" if least > -math.inf else "", f"above {above:g}" if above is not None else ""]
    limits.append(f"of at most {most:g}" if most < math.inf else "")
    good = isinstance(value, numbers.Real) or hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0
    number = float(value) if good and not is_bool(value) else math.nan
    if not math.isfinite(number) or not least <= number <= most or above is not None and number <= above:
        allowed = " and ".join(filter(None, limits))
        raise ValueError(f"{name}={value!r}: it has to be a finite number{' ' + allowed if allowed else ''}")
    return number


def flag(name: str, value) -> bool:
    """The value if it is True or False; ValueError for anything else, "false" and 0 included."""
    if not is_bool(value):
        raise ValueError(f"{name}={value!r}: it has to be True or False")
    return bool(value)


def one_of(name: str, value, allowed):
    """The value if it is among the allowed ones; ValueError lists them and names the nearest."""
    allowed = list(allowed)
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise ValueError(f"{name}={value!r}{near(value, allowed)}: allowed are {', '.join(map(repr, allowed))}")
    return value


def near(name, names, cutoff: float = 0.6) -> str:
    """`" (did you mean ...?)"` if one of the names is near, else nothing; cutoff: from 0, any, to 1, the same."""
    matches = difflib.get_close_matches(str(name), [str(other) for other in names], 1, cutoff)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def is_bool(value) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
