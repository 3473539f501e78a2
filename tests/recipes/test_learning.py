"""Each recipe in a hypergradient, against differences of retrainings to the end, and several of them in a fit over folds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import hoptim
from hoptim.recipes import (
    Categorical,
    DistilledData,
    DomainWeights,
    Dropout,
    ExampleWeights,
    Gate,
    LabelSmoothing,
    LossWeights,
    NoiseWidth,
    PriorScale,
    Rater,
    SoftLabels,
    Temperature,
    WeightDecay,
)

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=DRAW, dtype=torch.float64)
Y = (X @ torch.randn(4, 3, generator=DRAW, dtype=torch.float64) + torch.randn(40, 3, generator=DRAW).double()).argmax(1)
TRAIN, VAL = torch.arange(24), torch.arange(24, 40)
SOURCE = torch.arange(40) % 3


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).double()


def each(z: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(z, Y[batch], reduction="none")


def two_losses(z: Tensor, batch: Tensor) -> dict[str, Tensor]:
    return {"classes": each(z, batch).mean(), "first": (z[:, 0] - X[batch, 0]).square().mean()}


class Both(nn.Module):
    """Rates a pair of inputs and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return self.layers(torch.cat(features, 1))


def rater(_: nn.Module) -> nn.Module:
    """One that has learned something, so that all of its layers have a gradient."""
    found = Rater(Both()).double()
    nn.init.normal_(found.net.layers[2].weight, std=0.5)
    return found


def distilled(model: Any, hparams: Any, batch: Tensor) -> Tensor:
    x, y = hparams.examples()
    return F.cross_entropy(model(x), y)


def mixed(model: Any, hparams: Any, batch: Tensor, training: bool) -> Tensor:
    x = X[batch]
    return each(model(hparams.mix({"plain": x, "tanh": x.tanh(), "abs": x.abs()}, training)), batch).mean()


RECIPES: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[Any, Any, Tensor], Tensor]]] = {
    "WeightDecay": (lambda m: WeightDecay(m, start=0.1), lambda m, h, b: each(m(X[b]), b).mean() + h.penalty(m)),
    "PriorScale": (lambda m: PriorScale(m, 24), lambda m, h, b: each(m(X[b]), b).mean() + h.penalty(m)),
    "NoiseWidth": (lambda m: NoiseWidth(m, start=0.4), lambda m, h, b: each(h.call(m, X[b]), b).mean()),
    "Dropout": (lambda m: Dropout(m, start=0.3), lambda m, h, b: each(h.call(m, X[b]), b).mean()),
    "Dropout of units": (lambda m: Dropout(m, per="unit", start=0.3), lambda m, h, b: each(h.call(m, X[b]), b).mean()),
    "LabelSmoothing": (lambda m: LabelSmoothing(0.2), lambda m, h, b: h.cross_entropy(m(X[b]), Y[b])),
    "Temperature": (lambda m: Temperature(2.0), lambda m, h, b: h.cross_entropy(m(X[b]), Y[b])),
    "ExampleWeights": (lambda m: ExampleWeights(40), lambda m, h, b: h.mean(each(m(X[b]), b), b)),
    "SoftLabels": (lambda m: SoftLabels(Y, start=0.8), lambda m, h, b: h.cross_entropy(m(X[b]), b)),
    "LossWeights": (lambda m: LossWeights(["classes", "first"]), lambda m, h, b: h.sum(two_losses(m(X[b]), b))),
    "DomainWeights": (
        lambda m: DomainWeights({"a": 1, "b": 1, "c": 1}), lambda m, h, b: h.mean(each(m(X[b]), b), SOURCE[b])
    ),
    "Rater": (rater, lambda m, h, b: h.mean(each(m(X[b]), b), (X[b], F.one_hot(Y[b], 3)))),
    "DistilledData": (lambda m: DistilledData(3, (4,), size=1.0), distilled),
    "Categorical": (lambda m: Categorical(["plain", "tanh", "abs"]), lambda m, h, b: mixed(m, h, b, True)),
    "Gate": (lambda m: Gate(4, start=0.6), lambda m, h, b: each(m(X[b] * h.values()), b).mean()),
}  # fmt: skip


