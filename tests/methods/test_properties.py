"""What holds of every hypergradient, on random small networks: linearity, invariances, the dense answer, no trace."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import flat, same, snapshot, unflat
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call, hessian, jacrev

import hoptim
from hoptim import (
    CG,
    GMRES,
    MINRES,
    Chebyshev,
    Exact,
    FiniteDifference,
    GaussNewton,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
)
from hoptim.methods.result import Hypergradient

Tensors = dict[str, Tensor]
ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus, "gelu": nn.GELU}


def examples(count: int) -> Any:
    """The same few at each run; a failing one is small as it is, and not made smaller."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
    phases = [Phase.generate]
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=quiet
    )


# A random network, as a problem of hoptim's and as functions of flat vectors --------------------------------------------


@dataclass(frozen=True)
class Net:
    """An MLP with a decay for each weight and a weight for each example.

    ``permuted`` numbers the hidden units anew, ``names`` renames the modules: the function that is learned stays the same.
    """

    widths: tuple[int, ...]
    activation: str
    seed: int
    permuted: bool = False
    names: str = ""

    def tensors(self, what: str, *shape: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed + sum(map(ord, what)))
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def orders(self) -> list[Tensor]:
        """For each layer of units the order in which they come."""
        ends = {0, len(self.widths) - 1}
        return [
            torch.arange(n) if i in ends or not self.permuted else torch.arange(n).flip(0) for i, n in enumerate(self.widths)
        ]

    def reordered(self, tree: Tensors) -> Tensors:
        """Values by weight, in the order of the units."""
        orders, found = self.orders(), {}
        for layer in range(len(self.widths) - 1):
            into, out = orders[layer], orders[layer + 1]
            found[f"{layer}.weight"] = tree[f"{layer}.weight"][out][:, into]
            found[f"{layer}.bias"] = tree[f"{layer}.bias"][out]
        return found

    def initial(self, what: str, scale: float) -> Tensors:
        """Random values by weight."""
        found = {}
        for layer, (n, m) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            found[f"{layer}.weight"] = scale * self.tensors(f"{what} {layer} weight", m, n) / math.sqrt(n)
            found[f"{layer}.bias"] = scale * self.tensors(f"{what} {layer} bias", m)
        return self.reordered(found)

    def model(self) -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for layer, (n, m) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            linear = nn.Linear(n, m)
            for name in ("weight", "bias"):
                getattr(linear, name).data.copy_(self.initial("start", 1.0)[f"{layer}.{name}"])
            layers[f"{self.names}{layer}"] = linear
            if layer < len(self.widths) - 2:
                layers[f"{self.names}after {layer}"] = ACTIVATIONS[self.activation]()
        return nn.Sequential(layers)

    def data(self, what: str, n: int = 4) -> tuple[Tensor, Tensor]:
        return self.tensors(what + " x", n, self.widths[0]), self.tensors(what + " y", n, self.widths[-1])

    def problem(self, val: Any = None, scale: float = 1.0) -> hoptim.Problem:
        decays = {name: 0.3 + value.abs() for name, value in self.initial("decay", 0.5).items()}
        values = decays | {"example": 0.5 + self.tensors("example", 4).abs()}
        hparams = hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive))

        def criterion(z: Tensor, h: Any, b: Any) -> Tensor:
            return scale * (h["example"] * (z - b[1]).square().sum(1)).mean()

        def penalty(m: Any, h: Any) -> Tensor:
            return scale * sum((h[name] * p.square()).sum() for name, p in zip(decays, m.parameters(), strict=True))

        loss = hoptim.CompositeLoss(lambda m, h, b: m(b[0]), criterion, penalty)
        return hoptim.Problem(self.model(), hparams, loss, val or losses[0])

    def gradient(self, method: Any, val: Any = None, scale: float = 1.0, **options: Any) -> Hypergradient:
        problem = self.problem(val, scale)
        return hoptim.hypergradient(problem, self.data("train"), self.data("val"), method, **options)


