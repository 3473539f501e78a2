"""Checks of options, and names of types for error messages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real

_VOWEL_SOUND = re.compile("[aeio]|u(?!ni|[isu])", re.IGNORECASE)  # an Update, a UserDict, a Uniform, a uint8


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number of Python or NumPy, but not a bool.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether ``value`` is a finite real number of Python or NumPy, but not a bool.

    >>> is_finite(0.1), is_finite(float("nan")), is_finite("0.1")
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def listed(names: Sequence[str], shown: int = 4) -> str:
    """The names for a message: all, or the first few and the number of the others.

    >>> listed(["a", "b"]), listed(["a", "b", "c"], shown=2)
    ("['a', 'b']", "['a', 'b'] and 1 more")
    """
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"{list(names[:shown])}{more}"


def describe_type(value: object) -> str:
    """The type of ``value`` with its article, for an error message; or if it is a class itself, its name.

    >>> describe_type(0.5), describe_type(3), describe_type(int)
    ('a float', 'an int', 'the class int')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"an {name}" if _VOWEL_SOUND.match(name) else f"a {name}"
