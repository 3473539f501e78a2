"""PerTask against plain autograd through the loops, dense linear algebra, and finite differences of the trainings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import same
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

import hoptim
from hoptim.methods.kinds import KINDS
from hoptim.recipes import Initialization

K, RATE = 3, 0.1
Task = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))


def tasks(examples: int = 5, inputs: tuple[int, ...] = (2,)) -> Task:
    return torch.randn(K, examples, *inputs), torch.randn(K, examples, 1)


def loss(model: Any, hparams: Any, batch: Task) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, **options)


def of_initial(grads: Tensors) -> Tensors:
    return {name.removeprefix("initial."): g for name, g in grads.items()}


def by_hand(
    model: nn.Module, train: Task, val: Task, steps: int, *, first_order: bool = False, adapted: Any = lambda name: True
) -> Tensors:
    """The mean over the tasks of ∂L_V/∂λ, through gradient steps of rate 0.1, in a loop of torch's own functions."""
    start, total = dict(model.named_parameters()), {}
    for x, y, x_val, y_val in zip(*train, *val, strict=True):
        w = start
        for _ in range(steps):
            moving = {name: p for name, p in w.items() if adapted(name)}
            found = F.mse_loss(functional_call(model, w, (x,)), y)
            g = torch.autograd.grad(found, list(moving.values()), create_graph=not first_order)
            w = w | {name: p - RATE * one for (name, p), one in zip(moving.items(), g, strict=True)}
        found = F.mse_loss(functional_call(model, w, (x_val,)), y_val) / K
        for name, g in zip(start, torch.autograd.grad(found, list(start.values()), allow_unused=True), strict=True):
            total[name] = total.get(name, 0) + g
    return total


def slope(value: Callable[[], float], leaf: Tensor, along: Tensor, size: float = 1e-5) -> float:
    """The derivative of a value along a direction of a leaf, by a central difference."""
    with torch.no_grad():
        leaf += size * along
        above = value()
        leaf -= 2 * size * along
        below = value()
        leaf += size * along
    return (above - below) / (2 * size)


