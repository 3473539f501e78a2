"""A model as a pure function: second derivatives exist, and what a forward pass changes is restored."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
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


@contextmanager
def restore_attributes(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Restore modes and plain attributes of modules afterwards: caches, counters, contents of lists, dicts and tensors.

    These include the list in which an RNN keeps its weights. A buffer that a first forward pass registers is removed.
    """
    before = [(own := vars(part), own.copy()) for part in parts]
    buffers = [(part._buffers, len(part._buffers)) for part in parts]
    plain = [own[key] for own, _ in before for key in own.keys() - _TORCH_ATTRIBUTES]
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
        for registered, count in buffers:
            for key in list(registered)[count:]:
                del registered[key]
        for t, version, value in values:
            if t._version != version:
                t.detach().copy_(value)
        for container, items in held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(items)


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
