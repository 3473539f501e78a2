"""NoiseWidth: learned noise before the layers of a model, without changes to the model's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.recipes.layer_inputs import LayerInputs, find_layers, first_weight
from hoptim.recipes.start import cast, check_between, full


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
        TypeError: ``model`` is no module, or ``layers`` no list of names; when called, the input of a layer is no tensor of
            real numbers.
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
        return torch.addcmul(x, cast(self[f"width.{name}"], x), torch.randn_like(x))