def assert_slopes(
    problem: hoptim.Problem, train: Any, val: Any, method: hoptim.PerTask, tolerance: float = 1e-6, **more: Any
) -> None:
    """The hypergradient is the derivative of the mean validation loss after the trainings, along one direction a leaf."""
    grads = hoptim.hypergradient(problem, train, val, method, **more).grads
    exact = hoptim.PerTask(method.steps, chunk_size=method.chunk_size)
    for name, leaf in problem.leaves().items():
        along = torch.randn_like(leaf)
        by_difference = slope(lambda: hoptim.hypergradient(problem, train, val, exact, **more).val_loss.item(), leaf, along)
        assert (grads[name] * along).sum().item() == pytest.approx(by_difference, rel=tolerance, abs=1e-9), name


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_is_autograd_through_the_loops(steps: int, first_order: bool, chunk_size: int | None) -> None:
    model, train, val = net(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    method = hoptim.PerTask(steps, first_order=first_order, chunk_size=chunk_size)
    found = hoptim.hypergradient(problem, train, val, method, inner=sgd(model))
    assert_close(of_initial(found.grads), by_hand(model, train, val, steps, first_order=first_order))
    assert found.solution.value["0.weight"].shape == (K, 6, 2)
    assert found.solution.status is hoptim.Status.FINISHED


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_so_is_the_way_back_one_step_at_a_time(checkpoint: bool, chunk_size: int | None) -> None:
    model, train, val = net(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    method = hoptim.PerTask(4, hoptim.Unrolled(4, checkpoint=checkpoint), chunk_size=chunk_size)
    found = hoptim.hypergradient(problem, train, val, method, inner=sgd(model))
    assert_close(of_initial(found.grads), by_hand(model, train, val, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_any_differentiable_optimizer_trains_the_tasks(kind: type[torch.optim.Optimizer]) -> None:
    model, train, val = net(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    inner = kind(model.parameters(), lr=0.05)  # type: ignore[call-arg]
    assert_slopes(problem, train, val, hoptim.PerTask(3), 1e-5, inner=inner)
    side, turn = (hoptim.hypergradient(problem, train, val, hoptim.PerTask(3, chunk_size=n), inner=inner) for n in (None, 1))
    assert_close(side.grads, turn.grads, rtol=1e-9, atol=1e-12)


def test_adagrad_starts_with_its_first_accumulator() -> None:
    model, train, val = net(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    inner = torch.optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=0.3)
    (found, *_) = hoptim.PerTask(2).adapt(problem, train, inner=inner)
    assert_slopes(problem, train, val, hoptim.PerTask(2), inner=inner)
    for _ in range(2):
        inner.zero_grad()
        loss(model, None, (train[0][0], train[1][0])).backward()
        inner.step()
    assert_close(dict(found.named_parameters()), dict(model.named_parameters()))


def test_a_task_starts_with_a_new_state_of_the_optimizer_with_momentum_and_decay() -> None:
    model, train, val = net(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    inner = sgd(model, momentum=0.9, weight_decay=0.1)
    before = hoptim.hypergradient(problem, train, val, hoptim.PerTask(3), inner=inner).grads
    loss(model, None, (train[0][0], train[1][0])).backward()
    inner.step()  # the state of the user's optimizer, and the model's weights, have no part in it
    assert_close(hoptim.hypergradient(problem, train, val, hoptim.PerTask(3), inner=inner).grads, before)
    assert_slopes(problem, train, val, hoptim.PerTask(3), inner=inner)


SOLVERS = {
    "CG": (hoptim.CG(terms=40, tolerance=1e-12), 1e-9),
    "MINRES": (hoptim.MINRES(terms=40, tolerance=1e-12), 1e-9),
    "GMRES": (hoptim.GMRES(terms=40, tolerance=1e-12), 1e-9),
    "Neumann": (hoptim.Neumann(terms=400), 1e-3),
    "Nystrom": (hoptim.Nystrom(rank=80, rho=1e-9), 1e-3),
}


@pytest.mark.parametrize(
    ("solver", "chunk_size"), [(name, size) for name in SOLVERS for size in (None, 1, 2) if (name, size) != ("Nystrom", 2)]
)
def test_implicit_maml_is_dense_algebra(solver: str, chunk_size: int | None) -> None:
    model, train, val, strength = net(), tasks(), tasks(7), 0.5
    initial = Initialization(model)

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams.penalty(model, strength)

    problem, inner = hoptim.Problem(model, initial, train_loss, loss), sgd(model)
    how, tolerance = SOLVERS[solver]
    found = hoptim.hypergradient(
        problem, train, val, hoptim.PerTask(10, hoptim.Implicit(how), chunk_size=chunk_size), inner=inner
    )
    expected = dense(model, train, val, strength, steps=10)
    assert_close(of_initial(found.grads), expected, rtol=tolerance, atol=tolerance * 0.1)


def dense(model: nn.Module, train: Task, val: Task, strength: float, steps: int) -> Tensors:
    """(1/K) Σ_k ρ (H_k + ρI)⁻¹ g_k at the end of the trainings, whose loss has the pull ½ρ‖w − λ‖²."""
    shapes = {name: p.detach() for name, p in model.named_parameters()}
    start, total = torch.cat([p.flatten() for p in shapes.values()]), 0

    def named(w: Tensor) -> Tensors:
        parts = w.split([p.numel() for p in shapes.values()])
        return {name: part.view_as(p) for (name, p), part in zip(shapes.items(), parts, strict=True)}

    for x, y, x_val, y_val in zip(*train, *val, strict=True):

        def of_task(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            pull = strength / 2 * (w - start).square().sum()
            return F.mse_loss(functional_call(model, named(w), (x,)), y) + pull

        w = start
        for _ in range(steps):
            w = w - RATE * torch.func.grad(of_task)(w)
        g = torch.func.grad(lambda w, x=x_val, y=y_val: F.mse_loss(functional_call(model, named(w), (x,)), y))(w)
        total = total + strength * torch.linalg.solve(torch.func.hessian(of_task)(w), g) / K
    return named(total)


@pytest.mark.parametrize("solver", [hoptim.CG, hoptim.MINRES, hoptim.GMRES])
def test_side_by_side_each_task_has_a_krylov_space_of_its_own(solver: Any) -> None:
    model, train, val = net(), tasks(), tasks(7)

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams.penalty(model, 0.1)

    problem, inner = hoptim.Problem(model, Initialization(model), train_loss, loss), sgd(model)
    for terms in (1, 2, 4):
        plain = hoptim.Implicit(solver(terms=terms, tolerance=0.0), damping=0.01)
        side, turn = (
            hoptim.hypergradient(problem, train, val, hoptim.PerTask(4, plain, chunk_size=n), inner=inner).solution.value
            for n in (None, 1)
        )
        assert_close(side, turn, rtol=1e-8, atol=1e-10)


def test_gauss_newton_of_a_linear_model_is_exact() -> None:
    model, train, val = nn.Linear(2, 1), tasks(), tasks(7)
    parts = hoptim.CompositeLoss(
        lambda model, hparams, batch: model(batch[0]),
        lambda z, hparams, batch: F.mse_loss(z, batch[1]),
        lambda model, hparams: hparams.penalty(model, 0.3),
    )
    problem, solver = hoptim.Problem(model, Initialization(model), parts, loss), hoptim.CG(terms=10, tolerance=1e-12)
    expected = dense(model, train, val, 0.3, steps=5)
    for chunk_size in (None, 1):
        method = hoptim.PerTask(5, hoptim.Implicit(solver, curvature=hoptim.GaussNewton()), chunk_size=chunk_size)
        assert_close(of_initial(hoptim.hypergradient(problem, train, val, method, inner=sgd(model)).grads), expected)


def test_a_learned_strength_of_the_pull() -> None:
    model, train, val = nn.Linear(2, 1), tasks(), tasks(7)
    strength = hoptim.HyperParameters({"strength": torch.tensor(0.5)}, {"strength": constraints.positive})
    hparams = nn.ModuleDict({"initial": Initialization(model), "pull": strength})

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams["initial"].penalty(model, hparams["pull"]["strength"])

    problem = hoptim.Problem(model, hparams, train_loss, loss)
    assert_slopes(problem, train, val, hoptim.PerTask(3), inner=sgd(model))
    method = hoptim.PerTask(400, hoptim.Implicit(hoptim.CG(terms=10, tolerance=1e-12)))  # trained to the end
    assert_slopes(problem, train, val, method, 1e-5, inner=sgd(model))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_anil_adapts_the_last_layer_and_learns_all(chunk_size: int | None) -> None:
    model, train, val = net(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    inner = torch.optim.SGD(model[2].parameters(), lr=RATE)  # type: ignore[index]
    with torch.no_grad():
        problem.hparams.get_parameter("initial.0.weight").mul_(2)
    found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(3, chunk_size=chunk_size), inner=inner)
    learned = copy.deepcopy(model)
    problem.hparams.write(learned)  # type: ignore[operator]
    expected = by_hand(learned, train, val, 3, adapted=lambda name: name.startswith("2"))
    assert_close(of_initial(found.grads), expected)
    for adapted in hoptim.PerTask(3, chunk_size=chunk_size).adapt(problem, train, inner=inner):
        assert_close(adapted[0].weight, learned[0].weight)  # type: ignore[index]
        assert adapted[0].weight.requires_grad  # type: ignore[index]


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RAdam])
def test_meta_sgd_learns_a_rate_for_each_entry(kind: Any, chunk_size: int | None) -> None:
    model, train, val = net(), tasks(), tasks(7)
    rates = hoptim.HyperParameters({name: 0.05 + 0.05 * torch.rand_like(p) for name, p in model.named_parameters()})
    problem = hoptim.Problem(model, nn.ModuleDict({"initial": Initialization(model), "rate": rates}), loss, loss)
    inner = kind([{"params": [p]} for p in model.parameters()], lr=RATE)
    options = {"lr": [f"rate.{name}" for name, _ in model.named_parameters()]}
    assert_slopes(problem, train, val, hoptim.PerTask(2, chunk_size=chunk_size), inner=inner, options=options)


def test_meta_sgd_in_closed_form() -> None:
    model, train, val = nn.Linear(2, 1, bias=False), tasks(), tasks(7)
    rate = hoptim.HyperParameters({"rate": torch.tensor([[0.1, 0.3]])})
    problem = hoptim.Problem(model, nn.ModuleDict({"initial": Initialization(model), "rate": rate}), loss, loss)
    found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(1), inner=sgd(model), options={"lr": "rate.rate"}).grads
    w, expected = model.weight.detach(), {"initial.initial.weight": 0.0, "rate.rate": 0.0}
    for x, y, x_val, y_val in zip(*train, *val, strict=True):
        g, H = 2 * (x @ w.T - y).T @ x / 5, 2 * x.T @ x / 5
        g_val = 2 * (x_val @ (w - rate["rate"].detach() * g).T - y_val).T @ x_val / 7
        expected["rate.rate"] = expected["rate.rate"] - g_val * g / K
        expected["initial.initial.weight"] = (
            expected["initial.initial.weight"] + (g_val - (g_val * rate["rate"].detach()) @ H) / K
        )
    assert_close(found, expected)


def test_a_learned_rate_alone_begins_at_the_models_weights() -> None:
    model, train, val = net(), tasks(), tasks(7)
    rate = hoptim.HyperParameters({"rate": torch.tensor(0.1)}, {"rate": constraints.positive})
    problem = hoptim.Problem(model, rate, loss, loss)
    assert_slopes(problem, train, val, hoptim.PerTask(3), inner=sgd(model), options={"lr": "rate"})


def test_weights_may_begin_at_what_a_network_computes() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.layer = nn.Parameter(torch.randn(3)), nn.Linear(3, 2, bias=False)

        def initial_weights(self) -> Tensors:
            return {"weight": self.layer(self.code)[None].tanh()}

    model, train, val = nn.Linear(2, 1), tasks(), tasks(7)
    problem = hoptim.Problem(model, Hyper(), loss, loss)
    assert_slopes(problem, train, val, hoptim.PerTask(2), inner=sgd(model))


def test_learned_adapters_on_frozen_weights() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(2, 2).requires_grad_(False)
            self.down, self.up = nn.Linear(2, 1, bias=False), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(self.base(x).tanh()))

    model, train, val = Adapted(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    assert list(problem.leaves()) == ["initial.down.weight", "initial.up.weight", "initial.up.bias"]
    assert_slopes(problem, train, val, hoptim.PerTask(3), inner=inner)
    found = hoptim.PerTask(3).adapt(problem, train, inner=inner)
    assert all(one.base.weight is model.base.weight for one in found)  # type: ignore[union-attr]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_batch_norm_takes_the_statistics_of_each_batch(chunk_size: int | None) -> None:
    model, train, val = Normed(), tasks(6, (1, 4, 4)), tasks(7, (1, 4, 4))
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(2, chunk_size=chunk_size), inner=sgd(model))
    assert same(model.state_dict(), before)
    assert found.solution.status is hoptim.Status.FINISHED
    assert_close(of_initial(found.grads), by_hand(model, train, val, 2), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("is_anil", [False, True])
def test_layers_with_two_names(chunk_size: int | None, is_anil: bool) -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())
            self.features, self.head = nn.Sequential(self.base, nn.Identity()), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x))

    model, train, val = TwoNames(), tasks(), tasks(7)
    problem, before = hoptim.Problem(model, Initialization(model), loss, loss), copy.deepcopy(model.state_dict())
    inner = sgd(model.head if is_anil else model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(2, chunk_size=chunk_size), inner=inner)
    assert same(model.state_dict(), before)
    adapted = (lambda name: name.startswith("head")) if is_anil else (lambda name: True)
    assert_close(of_initial(found.grads), by_hand(model, train, val, 2, adapted=adapted))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_running_statistics_are_those_of_the_task_and_told_to_have_no_derivative(chunk_size: int) -> None:
    model, train, val = Normed(), tasks(6, (1, 4, 4)), tasks(7, (1, 4, 4))

    def val_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model.eval(), hparams, batch)

    problem, method = hoptim.Problem(model, Initialization(model), loss, val_loss), hoptim.PerTask(2, chunk_size=chunk_size)
    found = hoptim.hypergradient(problem, train, val, method, inner=sgd(model))
    assert found.solution.status is hoptim.Status.UNSEEN_WRITES
    assert "body.1.running_mean" in found.solution.detail
    adapted = method.adapt(problem, train, inner=sgd(model))
    losses = [loss(one.eval(), None, (x, y)) for one, x, y in zip(adapted, *val, strict=True)]
    assert_close(found.val_loss, torch.stack(losses).mean().detach())
    assert model.training
    assert all(one.body[1].num_batches_tracked == 2 for one in adapted)  # type: ignore[index]


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("method", [None, hoptim.Unrolled(3)])
def test_plain_attributes_go_on_from_step_to_step(method: Any, chunk_size: int | None) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(2, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.calls * self.layer(x)

    model, train, val = Growing(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(3, method, chunk_size=chunk_size), inner=inner)
    start, total = dict(model.layer.named_parameters()), 0
    for x, y, x_val, y_val in zip(*train, *val, strict=True):
        w = start
        for call in (1, 2, 3):
            one = F.mse_loss(call * functional_call(model.layer, w, (x,)), y)
            g = torch.autograd.grad(one, list(w.values()), create_graph=True)
            w = {name: p - 0.01 * t for (name, p), t in zip(w.items(), g, strict=True)}
        total = total + F.mse_loss(4 * functional_call(model.layer, w, (x_val,)), y_val) / K
    expected = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))  # type: ignore[arg-type]
    assert_close({name.removeprefix("layer."): g for name, g in of_initial(found.grads).items()}, expected)
    assert model.calls == 0


