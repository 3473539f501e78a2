"""DetachedView: the hyperparameters as the training loss of an inner step sees them, without gradients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_
from types import MethodType
from typing import Any
from weakref import ref

from torch import Tensor, nn

from hoptim.problem.loss_checks import ONLY_READS, check_given

_ABSENT = object()
_END = (object(),)  # differs from all that is held, so that one more or one less is seen


class DetachedView:
    """A gradient-free view of a module, sharing memory: a context manager that gives the view of the module as it is now.

    Each module has a counterpart of the same class, whose attributes are the module's own objects: buffers, dicts, arrays,
    locks. Only parameters and modules are replaced by their counterparts: attributes, items of a list, tuple or dict, and
    owners of a method or targets of a weak reference. Attributes assigned in the view are assigned in the module. Switching
    ``requires_grad`` off in the module itself would break activation checkpointing, which runs the loss again during the
    backward pass.

    Args:
        module: the hyperparameters.
        beside: the model. It has no counterpart: if ``module`` holds a layer of it, the view holds the same layer.

    Raises:
        ValueError: on exit, if a hyperparameter was written to.

    >>> hparams = nn.ParameterDict({"decay": nn.Parameter(Tensor([1.0]))})
    >>> view = DetachedView(hparams)
    >>> hparams["decay"].data.fill_(2.0)
    tensor([2.])
    >>> with view as seen:
    ...     seen["decay"], seen["decay"].requires_grad
    (Parameter containing:
    tensor([2.]), False)
    """

    def __init__(self, module: nn.Module, beside: nn.Module | None = None) -> None:
        self.module, self.beside = module, beside
        self._is_checked = False
        self._build()

    def __reduce__(self) -> Any:
        return DetachedView, (self.module, self.beside)

    def __enter__(self) -> nn.Module:  # not a generator, which would cost more than all these comparisons
        if self._theirs.has_changed():
            self._align()
        is_stale = not self._follows_all or self._structure.has_changed()
        if is_stale or not all(map(Tensor.is_set_to, self._parameters, self._constants)):
            self._build()
        self._versions = [p._version for p in self._parameters]
        return self._counterparts[id(self.module)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        versions = self._versions
        if versions != [p._version for p in self._parameters]:
            written = next(p for p, version in zip(self._parameters, versions, strict=True) if p._version != version)
            name = next(name for name, p in self.module.named_parameters() if p is written)
            raise ValueError(f"train_loss writes into hyperparameter {name!r}: {ONLY_READS}")
        if self._ours.has_changed():
            self._align()

    def check_detached(self, loss: Tensor) -> None:
        """Raise if a loss that was computed in the view reaches parameters of ``module``, for example by a closure.

        Only the first loss with a graph is checked, since this is too slow for each step.
        """
        if not self._is_checked:
            check_given("train_loss", loss, {id(p): name for name, p in self.module.named_parameters()})
            self._is_checked = loss.requires_grad

    def _build(self) -> None:
        """Make the view: at first, and again when modules, parameters or their memory have been replaced."""
        shared = set() if self.beside is None else set(self.beside.modules())
        modules = [module for module in self.module.modules() if module not in shared]
        self._parameters = list(self.module.parameters())
        self._constants = [nn.Parameter(p.detach(), requires_grad=False) for p in self._parameters]
        views = [object.__new__(type(module)) for module in modules]
        both = list(zip((*modules, *self._parameters), (*views, *self._constants), strict=True))
        self._counterparts: dict[int, Any] = {id(original): counterpart for original, counterpart in both}
        self._originals: dict[int, Any] = {id(counterpart): original for original, counterpart in both}
        pairs: list[tuple[Any, Any]] = []  # dicts and lists of the module and of the view, to be kept in step
        for module, view in zip(modules, views, strict=True):
            for key, value in vars(module).items():
                seen = vars(view)[key] = _exchange(value, self._counterparts)
                if seen is not value and isinstance(value, (dict, list)):
                    pairs.append((value, seen))
            pairs.append((vars(module), vars(view)))
        self._theirs, self._ours = (_Contents(containers) for containers in zip(*pairs, strict=True))
        held = [held for module in modules for held in (module._parameters, module._modules)]
        self._structure = _Contents(chain.from_iterable((one.keys(), one.values()) for one in held))
        self._follows_all = True

    def _align(self) -> None:
        """Apply what has changed in the module to the view, and the other way round."""
        theirs_changed, ours_changed = self._theirs.has_changed(), self._ours.has_changed()
        if theirs_changed:
            self._carry(self._theirs, self._ours, self._counterparts)
        if ours_changed:
            self._carry(self._ours, self._theirs, self._originals)
        self._theirs, self._ours = _Contents(self._theirs.containers), _Contents(self._ours.containers)

    def _carry(self, source: _Contents, target: _Contents, counterparts: Mapping[int, Any]) -> None:
        """Apply what has changed in the source to the target."""
        for now, before, other in zip(source.containers, source.copies, target.containers, strict=True):
            if isinstance(now, list):
                other[:] = _exchange(now, counterparts)
                continue
            for key in before.keys() - now.keys():
                other.pop(key, None)
            for key, value in now.items():
                if before.get(key, _ABSENT) is not value:
                    other[key] = _exchange(value, counterparts)
                    self._follows_all &= other[key] is value  # else it may be a new list or dict to keep in step


class _Contents:
    """A record of what lists, dicts and their views hold now, to compare with what they hold later."""

    def __init__(self, containers: Iterable[Any]) -> None:
        self.containers = list(containers)
        self.copies: list[Any] = [dict(one) if isinstance(one, dict) else list(one) for one in self.containers]
        self._items = [one.values() if isinstance(one, dict) else one for one in self.containers]
        self._held = [*chain.from_iterable(self._items), *_END]

    def has_changed(self) -> bool:  # in each step: without a list of what they hold now it takes two thirds of the time
        return not all(map(is_, chain(chain.from_iterable(self._items), _END), self._held))


def _exchange(value: Any, counterparts: Mapping[int, Any]) -> Any:
    """Replace by its counterpart the value itself, or the items of a list, tuple or dict."""
    kind = type(value)
    if kind not in (dict, OrderedDict, list, tuple):
        return _exchange_one(value, counterparts)
    held = value.values() if isinstance(value, dict) else value
    seen = [_exchange_one(one, counterparts) for one in held]
    if all(map(is_, seen, held)):
        return value
    return kind(zip(value, seen, strict=True)) if isinstance(value, dict) else kind(seen)


def _exchange_one(value: Any, counterparts: Mapping[int, Any]) -> Any:
    """Replace by its counterpart a value, the owner of a method, or the target of a weak reference."""
    if isinstance(value, MethodType) and id(value.__self__) in counterparts:
        return MethodType(value.__func__, counterparts[id(value.__self__)])
    if isinstance(value, ref) and id(value()) in counterparts:
        return ref(counterparts[id(value())])
    return counterparts.get(id(value), value)
