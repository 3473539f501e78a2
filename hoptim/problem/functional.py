"""A model as a pure function: second derivatives exist, and what a forward pass changes is restored."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

R = TypeVar("R")

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Joint(nn.Module):
    """A model and its hyperparameters as one module, whose forward pass calls any function of the two.

    ``torch.func.functional_call(joint, tensors, (function,))`` runs ``function()`` with ``tensors`` in place of its own.

    >>> joint = Joint(nn.Linear(1, 1), nn.ParameterDict({"decay": torch.tensor(1.0)}))
    >>> [name for name, _ in joint.named_parameters()]
    ['model.weight', 'model.bias', 'hparams.decay']
    >>> torch.func.functional_call(joint, {"hparams.decay": torch.tensor(2.0)}, (lambda: joint.hparams["decay"].item(),))
    2.0
    """

    def __init__(self, model: nn.Module, hparams: nn.Module) -> None:
        super().__init__()
        self.model, self.hparams = model, hparams

    def forward(self, function: Callable[[], R]) -> R:
        """``function()``."""
        return function()


def renormed_weights(parts: Sequence[nn.Module]) -> list[Tensor]:
    """The weights that a forward pass writes to: those of embeddings with a ``max_norm``."""
    return [part.weight for part in parts if isinstance(part, _EMBEDDINGS) and part.max_norm is not None]


class Attributes:
    """Modes and plain attributes of modules as they are now: caches, counters, contents of lists, dicts and tensors.

    These include the list in which an RNN keeps its weights.

    >>> module = nn.Module()
    >>> module.count, module.seen = 1, [1]
    >>> before = Attributes([module])
    >>> module.count = module.seen.append(2) or 2
    >>> before.put()
    >>> module.count, module.seen
    (1, [1])
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._kinds = [type(part).__name__ for part in parts]
        self._owned = [(own := vars(part), own.copy()) for part in parts]
        self._buffers = [(part._buffers, len(part._buffers)) for part in parts]
        plain = [own[key] for own, _ in self._owned for key in own.keys() - _TORCH_ATTRIBUTES]
        self._held = [(container, container.copy()) for container in plain if type(container) in (list, dict)]
        tensors = [t for t in plain if isinstance(t, Tensor) and not t.is_inference()]  # such as the states of a metric
        self._values = [(t, t._version, t.detach().clone()) for t in tensors]

    def differing(self, other: Attributes) -> list[str]:
        """Names of the attributes of which a floating-point number, also in a list or dict, was another one in ``other``."""
        found = []
        for kind, (_, mine), (_, theirs) in zip(self._kinds, self._owned, other._owned, strict=True):
            for key in mine.keys() - _TORCH_ATTRIBUTES - {"_flat_weights"}:  # which are parameters
                pairs = zip(self._numbers(mine[key]), other._numbers(theirs.get(key)), strict=False)
                if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
                    found.append(f"{kind}.{key}")
        return found

    def _numbers(self, value: Any) -> Iterator[Tensor]:
        """The floating-point numbers in an attribute, as they were."""
        lists = {id(container): items for container, items in self._held}
        values = {id(t): before for t, _, before in self._values}
        whole = lists.get(id(value), value)
        for one in whole.values() if isinstance(whole, dict) else whole if isinstance(whole, (list, tuple)) else [whole]:
            if isinstance(one, float) or (isinstance(one, Tensor) and one.is_floating_point()):
                yield torch.as_tensor(values.get(id(one), one)).detach()

    def put(self) -> None:
        """Restore them. A buffer that was registered later is removed."""
        for own, attributes in self._owned:
            if len(own) == len(attributes) and all(map(operator.is_, own.values(), attributes.values())):
                continue
            for key in own.keys() - attributes.keys():
                del own[key]
            own.update({key: value for key, value in attributes.items() if own.get(key) is not value})
        for registered, count in self._buffers:
            for key in list(registered)[count:]:
                del registered[key]
        for t, version, value in self._values:
            if t._version != version:
                t.detach().copy_(value)
        for container, items in self._held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(items)