def problem_of(name: str) -> hoptim.Problem:
    model = linear()
    make, part = RECIPES[name]
    torch.manual_seed(1)
    hparams = make(model).double()

    def train_loss(model: Any, h: Any, batch: Any) -> Tensor:
        torch.manual_seed(7)  # the same noise each time, so that a retraining has an end
        return part(model, h, batch) + 0.02 * sum(p.square().sum() for p in model.parameters())

    def val_loss(model: Any, h: Any, batch: Any) -> Tensor:
        if name == "Categorical":
            return mixed(model, h, batch, False)
        gates = h.values(training=False) if name == "Gate" else 1.0
        return each(model.eval()(X[batch] * gates), batch).mean()

    return hoptim.Problem(model, hparams, train_loss, val_loss)


def train(problem: hoptim.Problem, batch: Tensor = TRAIN) -> None:
    """To the end: most of the way by LBFGS, the rest by Newton's method."""
    weights = list(problem.model.train().parameters())
    optimizer = torch.optim.LBFGS(weights, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    for _ in range(4):
        gradient = flat(torch.autograd.grad(problem.loss(batch), weights, create_graph=True))
        if gradient.norm() < 1e-12:
            break
        rows = [flat(torch.autograd.grad(slope, weights, retain_graph=True)) for slope in gradient]
        step = torch.linalg.solve(torch.stack(rows), gradient.detach())
        nn.utils.vector_to_parameters(flat(weights).detach() - step, weights)
    assert flat(torch.autograd.grad(problem.loss(batch), weights)).norm() < 1e-12


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("name", RECIPES)
def test_its_hypergradient_is_the_slope_of_retraining(name: str) -> None:
    problem = problem_of(name)
    leaves = list(problem.hparams.parameters())
    at = nn.utils.parameters_to_vector(leaves).detach()
    train(problem)
    method = hoptim.Implicit(hoptim.CG(terms=60, tolerance=1e-10), curvature=hoptim.Exact())
    found = hoptim.hypergradient(problem, TRAIN, VAL, method)
    assert found.solution.status is hoptim.Status.CONVERGED
    gradient = flat(found.grads.values())
    torch.manual_seed(0)
    lines = [gradient / gradient.norm(), *torch.randn(2, len(at))]
    for line in lines:
        ends = []
        for sign in (1e-4, -1e-4):
            nn.utils.vector_to_parameters(at + sign * line, leaves)
            train(problem)
            ends.append(problem.val_loss(problem.model, problem.hparams, VAL).item())
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float(gradient @ line), rel=1e-4, abs=1e-8)
    assert gradient.norm() > 1e-4


def test_several_are_learned_together_over_folds() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()

    def train_loss(model: Any, h: Any, batch: Any) -> Tensor:
        z = h["dropout"].call(model, X[batch])
        return h["temperature"].cross_entropy(z, Y[batch]) + h["prior"].penalty(model)

    def val_loss(model: Any, h: Any, batch: Any) -> Tensor:
        return each(model.eval()(X[batch]), batch).mean()

    def loop(model: Any, optimizer: Any, examples: Tensor) -> None:
        for _ in range(40):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    torch.manual_seed(0)
    hparams = nn.ModuleDict({"dropout": Dropout(make()), "temperature": Temperature(), "prior": PriorScale(make(), 27)})
    before = [leaf.detach().clone() for leaf in hparams.double().parameters()]
    fit = hoptim.CrossValidated(
        make, hparams, train_loss, val_loss, inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        examples=40, steps=40, hypersteps=10,
    ).fit(loop)  # fmt: skip
    assert len(fit.history) == 10
    assert all(row["moved"] for row in fit.history)
    assert all((leaf - start).abs().min() > 0.01 for leaf, start in zip(hparams.parameters(), before, strict=True))