@pytest.mark.filterwarnings("ignore:tasks train one after the other")  # Unrolled follows the running statistics
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("method", [None, hoptim.Unrolled(3), hoptim.Implicit(hoptim.CG(terms=3))])
def test_it_leaves_no_trace(method: Any, chunk_size: int | None) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.calls, self.kept = nn.Linear(2, 1), nn.BatchNorm1d(2), 0, []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.kept.append(self.calls)
            return self.layer(F.dropout(self.norm(x), 0.2))

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        found = loss(model, hparams, batch) + hparams.train().penalty(model, 0.1)  # which is 0 in evaluation mode
        hparams.eval()
        return found

    model, train, val = Counting(), tasks(), tasks(7)
    problem, inner = hoptim.Problem(model, Initialization(model), train_loss, loss), sgd(model, momentum=0.5)
    before = copy.deepcopy((model.state_dict(), problem.hparams.state_dict())), torch.get_rng_state()
    hoptim.hypergradient(problem, train, val, hoptim.PerTask(3, method, chunk_size=chunk_size), inner=inner)
    hoptim.PerTask(3, method, chunk_size=chunk_size).adapt(problem, train, inner=inner)
    assert same((model.state_dict(), problem.hparams.state_dict()), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (model.calls, model.kept, model.training, problem.hparams.training) == (0, [], True, True)
    assert all(p.grad is None for p in (*model.parameters(), *problem.hparams.parameters()))
    assert not inner.state


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_tasks_draw_different_dropout_masks(chunk_size: int | None) -> None:
    model = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 1))
    train = tuple(t[:1].expand(K, *t.shape[1:]) for t in tasks())  # the same task three times
    found = hoptim.PerTask(1, chunk_size=chunk_size).adapt(
        hoptim.Problem(model, Initialization(model), loss, loss), train, inner=sgd(model)
    )
    first, second, third = (one[2].weight for one in found)  # type: ignore[index]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_a_loop_that_draws_nothing_else_is_told_that_masks_repeat() -> None:
    model, train, val = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, lambda m, h, b: loss(m.eval(), h, b))

    def masked() -> Tensor:
        return hoptim.hypergradient(problem, train, val, hoptim.PerTask(1), inner=sgd(model)).grads["initial.1.weight"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = masked()
        torch.rand(1)
        second = masked()
    assert not torch.equal(first, second)
    with pytest.warns(UserWarning, match="draw the same random numbers, such as dropout masks"):
        assert torch.equal(second, masked())


def test_models_that_vmap_cannot_train_train_in_turn_and_say_so_once() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if self.layer(x).sum() > 0 else 2 * self.layer(x)

    model, train, val = Branching(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    with pytest.warns(UserWarning, match="tasks train one after the other, since torch.func.vmap can't"):
        found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(2), inner=sgd(model))
    assert_close(of_initial(found.grads), by_hand(model, train, val, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hoptim.hypergradient(problem, train, val, hoptim.PerTask(2), inner=sgd(model))
    with pytest.raises(RuntimeError, match="vmap"):
        hoptim.hypergradient(problem, train, val, hoptim.PerTask(2, chunk_size=2), inner=sgd(model))


def test_lstms_train_in_turn() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    model, train, val = Sequence(), tasks(5, (4, 2)), tasks(5, (4, 2))
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_slopes(problem, train, val, hoptim.PerTask(2), inner=sgd(model))


class Written(nn.Module):
    """Puts other buffers in place of its own: a count, and a running mean with a graph, or one that is cut."""

    def __init__(self, *, is_cut: bool = False) -> None:
        super().__init__()
        self.layer, self.is_cut = nn.Linear(2, 1), is_cut
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        before = self.mean.detach() if self.is_cut else self.mean
        self.count, self.calls, self.mean = self.count + 1, self.calls + 1.0, 0.9 * before + 0.1 * y.mean()
        return y * self.count + 3 * self.mean


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("method", [None, hoptim.Unrolled(2)])
def test_buffers_that_a_forward_pass_replaces_go_on_with_their_graph(method: Any, chunk_size: int | None) -> None:
    model, train, val = Written(), tasks(), tasks(7)
    problem, inner = hoptim.Problem(model, Initialization(model), loss, loss), torch.optim.SGD(model.parameters(), lr=0.02)
    how = hoptim.PerTask(2, method, chunk_size=chunk_size)
    assert_slopes(problem, train, val, how, inner=inner)
    found = hoptim.hypergradient(problem, train, val, how, inner=inner)
    assert found.solution.status is hoptim.Status.FINISHED
    adapted = how.adapt(problem, train, inner=inner)
    assert [int(one.count) for one in adapted] == [2, 2, 2]  # type: ignore[arg-type]
    with torch.no_grad():
        losses = torch.stack([loss(one, None, (x, y)) for one, x, y in zip(adapted, *val, strict=True)])
    assert_close(losses.mean(), found.val_loss)
    assert int(model.count) == 0


def own_norm() -> nn.Module:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.register_buffer("running_mean", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            if self.training:
                with torch.no_grad():
                    self.running_mean.mul_(0.5).add_(0.5 * y.mean())
                return y - y.mean()
            return y - self.running_mean

    return Norm()


def evaluated(model: Any, hparams: Any, batch: Task) -> Tensor:
    return loss(model.eval(), hparams, batch)


def trained_then_evaluated(model: Any, hparams: Any, batch: Task) -> Tensor:
    return loss(model.train(), hparams, batch) + loss(model.eval(), hparams, batch)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    ("model", "train_loss", "val_loss"),
    [
        (own_norm, loss, evaluated),
        (lambda: Written(is_cut=True), loss, loss),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), trained_then_evaluated, loss),
    ],
)
def test_what_is_written_without_a_derivative_is_told(model: Any, train_loss: Any, val_loss: Any, chunk_size: Any) -> None:
    made, train, val = model(), tasks(), tasks(7)
    problem = hoptim.Problem(made, Initialization(made), train_loss, val_loss)
    found = hoptim.hypergradient(problem, train, val, hoptim.PerTask(2, chunk_size=chunk_size), inner=sgd(made))
    assert found.solution.status is hoptim.Status.UNSEEN_WRITES


def test_one_task_of_many_that_depends_strongly_on_its_start_is_told() -> None:
    model, (x, y), val = nn.Linear(2, 1), tasks(), tasks(7)
    x[1] *= 8
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    for chunk_size in (None, 1):
        found = hoptim.hypergradient(problem, (x, y), val, hoptim.PerTask(3, chunk_size=chunk_size), inner=sgd(model))
        assert found.solution.status is hoptim.Status.SENSITIVE
        assert found.solution.residuals.shape == (1, K)


@pytest.mark.parametrize("method", [None, hoptim.Unrolled(2), hoptim.Implicit()])
def test_in_turn_tasks_draw_the_same_numbers_for_a_hypergradient_and_for_adapt(method: Any) -> None:
    drawn: list[list[float]] = []

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand(3)
            drawn.append(noise.tolist())
            return self.layer(x) + noise.mean()

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams.penalty(model, 0.1)

    model, train, val = Noisy(), tasks(), tasks(7)
    problem = hoptim.Problem(model, Initialization(model), train_loss, loss)
    how = hoptim.PerTask(2, method, chunk_size=1)
    how.adapt(problem, train, inner=sgd(model))
    first = drawn.copy()
    assert len(first) == 2 * K
    assert len({tuple(one) for one in first}) == 2 * K  # none twice
    drawn.clear()
    hoptim.hypergradient(problem, train, val, how, inner=sgd(model))
    assert all(one in drawn for one in first)


def test_adapted_models_have_the_attributes_of_the_end_and_the_users_mode() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(2, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model.eval(), hparams, batch)

    model = Counting()
    problem = hoptim.Problem(model, Initialization(model), train_loss, loss)
    for chunk_size in (None, 1):
        for found in hoptim.PerTask(3, chunk_size=chunk_size).adapt(problem, tasks(), inner=sgd(model)):
            assert (found.calls, found.training) == (3, True)
    assert (model.calls, model.training) == (0, True)


def test_the_row_of_a_padding_index_is_not_trained() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 1))
    words, y = torch.randint(0, 5, (K, 6, 4)), torch.randn(K, 6, 1)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    found = hoptim.hypergradient(problem, (words, y), (words, y), hoptim.PerTask(2), inner=sgd(model))
    assert not found.grads["initial.0.weight"][0].any()
    with pytest.raises(ValueError, match="padding_idx"):
        hoptim.hypergradient(problem, (words, y), (words, y), hoptim.PerTask(2, chunk_size=3), inner=sgd(model))


