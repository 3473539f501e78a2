"""Gauss-Newton against the dense Jᵀ(∂²c/∂z²)J + ∂²penalty/∂w² in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from hoptim import (
    CG,
    MINRES,
    Averaged,
    CompositeLoss,
    Exact,
    GaussNewton,
    HyperParameters,
    Implicit,
    Neumann,
    Problem,
    Sampled,
    hypergradient,
)
from hoptim.curvature.linearization import GradientGraph
from hoptim.linalg.vectors import Layout

CRITERIA = {
    "cross-entropy": (lambda z, h, b: F.cross_entropy(z, b[1]), lambda n: torch.arange(n) % 3),
    "mean square": (lambda z, h, b: F.mse_loss(z, b[1]), lambda n: torch.linspace(-1, 1, 3 * n).reshape(n, 3)),
    "binary": (
        lambda z, h, b: F.binary_cross_entropy_with_logits(z, b[1]),
        lambda n: (torch.arange(3.0 * n) % 2).reshape(n, 3),
    ),
    "weighted": (
        lambda z, h, b: (h["weight"].exp() * F.cross_entropy(z, b[1], reduction="none")).mean(),
        lambda n: torch.arange(n) % 3,
    ),
}


def quartic(m: Any, h: Any) -> Tensor:
    return h["decay"] * sum((p**4).sum() + p.square().sum() for p in m.parameters())


def made(name: str, model: nn.Module | None = None, penalty: Any = quartic) -> tuple[Problem, Any]:
    torch.manual_seed(0)
    criterion, target = CRITERIA[name]
    model = (model or nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))).double()
    values = {"decay": torch.tensor(0.1).double(), "weight": torch.zeros(8).double()}
    hparams = HyperParameters(values if name == "weighted" else {"decay": values["decay"]})
    y = target(8)
    batch = (torch.randn(8, 2, dtype=torch.float64), y.double() if y.is_floating_point() else y)
    loss = CompositeLoss(lambda m, h, b: m(b[0]), criterion, penalty)
    return Problem(model, hparams, loss, lambda m, h, b: criterion(m(b[0]), {"weight": torch.ones(8).double()}, b)), batch


def operator(problem: Problem, batch: Any, curvature: Any) -> Any:
    with problem.at() as at, at.loss("train_loss", batch) as (loss, parts, _):
        return curvature.of(GradientGraph(loss, at.weights, at.leaves, parts))


def matrix(A: Any) -> Tensor:
    """A as a dense matrix, all columns in one batched product."""
    return A @ torch.eye(A.size, dtype=torch.float64)


def dense(problem: Problem, batch: Any, penalty: Any = quartic) -> Tensor:
    weights = {name: p.detach() for name, p in problem.weights().items()}
    size = sum(p.numel() for p in weights.values())

    def output(w: Any) -> Tensor:
        return functional_call(problem.model, w, (batch[0],)).flatten()

    J = torch.cat([j.reshape(24, -1) for j in jacrev(output)(weights).values()], dim=1)
    z = output(weights).detach()
    Hz = hessian(lambda z: problem.train_loss.criterion(z.reshape(8, 3), problem.hparams, batch))(z).detach()
    found = J.T @ Hz @ J
    if penalty is not None:
        w = torch.cat([p.flatten() for p in weights.values()])
        found += torch.diag(problem.hparams["decay"].detach() * (12 * w**2 + 2))
    assert found.shape == (size, size)
    return found


@pytest.mark.parametrize("name", CRITERIA)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    problem, batch = made(name)
    torch.testing.assert_close(matrix(operator(problem, batch, GaussNewton())), dense(problem, batch), rtol=1e-9, atol=1e-12)


CURVLINOPS = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "mean square": nn.MSELoss(),
    "binary": nn.BCEWithLogitsLoss(),
}
MODELS = {
    "MLP": lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
}


@pytest.mark.parametrize("kind", ["Exact", "GaussNewton"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CURVLINOPS)
def test_products_are_those_of_curvlinops(name: str, model: str, kind: str) -> None:
    """Not of norms: its exact products (3.0.1) through a LayerNorm differ from finite differences, ours do not."""
    problem, batch = made(name, MODELS[model](), penalty=None)
    theirs = {"Exact": HessianLinearOperator, "GaussNewton": GGNLinearOperator}[kind](
        problem.model, CURVLINOPS[name], list(problem.model.parameters()), [batch]
    )
    found = matrix(operator(problem, batch, {"Exact": Exact(), "GaussNewton": GaussNewton()}[kind]))
    torch.testing.assert_close(found, theirs @ torch.eye(len(found), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-3


def test_without_a_penalty() -> None:
    problem, batch = made("cross-entropy", penalty=None)
    A = operator(problem, batch, GaussNewton())
    torch.testing.assert_close(matrix(A), dense(problem, batch, None), rtol=1e-9, atol=1e-12)


def test_a_batched_product_is_that_of_each_alone() -> None:
    problem, batch = made("cross-entropy")
    A = operator(problem, batch, GaussNewton())
    v = torch.randn(3, A.size, dtype=torch.float64)
    together = A @ v
    for row, alone in zip(together, v, strict=True):
        torch.testing.assert_close(row, A @ alone, rtol=1e-10, atol=1e-12)


def test_on_a_linear_model_it_is_the_exact_hessian() -> None:
    problem, batch = made("cross-entropy", model=nn.Linear(2, 3))
    torch.testing.assert_close(matrix(operator(problem, batch, GaussNewton())), matrix(operator(problem, batch, Exact())))


def test_it_is_definite_where_the_exact_hessian_is_not() -> None:
    problem, batch = made(
        "mean square", penalty=lambda m, h: 0.01 * h["decay"] * sum(p.square().sum() for p in m.parameters())
    )
    lowest = [torch.linalg.eigvalsh(matrix(operator(problem, batch, kind)))[0].item() for kind in (Exact(), GaussNewton())]
    assert lowest[0] < -1e-3
    assert lowest[1] == pytest.approx(0.01 * 0.1 * 2, rel=1e-6)


def test_a_weight_of_the_penalty_alone_has_its_curvature() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    model.register_parameter("aside", nn.Parameter(torch.ones(2)))
    problem, batch = made("cross-entropy", model=model)
    A = operator(problem, batch, GaussNewton())
    product = Layout.of(problem.weights()).views(A @ torch.ones(A.size, dtype=torch.float64))
    torch.testing.assert_close(product["aside"], torch.full((2,), 0.1 * 14, dtype=torch.float64))


def test_the_hypergradient_is_the_dense_one() -> None:
    problem, batch = made("cross-entropy")
    result = hypergradient(problem, batch, batch, Implicit(CG(terms=200, tolerance=1e-12), curvature=GaussNewton()))
    weights = list(problem.model.parameters())
    g = torch.autograd.grad(problem.val_loss(problem.model, problem.hparams, batch), weights)
    x = torch.linalg.solve(dense(problem, batch), torch.cat([part.flatten() for part in g]))
    w = torch.cat([p.detach().flatten() for p in weights])
    assert result.grads["decay"].item() == pytest.approx(-(x @ (4 * w**3 + 2 * w)).item(), rel=1e-8)


def test_a_composite_loss_is_the_sum_of_its_parts() -> None:
    problem, batch = made("cross-entropy")
    plain = F.cross_entropy(problem.model(batch[0]), batch[1]) + quartic(problem.model, problem.hparams)
    assert problem.loss(batch).item() == plain.item()
    together = Problem(problem.model, problem.hparams, problem.train_loss.__call__, problem.val_loss)
    one, other = (
        hypergradient(p, batch, batch, Implicit(Neumann(terms=3, step_size=0.1), curvature=Exact()))
        for p in (problem, together)
    )
    assert torch.equal(one.grads["decay"], other.grads["decay"])


def test_dropout_has_one_mask_in_the_gradient_and_in_the_curvature() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    problem, batch = made("cross-entropy", model=model)
    found = []
    for kind in (Exact(), GaussNewton()):
        torch.manual_seed(5)
        found.append(matrix(operator(problem, batch, kind)))
    torch.testing.assert_close(*found)


def test_without_parts_it_says_how_to_show_them() -> None:
    problem, batch = made("cross-entropy")
    plain = Problem(
        problem.model, problem.hparams, lambda m, h, b: F.cross_entropy(m(b[0]), b[1]) + quartic(m, h), problem.val_loss
    )
    with pytest.raises(ValueError, match=r"hoptim\.CompositeLoss"):
        hypergradient(plain, batch, batch, Implicit(curvature=GaussNewton()))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("model", quartic), "predict is a str"),
        ((lambda m, h, b: m(b), None), "criterion is a NoneType"),
        ((lambda m, h, b: m(b), lambda z, h, b: z.mean(), 3), "penalty is an int"),
    ],
)
def test_a_part_that_is_no_function_is_named(parts: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        CompositeLoss(*parts)


def test_a_prediction_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="predict returned a dict"):
        CompositeLoss(lambda m, h, b: {}, lambda z, h, b: z)(None, None, None)


@pytest.mark.parametrize("compile", [False, True])
def test_predict_sees_the_hyperparameters_and_the_hypergradient_goes_through_them(compile: bool) -> None:
    """A learned scale of each feature: z = (x ⊙ scale) w is linear in w, so that Gauss-Newton is the Hessian."""
    x, y = torch.randn(20, 3), torch.randn(20, 1)

    def predict(m: Any, h: Any, b: Any) -> Tensor:
        return m(x[b] * h["scale"])

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return (m(x[b]) - y[b]).square().mean()

    found = {}
    for name, curvature in (("exact", Exact()), ("ours", GaussNewton(compile=compile))):
        torch.manual_seed(0)
        model, hparams = nn.Linear(3, 1), HyperParameters({"scale": torch.tensor([0.5, 1.0, 2.0])})
        loss = CompositeLoss(predict, lambda z, h, b: (z - y[b]).square().mean(), lambda m, h: 0.1 * m.weight.square().sum())
        problem = Problem(model, hparams, loss, val)
        method = Implicit(MINRES(terms=8), curvature=curvature)
        found[name] = hypergradient(problem, torch.arange(10), torch.arange(10, 20), method).grads["scale"]
    torch.testing.assert_close(found["ours"], found["exact"], rtol=1e-9, atol=1e-12)
    assert float(found["exact"].abs().min()) > 1e-3


# A criterion without curvature in z


def margins(z: Tensor, b: Any) -> Tensor:
    return z * (2 * F.one_hot(b[1], 3) - 1)


LINEAR = {
    "nll_loss": lambda z, h, b: F.nll_loss(z, b[1]),
    "L1": lambda z, h, b: F.l1_loss(z, F.one_hot(b[1], 3).double()),
    "hinge": lambda z, h, b: (1 - margins(z, b)).clamp(min=0).mean(),
    "pinball": lambda z, h, b: (z - 0.3 * F.one_hot(b[1], 3)).mul(0.2).maximum(-0.8 * z).mean(),
}


def classifier(criterion: Any, *, log: bool, penalty: Any = quartic) -> tuple[Problem, Any]:
    """Three classes from two features; ``log``: the model returns log-probabilities instead of logits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    if log:
        model.append(nn.LogSoftmax(dim=1))
    batch = torch.randn(8, 2, dtype=torch.float64), torch.arange(8) % 3
    hparams = HyperParameters({"decay": torch.tensor(0.1).double(), "weight": torch.ones(8).double()})
    loss = CompositeLoss(lambda m, h, b: m(b[0]), criterion, penalty)

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1]) + 0 * (h["decay"] + h["weight"].sum())

    return Problem(model, hparams, loss, val), batch


