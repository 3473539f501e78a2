"""What the options of a strategy may be: whole numbers and finite ones, of Python or NumPy; and what was given instead."""

from __future__ import annotations

import math
from numbers import Integral, Real


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number; a bool is none.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def describe_type(value: object) -> str:
    """What ``value`` is, for an error: a class given in place of an instance is named as such.

    >>> describe_type(3), describe_type(int)
    ('a int', 'the class int')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def is_finite(value: object) -> bool:
    """Whether ``value`` is a finite real number; a bool is none.

    >>> is_finite(0.1), is_finite(float("nan")), is_finite("0.1")
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
