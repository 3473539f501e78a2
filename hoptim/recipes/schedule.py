"""Schedule: a learned curve over the steps of a training, for a learning rate for example."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.arguments import check_between


class Schedule(HyperParameters):
    """A learned positive number for each step of a training: values at knots, interpolated linearly on a log scale.

    The first knot is step 0, the last one the last step. :class:`hoptim.Replay` learns it over the whole training; any
    training can then follow it through torch's ``LambdaLR`` on an optimizer whose rate is 1.

    Args:
        steps: how many steps the training has, 2 or more.
        knots: how many knots there are, from 2 to ``steps``, default 5; with ``steps`` knots each step has its own value.
        start: the value of each knot at the start, default 0.1.

    Raises:
        ValueError: ``knots`` is not between 2 and ``steps``, or ``start`` is not positive; when called, a step is negative.

    Source: piecewise linear schedules learned by gradient: Engstrom et al. 2025 (arXiv 2503.13751), section 5.

    >>> from torch import nn
    >>> from hoptim import Problem, Replay, hypergradient
    >>> _ = torch.manual_seed(0)
    >>> x, model, rate = torch.randn(20, 3), nn.Linear(3, 1), Schedule(steps=50, knots=3, start=0.01)
    >>> y = x.sum(1, keepdim=True)
    >>> def loss(model, hparams, batch):
    ...     return (model(x[batch]) - y[batch]).square().mean()
    >>> inner, batches = torch.optim.SGD(model.parameters(), lr=1.0), [torch.arange(10)] * 50
    >>> replay = Replay(batches, options=lambda hparams, t: {"lr": hparams.at(t)})
    >>> found = hypergradient(Problem(model, rate, loss), None, torch.arange(10, 20), replay, inner=inner)
    >>> (found.grads["value"] < 0).tolist()                                      # a larger rate would be better throughout
    [True, True, True]
    >>> scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda t: rate.at(t).item())
    """

    outer_rate = 0.3  # since there is a hyperstep only for each whole training

    def __init__(self, steps: int, knots: int = 5, *, start: float = 0.1) -> None:
        if not 2 <= knots <= steps:
            raise ValueError(f"knots is {knots!r}: give a whole number from 2 to steps={steps}")
        check_between("start", start, 0)
        super().__init__({"value": torch.full((knots,), float(start))}, {"value": constraints.positive})
        self.steps, self.knots = steps, knots

    def at(self, step: int) -> Tensor:
        """The value at step 0, 1, …, ``steps`` − 1, as a tensor of one number; later steps have the last value."""
        if step < 0:
            raise ValueError(f"step is {step!r}: give one from 0 to {self.steps - 1}")
        place = min(step, self.steps - 1) * (self.knots - 1) / (self.steps - 1)
        left = min(int(place), self.knots - 2)
        logs = self["value"].log()
        return torch.lerp(logs[left], logs[left + 1], place - left).exp()
