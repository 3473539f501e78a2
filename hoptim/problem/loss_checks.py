"""What a loss must do: take three arguments, return real numbers that have a gradient, and change nothing."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hoptim.checks import describe_type
from hoptim.linalg.vectors import Tensors
from hoptim.linalg.vjp import nodes
from hoptim.problem.wrappers import AS_SEEN, without_wrappers

_NONE = object()
ONLY_READS = "a loss only reads; do that after optimizer.step()"
WHOLE = (
    "in a training step of a sharded model its weights are torch's DTensor: add full_tensor() to a scalar that is made of "
    "them, or to a weight, before it meets a plain tensor, if it has that method, since a hyperstep has plain weights. "
    "Penalties of hoptim.recipes do so"
)
_OF_SHARDS = ("DTensor", "full_tensor", "Sharding propagation")  # what torch says where this is the cause


def check_takes(name: str, function: Any, arguments: str) -> None:
    """Raise ``TypeError`` if ``function`` is no function or cannot be called with these arguments.

    >>> check_takes("loss", lambda model, batch: 0.0, "model, hparams, batch")
    Traceback (most recent call last):
    TypeError: loss takes (model, batch), but is called as loss(model, hparams, batch): too many positional arguments
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} is {describe_type(function)}: give a function of ({arguments})")
    try:
        forward = function.forward if isinstance(function, nn.Module) else function
        signature = inspect.signature(forward, follow_wrapped=False)
    except (TypeError, ValueError):  # functions written in C may have no signature
        return
    try:
        signature.bind(*filter(None, arguments.split(", ")))
    except TypeError as error:
        raise TypeError(f"{name} takes {signature}, but is called as {name}({arguments}): {error}") from None


def check_real(what: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise for a parameter that has no values, is complex, or cannot have a gradient."""
    for name, p in parameters:
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(f"{what} {name!r} is not initialised yet: run the model on one batch first")
        if p.is_meta:
            raise ValueError(f"{what} {name!r} is on the meta device and has no values: load it with to_empty() first")
        if p.is_inference():
            raise ValueError(f"{what} {name!r} was made inside torch.inference_mode(): build it outside")
        if p.is_complex():
            raise TypeError(f"{what} {name!r} is {p.dtype}: keep its real and imaginary parts, torch.view_as_real(...)")
        if what == "hyperparameter" and (placements := getattr(p, "placements", ())):
            raise TypeError(
                f"hyperparameter {name!r} is sharded, {placements}: each rank has whole hyperparameters. Make it "
                "of a shape, as in torch.zeros(weight.shape), not like a sharded weight"
            )


def check_beside(model: nn.Module, hparams: nn.Module) -> None:
    """Raise if the hyperparameters are a part of the model."""
    if inside := next((name for name, part in model.named_modules() if part is hparams), None):
        raise ValueError(
            f"hparams is registered inside the model, as {inside!r}, and would be a weight too: do not register hparams "
            "inside the model. Keep it beside the model, or give Problem the part of the model that is trained"
        )


def check_apart(weights: Iterable[tuple[str, nn.Parameter]], leaves: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise if a weight and a hyperparameter are one tensor, or start at the same memory."""
    tensors = list(weights)
    same = {id(p): name for name, p in tensors}
    memory = {place: name for name, p in tensors if (place := p.data_ptr())}
    frozen = {id(p) for _, p in tensors if not p.requires_grad}
    for name, p in leaves:
        if id(p) in frozen and not p.requires_grad:  # neither trained nor learned, so both may read it
            continue
        if id(p) in same:
            raise ValueError(f"weight {same[id(p)]!r} and hyperparameter {name!r} are the same tensor: clone() one of them")
        if weight := memory.get(p.data_ptr()):
            raise ValueError(f"weight {weight!r} and hyperparameter {name!r} share memory: clone() one of them")


def scalar(name: str, value: Tensor, needs_gradient: bool = True) -> Tensor:
    """Return ``value`` if it is a real scalar with a gradient; otherwise raise and say what to do."""
    if not isinstance(value, Tensor):
        pair = ", or give has_aux=True for a pair (loss, aux)" if isinstance(value, tuple) else ""
        raise TypeError(f"{name} returned {describe_type(value)}: return a scalar tensor, the loss alone{pair}")
    if not value.is_floating_point():
        raise TypeError(f"{name} returned a tensor of {value.dtype}: return a real, floating-point loss")
    if value.ndim:
        raise ValueError(f"{name} returned a tensor of shape {tuple(value.shape)}: return a scalar, such as its mean()")
    placements: tuple[Any, ...] = getattr(value, "placements", ())
    if not all(placement.is_replicate() for placement in placements):
        raise TypeError(f"{name} returned a DTensor of which each rank has a part, {placements}: {WHOLE}")
    if needs_gradient and not value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} returned a loss without a gradient: is it computed under no_grad() or detach()ed?")
    return value


def split_aux(name: str, returned: Any) -> tuple[Any, Any]:
    """The loss and what was returned with it; a validation loss may come alone."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return returned[0], returned[1]
    if name == "val_loss":
        return returned, None
    raise TypeError(f"{name} returned {describe_type(returned)}: with has_aux=True it returns a pair, (loss, aux)")


def losses(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a real scalar or vector of losses with a gradient; otherwise raise and say what to do."""
    if not isinstance(value, Tensor) or not value.ndim:
        return scalar(name, value)
    if value.ndim > 1 or not len(value):
        raise ValueError(f"{name} returned a tensor of shape {tuple(value.shape)}: return a scalar, or a vector of losses")
    scalar(f"an entry of {name}", value[0])
    return value


