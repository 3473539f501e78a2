"""An optimizer around another one: what is read and written is the inner one's, and hooks are called once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def _own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
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


class OptimizerProxy(Optimizer):
    """An ``Optimizer`` in the eyes of all that accept one, whose groups, state and defaults are those of ``inner``.

    They are never copied: a scheduler that moved a list of its own would move nothing after ``load_state_dict``.
    """

    inner: Optimizer
    profile_hook_step = staticmethod(_own_hooks)  # type: ignore[assignment]  # with which torch wraps ``step``

    def __init__(self) -> None:
        super().__setstate__({})  # makes the hooks; Optimizer.__init__ would also write param_groups, which are the inner's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults; none where it has none, or before it is here."""
        return getattr(self.__dict__.get("inner"), "defaults", {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        inner: dict[str, Any] = {key: state.pop(key) for key in ("state", "param_groups") if key in state}
        super().__setstate__(state)
        if inner:
            self.inner.__setstate__(inner)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # a scheduler's own, of this one