def squares(m: Any, h: Any, b: Any) -> Tensor:
    return (m(b[0]) - b[1]).square().mean() + 0.1 * h["example"].square().sum()


def cosines(m: Any, h: Any, b: Any) -> Tensor:
    return (m(b[0]) * b[1]).cos().sum() + h["example"].log().sum()


def lengths(m: Any, h: Any, b: Any) -> Tensor:
    return sum(p.square().sum() for p in m.parameters()) + 0 * h["example"].sum()


losses = (squares, cosines, lengths)
nets = st.builds(
    Net,
    widths=st.sampled_from([(2, 1), (2, 3, 1), (1, 4, 2), (2, 2, 3, 1)]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 10**6),
)


@dataclass(frozen=True)
class Dense:
    """The same problem by dense linear algebra: A, B = ∂F/∂λ, g and ∂L_V/∂λ."""

    A: Tensor
    B: Tensor
    g: Tensor
    direct: Tensor

    @classmethod
    def of(cls, net: Net, gauss_newton: bool = False) -> Dense:
        problem = net.problem()
        model, hparams = problem.model, problem.hparams
        shapes = {name: p.detach() for name, p in model.named_parameters()}
        sizes = {name: p.detach() for name, p in hparams.named_parameters()}
        (x, y), (x_val, y_val) = net.data("train"), net.data("val")

        def outputs(w: Tensor, x: Tensor) -> Tensor:
            return functional_call(model, unflat(w, shapes), (x,))

        def train(w: Tensor, t: Tensor) -> Tensor:
            values = {name: value.exp() for name, value in unflat(t, sizes).items()}
            decay = torch.cat([values[name].flatten() for name in values if name != "example"])
            return (values["example"] * (outputs(w, x) - y).square().sum(1)).mean() + (decay * w.square()).sum()

        def val(w: Tensor, t: Tensor) -> Tensor:
            return (outputs(w, x_val) - y_val).square().mean() + 0.1 * unflat(t, sizes)["example"].exp().square().sum()

        w, t = flat(shapes), flat(sizes)
        if gauss_newton:
            J = jacrev(outputs)(w, x)
            weight = sizes["example"].exp()
            decay = torch.cat([value.exp().flatten() for name, value in sizes.items() if name != "example"])
            A = 2 * torch.einsum("nki,n,nkj->ij", J, weight, J) / len(x) + 2 * decay.diag()
        else:
            A = hessian(train)(w, t)
        B = jacrev(torch.func.grad(train), argnums=1)(w, t)
        return cls(A=A, B=B, g=torch.func.grad(val)(w, t), direct=torch.func.grad(val, argnums=1)(w, t))

    def shift(self, above: float = 0.1) -> float:
        """The damping that makes A definite."""
        return max(0.0, above - float(torch.linalg.eigvalsh(self.A)[0]))

    def top(self) -> float:
        return float(torch.linalg.eigvalsh(self.A).abs()[[0, -1]].max())

    def solved(self, damping: float) -> Tensor:
        return torch.linalg.solve(self.A + damping * torch.eye(len(self.A)), self.g)

    def polynomial(self, terms: int, step: float, damping: float) -> Tensor:
        """step · Σ_{j ≤ terms} (I − step·(A + damping))ʲ g."""
        matrix = torch.eye(len(self.A)) - step * (self.A + damping * torch.eye(len(self.A)))
        return step * sum(torch.linalg.matrix_power(matrix, j) @ self.g for j in range(terms + 1))

    def answer(self, x: Tensor) -> Tensor:
        return self.direct - self.B.T @ x


def assert_near(found: Tensor, expected: Tensor, rtol: float = 1e-7) -> None:
    """Equal up to ``rtol`` of the length of the whole vector."""
    assert expected.isfinite().all()
    assert (found - expected).norm() <= rtol * (1 + expected.norm()), f"{found}\n{expected}"


