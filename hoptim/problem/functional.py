"""A model as a pure function: second derivatives exist, and what a forward pass changes is restored."""

from __future__ import annotations

import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from hoptim.linalg import dicts

R = TypeVar("R")

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
_PLAIN = frozenset((int, float, bool, str, type(None)))
_OF_RNN = "_flat_weights"  # the list in which an RNN keeps its parameters
MANY = 1000  # a longer list or dict is restored, but what is in its items is not looked at
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


@contextmanager
def swapped(joint: Joint, parts: Sequence[nn.Module], tensors: dict[str, Tensor]) -> Iterator[None]:
    """``torch.func.functional_call`` for the time of a context: inside, ``tensors`` are in place of the module's own.

    Torch's function finds where each belongs, also where modules share it. What its modules, ``parts``, hold meanwhile is
    put there again for the context.

    >>> joint = Joint(nn.Linear(1, 1), nn.ParameterDict({"decay": torch.tensor(1.0)}))
    >>> with swapped(joint, list(joint.modules()), {"hparams.decay": torch.tensor(2.0)}):
    ...     joint.hparams["decay"].item()
    2.0
    >>> joint.hparams["decay"].item()
    1.0
    """
    own = _registered(parts)
    with _restored(own):  # also from functional_call, which leaves a module with two names with other tensors
        _put(own, functional_call(joint, tensors, (lambda: [held.copy() for held in own],)))
        yield


