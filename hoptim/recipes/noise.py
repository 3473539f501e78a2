"""Learned noise and dropout at the inputs of a model's layers, without changes to the model's code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from hoptim.checks import describe_type
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.wrappers import uncompiled, unwrap
from hoptim.recipes.arguments import cast, check_between
from hoptim.recipes.model_parts import beside, full, levels_of, part_of, unwrapped, whole_like

# Not taken by default. The last is the output layer of attention, which uses its weight without calling the layer.
_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, NonDynamicallyQuantizableLinear)


class LayerInputs(HyperParameters, ABC):
    """Hyperparameters that each belong to a layer and change its input while both are in training mode."""

    layers: tuple[str, ...]

    def call(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, with changed inputs of the layers that are in training mode, as this module is."""
        module = unwrapped(model)
        parts = {part_of(module, name): name for name in reversed(self.layers)}  # a layer of two names is one
        parts.pop(None, None)
        if len(parts) < len(self.layers):
            missing = next(name for name in self.layers if name not in parts.values())
            own = type(self).__name__
            raise ValueError(f"this model has no layer {missing!r}, which {own} was made for: give the same model")
        begun = _way_of_saving()
        key = id(parts)  # differs from that of any call around this one; a number, as torch.compile of 2.8 asks for
        hooks = [(part._forward_pre_hooks, partial(self._change, name, begun)) for part, name in parts.items()]
        try:
            for of_part, hook in hooks:  # register_forward_pre_hook and its handle take twice as long
                of_part[key] = hook
            with uncompiled():  # a graph that was compiled before has no hooks
                return model(*args, **kwargs)
        finally:
            for of_part, _ in hooks:
                of_part.pop(key, None)

    @abstractmethod
    def changed(self, name: str, x: Tensor) -> Tensor:
        """The input of the layer of this name, which replaces ``x``."""

    def _change(self, name: str, begun: tuple[bool, Any], layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not (self.training and layer.training):
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
        TypeError: ``model`` is no module.
        ValueError: a layer does not exist, or there is none.
    """
    parts = dict(unwrapped(model).named_modules())
    if layers is None:
        layers = [name for name, part in parts.items() if name and _is_matrix(part)]
    if strangers := [name for name in layers if not name or name not in parts]:
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


class NoiseWidth(LayerInputs):
    """Learned widths σ in (0, 1) of Gaussian noise that is added to the input of layers in training mode: x + σ·ξ.

    The model's code does not change: layers are found by name, and get their noise while :meth:`call` runs the model. A
    layer in evaluation mode gets none.

    Args:
        model: the model, before or after it is wrapped.
        layers: the names of the layers, such as ``"blocks.0.mlp"``; ``None``, the default: all that have a weight of at
            least two axes and are no embedding.
        start: σ at the start, default 0.1.

    Raises:
        TypeError: ``model`` is no module; when called, the input of a layer is no tensor of real numbers.
        ValueError: a layer does not exist, there is none, or ``start`` is not between 0 and 1.

    Source: Bishop 1995, Training with noise is equivalent to Tikhonov regularization.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> hparams = NoiseWidth(model, start=0.1)
    >>> list(hparams)
    ['width.0', 'width.2']
    >>> x = torch.zeros(2, 4)
    >>> torch.equal(hparams.call(model, x), model(x)), torch.equal(hparams.call(model.eval(), x), model(x))
    (False, True)
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None, *, start: float = 0.1) -> None:
        found = find_layers(model, layers)
        check_between("start", start, 0, 1)
        values = {f"width.{name}": full((), start, first_weight(model)) for name in found}
        super().__init__(values, dict.fromkeys(values, constraints.unit_interval))
        self.layers = tuple(found)

    def changed(self, name: str, x: Tensor) -> Tensor:
        """x + σ·ξ."""
        width, noise = cast(self[f"width.{name}"], x), torch.randn_like(whole_like(x))
        return torch.addcmul(x, beside(width, x), beside(noise, x))


Per = Literal["layer", "unit"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Dropout(LayerInputs):
    """Learned rates p in (0, 1) of dropout at the input of layers in training mode, in its concrete relaxation.

    A unit is kept with probability 1 − p. The mask is not exactly 0 or 1, so that it has a derivative in p:

        x ↦ x·(1 − s)/(1 − p),    s = sigmoid((logit p + logit u)/τ),    u uniform on (0, 1).

    As τ → 0 this is ``nn.Dropout(p)``. The model's code does not change: layers are found by name, and get the dropout while
    :meth:`call` runs the model. A layer in evaluation mode gets none. Remove ``nn.Dropout`` from the model.

    Args:
        model: the model, before or after it is wrapped.
        layers: the names of the layers, such as ``"blocks.0.mlp"``; ``None``, the default: all that have a weight of at
            least two axes and are no embedding.
        per: one p for each layer (``"layer"``, shape ()), or for each unit of its input (``"unit"``, shape (n,)): the last
            axis of the input of a linear layer, the channels of a convolution.
        start: p at the start, default 0.1.
        temperature: τ, default 0.1.

    Raises:
        TypeError: ``model`` is no module; when called, the input of a layer is no tensor of real numbers.
        ValueError: a layer does not exist, there is none, one is neither linear nor a convolution with ``per="unit"``;
            ``start`` is not between 0 and 1, or ``temperature`` is not positive.

    Source: Gal, Hron and Kendall 2017, Concrete dropout (arXiv 1705.07832).

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> hparams = Dropout(model, ["2"], per="unit", start=0.25)
    >>> hparams["rate.2"].shape, hparams.degrees_of_freedom
    (torch.Size([8]), 8)
    >>> x = torch.ones(1000, 8)
    >>> kept = hparams.changed("2", x)
    >>> round(kept.mean().item(), 1), round((kept < 0.1).float().mean().item(), 1)
    (1.0, 0.2)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        per: Per = "layer",
        start: float = 0.1,
        temperature: float = 0.1,
    ) -> None:
        found = find_layers(model, layers)
        if per not in ("layer", "unit"):
            raise ValueError(f"per is {per!r}: give 'layer' or 'unit'")
        check_between("start", start, 0, 1)
        check_between("temperature", temperature, 0)
        units = {name: _units(name, layer) for name, layer in found.items()} if per == "unit" else {}
        like = first_weight(model)
        values = {f"rate.{name}": full((units[name][0],) if units else (), start, like) for name in found}
        super().__init__(values, dict.fromkeys(values, constraints.unit_interval), levels_of(values) if units else ())
        self.layers, self.temperature = tuple(found), temperature
        self._axes = {name: axes for name, (_, axes) in units.items()}

    def changed(self, name: str, x: Tensor) -> Tensor:
        """x·(1 − s)/(1 − p)."""
        rate = self[f"rate.{name}"]
        if rate.ndim:
            rate = rate.reshape(-1, *[1] * self._axes[name])
        smallest = torch.finfo(rate.dtype).tiny
        u = torch.rand(x.shape, dtype=rate.dtype, device=x.device).clamp(min=smallest)
        dropped = torch.sigmoid((torch.logit(rate) + torch.logit(u)) / self.temperature)
        return x * beside(cast((1 - dropped) / (1 - rate), x), x)


def _units(name: str, layer: nn.Module) -> tuple[int, int]:
    """The number of units of a layer's input, and how many axes come after theirs."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, 0
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels, len(layer.kernel_size)
    raise ValueError(f"layer {name!r} is {type(layer).__name__}, whose units are not known: take per='layer'")