CURVATURES = {"exact": Exact(), "gauss_newton": GaussNewton(), "differences": FiniteDifference()}
curvatures = pytest.mark.parametrize("curvature", CURVATURES)
PRECISION = {"exact": 1e-7, "gauss_newton": 1e-7, "differences": 1e-5}  # of differences as they are


def implicit(solver: Any, curvature: str = "exact", damping: float = 0.0) -> Implicit:
    return Implicit(solver, curvature=CURVATURES[curvature], damping=damping)


def sgd(problem: hoptim.Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.model.parameters(), lr=0.02, momentum=0.6)


# Linear in the validation loss ---------------------------------------------------------------------------------------------

LINEAR: dict[str, Callable[[Dense, float], Any]] = {
    "identity": lambda dense, damping: Identity(),
    "neumann": lambda dense, damping: Neumann(terms=5, step_size=0.5 / (dense.top() + damping)),
    "chebyshev": lambda dense, damping: Chebyshev(terms=6, tolerance=0, interval=(0.05, dense.top() + damping)),
    "nystrom": lambda dense, damping: Nystrom(rank=3, rho=0.1),
    "CG, solved": lambda dense, damping: CG(terms=200, tolerance=1e-11),
}
factors = st.floats(-2, 2).filter(lambda a: abs(a) > 1e-2)


@curvatures
@pytest.mark.parametrize("solver", LINEAR)
@given(net=nets, a=factors, b=factors)
@examples(3)
def test_it_is_linear_in_the_validation_loss(solver: str, curvature: str, net: Net, a: float, b: float) -> None:
    dense = Dense.of(net, gauss_newton=curvature == "gauss_newton")
    damping = dense.shift()
    method = implicit(LINEAR[solver](dense, damping), curvature, damping)
    found = [flat(net.gradient(method, val).grads) for val in (squares, cosines)]
    both = net.gradient(method, lambda m, h, b_: a * squares(m, h, b_) + b * cosines(m, h, b_))
    assert_near(flat(both.grads), a * found[0] + b * found[1], PRECISION[curvature])


@given(net=nets, a=factors, b=factors)
@examples(5)
def test_unrolled_steps_are_linear_in_the_validation_loss(net: Net, a: float, b: float) -> None:
    def unrolled(val: Any) -> Tensor:
        problem = net.problem(val)
        batches = net.data("train"), net.data("val")
        return flat(hoptim.hypergradient(problem, *batches, hoptim.Unrolled(3), inner=sgd(problem)).grads)

    both = unrolled(lambda m, h, b_: a * squares(m, h, b_) + b * cosines(m, h, b_))
    assert_near(both, a * unrolled(squares) + b * unrolled(cosines))


# Blind to how units are numbered and modules are named ---------------------------------------------------------------------

ANY: dict[str, Any] = {
    "identity": Identity(),
    "neumann": Neumann(terms=3, step_size=0.02),
    "chebyshev": Chebyshev(terms=3, tolerance=0, interval=(0.5, 30.0)),
    "CG": CG(terms=3, tolerance=0),
    "MINRES": MINRES(terms=3, tolerance=0),
    "GMRES": GMRES(terms=3, tolerance=0),
    "nystrom of full rank": Nystrom(rank=100, rho=0.3),
}


def compared(net: Net, other: Net, method: Any, rtol: float = 1e-7) -> None:
    """The hypergradients of two networks that are one, decays by weight and the weights of the examples."""

    def of(one: Net) -> Hypergradient:
        problem = one.problem()
        return hoptim.hypergradient(problem, one.data("train"), one.data("val"), method, inner=sgd(problem))

    found, moved = of(net), of(other)
    assert found.solution.status is moved.solution.status
    if not found.solution.status.ok:
        return
    assert_near(flat(other.reordered(found.grads)), flat({name: moved.grads[name] for name in net.initial("", 0.0)}), rtol)
    assert_near(found.grads["example"], moved.grads["example"], rtol)


@curvatures
@pytest.mark.parametrize("solver", ANY)
@given(net=nets)
@examples(2)
def test_hidden_units_may_be_numbered_anew(solver: str, curvature: str, net: Net) -> None:
    compared(net, replace(net, permuted=True), implicit(ANY[solver], curvature, 0.5), PRECISION[curvature])


