"""Finite differences, averages and samples against dense float64 algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import classes, flat, noisy_problem, same, snapshot
from tiny import (
    BATCHES,
    SIZE,
    VAL,
    direct_of,
    g_of,
    hess,
    joined,
    leaf_vector,
    leaves_of,
    linearized,
    matrix,
    matrix_at_once,
    mixed,
    mixed_at_once,
    mixed_matrix,
    outputs,
    series,
    slope,
    tiny,
    train,
    val_loss,
    weights_of,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import grad, hessian, jacrev
from torch.nn import functional as F

from hoptim import (
    CG,
    Averaged,
    BilevelOptimizer,
    Exact,
    FiniteDifference,
    GaussNewton,
    HyperParameters,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Sampled,
    Unrolled,
    hypergradient,
)

FIVE = Neumann(terms=5, step_size=0.3)
NEAR = {"rtol": 1e-7, "atol": 1e-8}
SAME = {"rtol": 1e-11, "atol": 1e-13}


def products(one: Any) -> dict[str, Tensor]:
    return {
        "A": matrix(one.A),
        "A at once": matrix_at_once(one.A),
        "A.T": matrix(one.A.T),
        "B": mixed_matrix(one),
        "B at once": mixed_at_once(one),
        "F": one.value,
        "loss": one.loss,
    }


def check(found: dict[str, Tensor], A: Tensor, B: Tensor, F: Tensor, loss: Tensor, **tolerance: float) -> None:
    expected = {"A": A, "A at once": A, "A.T": A.T, "B": B, "B at once": B, "F": F, "loss": loss}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# The reference itself


def test_exact_products_are_those_of_the_reference() -> None:
    problem = tiny()
    b = BATCHES[0]
    loss = train(weights_of(problem), leaves_of(problem), b)
    found = linearized(problem, Exact(), products)
    check(found, hess(problem, b), mixed(problem, b), slope(problem, b), loss, **SAME)


def gauss_newton(problem: Problem, b: Any) -> Tensor:
    w, l = weights_of(problem), leaves_of(problem)  # noqa: E741
    J = jacrev(lambda w: outputs(w, b[0]).flatten())(w)
    Hz = hessian(lambda z: F.cross_entropy(l[2].exp() * z.reshape(-1, 2), b[1]))(outputs(w, b[0]).flatten())
    criterion = hessian(lambda w: F.cross_entropy(l[2].exp() * outputs(w, b[0]), b[1]))(w)
    return J.T @ Hz @ J + hess(problem, b) - criterion


# FiniteDifference


def test_differences_are_the_exact_products() -> None:
    problem = tiny()
    b = BATCHES[0]
    loss = train(weights_of(problem), leaves_of(problem), b)
    found = linearized(problem, FiniteDifference(), products)
    check(found, hess(problem, b), mixed(problem, b), slope(problem, b), loss, **NEAR)


@pytest.mark.parametrize("step", [0.3, 1e-2])
def test_step_is_the_length_of_the_difference_relative_to_the_weights(step: float) -> None:
    problem = tiny()
    w, l, v = weights_of(problem), leaves_of(problem), torch.linspace(-3, 5, SIZE)  # noqa: E741
    e = step * w.norm() / v.norm()
    up, down = (grad(train, argnums=(0, 1))(w + s * e * v, l, BATCHES[0]) for s in (1, -1))

    def products(one: Any) -> tuple[Tensor, Tensor]:
        return one.A @ v, leaf_vector(one.mixed(v))

    Av, Bv = linearized(problem, FiniteDifference(step=step), products)
    torch.testing.assert_close(Av, (up[0] - down[0]) / (2 * e), **SAME)
    torch.testing.assert_close(Bv, (up[1] - down[1]) / (2 * e), **SAME)
    assert (Av - hess(problem, BATCHES[0]) @ v).norm() > step**2 * 1e-2  # it is a difference, and no derivative


def test_differences_where_all_weights_are_zero_and_along_nothing() -> None:
    problem = tiny()
    nn.utils.vector_to_parameters(torch.zeros(SIZE), problem.model.parameters())
    A = linearized(problem, FiniteDifference(), lambda one: (matrix(one.A), one.A @ torch.zeros(SIZE)))
    torch.testing.assert_close(A[0], hess(problem, BATCHES[0]), **NEAR)
    assert torch.equal(A[1], torch.zeros(SIZE))


@pytest.mark.parametrize("solver", [Identity(), Neumann(terms=5, step_size=0.03), CG(terms=3)])
@pytest.mark.parametrize("name", ["dropout", "dropout and BatchNorm"])
def test_hypergradient_by_differences_replays_the_masks_and_leaves_no_trace(name: str, solver: Any) -> None:
    problem = tiny(dropout=0.5) if name == "dropout" else noisy_problem()
    data = (BATCHES[0], VAL) if name == "dropout" else (classes(8, 0), classes(8, 1))
    torch.manual_seed(7)
    before = snapshot(problem)
    exact, found = (
        hypergradient(problem, *data, Implicit(solver, curvature=curvature)) for curvature in (Exact(), FiniteDifference())
    )
    assert same(snapshot(problem), before)
    for leaf in found.grads:
        torch.testing.assert_close(found.grads[leaf], exact.grads[leaf], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(flat(found.solution.value), flat(exact.solution.value), rtol=1e-7, atol=1e-8)
    if name == "dropout":
        torch.manual_seed(8)
        other = hypergradient(problem, *data, Implicit(solver, curvature=FiniteDifference()))
        assert abs(other.grads["scale"] - found.grads["scale"]) > 1e-5  # another mask


class Once(torch.autograd.Function):
    """tanh, whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y**2)