@contextmanager
def restore_attributes(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Restore modes and plain attributes of modules afterwards."""
    before = Attributes(parts)
    try:
        yield
    finally:
        before.put()


@contextmanager
def twice_differentiable(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what these modules compute has a second derivative, and it is that of the loss alone.

    Attention is unfused, RNNs run without cuDNN, and embeddings have dense gradients. Weight norm is computed by operations
    whose second derivative is right in torch. Reentrant checkpointing, which ``autograd.grad`` cannot go through, becomes
    the non-reentrant kind. ``parametrize.cached()`` caches nothing. Backward hooks of modules do not run, since they may
    change gradients. Outside, the user's own choices hold.
    """
    with ExitStack() as stack:
        stack.enter_context(_FOR_ALL_MODULES)
        if any(isinstance(part, nn.RNNBase) for part in parts):
            stack.enter_context(_WITHOUT_CUDNN)
        if any(map(_has_weight_norm, parts)):
            stack.enter_context(_PlainWeightNorm())
        for part in parts:
            if isinstance(part, _EMBEDDINGS) and part.sparse:
                stack.enter_context(_replaced(part, sparse=False))
            if part._backward_hooks or part._backward_pre_hooks:
                stack.enter_context(_replaced(part, _backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict()))
        yield


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, attributes of ``owner`` have these values."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class _ProcessWide:
    """Settings that all threads see: the first thread to enter makes them, the last one to leave undoes them."""

    def __init__(self, *settings: Callable[[], AbstractContextManager[Any]]) -> None:
        self._settings, self._stack, self._threads, self._lock = settings, ExitStack(), 0, threading.Lock()
        self._context = Context()  # torch 2.15's sdpa_kernel must be left in the context where it was entered, by any thread

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                for setting in self._settings:
                    self._context.run(self._stack.enter_context, setting())
            self._threads += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                self._context.run(self._stack.close)


class _NonReentrant:
    """Replaces torch's function for reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


_FOR_ALL_MODULES = _ProcessWide(
    lambda: sdpa_kernel(SDPBackend.MATH),
    lambda: _replaced(global_hooks, _global_backward_hooks=OrderedDict(), _global_backward_pre_hooks=OrderedDict()),
    lambda: _replaced(checkpoint, CheckpointFunction=_NonReentrant),
    lambda: _replaced(parametrize, _cache_enabled=0, _cache={}),
)
_WITHOUT_CUDNN = _ProcessWide(lambda: torch.backends.cudnn.flags(enabled=False))


def differentiable_statistics(parts: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Inside, the running statistics of torch's batch norm and instance norm have a derivative."""
    keeps = any(getattr(part, "running_mean", None) is not None for part in parts)
    return _DifferentiableStatistics() if keeps else nullcontext()


class _DifferentiableStatistics(TorchFunctionMode):
    """Running statistics as a function with a derivative: r ← m·x̄ + (1 − m)·r, with the mean or variance x̄ of the batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}.get(func, func)
        return own(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: Any = False, momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if mean is None or var is None:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if not training:
        return _normalised(x, mean, var, weight, bias, eps)
    wide = x.to(mean.dtype)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    _average_(mean, wide.mean(axes), momentum)
    _average_(var, wide.var(axes), momentum)
    return F.batch_norm(x, None, None, weight, bias, True, momentum, eps)


def _instance_norm(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: Any = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if running_mean is None or running_var is None:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return _normalised(x, running_mean, running_var, weight, bias, eps)
    wide = x.to(running_mean.dtype).flatten(2)
    _average_(running_mean, wide.mean(2).mean(0), momentum)
    _average_(running_var, wide.var(2).mean(0), momentum)
    return F.instance_norm(x, None, None, weight, bias, True, momentum, eps)


def _average_(running: Tensor, now: Tensor, momentum: float) -> None:
    running.mul_(1 - momentum).add_(momentum * now)


def _normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias; torch's own has no derivative in mean and var."""
    if not (mean.requires_grad or var.requires_grad):
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    columns = (1, -1, *[1] * (x.ndim - 2))
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    return (x * scale.reshape(columns) + shift.reshape(columns)).to(x.dtype)


def _has_weight_norm(part: nn.Module) -> bool:
    old = any(isinstance(hook, WeightNorm) for hook in part._forward_pre_hooks.values())
    return old or isinstance(part, parametrizations._WeightNorm)


class _PlainWeightNorm(TorchFunctionMode):
    """g·v/‖v‖ from its parts: in the second derivative of torch's own function ‖v‖ is a constant, so A is not symmetric."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, dim = (*args, 0)[:3]
        return v * (g / torch.norm_except_dim(v, 2, dim))