@curvatures
@pytest.mark.parametrize("solver", ANY)
@given(net=nets, names=st.sampled_from(["layer", "z-", "half", "0"]))
@examples(2)
def test_modules_may_be_renamed(solver: str, curvature: str, net: Net, names: str) -> None:
    compared(net, replace(net, names=names), implicit(ANY[solver], curvature, 0.5), PRECISION[curvature])


@given(net=nets)
@examples(5)
def test_unrolled_steps_know_neither_numbers_nor_names(net: Net) -> None:
    compared(net, replace(net, permuted=True, names="layer"), hoptim.Unrolled(3))


# Several right-hand sides at once ------------------------------------------------------------------------------------------


def several(m: Any, h: Any, b: Any) -> Tensor:
    return torch.stack([loss(m, h, b) for loss in losses])


BATCHED = ANY | {"nystrom": Nystrom(rank=2, rho=0.1)}  # a step of one's own is found by a search that begins at g


@curvatures
@pytest.mark.parametrize("solver", BATCHED)
@given(net=nets)
@examples(2)
def test_losses_at_once_have_the_hypergradients_of_each_by_itself(solver: str, curvature: str, net: Net) -> None:
    method = implicit(BATCHED[solver], curvature, 0.5)
    each = [net.gradient(method, loss) for loss in losses]
    whole = net.gradient(method, several)
    if not all(one.solution.status.ok for one in each):
        assert not whole.solution.status.ok
        return
    assert_near(flat(whole.grads, (3,)), torch.stack([flat(one.grads) for one in each]), PRECISION[curvature])
    assert_near(whole.val_loss, torch.stack([one.val_loss for one in each]))


# The dense answer ----------------------------------------------------------------------------------------------------------

SOLVED = {"CG": CG, "MINRES": MINRES, "GMRES": GMRES, "chebyshev": Chebyshev}


@curvatures
@pytest.mark.parametrize("solver", SOLVED)
@given(net=nets, more=st.floats(0, 1))
@examples(4)
def test_what_is_solved_is_the_dense_answer(solver: str, curvature: str, net: Net, more: float) -> None:
    dense = Dense.of(net, gauss_newton=curvature == "gauss_newton")
    damping = dense.shift() + more
    options = {"interval": (0.08, 1.2 * (dense.top() + damping))} if solver == "chebyshev" else {}
    tolerance = 1e-7 if curvature == "differences" else 1e-11
    result = net.gradient(implicit(SOLVED[solver](terms=400, tolerance=tolerance, **options), curvature, damping))
    assert result.solution.status.ok
    assert_near(flat(result.grads), dense.answer(dense.solved(damping)), PRECISION[curvature])


@curvatures
@given(net=nets, terms=st.integers(0, 6), share=st.floats(0.05, 1.0), damping=st.floats(0, 1))
@examples(6)
def test_neumann_is_its_polynomial(curvature: str, net: Net, terms: int, share: float, damping: float) -> None:
    dense = Dense.of(net, gauss_newton=curvature == "gauss_newton")
    step = share / (dense.top() + damping)
    result = net.gradient(implicit(Neumann(terms=terms, step_size=step), curvature, damping))
    assert_near(flat(result.grads), dense.answer(dense.polynomial(terms, step, damping)), PRECISION[curvature])


@given(net=nets, rho=st.floats(0.1, 1), damping=st.floats(0, 1))
@examples(6)
def test_nystrom_of_full_rank_is_the_dense_answer(net: Net, rho: float, damping: float) -> None:
    dense = Dense.of(net, gauss_newton=True)
    result = net.gradient(implicit(Nystrom(rank=100, rho=rho), "gauss_newton", damping))
    assert_near(flat(result.grads), dense.answer(dense.solved(damping + rho)))


