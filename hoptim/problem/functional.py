"""A model as a pure function: its second derivatives exist, and what running it leaves behind is put back."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

Undo = Callable[[], None]

_TORCHS = frozenset(vars(nn.Module()))  # attributes that are torch's own
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# Of attention: whether it is enabled, and what chooses that. The last one is that of devices with kernels of their own.
_KERNELS: list[tuple[Callable[[], bool], Callable[[bool], Any]]] = [
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]
if hasattr(torch._C, "_get_overrideable_sdp_enabled"):
    _KERNELS.append((torch._C._get_overrideable_sdp_enabled, torch._C._set_sdp_use_overrideable))


def submodules(*modules: nn.Module) -> list[nn.Module]:
    """The modules and all that is in them, each once, in one quick walk.

    >>> [type(part).__name__ for part in submodules(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
    ['Sequential', 'ReLU', 'Linear']
    """
    seen: dict[nn.Module, None] = {}
    todo: list[Any] = list(modules)
    while todo:
        part = todo.pop()
        if part is not None and part not in seen:
            seen[part] = None
            todo += part._modules.values()
    return list(seen)


@contextmanager
def twice_differentiable(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what modules compute has a second derivative, and that of the loss alone.

    Args:
        parts: they and all that is in them, each by itself.

    Attention is unfused, RNNs do without cuDNN and embeddings have dense gradients; weight norm is made of operations whose
    second derivative torch has right (that of its own lacks a term); reentrant checkpointing, which ``autograd.grad`` passes
    by, is done the other way; and ``parametrize.cached()`` holds nothing of other tensors. Backward hooks of modules rest,
    as those of the live weights do: what they make of a gradient is not the loss's. The user's own choices serve outside.
    """
    weight_norm = _PlainWeightNorm() if any(map(_has_weight_norm, parts)) else nullcontext()
    undo: list[Undo] = []
    try:
        undo.extend(change(parts) for change in _CHANGES)
        with weight_norm:
            yield
    finally:
        for back in reversed(undo):
            back()


@contextmanager
def restore_attributes(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Modes and plain attributes of modules are as before afterwards: caches, counters, what lists, dicts and tensors hold.

    So is the list in which an RNN keeps its weights.
    """
    before = [(own := vars(part), own.copy()) for part in parts]
    plain = [own[key] for own, _ in before for key in own.keys() - _TORCHS]
    held = [(container, container.copy()) for container in plain if type(container) in (list, dict)]
    tensors = [t for t in plain if isinstance(t, Tensor) and not t.is_inference()]  # such as the states of a metric
    values = [(t, t._version, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        for own, attributes in before:
            if len(own) == len(attributes) and all(map(operator.is_, own.values(), attributes.values())):
                continue
            for key in own.keys() - attributes.keys():
                del own[key]
            own.update({key: value for key, value in attributes.items() if own.get(key) is not value})
        for t, version, value in values:
            if t._version != version:
                t.detach().copy_(value)
        for container, items in held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(items)


@contextmanager
def in_place_of(parts: Sequence[nn.Module], given: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, ``given`` stands in the places of the parameters and buffers of these ids, tied ones in all of theirs.

    As ``torch.func.functional_call``, with one walk in place of six: on a small net that is some 2 % of a hypergradient.
    """
    held: list[dict[str, Any]] = [tensors for part in parts for tensors in (part._parameters, part._buffers)]
    places = [(tensors, name, t) for tensors in held for name, t in tensors.items() if id(t) in given]
    sizes = [(tensors, len(tensors)) for tensors in held]
    try:
        for tensors, name, t in places:
            tensors[name] = given[id(t)]
        yield
    finally:
        for tensors, size in sizes:  # a first forward pass may register a buffer
            if len(tensors) > size:
                for name in list(tensors.keys())[size:]:
                    del tensors[name]
        for tensors, name, t in places:
            tensors[name] = t


def renormed(parts: Sequence[nn.Module]) -> list[Tensor]:
    """The weights that a forward pass writes into: those of embeddings with a ``max_norm``."""
    return [part.weight for part in parts if isinstance(part, _EMBEDDINGS) and part.max_norm is not None]


# Each of these changes something, and returns what puts it back.


def _of_the_process(change: Callable[[], Undo]) -> Callable[..., Undo]:
    """A change that all threads see: made by the first who is inside, put back by the last who leaves."""
    lock, inside = threading.Lock(), 0
    undo: Undo

    def enter(_: Sequence[nn.Module] = ()) -> Undo:
        nonlocal inside, undo
        with lock:
            if not inside:
                undo = change()
            inside += 1
        return leave

    def leave() -> None:
        nonlocal inside
        with lock:
            inside -= 1
            if not inside:
                undo()

    return enter


@_of_the_process
def _unfuse_attention() -> Undo:
    """As ``sdpa_kernel(SDPBackend.MATH)``, in a quarter of its time."""
    before = [(choose, enabled()) for enabled, choose in _KERNELS]
    for choose, enabled in before:
        if enabled is not (choose is torch.backends.cuda.enable_math_sdp):
            choose(not enabled)

    def back() -> None:
        for choose, enabled in before:
            choose(enabled)

    return back


def _leave_cudnn(parts: Sequence[nn.Module]) -> Undo:
    """For RNNs it has no double backward."""
    return _switch_cudnn_off() if any(isinstance(part, nn.RNNBase) for part in parts) else _nothing


@_of_the_process
def _switch_cudnn_off() -> Undo:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False

    def back() -> None:
        torch.backends.cudnn.enabled = before

    return back


def _rest_backward_hooks(parts: Sequence[nn.Module]) -> Undo:
    return _rest(hooks for part in parts for hooks in (part._backward_hooks, part._backward_pre_hooks) if hooks)


@_of_the_process
def _rest_hooks_of_all() -> Undo:
    return _rest((global_hooks._global_backward_hooks, global_hooks._global_backward_pre_hooks))


def _rest(which: Iterable[dict[int, Any]]) -> Undo:
    before = [(hooks, list(hooks.items())) for hooks in which]
    for hooks, _ in before:
        hooks.clear()

    def back() -> None:
        for hooks, items in before:
            hooks.update(items)

    return back


def _nothing() -> None:
    pass


def _make_dense(parts: Sequence[nn.Module]) -> Undo:
    """Sparse gradients have no second derivative."""
    sparse = [part for part in parts if isinstance(part, _EMBEDDINGS) and part.sparse]
    for part in sparse:
        part.sparse = False

    def back() -> None:
        for part in sparse:
            part.sparse = True

    return back


class _NotReentrant:
    """In the place of torch's function for ``use_reentrant=True``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@_of_the_process
def _leave_reentry() -> Undo:
    before = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NotReentrant  # type: ignore[assignment, misc]

    def back() -> None:
        checkpoint.CheckpointFunction = before  # type: ignore[misc]

    return back


@_of_the_process
def _leave_cache() -> Undo:
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}

    def back() -> None:
        parametrize._cache_enabled, parametrize._cache = before

    return back


_CHANGES: tuple[Callable[..., Undo], ...] = (
    _unfuse_attention,
    _leave_cudnn,
    _rest_backward_hooks,
    _rest_hooks_of_all,
    _make_dense,
    _leave_reentry,
    _leave_cache,
)


def _has_weight_norm(part: nn.Module) -> bool:
    old = any(isinstance(hook, WeightNorm) for hook in part._forward_pre_hooks.values())
    return old or isinstance(part, parametrizations._WeightNorm)


class _PlainWeightNorm(TorchFunctionMode):
    """g·v/‖v‖ from its parts: the backward pass of torch's own takes ‖v‖ for a constant, so that A came out unsymmetric."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, dim = (*args, 0)[:3]
        return v * (g / torch.norm_except_dim(v, 2, dim))