class annotate_errors:  # noqa: N801 (used as a function)
    """Add a line to the traceback of an exception that is raised inside, without changing its class.

    The line is a note (PEP 678); Python 3.10 keeps it in ``__notes__`` without printing it. With a ``batch`` the line ends
    in its type. If a name was not found and ``hparams`` has names of a wrapped model, another line says so; or what to do
    if weights are sharded and torch could not compute with them.
    """

    def __init__(self, note: str, batch: Any = _NONE, hparams: nn.Module | None = None) -> None:
        self._note, self._batch, self._hparams = note, batch, hparams

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if isinstance(error, Exception):
            note = self._note + ("" if self._batch is _NONE else f" {describe_type(self._batch)}")
            notes = vars(error).setdefault("__notes__", [])
            notes.append(f"hoptim: {note}")
            if isinstance(error, (KeyError, AttributeError)) and self._hparams is not None and AS_SEEN not in str(error):
                names = (name for name, _ in self._hparams.named_parameters() if without_wrappers(name) != name)
                notes += [f"hoptim: {name!r} is named after a wrapped model, and {AS_SEEN}" for name in names][:1]
            if self._batch is not _NONE and WHOLE not in str(error) and any(word in str(error) for word in _OF_SHARDS):
                notes += [f"hoptim: {WHOLE}"]


@contextmanager
def forbid_writes(name: str, weights: Tensors, leaves: Tensors, *, values: bool = False) -> Iterator[None]:
    """Raise if the loss that runs inside writes into its weights or hyperparameters, or calls ``backward()``.

    They may be the user's own tensors, which would stay changed. Most writes raise a tensor's version, but not those through
    ``.data``. So with ``values`` the values are compared too, and restored if they have changed. Of frozen weights, which
    may be as large as a model, only the norms are compared.
    """
    tensors = [("weight", *one) for one in weights.items()] + [("hyperparameter", *one) for one in leaves.items()]
    states = [(t._version, t.dtype, t.requires_grad) for _, _, t in tensors]
    copies = [t.detach().clone() if values and t.requires_grad else None for _, _, t in tensors]
    frozen = [t for _, _, t in tensors if values and not t.requires_grad and t.is_floating_point()]
    norms = _norms(frozen)
    try:
        yield
    except RuntimeError as error:
        if "a leaf Variable that requires grad" not in str(error):
            raise
        raise ValueError(f"{name} writes into a weight or a hyperparameter: {ONLY_READS}") from error
    moved = {id(t) for t, before, now in zip(frozen, norms, _norms(frozen), strict=True) if not torch.equal(before, now)}
    faults = []
    for (what, key, t), (version, dtype, learned), copy in zip(tensors, states, copies, strict=True):
        if t.dtype is not dtype or t.requires_grad is not learned:
            faults.append(f"changes the dtype or requires_grad of {what} {key!r}: do that before the training")
        elif t._version != version or id(t) in moved or not (copy is None or torch.allclose(t, copy, 0, 0, equal_nan=True)):
            faults.append(f"writes into {what} {key!r}: {ONLY_READS}")
            if copy is not None:
                t.detach().copy_(copy)
        elif learned and t.is_leaf and t.grad is not None:  # a frozen tensor may have one from before it was frozen
            faults.append("calls backward(): a loss only returns its value, and the caller differentiates it")
    if faults:
        raise ValueError(f"{name} {faults[0]}")


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return [norm.nan_to_num() for norm in torch._foreach_norm([t.detach() for t in tensors])] if tensors else []


def check_given(name: str, loss: Tensor, live: Mapping[int, str]) -> None:
    """Raise if a loss depends on the live tensors (their names by id) instead of those in its arguments."""
    ends = (node for node in nodes([loss]) if node.name().endswith("AccumulateGrad"))
    if bypassed := sorted({live[id(node.variable)] for node in ends if id(node.variable) in live}):
        raise ValueError(
            f"{name} uses {bypassed[:5]}, but not through the model and hparams that it is given, so their derivative "
            "would be wrong: take them from its arguments, inside the loss, not from a closure, a list or an earlier value"
        )


@contextmanager
def warn_of_training_mode(loss: str, model: nn.Module, norms_by_batch: bool = False) -> Iterator[None]:
    """Warn if the loss that runs inside calls dropout or, unless ``norms_by_batch``, batch norm in training mode."""
    called: dict[str, nn.Module] = {}

    def note(name: str, part: nn.Module, _: Any) -> None:
        if part.training:
            called[name] = part

    norms = () if norms_by_batch else nn.modules.batchnorm._BatchNorm
    random = [(name, part) for name, part in model.named_modules() if _differs_in_training(part, norms)]
    handles = [part.register_forward_pre_hook(partial(note, name)) for name, part in random]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if called:
        counts = Counter(type(part).__name__ for part in called.values())
        warnings.warn(
            f"{loss} runs {' and '.join(f'{count} {kind}' for kind, count in counts.items())} in training mode, such as "
            f"{next(iter(called))!r}: the hypergradient is that of random masks, or of the statistics of one batch. "
            f"Call model.eval() in {loss}, which is undone after it",
            stacklevel=3,
        )


def _differs_in_training(part: nn.Module, norms: Any) -> bool:
    if isinstance(part, norms):
        return part.running_mean is not None
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    return isinstance(part, (nn.RNNBase, nn.MultiheadAttention)) and part.dropout > 0