WAYS = {
    "left open": Implicit(),
    "plain": Implicit(curvature=GaussNewton()),
    "compiled": Implicit(curvature=GaussNewton(compile=True)),
    "averaged": Implicit(curvature=Averaged(batches=2, curvature=GaussNewton())),
    "sampled": Implicit(curvature=Sampled(curvature=GaussNewton())),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("penalty", [quartic, None], ids=["penalty", "no penalty"])
def test_a_criterion_that_is_linear_in_z_is_an_error_with_the_remedy(name: str, way: str, penalty: Any) -> None:
    problem, batch = classifier(LINEAR[name], log="nll" in name, penalty=penalty)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"linear in what predict returns.*logits.*cross_entropy.*hoptim\.Exact\(\)"):
        hypergradient(problem, batch, batch, WAYS[way], train_batches=[batch])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_remedies_agree() -> None:
    """Logits with cross_entropy, and Exact() of either loss, at a minimum."""
    answers = []
    for log, criterion, curvature in (
        (False, lambda z, h, b: F.cross_entropy(z, b[1]), GaussNewton()),
        (False, lambda z, h, b: F.cross_entropy(z, b[1]), Exact()),
        (True, lambda z, h, b: F.nll_loss(z, b[1]), Exact()),
    ):
        problem, batch = classifier(criterion, log=log, penalty=lambda m, h: h["decay"] * sum_of_squares(m))
        optimizer = torch.optim.LBFGS(problem.model.parameters(), max_iter=200, tolerance_grad=1e-12)

        def closure(problem: Problem = problem, batch: Any = batch) -> Tensor:
            problem.model.zero_grad()
            loss = problem.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        answers.append(hypergradient(problem, batch, batch, Implicit(CG(terms=200), curvature=curvature)).grads["decay"])
    torch.testing.assert_close(answers[1], answers[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(answers[0], answers[1], rtol=0.5, atol=0)


def sum_of_squares(m: Any) -> Tensor:
    return sum((p.square().sum() for p in m.parameters()), torch.zeros(()))


NOT_LINEAR = {
    "a softmax that is sure of itself, and wrong": lambda z, h, b: F.cross_entropy(1e6 * z, b[1]),
    "Huber, far from its targets": lambda z, h, b: F.huber_loss(z, torch.full_like(z, 54321.0)),
    "squared hinge": lambda z, h, b: (1 - margins(z, b)).clamp(min=0).square().mean(),
    "weights of zero": lambda z, h, b: (0 * h["weight"] * F.cross_entropy(z, b[1], reduction="none")).mean(),
    "a criterion of hyperparameters alone": lambda z, h, b: h["weight"].sum(),
    "one that refuses other z": lambda z, h, b: z.mean() if (z < 0).all() else 1 / 0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_criterion_that_is_only_flat_here_is_none(name: str) -> None:
    problem, batch = classifier(NOT_LINEAR[name], log="refuses" in name)
    assert torch.isfinite(hypergradient(problem, batch, batch, Implicit(curvature=GaussNewton())).grads["decay"])


def test_the_criterion_is_looked_at_once() -> None:
    calls = []

    def counting(z: Tensor, h: Any, b: Any) -> Tensor:
        calls.append(z)
        return (h["weight"] * F.cross_entropy(z, b[1], reduction="none")).mean()

    problem, batch = classifier(counting, log=False)
    counts = []
    for _ in range(3):
        calls.clear()
        hypergradient(problem, batch, batch)
        counts.append(len(calls))
    assert counts[0] == counts[1] + 3
    assert counts[1] == counts[2]
