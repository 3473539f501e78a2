"""Wrappers around a model: the wrapper is called, but names are those of the module inside."""

from __future__ import annotations

import contextlib
import copy
import gc
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

AS_SEEN = (
    "a loss sees the model inside its wrappers: name hyperparameters by that, as in ddp.module.named_parameters() or "
    "compiled._orig_mod.named_parameters()"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside all wrappers, which are ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    return list(_layers(model))[-1]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled."""
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in model.modules())


def without_wrappers(name: str) -> str:
    """A weight's name without the parts that wrappers put in front of it.

    >>> [without_wrappers(name) for name in ("_orig_mod.module.0.weight", "module_0_weight", "modules.0.bias")]
    ['0.weight', '0_weight', 'modules.0.bias']
    """
    return re.sub(r"^((module|_orig_mod)[^a-zA-Z0-9])+", "", name)


def warn_of_compiled_aside(given: nn.Module) -> None:
    """Warn if ``torch.compile`` wraps the model that ``Problem`` was given, so that the training runs uncompiled."""
    if not was_compile_called() or is_compiled(given):
        return
    layers = list(_layers(given))
    if any(type(held) is dict and held.get("_orig_mod") is one for one in layers for held in gc.get_referrers(one)):
        warnings.warn(
            f"torch.compile wraps the {type(layers[-1]).__name__}, but Problem was given what is inside: the training runs "
            "uncompiled. Give Problem what torch.compile returned, or compile in place, by model.compile()",
            stacklevel=3,
        )


def was_compile_called() -> bool:
    """Whether ``torch.compile`` was called in this process; to find what holds a model takes 60 ms and more."""
    if "torch._dynamo" not in sys.modules:
        return False
    backends = getattr(sys.modules["torch._dynamo"].eval_frame, "cached_backends", None)  # ``None`` is that of disable()
    return backends is None or any(backend is not None for backend in backends.values())


def process_group_of(model: nn.Module) -> Any:
    """The process group of the ``DistributedDataParallel`` that ``model`` is wrapped in, or ``None``."""
    return next((one.process_group for one in _layers(model) if isinstance(one, DistributedDataParallel)), None)


def _layers(model: nn.Module | None) -> Iterator[nn.Module]:
    """The wrappers from the outside in, and the module inside them all."""
    while model is not None:
        yield model
        name = "module" if isinstance(model, (DistributedDataParallel, DataParallel)) else "_orig_mod"
        model = getattr(model, name) if name in model._modules else None


def _of_model(function: Callable[..., Any]) -> Any:
    """A method that calls ``function`` with the model inside in place of the facade."""
    return lambda self, *args: function(vars(self)["_model"], *args)


class Facade:
    """An object that calls the wrapper, so that its hooks run, and is the model inside in everything else.

    So a loss that reads ``model.named_parameters()`` sees no ``module.`` and no ``_orig_mod.``, as in a hypergradient.

    >>> wrapper = nn.DataParallel(nn.Linear(1, 1))
    >>> seen = Facade(wrapper, wrapper.module)
    >>> [name for name, _ in seen.named_parameters()], isinstance(seen, nn.Linear), seen(torch.ones(1, 1)).shape
    (['weight', 'bias'], True, torch.Size([1, 1]))
    """

    def __init__(self, wrapper: nn.Module, model: nn.Module) -> None:
        vars(self).update(_wrapper=wrapper, _model=model)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The wrapper's forward pass."""
        return vars(self)["_wrapper"](*args, **options)

    __class__ = property(_of_model(type))
    __getattr__, __setattr__, __delattr__ = _of_model(getattr), _of_model(setattr), _of_model(delattr)

    # Python looks these up in the class, past __getattr__.
    __bool__, __len__, __iter__ = _of_model(bool), _of_model(len), _of_model(iter)
    __contains__, __getitem__ = _of_model(operator.contains), _of_model(operator.getitem)
    __dir__, __repr__ = _of_model(dir), _of_model(repr)
    __copy__, __deepcopy__ = _of_model(copy.copy), _of_model(copy.deepcopy)
    __reduce_ex__ = _of_model(lambda model, protocol: model.__reduce_ex__(protocol))


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, compiled modules and functions run eagerly, because compiled graphs have no double backward."""
    return torch.compiler.set_stance("force_eager") if was_compile_called() else contextlib.nullcontext()


def check_whole(model: nn.Module) -> None:
    """Raise ``TypeError`` if weights belong to TorchScript or to the older ``FullyShardedDataParallel``."""
    for part in model.modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                "the model is or holds a TorchScript module, whose weights can't be exchanged: give the module that was "
                "scripted or traced; torch.compile works"
            )
        if type(part).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"the model holds a {type(part).__name__}, whose flat parameters can't be told apart: shard it with "
                "torch.distributed.fsdp.fully_shard instead"
            )
