"""The default method."""

from __future__ import annotations

from collections.abc import Sequence

from hoptim.methods.implicit import Implicit
from hoptim.methods.learned_options import LearnedOption
from hoptim.methods.method import Method
from hoptim.methods.unrolled import Unrolled


def default_method(learned: Sequence[LearnedOption], every: int | None = None) -> Method:
    """``Implicit()``, or if options of the inner optimizer are learned ``Unrolled()``, over at most ``every`` steps.

    ``Implicit()`` does not see such options, and with the condition ``Update`` the sign can be wrong on an untrained net.

    >>> default_method([]) == Implicit()
    True
    """
    if not learned:
        return Implicit()
    return Unrolled() if every is None else Unrolled(min(every, Unrolled.steps))
