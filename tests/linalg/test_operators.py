"""Operators made from operators, against dense matrices, and products with the curvature of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPERATORS, SIZE, Counted, Trained, classes, flat, like, noisy_problem
from systems import Dense
from torch import Tensor, nn

from hoptim import Exact, HyperParameters, Problem
from hoptim.curvature.linearization import Linearization, SymmetricByName
from hoptim.linalg.operators import Embedded, Mean, Operator, Scaled, Symmetric
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors

V = torch.linspace(-1, 2, SIZE, dtype=torch.float64)
M = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
S = torch.linspace(0.5, 2.0, SIZE, dtype=torch.float64)
I = torch.eye(SIZE, dtype=torch.float64)  # noqa: E741


def check(operator: Operator, dense: Tensor) -> None:
    """Products, one and several, and those of the transpose."""
    rows = torch.stack([V, V.flip(0)])
    for A, expected in ((operator, dense), (operator.T, dense.T), (operator.T.T, dense)):
        torch.testing.assert_close(A @ V, expected @ V)
        torch.testing.assert_close(A @ rows, rows @ expected.T)
        for v, product in ((V, expected @ V), (rows, rows @ expected.T)):
            y = v + 1
            assert A.product_onto_(y, -0.3, v) is y
            torch.testing.assert_close(y, product - 0.3 * (v + 1))
    assert (operator.size, operator.dtype) == (SIZE, torch.float64)


def test_operators_made_from_a_matrix_are_those_of_dense_algebra() -> None:
    A, B = Dense(M, symmetric=False), Dense(S.diag())
    check(A, M)
    check(A + 2.5, M + 2.5 * I)
    check(A + S, M + S.diag())
    check(Scaled(A, S), S.diag() @ M @ S.diag())
    check(Scaled(A, S) + 0.7, S.diag() @ M @ S.diag() + 0.7 * I)
    check(Mean([A, B, A + 1.0]), (2 * M + S.diag() + I) / 3)
    assert (A + 0.0) is A


@pytest.mark.parametrize("name", OPERATORS)
def test_a_symmetric_operator_is_its_own_transpose(name: str) -> None:
    A = Counted(OPERATORS[name]().double())
    check(A, A.matrix)
    assert A.T is A


def test_what_is_made_is_symmetric_and_fixed_where_all_its_parts_are() -> None:
    symmetric, other, changing = Dense(M), Dense(M, symmetric=False), Dense(M, fixed=False)
    for A, is_symmetric, is_fixed in ((symmetric, True, True), (other, False, True), (changing, True, False)):
        for made in (A + 1.0, Scaled(A, S), Mean([symmetric, A]), (A + 1.0).T, Scaled(A, S).T, Mean([A, symmetric]).T):
            assert (made.is_symmetric, made.is_fixed) == (is_symmetric, is_fixed)


class Weighted(Dense):
    """An operator with an inner product of its own, as one whose vectors are spread over processes has."""

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        return 4 * super().dot(u, v)

    def norm(self, v: Tensor) -> Tensor:
        return 2 * super().norm(v)

    def gram(self, u: Tensor, v: Tensor) -> Tensor:
        return 4 * super().gram(u, v)


def test_what_is_made_has_the_inner_product_of_its_base() -> None:
    layout = Layout.of(like(torch.float64))
    for made in (Weighted(M) + 1.0, Scaled(Weighted(M), S), Mean([Weighted(M)]), Embedded(Weighted(M), layout, layout)):
        assert made.dot(V, V) == 4 * (V @ V)
        assert made.norm(V) == 2 * V.norm()
        torch.testing.assert_close(made.gram(V[None], V[None]), 4 * (V @ V)[None, None])


def test_shift_leaves_the_vector_alone_though_the_product_is_the_vector_itself() -> None:
    v = V.clone()
    product = (Symmetric(lambda v: v, like=v) + 2.0) @ v
    assert torch.equal(v, V)
    torch.testing.assert_close(product, 3 * V)


def test_shift_of_a_product_that_is_an_expanded_view() -> None:
    A = Symmetric(lambda v: v.sum().expand(3), like=torch.ones(3))
    assert ((A + 2.0) @ torch.ones(3)).tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pieces_of_a_product_are_added_in_their_places(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = Layout.of({"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(3), "c": torch.zeros(1, 1)})

    def product(v: Tensors, _: bool) -> OptionalTensors:
        return {"a": 2 * v["a"], "b": None, "c": 4 * v["c"]}

    def onto(y: Tensors, a: Tensor | float, v: Tensors) -> OptionalTensors:
        return {"a": y["a"].mul_(a).add_(2 * v["a"]), "c": 4 * v["c"]}

    v, y = torch.arange(1.0, 7).expand(*lead, 6), torch.full((*lead, 6), 10.0)
    expected = (torch.tensor([2.0, 2, 0, 0, 0, 4]) * v - 5).to(layout.dtype)
    for A in (SymmetricByName(product, layout), SymmetricByName(product, layout, onto)):
        found = A.product_onto_(y.clone().to(layout.dtype), -0.5, v.to(layout.dtype))
        torch.testing.assert_close(found, expected, rtol=2e-3 if dtype == torch.float16 else 1e-12, atol=0)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_an_embedded_operator_is_zero_where_it_does_not_reach(lead: tuple[int, ...]) -> None:
    outer = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(())})
    inner = Layout.of({"c": torch.zeros(()), "a": torch.zeros(2)})
    N = torch.randn(3, 3)
    embedded = Embedded(Dense(N, symmetric=False), inner, outer)
    order = [5, 0, 1]  # of c and a in the outer vector
    dense = torch.zeros(6, 6)
    dense[torch.tensor(order)[:, None], torch.tensor(order)] = N
    v = torch.randn(*lead, 6)
    for A, expected in ((embedded, dense), (embedded.T, dense.T)):
        torch.testing.assert_close(A @ v, v @ expected.T)


# Of real models


def linearized(problem: Problem, batch: Any, then: Callable[[Linearization], Any]) -> Any:
    with problem.at() as at, Exact().linearize(at, batch) as one:
        return then(one)


def test_products_with_the_hessian_and_the_mixed_derivative_of_a_real_model() -> None:
    trained = Trained()
    theta = flat({name: leaf.detach() for name, leaf in trained.hparams.named_parameters()})
    w = trained.minimum + 0.1  # not at the minimum: these are derivatives at any weights
    trained.write(w)
    H = torch.func.hessian(trained.objective)(w, theta)
    B = torch.func.jacrev(torch.func.grad(trained.objective), argnums=1)(w, theta)
    v = torch.randn(len(w))

    def then(one: Linearization) -> None:
        torch.testing.assert_close(one.A @ v, H @ v, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(flat(one.mixed(v)), B.T @ v, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.value, torch.func.grad(trained.objective)(w, theta), rtol=1e-10, atol=1e-12)
        assert one.loss.item() == pytest.approx(trained.objective(w, theta).item())

    linearized(trained.problem(), None, then)


def test_batched_product_is_a_loop_of_products_on_a_real_model() -> None:
    def then(one: Linearization) -> None:
        rows = torch.randn(5, one.A.size)
        alone = torch.stack([one.A @ row for row in rows])
        torch.testing.assert_close(one.A @ rows, alone, rtol=1e-10, atol=1e-13)

    linearized(noisy_problem(), classes(8, 0), then)


def test_one_dropout_mask_serves_all_products() -> None:
    def then(one: Linearization) -> None:
        v = torch.randn(one.A.size)
        assert torch.equal(one.A @ v, one.A @ v)

    linearized(noisy_problem(), classes(8, 0), then)


def test_weights_without_curvature_get_zeros() -> None:
    def train(m: nn.Linear, h: Any, b: Any) -> Tensor:
        return m.weight.square().sum() + h["a"] * m.bias.sum()

    def then(one: Linearization) -> None:
        for lead in ((), (3,)):
            assert torch.equal(one.A @ torch.ones(*lead, 3), torch.tensor([2.0, 2.0, 0.0]).expand(*lead, 3))

    linearized(Problem(nn.Linear(2, 1), HyperParameters({"a": torch.tensor(1.0)}), train, train), None, then)