def test_model_without_a_second_derivative() -> None:
    problem = tiny(predict=lambda m, h, b: m[3](Once.apply(m[0](b[0]))))
    exact = hypergradient(tiny(), BATCHES[0], VAL, Implicit(FIVE, curvature=Exact()))
    found = hypergradient(problem, BATCHES[0], VAL, Implicit(FIVE, curvature=FiniteDifference()))
    torch.testing.assert_close(leaf_vector(found.grads), leaf_vector(exact.grads), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("curvature", [None, Exact(), GaussNewton()])
def test_curvature_of_a_model_without_a_second_derivative_is_an_error_and_no_answer(curvature: Any) -> None:
    problem = tiny(predict=lambda m, h, b: m[3](Once.apply(m[0](b[0]))))
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r"once_differentiable|FiniteDifference"):
        hypergradient(problem, BATCHES[0], VAL, Implicit(FIVE, curvature=curvature))


def test_differences_of_sparse_gradients_are_an_error_that_names_the_weight() -> None:
    model, hparams = nn.Embedding(3, 2), HyperParameters({"a": torch.tensor(1.0)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return h["a"] * nn.functional.embedding(b, m.weight, sparse=True).square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: m(b).sum())
    with pytest.raises(TypeError, match=r"\['weight'\] have sparse gradients.*sparse=False"):
        hypergradient(problem, torch.tensor([0]), torch.tensor([0]), Implicit(Identity(), curvature=FiniteDifference()))


def two_losses(m: Any, h: Any, b: Any) -> Tensor:
    whole = val_loss(m, h, b)
    return torch.stack([whole, whole**2 + m[3].bias.sum()])


def test_differences_for_several_right_hand_sides() -> None:
    problem = tiny(val=two_losses)
    exact, found = (
        hypergradient(problem, BATCHES[0], VAL, Implicit(FIVE, curvature=curvature))
        for curvature in (Exact(), FiniteDifference())
    )
    assert exact.grads["decay"].shape == (2, 2)
    for name in exact.grads:
        torch.testing.assert_close(found.grads[name], exact.grads[name], rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the training loss does not touch")
def test_differences_leave_out_weights_and_hyperparameters_that_are_not_touched() -> None:
    model = nn.Linear(1, 1)
    hparams = HyperParameters({"a": torch.tensor(0.5), "b": torch.tensor(0.25)})
    nn.init.ones_(model.weight)
    problem = Problem(
        model, hparams, lambda m, h, b: (m.weight - h["a"]).pow(4).sum(), lambda m, h, b: 3 * m.weight.sum() + h["b"]
    )
    result = hypergradient(problem, None, None, Implicit(Identity(), curvature=FiniteDifference()))
    assert list(result.solution.value) == ["weight"]
    assert result.grads["a"].item() == pytest.approx(3 * 12 * 0.25, rel=1e-7)
    assert (result.grads["b"].item(), result.indirect["b"].item()) == (1.0, 0.0)


# Averaged


INSIDE = {"exact": Exact(), "gauss-newton": GaussNewton(), "difference": FiniteDifference()}


def drawing(*batches: Any) -> Any:
    """Gives these batches, one after another, and no more."""
    return iter(batches).__next__


@pytest.mark.parametrize("name", INSIDE)
def test_average_is_the_mean_over_the_batches(name: str) -> None:
    problem = tiny()
    w, l = weights_of(problem), leaves_of(problem)  # noqa: E741
    dense = gauss_newton if name == "gauss-newton" else hess
    three = BATCHES[:3]
    found = linearized(problem, Averaged(batches=3, curvature=INSIDE[name]), products, draw=drawing(*three[1:]))
    A, B, F = (sum(part(problem, b) for b in three) / 3 for part in (dense, mixed, slope))
    loss = sum(train(w, l, b) for b in three) / 3
    check(found, A, B, F, loss, **(NEAR if name == "difference" else SAME))


@pytest.mark.parametrize("name", INSIDE)
def test_average_is_the_hypergradient_of_the_joined_batch(name: str) -> None:
    problem = tiny()
    together = hypergradient(problem, joined(BATCHES[:4]), VAL, Implicit(FIVE, curvature=INSIDE[name]))
    averaged = Implicit(FIVE, curvature=Averaged(batches=4, curvature=INSIDE[name]))
    found = hypergradient(problem, BATCHES[0], VAL, averaged, train_batches=BATCHES[1:4])
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if name == "difference" else SAME
    torch.testing.assert_close(leaf_vector(found.grads), leaf_vector(together.grads), **tolerance)
    torch.testing.assert_close(found.train_loss, together.train_loss)
    torch.testing.assert_close(found.gradient_norm, together.gradient_norm)


def test_average_over_one_batch_needs_no_others() -> None:
    one, exact = (
        hypergradient(tiny(), BATCHES[0], VAL, Implicit(FIVE, curvature=curvature))
        for curvature in (Averaged(batches=1), Exact())
    )
    torch.testing.assert_close(one.grads["decay"], exact.grads["decay"], **SAME)


@pytest.mark.parametrize("curvature", [Averaged(), Sampled()])
def test_without_more_batches_it_says_what_to_give(curvature: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(curvature).__name__} needs more training batches: give train_batches"):
        hypergradient(tiny(), BATCHES[0], VAL, Implicit(FIVE, curvature=curvature))


def optimizer_of(problem: Problem, curvature: Any, **options: Any) -> BilevelOptimizer:
    return BilevelOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.1),
        torch.optim.SGD(problem.hparams.parameters(), lr=0.1),
        problem,
        val_batches=[VAL],
        hypergradient=Implicit(FIVE, curvature=curvature),
        **options,
    )


