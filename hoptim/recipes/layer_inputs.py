"""LayerInputs: hyperparameters that change the inputs of a model's layers, without changes to the model's code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.wrappers import uncompiled, unwrap, was_compile_called
from hoptim.recipes.start import held, inside
from hoptim.validation import describe_type

# Not taken by default. The last is the output layer of attention, which uses its weight without calling the layer.
_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, NonDynamicallyQuantizableLinear)


class LayerInputs(HyperParameters, ABC):
    """Hyperparameters that each belong to a layer and change its input while the layer is in training mode."""

    layers: tuple[str, ...]

    def call(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, with changed inputs of the layers that are in training mode."""
        module = inside(model)
        parts = {held(module, name): name for name in reversed(self.layers)}  # a layer of two names is one
        parts.pop(None, None)
        if len(parts) < len(self.layers):
            missing = next(name for name in self.layers if name not in parts.values())
            own = type(self).__name__
            raise ValueError(f"this model has no layer {missing!r}, which {own} was made for: give the same model")
        begun = _way_of_saving()
        key: Any = object()
        hooks = [(part._forward_pre_hooks, partial(self._change, name, begun)) for part, name in parts.items()]
        try:
            for of_part, hook in hooks:  # register_forward_pre_hook and its handle take twice as long
                of_part[key] = hook
            with uncompiled() if was_compile_called() else nullcontext():  # a graph that was compiled before has no hooks
                return model(*args, **kwargs)
        finally:
            for of_part, _ in hooks:
                of_part.pop(key, None)

    @abstractmethod
    def changed(self, name: str, x: Tensor) -> Tensor:
        """The input of the layer of this name, which replaces ``x``."""

    def _change(self, name: str, begun: tuple[bool, Any], layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not layer.training:
            return None
        if _way_of_saving() != begun:
            raise ValueError(
                f"layer {name!r} is inside activation checkpointing, or a no_grad() or saved_tensors_hooks() of the model: "
                "the backward pass would compute it again without its change. Leave it out of layers"
            )
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = describe_type(x) if inputs else "its input by keyword"
            raise TypeError(f"layer {name!r} gets {found}, which can't be changed: leave it out of layers")
        return self.changed(name, x), *inputs[1:]


def find_layers(model: object, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers by name; by default all that have a weight of at least two axes and are no embedding.

    Raises:
        TypeError: ``model`` is no module, or ``layers`` no list of names.
        ValueError: a layer does not exist, or there is none.
    """
    parts = dict(inside(model).named_modules())
    if layers is None:
        layers = [name for name, part in parts.items() if name and _is_matrix(part)]
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers is {layers!r}: give a list of names of layers")
    layers = list(layers)
    if strangers := [name for name in layers if not isinstance(name, str) or name not in parts or not name]:
        raise ValueError(f"the model has no layer {strangers[0]!r}: its layers are {[name for name in parts if name]}")
    if not layers:
        raise ValueError("no layer is given, and the model has none with a weight of two axes: name layers")
    return {name: parts[name] for name in layers}


def first_weight(model: nn.Module) -> Tensor:
    """A tensor with the model's device and precision."""
    return next(unwrap(model).parameters(), torch.zeros(()))


def _is_matrix(part: nn.Module) -> bool:
    weight = part.weight if is_parametrized(part, "weight") else part._parameters.get("weight")
    return isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(part, _OTHERS)


def _way_of_saving() -> tuple[bool, Any]:
    """Whether a graph is recorded, and the hooks that save its tensors: activation checkpointing changes one of the two."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)
