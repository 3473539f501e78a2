"""What a model may be wrapped in: data-parallel and compiled wrappers are called, the module inside has the names."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside all wrappers: under ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    return list(_layers(model))[-1]


def process_group_of(model: nn.Module) -> Any:
    """The process group of the ``DistributedDataParallel`` that ``model`` is wrapped in, or ``None``."""
    return next((one.process_group for one in _layers(model) if isinstance(one, DistributedDataParallel)), None)


def _layers(model: nn.Module | None) -> Iterator[nn.Module]:
    """The wrappers from the outside in, and the module inside them all."""
    while model is not None:
        yield model
        name = "module" if isinstance(model, (DistributedDataParallel, DataParallel)) else "_orig_mod"
        model = getattr(model, name) if name in model._modules else None


class Facade:
    """Called, it is the wrapper, so that its hooks fire; asked for anything else, it is the model inside.

    So a loss reads ``model.named_parameters()`` without ``module.`` or ``_orig_mod.``, as it does in a hypergradient.

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

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_model"], name)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)["_model"], name)

    def __bool__(self) -> bool:
        return bool(vars(self)["_model"])

    def __contains__(self, item: Any) -> bool:
        return item in vars(self)["_model"]

    def __dir__(self) -> list[str]:
        return dir(vars(self)["_model"])

    def __repr__(self) -> str:
        return repr(vars(self)["_model"])

    def __copy__(self) -> Any:
        return copy.copy(vars(self)["_model"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(vars(self)["_model"], memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return vars(self)["_model"].__reduce_ex__(protocol)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_model"], name, value)

    def __getitem__(self, index: Any) -> Any:
        return vars(self)["_model"][index]

    def __iter__(self) -> Any:
        return iter(vars(self)["_model"])

    def __len__(self) -> int:
        return len(vars(self)["_model"])

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(vars(self)["_model"])


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, what ``torch.compile`` made runs as it was written: compiled graphs have no double backward."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def check_whole(model: nn.Module) -> None:
    """Raise where weights are sharded, or TorchScript holds them."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(
            "the model is, or holds, a TorchScript module, whose weights no others can stand in for: give the module that "
            "was scripted or traced; torch.compile works"
        )
    for name, p in model.named_parameters():
        if hasattr(p, "device_mesh"):
            raise TypeError(
                f"weight {name!r} is a DTensor, sharded over {p.device_mesh}: hoptim needs whole weights on each rank. Use "
                "DistributedDataParallel instead of fully_shard and parallelize_module"
            )
    if sharded := [type(m).__name__ for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]:
        raise TypeError(f"the model holds a {sharded[0]}, whose weights are sharded: use DistributedDataParallel")
