"""What is asked of a loss: it takes three arguments, returns real numbers with a gradient, and leaves all else alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hoptim.linalg.trees import Tree
from hoptim.linalg.vjp import nodes
from hoptim.validation import describe_type

ONLY_READS = "a loss only reads; do that after optimizer.step()"


def check_takes(name: str, function: Any, arguments: str) -> None:
    """Raise where ``function`` is none, or can't be called with these arguments.

    >>> check_takes("loss", lambda model, batch: 0.0, "model, hparams, batch")
    Traceback (most recent call last):
    TypeError: loss takes (model, batch), but is called as loss(model, hparams, batch): too many positional arguments
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} is {describe_type(function)}: give a function of ({arguments})")
    try:
        forward = function.forward if isinstance(function, nn.Module) else function
        signature = inspect.signature(forward, follow_wrapped=False)
    except (TypeError, ValueError):  # what is written in C may have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise TypeError(f"{name} takes {signature}, but is called as {name}({arguments}): {error}") from None


def check_real(what: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise for a parameter that has no data, no real numbers, or no way to a gradient."""
    for name, p in parameters:
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(f"{what} {name!r} is not initialised yet: run the model on one batch first")
        if p.is_meta:
            raise ValueError(f"{what} {name!r} is on the meta device and has no values: load it with to_empty() first")
        if p.is_inference():
            raise ValueError(f"{what} {name!r} was made inside torch.inference_mode(): build it outside")
        if p.is_complex():
            raise TypeError(f"{what} {name!r} is {p.dtype}: keep its real and imaginary parts, torch.view_as_real(...)")


def check_apart(weights: Iterable[tuple[str, nn.Parameter]], leaves: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise where a weight and a hyperparameter are one tensor, or begin at the same memory."""
    tensors = list(weights)
    same = {id(p): name for name, p in tensors}
    memory = {place: name for name, p in tensors if (place := p.data_ptr())}
    frozen = {id(p) for _, p in tensors if not p.requires_grad}
    for name, p in leaves:
        if id(p) in frozen and not p.requires_grad:  # neither learned nor trained: both may read it
            continue
        if id(p) in same:
            raise ValueError(f"weight {same[id(p)]!r} and hyperparameter {name!r} are the same tensor: part them")
        if weight := memory.get(p.data_ptr()):
            raise ValueError(f"weight {weight!r} and hyperparameter {name!r} share memory: clone() one of them")


def scalar(name: str, value: Tensor, needs_gradient: bool = True) -> Tensor:
    """Return ``value`` if it is a real scalar with a gradient; raise and say what to do if not."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} returned {describe_type(value)}: return a scalar tensor, the loss alone")
    if not value.is_floating_point():
        raise TypeError(f"{name} returned a tensor of {value.dtype}: return a real, floating-point loss")
    if value.ndim:
        raise ValueError(f"{name} returned a tensor of shape {tuple(value.shape)}: return a scalar, such as its mean()")
    if needs_gradient and not value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} returned a loss without a gradient: is it computed under no_grad() or detach()ed?")
    return value


def losses(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a scalar, or a vector of one loss or more, with a gradient; raise if not."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) for one in value):
        raise TypeError(
            f"{name} returned {describe_type(value)} of tensors: return one loss, or torch.stack(...) of several"
        )
    if not isinstance(value, Tensor) or not value.ndim:
        return scalar(name, value)
    if value.ndim > 1 or not len(value):
        raise ValueError(f"{name} returned a tensor of shape {tuple(value.shape)}: return a scalar, or a vector of losses")
    scalar(f"an entry of {name}", value[0])
    return value


@contextmanager
def annotate_errors(note: str) -> Iterator[None]:
    """What is raised inside goes on as it is, with one line more at the end of its traceback.

    A user's own error keeps its class, by which the user's code may catch it, and its place. The line is a note in the sense
    of PEP 678; Python 3.10 keeps it in ``__notes__`` and does not print it.
    """
    try:
        yield
    except Exception as error:
        vars(error).setdefault("__notes__", []).append(f"hoptim: {note}")
        raise


@contextmanager
def forbid_writes(name: str, weights: Tree, leaves: Tree, *, values: bool = False) -> Iterator[None]:
    """Raise where the loss that runs inside writes into its weights or hyperparameters, or goes backward itself.

    They are the live memory: a write would stay. Whatever torch knows to be a write raises a tensor's version; one through
    ``.data`` shows in the values alone, which are compared and put back where ``values`` asks for it.
    """
    tensors = [("weight", *one) for one in weights.items()] + [("hyperparameter", *one) for one in leaves.items()]
    states = [(t._version, t.dtype, t.requires_grad) for _, _, t in tensors]
    copies = [t.detach().clone() if values and t.requires_grad else None for _, _, t in tensors]
    frozen = [t for _, _, t in tensors if values and not t.requires_grad and t.is_floating_point()]
    sizes = _norms(frozen)  # a copy could be as large as the model
    yield
    moved = {id(t) for t, was, now in zip(frozen, sizes, _norms(frozen), strict=True) if not torch.equal(was, now)}
    faults = []
    for (what, key, t), (version, dtype, learned), copy in zip(tensors, states, copies, strict=True):
        if t.dtype is not dtype or t.requires_grad is not learned:
            faults.append(f"changes the dtype or requires_grad of {what} {key!r}: do that before the training")
        elif t._version != version or id(t) in moved or not (copy is None or _same(t, copy)):
            faults.append(f"writes into {what} {key!r}: {ONLY_READS}")
            if copy is not None:
                t.detach().copy_(copy)
        elif learned and t.is_leaf and t.grad is not None:  # a frozen one may keep that of the time before
            faults.append("calls backward(): a loss only returns its value, and the caller differentiates it")
    if faults:
        raise ValueError(f"{name} {faults[0]}")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return [norm.nan_to_num() for norm in torch._foreach_norm([t.detach() for t in tensors])] if tensors else []


def check_given(name: str, loss: Tensor, live: Mapping[int, str]) -> None:
    """Raise where a loss goes past the tensors it is given to the live ones: by a list of parameters made beforehand."""
    ends = (node for node in nodes([loss]) if node.name().endswith("AccumulateGrad"))
    if past := sorted({live[id(node.variable)] for node in ends if id(node.variable) in live}):
        raise ValueError(
            f"{name} uses {past[:5]} past the model and hparams that it is given, so that their derivative would be missed: "
            "take them from its arguments, inside the loss, not from a list or a value made before"
        )
