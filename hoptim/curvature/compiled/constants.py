"""The plain Python values that a loss may read besides its arguments: a graph of it has them built in."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hoptim.problem.composite_loss import CompositeLoss

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def options(module: nn.Module) -> Iterator[Any]:
    """Modes and options of all layers."""
    for name, part in module.named_modules():
        yield name
        for value in vars(part).values():
            if isinstance(value, PLAIN):
                yield type(value), value


def read(thing: Any, names: Collection[str] = (), depth: int = 4) -> Iterator[Any]:
    """The plain values, and the tensors by identity, that calling ``thing`` may read besides its arguments.

    A graph has them built in. They are looked for where a function names them: variables that it closes over, globals,
    defaults, attributes and items, and the same of functions that it names.
    """
    if isinstance(thing, PLAIN):
        yield type(thing), thing
    elif isinstance(thing, Tensor):
        yield id(thing), thing.shape
    elif depth and not (getattr(thing, "__module__", None) or "").startswith(("torch", "builtins")):
        yield thing.__code__ if isinstance(thing, types.FunctionType) else thing if isinstance(thing, type) else type(thing)
        for inner, within in _inside(thing, names):
            yield from read(inner, within, depth - 1)


def _inside(thing: Any, names: Collection[str]) -> Iterator[tuple[Any, Collection[str]]]:
    if isinstance(thing, types.FunctionType):
        names = _names(thing.__code__)
        cells = dict(zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True))
        defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        values = [thing.__globals__.get(name) for name in names] + defaults
        yield from ((value, names) for value in values if value is not None)
        yield from ((cell.cell_contents, names) for cell in cells.values() if cell != types.CellType())
    elif isinstance(thing, types.MethodType):
        yield thing.__func__, ()
        yield thing.__self__, _names(thing.__func__.__code__)
    elif isinstance(thing, functools.partial):
        yield from ((value, names) for value in (thing.func, *thing.args, *thing.keywords.values()))
    elif isinstance(thing, CompositeLoss):
        yield from ((part, ()) for part in (thing.predict, thing.criterion, thing.penalty))
    elif isinstance(thing, dict):
        yield from ((thing[name], names) for name in names if name in thing)
    elif isinstance(thing, (list, tuple)):
        yield from ((value, names) for value in thing[:100])
    elif hasattr(thing, "__dict__"):
        call = vars(type(thing)).get("__call__")
        if isinstance(call, types.FunctionType):
            names = [*names, *_names(call.__code__)]
            yield call, ()
        yield from ((value, names) for name in names if (value := _attribute(thing, name)) is not None)


def _attribute(thing: Any, name: str) -> Any:
    """An attribute of its own, of its class, or a property's value; ``None`` for any other."""
    if name in vars(thing):
        return vars(thing)[name]
    kinds = thing.__mro__ if isinstance(thing, type) else type(thing).__mro__
    own = (kind for kind in kinds if name in vars(kind) and not kind.__module__.startswith(("torch", "builtins")))
    found = next((vars(kind)[name] for kind in own), None)
    if isinstance(found, property):
        with contextlib.suppress(Exception):  # the loss itself will meet it
            return getattr(thing, name)
        return None
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def _names(code: types.CodeType) -> list[str]:
    """What a function names: globals, attributes and constant keys, also within the functions that it holds."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return [*code.co_names, *(part for part in code.co_consts if isinstance(part, str)), *inner]
