"""Initialization: learned weights from which trainings begin, or to which they are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hoptim.checks import is_finite
from hoptim.linalg.vectors import Tensors
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.loss_checks import check_real
from hoptim.recipes.model_parts import part_of, total, unwrapped


class Initialization(HyperParameters):
    """Learned weights λ from which the trainings of many tasks begin, and the pull ½ρ‖w − λ‖² towards them.

    With :class:`~hoptim.PerTask` a training on each task begins at λ, and λ moves down the mean validation loss of the tasks
    after it: MAML. With the pull in the training loss, λ is a prior mean: implicit MAML. A weight that the inner optimizer
    does not hold is λ itself, in every task: ANIL, if it holds the last layer alone.

    The leaves are the weights themselves, at first those of the model: that of ``"0.weight"`` is
    ``hparams["initial.0.weight"]``.

    Args:
        model: the model, before or after it is wrapped. Move it to its device first.
        include: ``include(name, weight) -> bool`` says which of the weights that require a gradient are learned.

    Raises:
        TypeError: ``model`` is no module, or a weight is complex.
        ValueError: there is no weight, or one has no values yet.

    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400); Rajeswaran et al. 2019 (arXiv 1909.04630), equation 3.

    >>> import hoptim
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(1, 1)
    >>> initial = Initialization(model)
    >>> def loss(model, hparams, task):
    ...     x, y = task
    ...     return (model(x) - y).square().mean()
    >>> problem, outer = hoptim.Problem(model, initial, loss), initial.optimizer(0.1)
    >>> inner, maml = torch.optim.SGD(model.parameters(), lr=0.1), hoptim.PerTask(steps=1)
    >>> for _ in range(100):                                              # lines y = 2x + b, each with its own b
    ...     x, b = torch.randn(8, 10, 1), torch.randn(8, 1, 1)
    ...     task = x, 2 * x + b
    ...     result = hoptim.hypergradient(problem, task, task, maml, inner=inner)
    ...     hoptim.outer_step(problem, outer, result.grads)
    >>> round(initial["initial.weight"].item(), 1)                       # what the tasks share
    2.0
    """

    outer_rate = 1e-3  # the meta step size of the MAML paper's experiments

    def __init__(self, model: nn.Module, *, include: Callable[[str, nn.Parameter], bool] | None = None) -> None:
        module = unwrapped(model)
        check_real("weight", module.named_parameters())
        wanted = include or (lambda *_: True)
        weights = {name: p for name, p in module.named_parameters() if p.requires_grad and wanted(name, p)}
        if not weights:
            raise ValueError("there is no weight to begin from: none requires a gradient and is wanted by include")
        super().__init__({f"initial.{name}": p.detach() for name, p in weights.items()})
        self._names = list(weights)

    def initial_weights(self) -> Tensors:
        """λ by the names of the model's weights."""
        return {name: self[f"initial.{name}"] for name in self._names}

    def penalty(self, model: Any, strength: float | Tensor) -> Tensor:
        """½ρ‖w − λ‖² for the training loss: how far the weights of this task have gone. In evaluation mode it is 0.

        Args:
            model: the model that the training loss gets.
            strength: ρ, at least 0; it may be a hyperparameter.

        Raises:
            ValueError: ``strength`` is negative, or a weight is missing in ``model``.
        """
        if not isinstance(strength, Tensor) and not (is_finite(strength) and strength >= 0):
            raise ValueError(f"strength is {strength!r}: give a finite number, 0 or more, or a hyperparameter")
        if not self.training:
            return next(self.parameters()).new_zeros(())
        module = unwrapped(model)
        found = {name: part_of(module, name) for name in self._names}
        if missing := [name for name, w in found.items() if w is None]:
            raise ValueError(
                f"the weight {missing[0]!r} is missing in this model: give penalty the model of the training loss"
            )
        return strength / 2 * total((found[name] - start).square().sum() for name, start in self.initial_weights().items())

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Copy λ into the weights of a model, such as for a plain fine-tuning."""
        module = unwrapped(model)
        for name, value in self.initial_weights().items():
            module.get_parameter(name).copy_(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.degrees_of_freedom} weights in {len(self._names)} tensors"