def _registered(parts: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """The dicts in which modules hold their parameters and buffers."""
    return [held for part in parts for held in (part._parameters, part._buffers) if held]


def restore_tensors(parts: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Put the parameters and buffers that these modules hold there again afterwards.

    ``functional_call`` does so itself, but leaves other tensors in a module that has two names.
    """
    return _restored(_registered(parts))


@contextmanager
def _restored(own: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Put what these dicts hold there again afterwards."""
    before = [held.copy() for held in own]
    try:
        yield
    finally:
        _put(own, before)


def _put(own: Sequence[dict[str, Any]], values: Sequence[dict[str, Any]]) -> None:
    for held, there in zip(own, values, strict=True):
        held.update(there)


def renormed_weights(parts: Sequence[nn.Module]) -> list[Tensor]:
    """The weights that a forward pass writes to: those of embeddings with a ``max_norm``."""
    return [part.weight for part in parts if isinstance(part, _EMBEDDINGS) and part.max_norm is not None]


class Attributes:
    """Modes and plain attributes of modules as they are now: caches, counters, contents of lists, dicts and tensors.

    Lists and dicts may be inside one another; what other objects hold is left alone. These include the list in which an RNN
    keeps its weights. Copies of tensors that ``before`` has already are shared with it.

    >>> module = nn.Module()
    >>> module.count, module.seen = 1, [1]
    >>> before = Attributes([module])
    >>> module.count = module.seen.append(2) or 2
    >>> before.put()
    >>> module.count, module.seen
    (1, [1])
    """

    def __init__(self, parts: Sequence[nn.Module], before: Attributes | None = None) -> None:
        self._copies = {} if before is None else {key: copy for key, (_, _, copy) in before._values.items()}
        self._kinds = [type(part).__name__ for part in parts]
        self._owned = [(own := vars(part), own.copy()) for part in parts]
        self._buffers = [(part._buffers, {key: t is None for key, t in part._buffers.items()}) for part in parts]
        self._held: dict[int, tuple[Any, Any]] = {}  # lists and dicts, also inside one another, with their contents
        self._values: dict[int, tuple[Tensor, int, Tensor]] = {}  # such as the states of a metric
        for own, _ in self._owned:
            for key in own.keys() - _TORCH_ATTRIBUTES:
                if type(own[key]) not in _PLAIN:
                    self._hold(own[key], deep=key != _OF_RNN)

    def _hold(self, value: Any, *, deep: bool = True) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
            self._values[id(value)] = value, value._version, _copy_of(value, self._copies.get(id(value)))
        elif type(value) in (list, dict) and id(value) not in self._held:
            self._held[id(value)] = value, value.copy()
            for one in (value.values() if isinstance(value, dict) else value) if deep and len(value) <= MANY else ():
                self._hold(one)

    def copies(self) -> dict[int, Tensor]:
        """Copies of the tensors in attributes by their ids: a memo for ``copy.deepcopy``, which refuses one with a graph."""
        return {key: copy for key, (_, _, copy) in self._values.items()}

    def differing(self, other: Attributes) -> list[str]:
        """Names of the attributes of which a floating-point number, also in a list or dict, was another one in ``other``."""
        found = []
        for kind, (_, mine), (_, theirs) in zip(self._kinds, self._owned, other._owned, strict=True):
            for key in mine.keys() - _TORCH_ATTRIBUTES - {_OF_RNN}:
                one, two = list(self._numbers(mine[key])), list(other._numbers(theirs.get(key)))
                if len(one) != len(two) or not all(map(dicts.is_same, one, two)):
                    found.append(f"{kind}.{key}")
            found += [
                f"{kind}.{key}" for key in theirs.keys() - mine.keys() if next(other._numbers(theirs[key]), None) is not None
            ]
        return found

    def _numbers(self, value: Any) -> Iterator[Tensor]:
        """The floating-point numbers in an attribute, as they were."""
        if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
            yield (self._values[id(value)][2] if id(value) in self._values else torch.as_tensor(value)).detach()
        elif isinstance(value, (list, dict, tuple)) and len(value) <= MANY:
            whole = self._held[id(value)][1] if id(value) in self._held else value
            for one in whole.values() if isinstance(whole, dict) else whole:
                yield from self._numbers(one)

    def put(self) -> None:
        """Restore them. A buffer that was registered later is removed, and one that was ``None`` is so again."""
        for own, attributes in self._owned:
            if len(own) == len(attributes) and all(map(operator.is_, own.values(), attributes.values())):
                continue
            for key in own.keys() - attributes.keys():
                del own[key]
            own.update({key: value for key, value in attributes.items() if own.get(key) is not value})
        for registered, is_empty in self._buffers:
            for key in list(registered):
                if key not in is_empty:
                    del registered[key]
                elif is_empty[key]:
                    registered[key] = None
        for t, version, value in self._values.values():
            if t._version != version:
                t.detach().copy_(value)
        for container, items in self._held.values():
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
def switch_to_evaluation(*modules: nn.Module) -> Iterator[None]:
    """Inside, these modules are in evaluation mode; afterwards each of their parts has the mode that it had before."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def twice_differentiable(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what these modules compute has a second derivative, and it is that of the loss alone.

    Attention is unfused, RNNs run without cuDNN, and embeddings have dense gradients. Weight norm is computed by operations
    whose second derivative is right in torch. Reentrant checkpointing, which ``autograd.grad`` cannot go through, becomes
    the non-reentrant kind, and a layer that a checkpoint runs again starts from what modules held when it ran first.
    ``parametrize.cached()`` caches nothing. Backward hooks of modules do not run, since they may change gradients. Outside,
    the user's own choices hold.
    """
    with ExitStack() as stack:
        stack.enter_context(_FOR_ALL_MODULES)
        stack.enter_context(_in_a_hypergradient(parts))
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


class _ThisThread(threading.local):
    """The modules whose checkpoints start from what modules held; none in a thread that takes no hypergradient.

    ``last`` are copies for the last checkpoint, with which the next one shares what has not changed.
    """

    parts: Sequence[nn.Module] = ()
    last: tuple[Attributes | None, dict[int, Tensor]] = None, {}


_HERE = _ThisThread()
_checkpointed = checkpoint._checkpoint_without_reentrant_generator


def _checkpointed_from_here(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Replaces torch's function, which runs ``function`` again in backward passes, among other writes than before."""
    again = _from_here(function) if _HERE.parts and torch.is_grad_enabled() else function
    return _checkpointed(again, *args, **options)


def _from_here(function: Callable[..., R]) -> Callable[..., R]:
    """``function``, which each time finds modules as they are now, and what it writes to them is undone."""
    parts, (before, last) = _HERE.parts, _HERE.last
    attributes, own = Attributes(parts, before), _registered(parts)
    registered = [held.copy() for held in own]
    buffers = [t for part in parts for t in part._buffers.values() if t is not None]
    writable = {id(t): t for t in (*renormed_weights(parts), *buffers)}
    copies = {key: _copy_of(t, last.get(key)) for key, t in writable.items()}
    _HERE.last = attributes, copies
    written = set(writable)  # once it has run again, those that it writes to: only they are cloned each time

    def again(*args: Any, **options: Any) -> R:
        fresh = {key: copies[key].detach().requires_grad_(t.requires_grad) for key, t in writable.items()}
        fresh |= {key: fresh[key].clone() for key in written}
        with _in_a_hypergradient(parts), _restored(own), restore_attributes(parts):
            attributes.put()
            _put(own, [{name: fresh.get(id(t), t) for name, t in held.items()} for held in registered])
            try:
                return function(*args, **options)
            finally:
                written.intersection_update({key for key in written if not _is_copy(fresh[key], copies[key])})

    return again


def _copy_of(t: Tensor, last: Tensor | None) -> Tensor:
    """A copy of a tensor; the last one, if it has the same values."""
    return last if last is not None and _is_copy(t, last) else t.detach().clone()


def _is_copy(t: Tensor, other: Tensor) -> bool:
    return t.layout == torch.strided and t.dtype == other.dtype and torch.equal(t.detach(), other)


def _in_a_hypergradient(parts: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Inside, checkpoints of these modules start from what they held, in this thread."""
    return _replaced(_HERE, parts=parts, last=(None, {}))


_FOR_ALL_MODULES = _ProcessWide(
    lambda: sdpa_kernel(SDPBackend.MATH),
    lambda: _replaced(global_hooks, _global_backward_hooks=OrderedDict(), _global_backward_pre_hooks=OrderedDict()),
    lambda: _replaced(
        checkpoint, CheckpointFunction=_NonReentrant, _checkpoint_without_reentrant_generator=_checkpointed_from_here
    ),
    lambda: _replaced(parametrize, _cache_enabled=0, _cache={}),
)
_WITHOUT_CUDNN = _ProcessWide(lambda: torch.backends.cudnn.flags(enabled=False))


class ConstantStatistics(TorchFunctionMode):
    """Norms take running statistics without a graph, in which torch has no derivative and refuses one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.batch_norm, F.instance_norm):
            call = inspect.signature(func).bind(*args, **(kwargs or {}))
            named = call.arguments
            named |= {key: named[key].detach() for key in ("running_mean", "running_var") if named.get(key) is not None}
            return func(*call.args, **call.kwargs)
        if func in (torch.batch_norm, torch.instance_norm):
            args = tuple(t.detach() if place in (3, 4) and t is not None else t for place, t in enumerate(args))
        return func(*args, **(kwargs or {}))


class DifferentiableStatistics(TorchFunctionMode):
    """Running statistics with a derivative: r ← m·x̄ + (1 − m)·r, with the mean or variance x̄ of the batch.

    They are those of torch's batch norm and instance norm. For the backward pass of a loss they stay the constants that they
    are in torch; :meth:`graph_of` gives them as functions of what came before. The mode is for the forward pass of a layer,
    also when a checkpoint runs it again: :meth:`around` enters it there.

    Attributes:
        is_stale: whether they were read after they were written in the same step, or written by a checkpoint that runs a
            layer again. Then a part of the second derivative is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: the statistic, and the same with its graph
        self.is_stale = False

    @contextmanager
    def around(self, joint: nn.Module) -> Iterator[DifferentiableStatistics]:
        """Inside, it is the mode of each forward pass of a layer with running statistics."""
        with ExitStack() as stack:
            for part in joint.modules():
                if getattr(part, "running_mean", None) is not None:
                    enter = part.register_forward_pre_hook(lambda *_: self.__enter__() and None)
                    leave = part.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            yield self

    def graph_of(self, t: Tensor) -> Tensor:
        """A buffer with its graph, if it is a statistic that was written; else the buffer."""
        known = t.layout == torch.strided and t.data_ptr() in self._graphs  # a sparse tensor has no memory of its own
        return self._graphs[t.data_ptr()][1] if known else t

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.batch_norm, F.instance_norm):
            return func(*args, **(kwargs or {}))
        call = inspect.signature(func).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        given, over_batch = call.arguments, func is F.batch_norm
        mean, var = given["running_mean"], given["running_var"]
        if mean is None or var is None:
            return func(**given)
        if not given["training" if over_batch else "use_input_stats"]:
            return self._normalised(func, {**given, "running_mean": self._read(mean), "running_var": self._read(var)})
        if torch._C._current_graph_task_id() != -1:
            self.is_stale = True
        elif torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # not those of a checkpoint around it
                self._write(given["input"].to(mean.dtype), mean, var, over_batch, given["momentum"])
        return func(**{**given, "running_mean": mean.detach(), "running_var": var.detach()})

    def _write(self, x: Tensor, mean: Tensor, var: Tensor, over_batch: bool, momentum: float) -> None:
        if over_batch:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            now = x.mean(axes), x.var(axes)
        else:
            now = x.flatten(2).mean(2).mean(0), x.flatten(2).var(2).mean(0)
        for running, value in zip((mean, var), now, strict=True):
            before = self.graph_of(running).clone()  # the statistic itself is about to be written
            self._graphs[running.data_ptr()] = running, (1 - momentum) * before + momentum * value

    def _read(self, running: Tensor) -> Tensor:
        """A statistic as a constant, or with a derivative if it is that from before the step."""
        node = running.grad_fn
        if running.data_ptr() not in self._graphs and node is None:
            return running
        is_first = node is not None and hasattr(node.next_functions[0][0], "variable")
        if running.data_ptr() not in self._graphs and is_first:
            return running.clone()
        self.is_stale = True
        return running.detach()

    @staticmethod
    def _normalised(func: Any, given: dict[str, Any]) -> Tensor:
        """(x − mean) / √(var + eps) · weight + bias; torch's own has no derivative in mean and var."""
        x, mean, var, weight, bias = (given[key] for key in ("input", "running_mean", "running_var", "weight", "bias"))
        if not (mean.requires_grad or var.requires_grad):
            return func(**given)
        columns = (1, -1, *[1] * (x.ndim - 2))
        scale = (var + given["eps"]).rsqrt() if weight is None else weight * (var + given["eps"]).rsqrt()
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
