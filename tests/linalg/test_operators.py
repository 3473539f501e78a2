from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import OPERATORS, SIZE, Counted, Trained, classes, flat, like, noisy_problem, unflat
from torch import Tensor, nn

from hoptim import Exact, HyperParameters, Problem
from hoptim.curvature.linearization import StationarityGraph
from hoptim.linalg import operators
from hoptim.linalg.operators import Mean, Operator, Symmetric, rows

V = torch.linspace(-1, 2, SIZE, dtype=torch.float64)


def graph_of(problem: Problem, batch: Any = None) -> StationarityGraph:
    weights = {name: p.detach().requires_grad_() for name, p in problem.weights().items()}
    leaves = {name: p.detach().requires_grad_() for name, p in problem.leaves().items()}
    return problem.pure(
        "train_loss", weights, leaves, batch, lambda loss, parts: StationarityGraph(loss, weights, leaves, parts)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_products_of_an_operator_its_transpose_and_its_shift(name: str) -> None:
    A = Counted(OPERATORS[name]())
    v = unflat(V, A.like)
    for operator, dense in ((A, A.matrix), (A.T, A.matrix), ((A + 2.5), A.matrix + 2.5 * torch.eye(SIZE))):
        torch.testing.assert_close(flat(operator @ v), dense @ V)
        torch.testing.assert_close(flat(operator.T @ v), dense @ V)
    assert (A + 0.0) is A


def test_shift_of_a_batched_product() -> None:
    A = Counted(OPERATORS["spd"]())
    rows = torch.stack([V, V.flip(0)])
    product = (A + 2.5) @ unflat(rows, A.like)
    torch.testing.assert_close(flat(product, (2,)), rows @ A.matrix + 2.5 * rows)


def test_shift_leaves_the_vector_alone_though_the_product_is_the_vector_itself() -> None:
    v = unflat(V.clone(), like())
    product = (Symmetric(lambda v: v, like()) + 2.0) @ v
    assert torch.equal(flat(v), V)
    torch.testing.assert_close(flat(product), 3 * V)


def test_shift_of_a_product_that_is_an_expanded_view() -> None:
    A = Symmetric(lambda v: {"w": v["w"].sum().expand(3)}, {"w": torch.ones(3)})
    assert ((A + 2.0) @ {"w": torch.ones(3)})["w"].tolist() == [5.0, 5.0, 5.0]


def test_batched_vectors_are_known_by_their_leading_axis() -> None:
    A = Counted(OPERATORS["spd"]())
    assert not A.is_batched(unflat(V, A.like))
    assert A.is_batched(unflat(V[None], A.like))


def test_products_with_the_hessian_and_the_mixed_derivative_of_a_real_model() -> None:
    trained = Trained()
    graph = graph_of(trained.problem())
    theta = flat({name: leaf.detach() for name, leaf in trained.hparams.named_parameters()})
    w = trained.minimum + 0.1  # not at the minimum: these are derivatives at any weights
    trained.write(w)
    graph = graph_of(trained.problem())
    H = torch.func.hessian(trained.objective)(w, theta)
    B = torch.func.jacrev(torch.func.grad(trained.objective), argnums=1)(w, theta)
    v = torch.randn(len(w))
    A = Exact()(graph)
    torch.testing.assert_close(flat(A @ unflat(v, trained.shapes)), H @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(graph.mixed(unflat(v, trained.shapes))), B.T @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(graph.value), torch.func.grad(trained.objective)(w, theta), rtol=1e-10, atol=1e-12)
    assert graph.loss.item() == pytest.approx(trained.objective(w, theta).item())


def test_batched_product_is_a_loop_of_products_on_a_real_model() -> None:
    A = graph_of(noisy_problem(), classes(8, 0)).jacobian()
    rows = {name: torch.randn(5, *value.shape) for name, value in A.like.items()}
    together = A @ rows
    for i in range(5):
        alone = A @ {name: value[i] for name, value in rows.items()}
        for name in rows:
            torch.testing.assert_close(together[name][i], alone[name], rtol=1e-10, atol=1e-13)


def test_one_dropout_mask_serves_all_products() -> None:
    A = graph_of(noisy_problem(), classes(8, 0)).jacobian()
    v = {name: torch.randn_like(value) for name, value in A.like.items()}
    first, second = A @ v, A @ v
    assert all(torch.equal(first[name], second[name]) for name in v)


def test_weights_without_curvature_get_zeros() -> None:
    def train(m: nn.Linear, h: Any, b: Any) -> Tensor:
        return m.weight.square().sum() + h["a"] * m.bias.sum()

    model = nn.Linear(2, 1)
    A = graph_of(Problem(model, HyperParameters({"a": torch.tensor(1.0)}), train, train)).jacobian()
    for lead in ((), (3,)):
        product = A @ {"weight": torch.ones(*lead, 1, 2), "bias": torch.ones(*lead, 1)}
        assert torch.equal(product["weight"], torch.full((*lead, 1, 2), 2.0))
        assert torch.equal(product["bias"], torch.zeros(*lead, 1))


# Means


class Dense(Operator):
    """A matrix that need not be symmetric, over the entries "a" and "b", or one of them."""

    def __init__(self, M: Tensor, names: str = "ab") -> None:
        super().__init__({name: torch.zeros(2) for name in names})
        self.M = M

    def __matmul__(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        product = torch.cat([v[name] for name in self.like], -1) @ self.M.T
        return dict(zip(self.like, product.split(2, -1), strict=True))

    @property
    def T(self) -> Operator:  # noqa: N802
        return Dense(self.M.T, "".join(self.like))


def test_mean_of_operators_of_unequal_names_and_its_transpose() -> None:
    M, N, O = torch.randn(4, 4), torch.randn(2, 2), torch.randn(2, 2)  # noqa: E741
    mean = Mean([Dense(N, "b"), Dense(M), Dense(O, "a")])
    dense = (M + torch.block_diag(O, N)) / 3
    v = {"a": torch.randn(3, 2), "b": torch.randn(3, 2)}
    for operator, expected in ((mean, dense), (mean.T, dense.T), (mean.T.T + 0.5, dense + 0.5 * torch.eye(4))):
        product = operator @ v
        torch.testing.assert_close(torch.cat([product["a"], product["b"]], -1), torch.cat([v["a"], v["b"]], -1) @ expected.T)
        product = operator @ {name: value[1] for name, value in v.items()}
        torch.testing.assert_close(torch.cat([product["a"], product["b"]]), expected @ torch.cat([v["a"][1], v["b"][1]]))
    assert not mean.symmetric
    assert Mean([Counted(OPERATORS["spd"]()), Counted(OPERATORS["zero"]())]).symmetric


# Several right-hand sides, in the way that is fastest


class Calls:
    """A matrix product that notes how many vectors came at once: 0 for one without a leading axis."""

    def __init__(self) -> None:
        self.M, self.sizes = torch.randn(3, 3), list[int]()

    def __call__(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        self.sizes.append(len(v["w"]) if v["w"].ndim > 1 else 0)
        return {"w": v["w"] @ self.M.T, "b": 2 * v["b"]}


@pytest.mark.parametrize(("count", "size", "sizes"), [(6, 1, [0] * 6), (6, 4, [4, 2]), (6, 6, [6]), (9, 4, [4, 4, 1])])
def test_rows_are_the_same_whichever_way_was_chosen(
    count: int, size: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_CHUNK", {("key", count): size})
    product, v = Calls(), {"w": torch.randn(count, 3), "b": torch.randn(count)}
    found = rows(product, v, "key")
    assert product.sizes == sizes
    torch.testing.assert_close(found["w"], v["w"] @ product.M.T)
    torch.testing.assert_close(found["b"], 2 * v["b"])


def test_ways_are_measured_once_for_a_key_and_a_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[Any, int] = {}
    monkeypatch.setattr(operators, "_CHUNK", chosen)
    for count in (3, 6):
        v = {"w": torch.randn(count, 3), "b": torch.randn(count)}
        for key in ("one", "other"):
            first, second = Calls(), Calls()
            assert torch.allclose(rows(first, v, key)["w"], v["w"] @ first.M.T)
            rows(second, v, key)
            assert len(first.sizes) > len(second.sizes)
            assert {0, count, *([4] if count > 4 else [])} <= set(first.sizes)
            assert len(second.sizes) == -(-count // chosen[(key, count)])
    assert set(chosen) == {("one", 3), ("other", 3), ("one", 6), ("other", 6)}


@pytest.mark.parametrize(("slow", "size"), [(lambda n: n, 6), (lambda n: 20 * (n != 0), 1), (lambda n: 20 * (n != 4), 4)])
def test_the_way_with_the_least_time_for_all_rows_is_chosen(slow: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[Any, int] = {}
    monkeypatch.setattr(operators, "_CHUNK", chosen)
    clock = [0.0]
    monkeypatch.setattr(operators.time, "perf_counter", lambda: clock[0])

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        clock[0] += 1.0 + slow(len(v["w"]) if v["w"].ndim > 1 else 0) / (100 if size == 6 else 1)
        return v

    rows(product, {"w": torch.randn(6, 3)}, "key")
    assert chosen == {("key", 6): size}