@given(net=nets)
@examples(6)
def test_identity_takes_g_for_x(net: Net) -> None:
    dense = Dense.of(net)
    assert_near(flat(net.gradient(implicit(Identity())).grads), dense.answer(dense.g))


@given(net=nets, steps=st.integers(1, 5))
@examples(6)
def test_unrolled_steps_are_a_plain_loop_differentiated(net: Net, steps: int) -> None:
    problem = net.problem()
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves().items()}
    weights = {name: p.detach().clone().requires_grad_() for name, p in problem.weights().items()}
    values = {name: leaf.exp() for name, leaf in leaves.items()}
    buffers = {name: torch.zeros_like(w) for name, w in weights.items()}
    model = net.model()

    def at(weights: Tensors, x: Tensor) -> Tensor:
        return functional_call(model, weights, (x,))

    (x, y), (x_val, y_val) = net.data("train"), net.data("val")
    for _ in range(steps):
        penalty = sum((values[name] * w.square()).sum() for name, w in weights.items())
        loss = (values["example"] * (at(weights, x) - y).square().sum(1)).mean() + penalty
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        buffers = {name: 0.6 * buffers[name] + g for name, g in zip(weights, gradients, strict=True)}
        weights = {name: w - 0.02 * buffers[name] for name, w in weights.items()}
    val = (at(weights, x_val) - y_val).square().mean() + 0.1 * values["example"].square().sum()
    expected = dict(zip(leaves, torch.autograd.grad(val, list(leaves.values())), strict=True))
    for checkpoint in (False, True):
        method = hoptim.Unrolled(steps, checkpoint=checkpoint)
        found = hoptim.hypergradient(problem, (x, y), (x_val, y_val), method, inner=sgd(problem))
        assert_near(flat(found.grads), flat(expected))


# The scale of the training loss, and no trace ------------------------------------------------------------------------

SCALES = {
    "CG": CG(terms=200, tolerance=1e-11),
    "MINRES": MINRES(terms=200, tolerance=1e-11),
    "GMRES": GMRES(terms=200, tolerance=1e-11),
    "MINRES, 4 terms": MINRES(terms=4, tolerance=0),
    "neumann with its own step": Neumann(terms=5),
    "chebyshev with its own interval": Chebyshev(terms=5, tolerance=0),
}


@pytest.mark.parametrize("curvature", ["exact", "gauss_newton"])
@pytest.mark.parametrize("solver", SCALES)
@given(net=nets, scale=st.floats(0.05, 20))
@examples(3)
def test_the_training_losss_scale_cancels(solver: str, curvature: str, net: Net, scale: float) -> None:
    method = implicit(SCALES[solver], curvature)
    one, other = net.gradient(method), net.gradient(method, scale=scale)
    assert one.solution.status is other.solution.status
    if one.solution.status.ok:
        assert_near(flat(other.grads), flat(one.grads), 1e-6)


TRACELESS = {
    "minres": Implicit(),
    "neumann": implicit(Neumann(terms=3), "differences"),
    "nystrom": implicit(Nystrom(rank=2), "gauss_newton"),
    "jacobi": Implicit(CG(terms=2), preconditioner=hoptim.Jacobi(probes=2)),
    "update": Implicit(GMRES(terms=2), condition=hoptim.Update()),
    "unrolled": hoptim.Unrolled(2),
}


@pytest.mark.parametrize("name", TRACELESS)
@given(net=nets, many=st.booleans())
@examples(2)
def test_it_leaves_no_trace(name: str, net: Net, many: bool) -> None:
    problem = net.problem(several if many else None)
    inner, batch = sgd(problem), net.data("train")
    problem.loss(batch).backward()
    inner.step()
    before, state = snapshot(problem), inner.state_dict()
    kept = {key: value["momentum_buffer"].clone() for key, value in state["state"].items()}
    hoptim.hypergradient(problem, batch, net.data("val"), TRACELESS[name], inner=inner)
    assert same(snapshot(problem), before)
    assert same({key: value["momentum_buffer"] for key, value in inner.state_dict()["state"].items()}, kept)
