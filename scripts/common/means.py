"""A mean and its standard error, as a number and as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def standard_error(values: Iterable[float]) -> float:
    """The standard error of the mean; NaN for a single value.

    >>> standard_error([1.0, 3.0]), standard_error([1.0])
    (1.0, nan)
    """
    found = list(values)
    return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan


def mean_and_error(values: Sequence[float], form: str = ".3f") -> str:
    """The mean ± its standard error as text; the mean alone for a single value, and nothing for none.

    >>> mean_and_error([1.0, 3.0]), mean_and_error([1.0, 3.0], "+.1f"), mean_and_error([0.25], ".0%"), mean_and_error([])
    ('2.000 ± 1.000', '+2.0 ± 1.0', '25%', '')
    """
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {standard_error(values):{form.removeprefix('+')}}" if len(values) > 1 else mean
