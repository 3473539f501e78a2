"""Dropout: learned rates of dropout before the layers of a model, without changes to the model's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.recipes.layer_inputs import LayerInputs, find_layers, first_weight
from hoptim.recipes.start import check_between, full, shared

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
        TypeError: ``model`` is no module, or ``layers`` no list of names; when called, the input of a layer is no tensor of
            real numbers.
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
        shapes = {name: () if per == "layer" else (_units(name, layer),) for name, layer in found.items()}
        values = {f"rate.{name}": full(shape, start, first_weight(model)) for name, shape in shapes.items()}
        super().__init__(values, dict.fromkeys(values, constraints.unit_interval), shared(values) if per == "unit" else ())
        self.layers, self.temperature = tuple(found), temperature
        self._axes = {name: _axes_after_units(layer) for name, layer in found.items()}

    def changed(self, name: str, x: Tensor) -> Tensor:
        """x·(1 − s)/(1 − p)."""
        rate = self[f"rate.{name}"]
        if rate.ndim:
            rate = rate.reshape(-1, *[1] * self._axes[name])
        smallest = torch.finfo(rate.dtype).tiny
        u = torch.rand(x.shape, dtype=rate.dtype, device=x.device).clamp(min=smallest)
        dropped = torch.sigmoid((torch.logit(rate) + torch.logit(u)) / self.temperature)
        return x * ((1 - dropped) / (1 - rate)).to(x.dtype)


def _axes_after_units(layer: nn.Module) -> int:
    """How many axes of a layer's input come after the axis of its units."""
    return len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 0


def _units(name: str, layer: nn.Module) -> int:
    """The number of units of a layer's input."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels
    raise ValueError(f"layer {name!r} is {type(layer).__name__}, whose units are not known: take per='layer'")
