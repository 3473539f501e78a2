"""Step hooks of an optimizer that steps through another one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` with the optimizer's own hooks around it, in the place of ``Optimizer.profile_hook_step``.

    Torch's also calls the hooks that were registered for all optimizers, and shows the step in a profile, as the one inside
    does already: whoever counts steps would count each twice.
    """

    @functools.wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[0]
        for before in optimizer._optimizer_step_pre_hooks.values():
            args, kwargs = before(optimizer, args, kwargs) or (args, kwargs)
        result = step(*args, **kwargs)
        for after in optimizer._optimizer_step_post_hooks.values():
            after(optimizer, args, kwargs)
        return result

    return hooked
