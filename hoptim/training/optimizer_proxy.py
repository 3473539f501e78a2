"""An optimizer around another one, with the groups, state and defaults of the inner one; hooks are called once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def _call_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` between the hooks that were registered on this optimizer, without those for all optimizers."""

    @functools.wraps(step)
    def hooked(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        given: tuple[Any, Any] = (optimizer, *args), kwargs
        for before in optimizer._optimizer_step_pre_hooks.values():
            given = before(optimizer, *given) or given
        result = step(*given[0], **given[1])
        for after in optimizer._optimizer_step_post_hooks.values():
            after(optimizer, *given)
        return result

    return hooked


class OptimizerProxy(Optimizer):
    """An ``Optimizer`` whose groups, state and defaults are those of ``inner``.

    They are not copied: with a list of groups of its own, schedulers would have no effect after ``load_state_dict``.
    """

    inner: Optimizer
    # Torch wraps ``step`` in this. Its own version also calls the hooks for all optimizers and opens a range in the
    # profiler, which the inner optimizer's step does already: each step would be seen twice.
    profile_hook_step = staticmethod(_call_own_hooks)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__setstate__({})  # makes the dicts of hooks; Optimizer.__init__ would also set groups and state

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
        """The inner optimizer's defaults; empty if it has none, or is not set yet."""
        return getattr(self.__dict__.get("inner"), "defaults", {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups_and_state: dict[str, Any] = {key: state[key] for key in ("state", "param_groups") if key in state}
        super().__setstate__({key: value for key, value in state.items() if key not in groups_and_state})
        if groups_and_state:
            self.inner.__setstate__(groups_and_state)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # bound to this object by a scheduler