def learn(problem: hoptim.Problem, train: Any, val: Any) -> None:
    optimizer = hoptim.BilevelOptimizer(
        torch.optim.Adam(problem.model.parameters(), lr=0.03),
        torch.optim.Adam(problem.hparams.parameters(), lr=0.2),
        problem, val_batches=[val], every=5, warmup=100,
    )  # fmt: skip
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.loss(train).backward()
        optimizer.step()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gates_open_for_the_features_that_matter(seed: int) -> None:
    """Of twelve features three matter; the others fit noise."""
    torch.manual_seed(seed)
    x = torch.randn(300, 12)
    y = x[:, [2, 5, 9]] @ torch.tensor([1.0, -1.5, 0.8]) + 0.5 * torch.randn(300)
    model, gate = nn.Linear(12, 1).double(), Gate(12).double()

    def train_loss(model: Any, h: Any, batch: Any) -> Tensor:
        return (model(x[batch] * h.values())[:, 0] - y[batch]).square().mean()

    def val_loss(model: Any, h: Any, batch: Any) -> Tensor:
        error = (model(x[batch] * h.values(training=False))[:, 0] - y[batch]).square().mean()
        return error + 0.1 * h.count()

    learn(hoptim.Problem(model, gate, train_loss, val_loss), torch.arange(100), torch.arange(100, 300))
    opened, far = gate.harden()
    assert opened.nonzero()[:, 0].tolist() == [2, 5, 9]
    assert far < 0.5


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
def test_the_option_that_made_the_data_is_chosen(relaxation: Any) -> None:
    """A target that is linear in |x|; the other options see another function of x."""
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    y = x.abs() @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(200)
    model = nn.Linear(3, 1).double()
    choice = Categorical(["plain", "abs", "sin"], relaxation=relaxation).double()

    def loss(model: Any, h: Any, batch: Any, training: bool) -> Tensor:
        inputs = h.mix({"plain": x[batch], "abs": x[batch].abs(), "sin": x[batch].sin()}, training)
        return (model(inputs)[:, 0] - y[batch]).square().mean()

    problem = hoptim.Problem(model, choice, lambda m, h, b: loss(m, h, b, True), lambda m, h, b: loss(m, h, b, False))
    learn(problem, torch.arange(100), torch.arange(100, 200))
    best, rest = choice.harden()
    assert best == "abs"
    assert rest < 0.3


class Block(nn.Module):
    """Two layers, of which the second is computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if self.reentrant is None else checkpoint(self.b, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("recipe", [NoiseWidth, Dropout])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_checkpointed_are_refused_where_they_would_be_computed_again_without_noise(
    recipe: Any, reentrant: bool
) -> None:
    model, x = Block(reentrant), torch.randn(5, 3)
    with pytest.raises(ValueError, match="layer 'b' is inside activation checkpointing"):
        recipe(model).call(model, x)
    plain = Block(None)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    found = recipe(model, ["a"]).double().call(model, x)
    torch.manual_seed(0)
    assert torch.equal(found, recipe(plain, ["a"]).double().call(plain, x))


def test_a_model_that_was_compiled_and_run_before_gets_its_noise() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4)).double(), torch.zeros(200, 3)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    width = NoiseWidth(model, start=0.9).double()
    assert before.std(0).max() == 0
    for _ in range(2):
        assert width.call(compiled, x).std(0).min() > 0.1
        torch._dynamo.reset()  # forgets what was compiled, which is compiled again at its next call
    assert compiled(x).std(0).max() == 0


def test_the_layers_found_are_those_with_an_input_of_their_own() -> None:
    """Attention never calls its last layer; the weight of a parametrized layer is no parameter of its own."""
    found = NoiseWidth(nn.TransformerEncoderLayer(8, 2, 16)).layers
    assert found == ("linear1", "linear2")
    assert NoiseWidth(nn.Sequential(weight_norm(nn.Linear(2, 3)), nn.Linear(3, 2))).layers == ("0", "1")
    with pytest.raises(ValueError, match="name layers"):
        NoiseWidth(nn.Linear(2, 2))