def test_optimizer_averages_over_its_train_batches_as_they_come() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, Averaged(batches=2), train_batches=BATCHES[:4])
    for pair in (BATCHES[:2], BATCHES[2:4], BATCHES[:2]):
        A, B = (sum(part(problem, b) for b in pair) / 2 for part in (hess, mixed))
        expected = direct_of(problem) - B.T @ series([A] * 5, g_of(problem), 0.3)
        record = optimizer.hyperstep()
        torch.testing.assert_close(leaf_vector(record.result.grads), expected, **SAME)


@pytest.mark.parametrize("inside", [Exact(), FiniteDifference()])
@pytest.mark.parametrize("kind", [Averaged, Sampled])
def test_several_batches_leave_no_trace_and_are_the_same_again(kind: Any, inside: Any) -> None:
    problem = noisy_problem()
    before = snapshot(problem)
    method = Implicit(Neumann(terms=3, step_size=0.03), curvature=kind(curvature=inside))
    more = [classes(8, seed) for seed in (2, 3, 4)]
    one, other = (hypergradient(problem, classes(8, 0), classes(8, 1), method, train_batches=more) for _ in range(2))
    assert same(snapshot(problem), before)
    assert same(one.grads, other.grads)


class Branches(nn.Module):
    """Even batches go through one weight, odd ones through another; both through the third."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("even", 0.5), ("odd", -0.4), ("both", 0.8)):
            self.register_parameter(name, nn.Parameter(torch.tensor([value])))

    def forward(self, b: int) -> Tensor:
        return ((self.odd if b % 2 else self.even) * self.both + b).sum()


def branches() -> Problem:
    hparams = HyperParameters({"a": torch.tensor(0.3)})

    def loss(m: Any, h: Any, b: int) -> Tensor:
        return (m(b) - h["a"]) ** 2

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return m.even.sum() ** 2 + m.odd.sum() ** 2 + m.both.sum() ** 2

    return Problem(Branches(), hparams, loss, val)


def branch_loss(w: Tensor, a: Tensor, b: int) -> Tensor:
    return (w[b % 2] * w[2] + b - a) ** 2


W, A_ = torch.tensor([0.5, -0.4, 0.8], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
FEW = Neumann(terms=2, step_size=0.1)


def test_average_counts_a_weight_where_any_batch_touches_it() -> None:
    result = hypergradient(branches(), 0, None, Implicit(FEW, curvature=Averaged(batches=2)), train_batches=[1])
    H = sum(hessian(branch_loss)(W, A_, b) for b in (0, 1)) / 2
    B = sum(jacrev(grad(branch_loss), argnums=1)(W, A_, b) for b in (0, 1)) / 2
    expected = -B @ series([H, H], 2 * W, 0.1)
    assert result.grads["a"].item() == pytest.approx(expected.item(), rel=1e-11)
    assert set(result.solution.value) == {"even", "odd", "both"}


def test_average_counts_a_hyperparameter_that_not_every_batch_uses() -> None:
    model = nn.ParameterDict({"w": torch.tensor([1.5])})
    hparams = HyperParameters({"a": torch.tensor(0.3), "b": torch.tensor(0.7)})

    def loss(m: Any, h: Any, b: str) -> Tensor:
        return 0.5 * (m["w"] - h[b]).square().sum()

    problem = Problem(model, hparams, loss, lambda m, h, b: 3 * m["w"].sum())
    method = Implicit(Identity(), curvature=Averaged(batches=3))
    result = hypergradient(problem, "a", None, method, train_batches=["b", "b"])
    assert {name: value.item() for name, value in result.grads.items()} == pytest.approx({"a": 1.0, "b": 2.0})


# Sampled


@pytest.mark.parametrize("name", INSIDE)
def test_sampled_product_j_uses_batch_j(name: str) -> None:
    problem = tiny()
    dense = gauss_newton if name == "gauss-newton" else hess
    x = series([dense(problem, b) for b in BATCHES[1:6]], g_of(problem), 0.3)
    expected = direct_of(problem) - mixed(problem, BATCHES[0]).T @ x
    method = Implicit(FIVE, curvature=Sampled(curvature=INSIDE[name]))
    result = hypergradient(problem, BATCHES[0], VAL, method, train_batches=BATCHES[1:6])
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if name == "difference" else SAME
    torch.testing.assert_close(leaf_vector(result.grads), expected, **tolerance)
    torch.testing.assert_close(flat(result.solution.value), x, **tolerance)
    torch.testing.assert_close(result.train_loss, train(weights_of(problem), leaves_of(problem), BATCHES[0]))
    torch.testing.assert_close(result.gradient_norm, slope(problem, BATCHES[0]).norm())


def test_sampled_draws_one_batch_a_product_for_several_losses_too() -> None:
    problem = tiny(val=two_losses)
    alone = [tiny(val=lambda m, h, b, r=r: two_losses(m, h, b)[r]) for r in range(2)]
    drawn: list[int] = []

    class Counting(list[Any]):
        def __iter__(self) -> Any:
            for i, b in enumerate(list.__iter__(self)):
                drawn.append(i)
                yield b

    method = Implicit(FIVE, curvature=Sampled())
    result = hypergradient(problem, BATCHES[0], VAL, method, train_batches=Counting(BATCHES[1:6]))
    assert drawn == [0, 1, 2, 3, 4]
    for r in range(2):
        expected = hypergradient(alone[r], BATCHES[0], VAL, method, train_batches=BATCHES[1:6])
        torch.testing.assert_close(result.grads["decay"][r], expected.grads["decay"], **SAME)


def test_sampled_from_the_optimizer_goes_on_where_the_last_one_stopped() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, Sampled(), train_batches=BATCHES)
    for first in (0, 6, 12):
        at, *others = (BATCHES[i % 6] for i in range(first, first + 6))
        x = series([hess(problem, b) for b in others], g_of(problem), 0.3)
        expected = direct_of(problem) - mixed(problem, at).T @ x
        torch.testing.assert_close(leaf_vector(optimizer.hyperstep().result.grads), expected, **SAME)


@pytest.mark.filterwarnings("ignore:the training loss does not touch")
def test_sampled_batches_that_touch_other_weights_act_on_those_of_the_hypersteps_own() -> None:
    result = hypergradient(branches(), 0, None, Implicit(FEW, curvature=Sampled()), train_batches=[1, 2])
    keep = torch.tensor([0, 2])
    cut = [hessian(branch_loss)(W, A_, b)[keep][:, keep] for b in (1, 2)]
    B = jacrev(grad(branch_loss), argnums=1)(W, A_, 0)[keep]
    expected = -B @ series(cut, 2 * W[keep], 0.1)
    assert result.grads["a"].item() == pytest.approx(expected.item(), rel=1e-11)


@pytest.mark.parametrize("method", [Implicit(), Implicit(curvature=Exact(compile=True)), Unrolled(2)])
def test_a_loss_that_is_once_differentiable_itself_is_found(method: Any) -> None:
    """Outermost it leaves no mark in the graph of the gradient; compiled and unrolled ways must look too."""
    problem = Problem(
        nn.Linear(2, 1),
        nn.ParameterDict({"decay": torch.tensor(0.1)}),
        lambda m, h, b: Once.apply(m(b)).mean() + h["decay"] * m.weight.square().sum(),
        lambda m, h, b: m(b).square().mean(),
    )
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"\['Once'\] are once_differentiable.*FiniteDifference"):
        hypergradient(problem, torch.randn(4, 2), torch.randn(4, 2), method, inner=inner)


def test_a_batch_that_touches_no_weight_counts_as_zero_in_the_mean() -> None:
    d = torch.tensor([2.0, 3.0])

    def train_loss(m: Any, h: Any, b: Any) -> Tensor:  # the second batch has no part that depends on the weights
        return b * 0.5 * (d * m["w"].square()).sum() - m["w"] @ h["a"] if b else h["a"].sum()

    problem = Problem(
        nn.ParameterDict({"w": torch.ones(2)}),
        HyperParameters({"a": torch.ones(2)}),
        train_loss,
        lambda m, h, b: m["w"].sum(),
    )
    for curvature, side in ((Exact(), 1), (FiniteDifference(), 1), (Exact(), 3)):
        problem.val_loss = (lambda m, h, b: m["w"].sum()) if side == 1 else (lambda m, h, b: torch.stack([m["w"].sum()] * 3))
        method = Implicit(CG(), curvature=Averaged(batches=2, curvature=curvature))
        result = hypergradient(problem, 1.0, None, method, train_batches=[0.0])
        expected = torch.ones(2) / d  # (A/2)⁻¹ g through B/2 = −I/2
        for row in result.grads["a"].reshape(side, 2):
            torch.testing.assert_close(row, expected, **NEAR)


def test_differences_keep_their_masks_whatever_is_drawn_between_two_products() -> None:
    problem, v = tiny(dropout=0.5), torch.linspace(-1, 1, SIZE)

    def twice(one: Any) -> tuple[Tensor, Tensor]:
        first = one.A @ v
        torch.rand(3)
        return first, one.A @ v

    first, second = linearized(problem, FiniteDifference(), twice)
    assert torch.equal(first, second)