def test_embeddings_with_a_largest_norm_go_step_by_step() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Flatten(), nn.Linear(12, 1))
    words, y = torch.randint(0, 5, (K, 6, 4)), torch.randn(K, 6, 1)
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    for chunk_size in (None, 1):
        method = hoptim.PerTask(2, chunk_size=chunk_size)
        found = hoptim.hypergradient(problem, (words, y), (words, y), method, inner=sgd(model))
        assert found.solution.status is hoptim.Status.UNSEEN_WRITES
    with pytest.raises(ValueError, match="first_order=True is not for an Embedding with a max_norm"):
        hoptim.hypergradient(problem, (words, y), (words, y), hoptim.PerTask(2, first_order=True), inner=sgd(model))


def test_initial_weights_of_a_network_that_writes_leave_no_trace_and_have_the_type_of_the_models() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.calls = nn.Linear(3, 2).float(), nn.BatchNorm1d(2).float(), 0

        def initial_weights(self) -> Tensors:
            self.calls += 1
            runs.append(1)
            return {"weight": self.norm(self.layer(torch.eye(3, dtype=torch.float32)))[:1]}

    runs: list[int] = []
    model, hyper = nn.Linear(2, 1), Hyper()
    problem, before = hoptim.Problem(model, hyper, loss, loss), copy.deepcopy(hyper.state_dict())
    for chunk_size in (None, 1):
        method = hoptim.PerTask(2, chunk_size=chunk_size)
        runs.clear()
        hoptim.hypergradient(problem, tasks(), tasks(7), method, inner=sgd(model))
        assert len(runs) == 1
        (found, *_) = method.adapt(problem, tasks(), inner=sgd(model))
        assert found.weight.dtype == torch.float64
    assert same(hyper.state_dict(), before)
    assert hyper.calls == 0


