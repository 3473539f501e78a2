"""How each method is trained: the meta-learned starts by hoptim.PerTask, and the simple ways beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from studies.few_shot.tasks import Batch, class_means
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import hoptim
from hoptim.recipes import Initialization

Tensors = dict[str, Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], tuple[Batch, Batch]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method of meta-training.

    Attributes:
        method: with its number of inner steps.
        rate: of the inner SGD.
        pull: the strength of ½ρ‖w − λ‖² in the training loss, for implicit MAML.
        last: whether the last layer alone is trained on a task, as in ANIL.
        rates: whether each weight has a learned rate, as in Meta-SGD.
        meta_rate: of Adam.
    """

    method: hoptim.PerTask
    rate: float
    pull: float = 0.0
    last: bool = False
    rates: bool = False
    meta_rate: float = 1e-3


class Learner:
    """A model whose start, and perhaps rates, are learned by a way."""

    def __init__(self, model: nn.Sequential, way: Way, criterion: Criterion) -> None:
        self.way, self.model, self.initial, self.skipped = way, model, Initialization(model), 0
        parameters = dict((model[-1] if way.last else model).named_parameters())
        self.hparams, self.options = nn.ModuleDict({"initial": self.initial}), None
        if way.rates:
            self.hparams["rate"] = hoptim.HyperParameters({n: torch.full_like(p, way.rate) for n, p in parameters.items()})
            self.options = {"lr": [f"rate.{name}" for name in parameters]}
        self.inner = torch.optim.SGD([{"params": [p]} for p in parameters.values()], lr=way.rate)

        def predict(model: Any, _: Any, batch: Batch) -> Tensor:
            return model(batch[0])

        def loss_of(z: Tensor, _: Any, batch: Batch) -> Tensor:
            return criterion(z, batch[1])

        def pull(model: Any, hparams: Any) -> Tensor:
            return hparams["initial"].penalty(model, way.pull)

        # a loss that shows its parts, which Gauss-Newton needs
        val_loss = hoptim.CompositeLoss(predict, loss_of)
        train_loss = hoptim.CompositeLoss(predict, loss_of, pull) if way.pull else val_loss
        self.problem = hoptim.Problem(model, self.hparams, train_loss, val_loss)

    def train(self, draw: Draw, steps: int) -> Learner:
        """Meta-train on tasks that ``draw`` returns; a hypergradient that is not usable is skipped."""
        outer = torch.optim.Adam(self.hparams.parameters(), lr=self.way.meta_rate)
        for _ in range(steps):
            train, val = draw()
            found = hoptim.hypergradient(self.problem, train, val, self.way.method, inner=self.inner, options=self.options)
            if found.solution.status.ok:
                hoptim.outer_step(self.problem, outer, found.grads)
            else:
                self.skipped += 1
        return self

    def start(self) -> Tensors:
        """The learned weights."""
        return {name: w.detach() for name, w in self.initial.initial_weights().items()}

    def rates(self) -> Tensors:
        """The rate of each weight, 0 for those that are not trained on a task."""
        own = {id(p) for group in self.inner.param_groups for p in group["params"]}
        if self.way.rates:
            return {name: self.hparams.get_parameter(f"rate.{name}").detach() for name in self.start()}
        return {name: torch.tensor(self.way.rate * (id(p) in own)) for name, p in self.model.named_parameters()}

    def adapted(self, support: Batch, steps: int) -> list[nn.Module]:
        """A model for each task, after so many steps on its support set."""
        method = hoptim.PerTask(steps, chunk_size=self.way.method.chunk_size)
        return method.adapt(self.problem, support, inner=self.inner, options=self.options)


def pretrained(
    model: nn.Sequential, draw: Callable[[], Batch], criterion: Criterion, steps: int, rate: float = 1e-3
) -> Tensors:
    """The weights of a training on all tasks at once, whose examples ``draw`` returns."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        x, y = draw()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def predictions(
    model: nn.Module, start: Tensors, rates: Mapping[str, Tensor | float], support: Batch, x: Tensor, steps: int,
    criterion: Criterion, pull: float = 0.0,
) -> Tensor:  # fmt: skip
    """What the model says of ``x`` after 0, …, ``steps`` gradient steps on each task.

    Its shape is (tasks, steps + 1, points, outputs).
    """

    def of_task(task: Batch, x: Tensor) -> Tensor:
        def loss(w: Tensors) -> Tensor:
            away = sum((w[name] - begin).square().sum() for name, begin in start.items())
            return criterion(functional_call(model, w, (task[0],)), task[1]) + pull / 2 * away

        def trained() -> Iterator[Tensors]:
            w = start
            yield w
            for _ in range(steps):
                w = {name: w[name] - rates[name] * g for name, g in grad(loss)(w).items()}
                yield w

        return torch.stack([functional_call(model, w, (x,)) for w in trained()])

    with torch.no_grad():
        return vmap(of_task)(support, x)


def nearest_mean(support: Batch, x: Tensor) -> Tensor:
    """For the features of each task, minus the squared distances of queries from the mean of each class."""
    means = torch.stack([class_means(*one) for one in zip(*support, strict=True)])
    return -torch.cdist(x, means).square()


def mse(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean()
