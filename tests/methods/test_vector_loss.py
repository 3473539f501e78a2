"""Several validation losses at once: each gets the hypergradient that it would get alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from cases import flat, same, snapshot
from tiny import BATCHES, VAL, leaf_vector, leaves_of, tiny
from torch import Tensor, optim
from torch.nn import functional as F

from hoptim import (
    CG,
    MINRES,
    Averaged,
    BilevelOptimizer,
    Exact,
    FiniteDifference,
    GaussNewton,
    Identity,
    Implicit,
    Jacobi,
    Neumann,
    Problem,
    Status,
    Unrolled,
    Update,
    hypergradient,
)
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.warm_start import WarmStart
from hoptim.tracking import Console


def three(m: Any, h: Any, b: Any) -> Tensor:
    """One with a direct term, one of another model output, one of a single weight alone."""
    z = m.eval()(b[0])
    first = F.cross_entropy(z, b[1]) + 0.3 * h["decay"].sin().sum()
    return torch.stack([first, 2 * z.square().mean() - h["scale"] ** 3, m[3].bias.sum() ** 2])


def one(r: int) -> Any:
    return lambda m, h, b: three(m, h, b)[r]


def mean(m: Any, h: Any, b: Any) -> Tensor:
    return three(m, h, b).mean()


SERIES = Neumann(terms=6, step_size=0.3)
METHODS: dict[str, Any] = {
    "identity": Implicit(Identity()),
    "neumann": Implicit(SERIES, curvature=Exact()),
    "neumann, damped": Implicit(SERIES, curvature=Exact(), damping=0.2),
    "neumann, gauss-newton": Implicit(SERIES, curvature=GaussNewton()),
    "neumann, differences": Implicit(SERIES, curvature=FiniteDifference()),
    "neumann, average": Implicit(SERIES, curvature=Averaged(batches=2, curvature=GaussNewton())),
    "neumann, update": Implicit(Neumann(terms=6, step_size=1.0), condition=Update(), curvature=Exact()),
    "neumann, scaled": Implicit(Neumann(terms=6, step_size=0.1), curvature=GaussNewton(), preconditioner=Jacobi()),
    "warm start": Implicit(WarmStart(SERIES), curvature=Exact()),
    "cg": Implicit(CG(terms=60, tolerance=1e-12), curvature=GaussNewton()),
    "minres": Implicit(MINRES(terms=60, tolerance=1e-12), curvature=GaussNewton()),
    "minres, exact": Implicit(MINRES(terms=60, tolerance=1e-12), curvature=Exact(), damping=0.1),
    "default": Implicit(),
    "default, update": Implicit(condition=Update()),
    "gmres, update": Implicit(GMRES(terms=17, tolerance=1e-13), condition=Update(), curvature=GaussNewton(), damping=0.2),
    "unrolled": Unrolled(4),
    "unrolled, checkpoint": Unrolled(4, checkpoint=True),
}
LOOSE = {"neumann, differences": (1e-6, 1e-8), "cg": (1e-8, 1e-10), "minres": (1e-8, 1e-10), "minres, exact": (1e-7, 1e-9)}
LOOSE["gmres, update"] = (1e-8, 1e-10)


def inner_of(problem: Problem) -> optim.Optimizer:
    """AdamW with its state full."""
    inner = optim.AdamW(problem.model.parameters(), lr=0.05, weight_decay=0.2)
    start = {name: p.detach().clone() for name, p in problem.weights().items()}
    for b in BATCHES[3:5]:
        inner.zero_grad()
        problem.loss(b).backward()
        inner.step()
    for name, p in problem.weights().items():
        p.data.copy_(start[name])
        p.grad = None
    return inner


def found(method: Any, val: Any) -> Any:
    problem = tiny(val=val)
    inner = inner_of(problem)
    before = snapshot(problem)
    result = hypergradient(problem, BATCHES[0], VAL, method, inner=inner, train_batches=BATCHES[1:3])
    assert same(snapshot(problem), before)
    return result


@pytest.mark.parametrize("name", METHODS)
def test_each_loss_has_the_hypergradient_that_it_has_alone(name: str) -> None:
    method = METHODS[name]
    rtol, atol = LOOSE.get(name, (1e-11, 1e-13))
    together = found(method, three)
    assert together.solution.status.ok
    assert together.val_loss.shape == (3,)
    for r in range(3):
        alone = found(method, one(r))
        for kind in ("grads", "direct", "indirect"):
            row = {leaf: value[r] for leaf, value in getattr(together, kind).items()}
            torch.testing.assert_close(leaf_vector(row), leaf_vector(getattr(alone, kind)), rtol=rtol, atol=atol)
        value = {weight: part[r] for weight, part in together.solution.value.items()}
        torch.testing.assert_close(flat(value), flat(alone.solution.value), rtol=10 * rtol, atol=10 * atol)
        assert together.val_loss[r].item() == pytest.approx(alone.val_loss.item(), rel=1e-13)
        residuals = together.solution.residuals
        if len(residuals) and len(alone.solution.residuals) == len(residuals):
            torch.testing.assert_close(residuals[:6, r], alone.solution.residuals[:6], rtol=1e-5, atol=1e-9)
    assert together.train_loss.item() == pytest.approx(alone.train_loss.item(), rel=1e-13)
    assert together.gradient_norm.item() == pytest.approx(alone.gradient_norm.item(), rel=1e-13)
    assert leaf_vector(together.grads, (3,)).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("default")])  # CG is not linear in g
def test_the_default_is_the_hypergradient_of_the_mean(name: str) -> None:
    rtol, atol = LOOSE.get(name, (1e-11, 1e-13))
    combined = found(METHODS[name], three).combined()
    torch.testing.assert_close(
        leaf_vector(combined), leaf_vector(found(METHODS[name], mean).grads), rtol=10 * rtol, atol=10 * atol
    )


def test_combined_is_the_weighted_sum_and_nothing_for_one_loss() -> None:
    result = found(METHODS["neumann"], three)
    expected = 2 * result.grads["decay"][0] - 0.5 * result.grads["decay"][1] + 3 * result.grads["decay"][2]
    torch.testing.assert_close(result.combined([2, -0.5, 3])["decay"], expected)
    torch.testing.assert_close(result.combined()["scale"], result.grads["scale"].mean())
    single = found(METHODS["neumann"], one(0))
    assert single.combined() is single.grads
    vector_of_one = found(METHODS["neumann"], lambda m, h, b: three(m, h, b)[:1])
    assert vector_of_one.grads["decay"].shape == (1, 2)
    torch.testing.assert_close(vector_of_one.combined()["decay"], single.grads["decay"])
    torch.testing.assert_close(vector_of_one.combined([2.0])["decay"], 2 * single.grads["decay"])


# In the optimizer


def optimizer_of(val: Any, method: Any = None, **options: Any) -> BilevelOptimizer:
    problem = tiny(val=val)
    return BilevelOptimizer(
        optim.SGD(problem.model.parameters(), lr=0.1),
        optim.SGD(problem.hparams.parameters(), lr=0.05),
        problem,
        val_batches=[VAL],
        **{"hypergradient": method or METHODS["neumann"], "every": 2, **options},
    )


def run(optimizer: BilevelOptimizer, steps: int = 2) -> Any:
    for b in BATCHES[:steps]:
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        optimizer.step()
    return optimizer.record


@pytest.mark.parametrize("weights", [None, [0.2, 3.0, -1.0], (0, 0, 1)])
@pytest.mark.parametrize("name", ["neumann", "unrolled"])
def test_optimizer_moves_along_the_weighted_sum(name: str, weights: Any) -> None:
    method = Unrolled(2) if name == "unrolled" else METHODS[name]
    optimizer = optimizer_of(three, method, val_weights=weights)
    before = leaves_of(optimizer.problem)
    record = run(optimizer)
    assert leaf_vector(record.result.grads, (3,)).shape == (3, 3)
    share = torch.tensor([1 / 3] * 3 if weights is None else list(weights)).double()
    moved = before - 0.05 * share @ leaf_vector(record.result.grads, (3,))
    torch.testing.assert_close(leaves_of(optimizer.problem), moved, rtol=1e-12, atol=1e-14)

    def weighted(m: Any, h: Any, b: Any) -> Tensor:
        return (share * three(m, h, b)).sum()

    alone = optimizer_of(weighted, method)
    run(alone)
    torch.testing.assert_close(leaves_of(optimizer.problem), leaves_of(alone.problem), rtol=1e-12, atol=1e-14)


def test_record_of_several_losses_is_a_row_of_plain_numbers() -> None:
    record = run(optimizer_of(three))
    row = record.row()
    assert json.loads(json.dumps(row)) == row
    assert row["val_loss"] == pytest.approx(record.result.val_loss.mean().item())
    assert row["residual"] == pytest.approx(record.result.solution.residuals[-1].max().item())
    assert row["hypergradient_norm"] > 0


def test_wrong_number_of_weights_is_an_error_that_counts() -> None:
    with pytest.raises(ValueError, match="2 val_weights for 3 validation losses: give one a loss"):
        run(optimizer_of(three, val_weights=[1.0, 2.0]))


def test_weights_for_a_single_loss_are_an_error_and_not_ignored() -> None:
    with pytest.raises(ValueError, match="val_weights"):
        run(optimizer_of(one(0), val_weights=[5.0, 2.0]))


def test_solution_of_several_losses_is_carried_through_a_checkpoint() -> None:
    whole, first, second = (optimizer_of(three, METHODS["warm start"], every=1) for _ in range(3))
    run(whole, 4)
    run(first, 2)
    second.problem.model.load_state_dict(first.problem.model.state_dict())
    second.load_state_dict(first.state_dict())
    for b in BATCHES[2:4]:
        second.zero_grad()
        second.loss(b).backward()
        second.step()
    assert torch.equal(leaves_of(second.problem), leaves_of(whole.problem))
    assert second.record.result.solution.value["3.bias"].shape == (3, 2)


# Failures


def bad(m: Any, h: Any, b: Any) -> Tensor:
    losses = three(m, h, b)
    return torch.stack([losses[0], losses[1] * math.nan, losses[2]])


def infinities(m: Any, h: Any, b: Any) -> Tensor:
    losses = three(m, h, b)
    return torch.stack([losses[0] + math.inf, losses[1] - math.inf, losses[2]])


FAILURES = {
    "one loss is NaN": (bad, METHODS["neumann"], Status.NON_FINITE_LOSS),
    "infinities that cancel": (infinities, METHODS["neumann"], Status.NON_FINITE_LOSS),
    "a step that is too large": (three, Implicit(Neumann(terms=200, step_size=9.0)), Status.STEP_TOO_LARGE),
    "one gradient is infinite": (
        lambda m, h, b: (
            three(m, h, b)
            + torch.stack([m[3].bias.new_zeros(()), (m[3].bias - m[3].bias).abs().sqrt().sum(), h["scale"] * 0])
        ),
        METHODS["neumann"],
        Status.NON_FINITE_GRADIENT,
    ),
    "one direct gradient is infinite": (
        lambda m, h, b: three(m, h, b) + torch.stack([h["scale"] * 0, h["scale"] * 0, (h["scale"] - 0.4).abs().sqrt()]),
        METHODS["neumann"],
        Status.NON_FINITE_GRADIENT,
    ),
    "one loss of unrolled is NaN": (bad, Unrolled(2), Status.NON_FINITE_LOSS),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_of_one_is_a_failure_of_all_and_moves_nothing(name: str) -> None:
    val, method, status = FAILURES[name]
    optimizer = optimizer_of(val, method)
    before = leaves_of(optimizer.problem)
    with pytest.warns(UserWarning, match=f"moved nothing: {status.name}"):
        record = run(optimizer)
    assert (record.status, record.moved) == (status, False)
    for kind in (record.result.grads, record.result.indirect):
        assert leaf_vector(kind, (3,)).shape == (3, 3)
        assert leaf_vector(kind, (3,)).isnan().all()
    assert torch.equal(leaves_of(optimizer.problem), before)
    assert record.row()["hypergradient_norm"] is None


def test_a_loss_of_no_gradient_has_a_zero_row() -> None:
    def val(m: Any, h: Any, b: Any) -> Tensor:
        return torch.stack([three(m, h, b)[0], h["scale"] * 2.0])

    result = found(METHODS["neumann"], val)
    assert result.solution.status.ok
    assert torch.equal(result.indirect["decay"][1], torch.zeros(2))
    assert (result.grads["scale"][1].item(), result.grads["decay"][1].tolist()) == (2.0, [0.0, 0.0])
    assert result.untouched == ()
    torch.testing.assert_close(result.grads["decay"][0], found(METHODS["neumann"], one(0)).grads["decay"])


def test_the_figures_of_a_record_are_of_what_was_applied(capsys: Any) -> None:
    problem = tiny()
    problem.val_loss = lambda m, h, b: torch.stack([(k + 1) * m[0].weight.square().sum() + h["scale"] for k in range(3)])
    optimizer = BilevelOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.01),
        torch.optim.SGD(problem.hparams.parameters(), lr=0.0),
        problem,
        val_batches=[None],
        val_weights=[2.0, 0.0, -1.0],
        hooks=[Console()],
        hypergradient=Implicit(Identity(), curvature=Exact()),
    )
    row, result = optimizer.hyperstep(BATCHES[0]).row(), optimizer.record.result
    for kind, tree in (("hypergradient", result.grads), ("direct", result.direct), ("indirect", result.indirect)):
        applied = torch.cat([(2 * value[0] - value[2]).flatten() for value in tree.values()])
        assert row[f"{kind}_norm"] == pytest.approx(applied.norm().item())
    assert row["val_loss"] == pytest.approx((2 * result.val_loss[0] - result.val_loss[2]).item())
    assert f"val {row['val_loss']:.4f}" in capsys.readouterr().out