def test_fresh_batches_for_a_curvature_are_those_of_the_tasks() -> None:
    model, drawn, val = nn.Linear(2, 1), [tasks(), tasks()], tasks(7)

    def train_loss(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams.penalty(model, 0.5)

    problem = hoptim.Problem(model, Initialization(model), train_loss, loss)
    implicit = hoptim.Implicit(hoptim.CG(terms=10), curvature=hoptim.Averaged(batches=2))
    side, turn = (
        hoptim.hypergradient(
            problem, drawn[0], val, hoptim.PerTask(2, implicit, chunk_size=n), inner=sgd(model), train_batches=[drawn[0]]
        ).grads
        for n in (None, 1)
    )
    assert_close(side, turn)


def test_only_wide_convolutions_that_are_trained_go_in_turn() -> None:
    def passes(model: nn.Module, inner: Any) -> int:
        seen = []
        model.register_forward_pre_hook(lambda *_: seen.append(1))
        batch = torch.randn(4, 3, 1, 4, 4), torch.randn(4, 3, 1)
        problem = hoptim.Problem(model, Initialization(model), loss, loss)
        hoptim.hypergradient(problem, batch, batch, hoptim.PerTask(1), inner=inner)
        return len(seen)

    def wide(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, channels, 3), nn.Flatten(), nn.Linear(4 * channels, 1))

    narrow, broad, head = wide(63), wide(64), wide(64)
    assert passes(narrow, sgd(narrow)) < passes(broad, sgd(broad))
    assert passes(head, sgd(head[2])) < passes(broad, sgd(broad))


