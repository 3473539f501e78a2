"""Batches that are used later than they were given: as copies, or by reference if nothing has changed in them since."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DEEP = 6  # objects inside one another are opened to this depth
MANY = 32  # a longer list that begins and ends with plain values has no tensor between them
_PLAIN = frozenset((str, bytes, int, float, bool, complex, type(None), np.ndarray, torch.dtype, torch.device))
_CLOSED = (str, bytes, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, nn.Module)

Path = tuple[Any, ...]
FoundTensor = tuple[Path, Tensor, int | None]  # the way to a tensor, itself, and its version, which counts writes


class CopiedPart(NamedTuple):
    """A part of a batch, its version when it was copied, and the copy, which is the part itself if it can't be copied."""

    original: Any
    version: int | None
    copy: Any


class HeldBatch(NamedTuple):
    """A batch for later use; made by :func:`hold` or :func:`hold_copy`.

    Attributes:
        batch: the batch or its copy.
        tensors: those in ``batch``.
        leaves: the copied parts, with which the next copy shares what has not changed.
    """

    batch: Any
    tensors: Sequence[FoundTensor]
    leaves: Sequence[CopiedPart] = ()

    def get(self) -> Any:
        """The batch, which is as it was when it was kept.

        Raises:
            ValueError: a tensor in it was written to, or another one with other values is in its place.
        """
        for path in self.changed():
            name = "".join(f"[{key!r}]" for key in path)
            raise ValueError(
                f"the tensor batch{name} was written to after the batch was given or drawn, and a hyperstep needs it as it "
                "was: give or draw other tensors each time, such as batch.clone(); or give a hyperstep by hand its batch, "
                "hyperstep(train_batch=batch)"
            )
        return self.batch

    def changed(self) -> list[Path]:
        """The ways to the tensors that were written to, or in whose places are others with other values."""
        now = {path: tensor for path, tensor, _ in hold(self.batch).tensors}
        return [
            path
            for path, tensor, version in self.tensors
            if _version(tensor) != version or not ((there := now.get(path)) is tensor or _is_equal(there, tensor))
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return _held_again, (self.batch, self.changed())  # the versions of a copy are others


def hold(batch: Any) -> HeldBatch:
    """Keep a batch by reference, in a microsecond. NumPy's arrays have no versions: what is written to them goes unseen.

    >>> x = torch.ones(2)
    >>> kept = hold({"x": x})
    >>> _ = x.mul_(2)
    >>> kept.get()
    Traceback (most recent call last):
    ValueError: the tensor batch['x'] was written to after the batch was given or drawn, ...
    """
    found: list[FoundTensor] = []
    if isinstance(batch, Tensor):
        found.append(((), batch, _version(batch)))
    elif type(batch) not in _PLAIN:
        _find_tensors(batch, (), found)
    return HeldBatch(batch, found)


def _held_again(batch: Any, changed: Sequence[Path]) -> HeldBatch:
    return HeldBatch(
        batch,
        [(path, tensor, -1 if path in changed else version) for path, tensor, version in hold(batch).tensors],
    )


def _find_tensors(value: Any, path: Path, found: list[FoundTensor]) -> None:
    """Append the tensors in ``value``, which are found in containers and in the attributes of objects."""
    for key, part in _parts(value):
        kind = type(part)
        if kind in _PLAIN:
            continue
        if kind is Tensor or isinstance(part, Tensor):
            found.append(((*path, key), part, _version(part)))
        elif len(path) < DEEP:
            _find_tensors(part, (*path, key), found)


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, (tuple, list)):
        return () if len(value) > MANY and type(value[0]) in _PLAIN and type(value[-1]) in _PLAIN else enumerate(value)
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, _CLOSED):
        return ()
    slots = {key: getattr(value, key, None) for kind in type(value).__mro__ for key in vars(kind).get("__slots__", ())}
    return (slots | getattr(value, "__dict__", {})).items()


def hold_copy(batch: Any, last: HeldBatch | None = None) -> HeldBatch:
    """Keep a copy of a batch: of its tensors and arrays. What is inside other objects is kept by reference.

    Args:
        batch: the batch.
        last: the copy before this one, to share what has not changed since.

    >>> x = torch.ones(2)
    >>> kept = hold_copy([x, "a name"])
    >>> _ = x.mul_(2)
    >>> kept.get()
    [tensor([1., 1.]), 'a name']
    """
    before = chain(() if last is None else last.leaves, repeat(None))
    leaves: list[CopiedPart] = []

    def copy_part(part: Any) -> Any:
        leaves.append(_copy_of(part, next(before)))
        return leaves[-1].copy

    copy = _mapped(copy_part, batch)
    return HeldBatch(copy, hold(copy).tensors, leaves)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of each leaf. ``tree_map`` alone would leave a reference cycle behind each time it is called."""
    if type(value) in (list, tuple):
        return type(value)([_mapped(function, one) for one in value])
    if type(value) is dict:
        return {key: _mapped(function, one) for key, one in value.items()}
    return function(value) if pytree.tree_is_leaf(value) else pytree.tree_map(function, value)


def _copy_of(part: Any, last: CopiedPart | None) -> CopiedPart:
    if last is not None and last.original is part and _is_unchanged(last):
        return last
    if isinstance(part, np.ndarray):
        return CopiedPart(part, None, part.copy(order="K"))
    if not isinstance(part, Tensor):
        return CopiedPart(part, None, part)
    copy = part.detach().clone().requires_grad_(part.requires_grad)
    if type(part) is Tensor:
        vars(copy).update(vars(part))  # some loops put attributes there
    return CopiedPart(part, _version(part), copy if type(copy) is type(part) else part)


def _is_unchanged(leaf: CopiedPart) -> bool:
    """Whether the original still has the values of the copy; on an accelerator, without waiting for it."""
    original, version, copy = leaf
    if isinstance(original, np.ndarray):
        return original.dtype == copy.dtype and np.array_equal(original, copy)
    if not isinstance(original, Tensor):
        return True
    if original.is_cpu and original.layout == torch.strided:  # NumPy may have written to it, which no version tells
        return original.requires_grad == copy.requires_grad and _is_equal(original, copy)
    return version is not None and _version(original) == version


def _is_equal(there: Tensor | None, tensor: Tensor) -> bool:
    if there is None or there.shape != tensor.shape or tensor.layout != torch.strided or there.layout != torch.strided:
        return False
    return torch.equal(there.detach().to(tensor), tensor.detach())


def _version(tensor: Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:  # of a tensor that was made in inference mode
        return None
