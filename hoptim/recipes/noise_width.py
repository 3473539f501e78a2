"""NoiseWidth: learned noise before the layers of a model, whose code stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.wrappers import unwrap
from hoptim.recipes.start import full
from hoptim.validation import describe_type, is_finite


class NoiseWidth(HyperParameters):
    """Learned widths σ in (0, 1) of Gaussian noise that is added to the input of layers while they train: x + σ·ξ.

    No line of the model changes: its layers are found by name, and get their noise while :meth:`call` runs the model. A
    layer in evaluation mode gets none.

    Args:
        model: the model, before or after it is wrapped.
        layers: the names of the layers, such as ``"blocks.0.mlp"``; ``None``, the default, for each that has a weight of
            at least two axes and is no embedding.
        start: σ at the start.

    Raises:
        TypeError: ``model`` is no module; when called, the input of a layer is no tensor of real numbers.
        ValueError: a layer is not there, none is left, or ``start`` is not between 0 and 1.

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {describe_type(model)}: give an nn.Module")
        if not (is_finite(start) and 0 < start < 1):
            raise ValueError(f"start is {start!r}: give a number between 0 and 1")
        parts = dict(unwrap(model).named_modules())
        if layers is None:
            layers = [name for name, part in parts.items() if _is_matrix(part)]
        if strangers := [name for name in layers if name not in parts or not name]:
            raise ValueError(f"the model has no layer {strangers[0]!r}: its layers are {[name for name in parts if name]}")
        if not layers:
            raise ValueError("no layer is given, and the model has none with a weight of two axes: name layers")
        like = next(unwrap(model).parameters(), torch.zeros(()))
        values = {f"width.{name}": full((), start, like) for name in layers}
        super().__init__(values, dict.fromkeys(values, constraints.unit_interval))
        self.layers = tuple(layers)

    def call(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, with noise at the inputs of its layers where they are in training mode."""
        parts = dict(unwrap(model).named_modules())
        if missing := [name for name in self.layers if name not in parts]:
            raise ValueError(f"this model has no layer {missing[0]!r}, which NoiseWidth was made for: give the same model")
        handles = [parts[name].register_forward_pre_hook(partial(self._with_noise, name)) for name in self.layers]
        try:
            return model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _with_noise(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not layer.training:
            return None
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"layer {name!r} gets {describe_type(x)}, to which no noise can be added: leave it out of layers"
            )
        return x + self[f"width.{name}"].to(x.dtype) * torch.randn_like(x), *inputs[1:]


def _is_matrix(part: nn.Module) -> bool:
    weight = part._parameters.get("weight")
    return weight is not None and weight.ndim >= 2 and not isinstance(part, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm))