class Remembering(nn.Module):
    """Holds what it has computed, with a graph; one weight has two names, and another is normed."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.second = norm(nn.Linear(2, 2)), nn.Linear(2, 2)
        self.second.weight, self.last = self.first.bias, None  # type: ignore[assignment]
        self.tied = nn.Linear(2, 1)
        self.seen: dict[str, Any] = {}
        self.remembers = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.remembers:  # side by side it would be a tensor of vmap that is no longer valid
            self.last, self.seen["hidden"] = hidden, [hidden]
        return self.tied(hidden) + (self.second.weight * hidden).sum(-1, keepdim=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:There is a performance drop")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_models_with_tied_and_normed_weights_that_hold_a_graph(norm: Any, chunk_size: int | None) -> None:
    model, train, val = Remembering(norm), tasks(), tasks(7)
    del model.second.bias
    model(train[0][0])
    model.remembers = chunk_size == 1
    problem, method = hoptim.Problem(model, Initialization(model), loss, loss), hoptim.PerTask(2, chunk_size=chunk_size)
    held = model.last
    assert_slopes(problem, train, val, method, inner=sgd(model))
    assert model.last is held
    for found in method.adapt(problem, train, inner=sgd(model)):
        assert found.second.weight is found.first.bias  # type: ignore[union-attr]


def test_adapt_is_a_plain_training_on_each_task() -> None:
    model, train = net(), tasks()
    problem, inner = hoptim.Problem(model, Initialization(model), loss, loss), torch.optim.Adam(model.parameters(), lr=0.05)
    for chunk_size in (None, 1, 2):
        for place, found in enumerate(hoptim.PerTask(4, chunk_size=chunk_size).adapt(problem, train, inner=inner)):
            plain = copy.deepcopy(model)
            optimizer = torch.optim.Adam(plain.parameters(), lr=0.05)
            for _ in range(4):
                optimizer.zero_grad()
                loss(plain, None, (train[0][place], train[1][place])).backward()
                optimizer.step()
            assert_close(dict(found.named_parameters()), dict(plain.named_parameters()))


def test_in_float32_the_first_step_of_adam_is_torchs() -> None:
    torch.set_default_dtype(torch.float32)
    model, train = net(), tasks()
    problem, inner = hoptim.Problem(model, Initialization(model), loss, loss), torch.optim.Adam(model.parameters(), lr=0.05)
    (found, *_) = hoptim.PerTask(1).adapt(problem, train, inner=inner)
    loss(model, None, (train[0][0], train[1][0])).backward()
    inner.step()
    assert_close(dict(found.named_parameters()), dict(model.named_parameters()), rtol=0.0, atol=3e-7)


def test_each_step_may_have_a_batch_of_its_own() -> None:
    model, val, drawn = net(), tasks(7), [tasks(), tasks()]
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    found = hoptim.hypergradient(problem, drawn[0], val, hoptim.PerTask(2), inner=sgd(model), train_batches=drawn).grads
    start, total = dict(model.named_parameters()), 0
    for task in range(K):
        w = start
        for x, y in drawn:
            one = F.mse_loss(functional_call(model, w, (x[task],)), y[task])
            g = torch.autograd.grad(one, list(w.values()), create_graph=True)
            w = {name: p - RATE * t for (name, p), t in zip(w.items(), g, strict=True)}
        total = total + F.mse_loss(functional_call(model, w, (val[0][task],)), val[1][task]) / K
    expected = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))  # type: ignore[arg-type]
    assert_close(of_initial(found), expected)


def test_losses_with_aux_and_batches_of_any_structure() -> None:
    model, train, val = net(), tasks(), tasks(7)

    def named(model: Any, hparams: Any, batch: Any) -> tuple[Tensor, str]:
        return F.mse_loss(model(batch["x"]), batch["y"][0]), "aux"

    problem = hoptim.Problem(model, Initialization(model), named, named, has_aux=True)
    as_dicts = ({"x": x, "y": [y], "name": "any"} for x, y in (train, val))
    found = hoptim.hypergradient(problem, *as_dicts, hoptim.PerTask(2), inner=sgd(model))
    assert_close(of_initial(found.grads), by_hand(model, train, val, 2))


def test_under_autocast_side_by_side_is_as_in_turn() -> None:
    model, train, val = net().float(), tasks(), tasks(7)
    train, val = (tuple(t.float() for t in one) for one in (train, val))
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        side, turn = (
            hoptim.hypergradient(problem, train, val, hoptim.PerTask(2, chunk_size=n), inner=sgd(model)).grads
            for n in (3, 1)
        )
    for name, g in side.items():
        assert_close(g, turn[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_loss_may_find_the_model_anywhere_but_not_hold_a_weight(chunk_size: int | None) -> None:
    model, train, val = net(), tasks(), tasks(7)
    weight = model[0].weight  # type: ignore[index]

    def by_closure(_: Any, hparams: Any, batch: Task) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def by_weight(_: Any, hparams: Any, batch: Task) -> Tensor:
        return by_closure(_, hparams, batch) + weight.square().sum()  # type: ignore[operator]

    method = hoptim.PerTask(2, chunk_size=chunk_size)
    problem = hoptim.Problem(model, Initialization(model), by_closure, by_closure)
    found = hoptim.hypergradient(problem, train, val, method, inner=sgd(model)).grads
    assert_close(of_initial(found), by_hand(model, train, val, 2))
    wrong = hoptim.Problem(model, Initialization(model), by_weight, by_closure)
    with pytest.raises(ValueError, match=r"train_loss uses \['0.weight'\], but not through the model"):
        hoptim.hypergradient(wrong, train, val, method, inner=sgd(model))


def test_a_task_that_diverges_fails_the_hypergradient() -> None:
    model, (x, y), val = net(), tasks(), tasks(7)
    x[1, 0] = torch.inf
    problem = hoptim.Problem(model, Initialization(model), loss, loss)
    for chunk_size in (None, 1):
        found = hoptim.hypergradient(problem, (x, y), val, hoptim.PerTask(2, chunk_size=chunk_size), inner=sgd(model))
        assert not found.solution.status.ok
        assert "task 2 of 3: " in found.solution.detail
        with pytest.raises(ValueError, match="not finite"):
            hoptim.outer_step(problem, torch.optim.SGD(problem.hparams.parameters(), lr=0.1), found.grads)


def test_what_is_wrong_is_said() -> None:
    model, train, val = net(), tasks(), tasks(7)
    initial = Initialization(model)
    problem, inner = hoptim.Problem(model, initial, loss, loss), sgd(model)

    def of(problem: hoptim.Problem, method: Any, train: Any = train, val: Any = val, inner: Any = inner, **more: Any) -> Any:
        return hoptim.hypergradient(problem, train, val, method, inner=inner, **more)

    for wrong, message in (
        (lambda: hoptim.PerTask(0), "steps=0: give a whole number"),
        (lambda: hoptim.PerTask(1, chunk_size=0), "chunk_size=0: give a whole number"),
        (lambda: hoptim.PerTask(1, hoptim.Unrolled(2)), "steps=1 on a task, and Unrolled"),
        (
            lambda: hoptim.PerTask(1, hoptim.Implicit(curvature=hoptim.Averaged(curvature=hoptim.Exact(compile=True)))),
            "would be compiled anew in each call",
        ),
        (lambda: hoptim.PerTask(1, hoptim.Implicit(), first_order=True), "first_order=True is for the derivative through"),
        (
            lambda: of(problem, hoptim.PerTask(1), val=(val[0][:2], val[1][:2])),
            "have lengths of .* and 2 in the validation batch",
        ),
        (lambda: of(problem, hoptim.PerTask(1), train="a"), "the training batch has no tensor"),
        (lambda: of(problem, hoptim.PerTask(1), train=torch.tensor(1.0)), "a tensor of a single number"),
        (lambda: of(problem, hoptim.PerTask(1), inner=None), "PerTask needs the inner optimizer"),
        (lambda: of(problem, hoptim.PerTask(1, hoptim.Implicit())), r"does not touch \['initial.0.weight'"),
        (
            lambda: of(
                hoptim.Problem(model, hoptim.HyperParameters({"a": torch.ones(1)}), loss, loss),
                hoptim.PerTask(1),
                inner=torch.optim.SGD(model[0].parameters()),
            ),  # type: ignore[index]
            r"does not hold the weights \['2.weight', '2.bias'\], and no hyperparameter stands for them",
        ),
        (
            lambda: of(hoptim.Problem(model, initial, loss, lambda m, h, b: (m(b[0]) - b[1]).square()), hoptim.PerTask(1)),
            r"val_loss returned a tensor of shape \(7, 1\) for a task",
        ),
        (
            lambda: of(hoptim.Problem(net(), Initialization(nn.Linear(3, 1)), loss, loss), hoptim.PerTask(1)),
            "inner holds no weight of the problem's model",
        ),
        (lambda: initial.penalty(nn.Linear(2, 1), 0.1), "the weight '0.weight' is missing in this model"),
        (lambda: initial.penalty(model, -1.0), "strength is -1.0: give a finite number, 0 or more"),
        (lambda: Initialization(net().requires_grad_(False)), "there is no weight to begin from"),
        (lambda: of(problem, hoptim.PerTask(1), options={"lr": "initial.0.weight"}), "A rate for each entry of a weight"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()

    def of_pull(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams["start"].penalty(model, 0.1)

    def of_decay(model: Any, hparams: Any, batch: Task) -> Tensor:
        return loss(model, hparams, batch) + hparams["decay"].penalty(model)

    other = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"initial weight 'weight' of shape .*, and in the model it is not there"):
        of(hoptim.Problem(model, Initialization(other), loss, loss), hoptim.PerTask(1))
    both = nn.ModuleList([Initialization(model), Initialization(model)])
    with pytest.raises(ValueError, match="two modules of hparams have initial weights"):
        of(hoptim.Problem(model, both, loss, loss), hoptim.PerTask(1))
    rate = hoptim.HyperParameters({"rate": torch.tensor(0.1)})
    of_rate = hoptim.Problem(model, nn.ModuleDict({"start": initial, "rate": rate}), of_pull, loss)
    with pytest.raises(ValueError, match="is the inner optimizer's lr, on which the training gradient does not depend"):
        of(of_rate, hoptim.PerTask(1, hoptim.Implicit()), options={"lr": "rate.rate"})
    decay = hoptim.recipes.WeightDecay(model)
    decayed = hoptim.Problem(model, nn.ModuleDict({"start": initial, "decay": decay}), of_decay, loss)
    with pytest.raises(ValueError, match=r"with first_order=True nothing depends on \['decay.decay.0.weight'"):
        of(decayed, hoptim.PerTask(2, first_order=True))
    for solver in (hoptim.SOBA(step_size=0.1), hoptim.WarmStart(hoptim.CG())):
        with pytest.raises(TypeError, match="starts at the last solution, and the tasks are new each time"):
            hoptim.PerTask(1, hoptim.Implicit(solver))
    with pytest.raises(TypeError, match="of which PerTask can't take the part of a task"):
        of(problem, hoptim.PerTask(1), train=(train[0], train[1].numpy()))
    with pytest.raises(ValueError, match="adapt needs the inner optimizer"):
        hoptim.PerTask(1).adapt(problem, train, inner=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="which trains on each task itself"):
        hoptim.BilevelOptimizer(
            inner, torch.optim.Adam(initial.parameters()), problem, val_batches=[val], hypergradient=hoptim.PerTask(1)
        )
    with pytest.raises(TypeError, match="which trains on each task itself"):
        hoptim.audit(problem, train, val, hoptim.PerTask(1), inner=inner)
    with pytest.raises(TypeError, match=r"method is .*Replay"):
        hoptim.PerTask(1, hoptim.Replay([train]))  # type: ignore[arg-type]


def test_a_sinusoid_is_learned_from_few_points() -> None:
    """After some hundred steps a single gradient step on ten points fits a new sinusoid better than from random weights."""
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    initial, inner = Initialization(model), torch.optim.SGD(model.parameters(), lr=0.01)
    problem, outer, maml = hoptim.Problem(model, initial, loss, loss), initial.optimizer(), hoptim.PerTask(1)

    def sinusoids(count: int) -> tuple[Task, Task]:
        height, shift = 0.1 + 4.9 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
        x = 10 * torch.rand(count, 20, 1) - 5
        y = height * (x - shift).sin()
        return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])

    train, val = sinusoids(100)
    before = hoptim.hypergradient(problem, train, val, maml, inner=inner).val_loss
    for _ in range(300):
        result = hoptim.hypergradient(problem, *sinusoids(25), maml, inner=inner)
        hoptim.outer_step(problem, outer, result.grads)
    after = hoptim.hypergradient(problem, train, val, maml, inner=inner).val_loss
    assert after < 0.75 * before


def test_a_meta_training_resumes_to_the_bit_from_hyperparameters_and_outer_optimizer() -> None:
    def begun() -> tuple[Any, Any, Any]:
        torch.manual_seed(1)
        model = net()
        initial = Initialization(model)
        return hoptim.Problem(model, initial, loss, loss), initial.optimizer(), sgd(model)

    def run(problem: Any, outer: Any, inner: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            found = hoptim.hypergradient(problem, tasks(), tasks(7), hoptim.PerTask(2), inner=inner)
            hoptim.outer_step(problem, outer, found.grads)

    whole, first, second = begun(), begun(), begun()
    run(*whole, range(6))
    run(*first, range(3))
    saved = copy.deepcopy((first[0].hparams.state_dict(), first[1].state_dict()))
    second[0].hparams.load_state_dict(saved[0])
    second[1].load_state_dict(saved[1])
    run(*second, range(3, 6))
    assert same(second[0].hparams.state_dict(), whole[0].hparams.state_dict())
