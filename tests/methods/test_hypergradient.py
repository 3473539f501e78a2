from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import RIDGES, Trained, classes, flat, noisy_problem, noisy_run, same, snapshot
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.checkpoint import checkpoint

from hoptim import CG, HyperParameters, Identity, Implicit, Neumann, Problem, Status, hypergradient

MANY = Implicit(Neumann(terms=1000))
FEW = Implicit(Neumann(terms=3))


# Closed forms


@pytest.mark.parametrize("name", RIDGES)
def test_ridge_regression_has_its_closed_form(name: str) -> None:
    ridge = RIDGES[name]
    result = hypergradient(ridge.problem(), "train", "val", MANY)
    torch.testing.assert_close(result.grads["value"], ridge.exact(ridge.start()), rtol=1e-8, atol=1e-10)


def test_scalar_ridge_by_the_formula_written_out() -> None:
    ridge = RIDGES["scalar"]
    x, y, x_val, y_val = ridge.data()
    H = x.T @ x / 12 + 0.3 * torch.eye(4)
    w = torch.linalg.solve(H, x.T @ y / 12)
    g = x_val.T @ (x_val @ w - y_val) / 12
    result = hypergradient(ridge.problem(), "train", "val", MANY)
    assert result.grads["value"].item() == pytest.approx(-(torch.linalg.solve(H, g) @ w).item(), rel=1e-8)
    torch.testing.assert_close(flat(result.solution.value), torch.linalg.solve(H, g), rtol=1e-8, atol=1e-10)


def test_given_terms_and_step_reach_the_whole_result() -> None:
    ridge = RIDGES["scalar"]
    x, _, x_val, y_val = ridge.data()
    H = x.T @ x / 12 + 0.3 * torch.eye(4)
    w = ridge.solution(torch.tensor(0.3))
    g = x_val.T @ (x_val @ w - y_val) / 12
    truncated = 0.2 * sum(torch.linalg.matrix_power(torch.eye(4) - 0.2 * H, j) @ g for j in range(6))
    result = hypergradient(ridge.problem(), "train", "val", Implicit(Neumann(terms=5, step_size=0.2)))
    assert result.grads["value"].item() == pytest.approx(-(truncated @ w).item(), rel=1e-10)
    assert result.solution.products == 5


def test_identity_is_one_mixed_product_with_the_gradient() -> None:
    ridge = RIDGES["scalar"]
    _, _, x_val, y_val = ridge.data()
    w = ridge.solution(torch.tensor(0.3))
    g = x_val.T @ (x_val @ w - y_val) / 12
    result = hypergradient(ridge.problem(), "train", "val", Implicit(Identity()))
    assert result.grads["value"].item() == pytest.approx(-(g @ w).item(), rel=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.5, 3.0])
def test_damping_is_added_to_the_diagonal(damping: float) -> None:
    ridge = RIDGES["scalar"]
    x, _, x_val, y_val = ridge.data()
    w = ridge.solution(torch.tensor(0.3))
    H = x.T @ x / 12 + (0.3 + damping) * torch.eye(4)
    g = x_val.T @ (x_val @ w - y_val) / 12
    result = hypergradient(ridge.problem(), "train", "val", Implicit(Neumann(terms=1000), damping=damping))
    assert result.grads["value"].item() == pytest.approx(-(torch.linalg.solve(H, g) @ w).item(), rel=1e-8)


@pytest.mark.parametrize("name", RIDGES)
def test_leaf_of_a_positive_hyperparameter_gets_the_chain_rule(name: str) -> None:
    ridge = RIDGES[name]
    hparams = HyperParameters({"value": ridge.start()}, {"value": constraints.positive})
    result = hypergradient(ridge.problem(hparams), "train", "val", MANY)
    expected = ridge.exact(ridge.start()) * ridge.start()
    torch.testing.assert_close(result.grads["value"], expected, rtol=1e-8, atol=1e-10)


def test_whole_is_direct_plus_indirect() -> None:
    ridge = RIDGES["scalar"]
    problem = ridge.problem()
    plain = problem.val_loss
    problem = Problem(
        problem.model, problem.hparams, problem.train_loss, lambda m, h, b: plain(m, h, b) + 5 * h["value"] ** 2
    )
    result = hypergradient(problem, "train", "val", MANY)
    assert result.direct["value"].item() == pytest.approx(10 * 0.3)
    assert result.indirect["value"].item() == pytest.approx(ridge.exact(torch.tensor(0.3)).item(), rel=1e-8)
    assert torch.equal(result.grads["value"], result.direct["value"] + result.indirect["value"])


# Finite differences of retraining


def test_small_mlp_agrees_with_finite_differences_of_retraining() -> None:
    trained = Trained()
    result = hypergradient(trained.problem(), None, None, Implicit(Neumann(terms=4000)))
    theta = flat({name: leaf.detach() for name, leaf in trained.hparams.named_parameters()})
    assert result.solution.status.ok
    for seed in range(4):
        d = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed))
        up, down = (trained.validation(trained.retrain(theta + sign * 1e-4 * d, trained.minimum)) for sign in (1, -1))
        assert (flat(result.grads) @ d).item() == pytest.approx(((up - down) / 2e-4).item(), rel=1e-4)


# What the losses touch


def two_weights(train: Callable[..., Tensor], val: Callable[..., Tensor], **values: float) -> Problem:
    """A linear model of a weight and a bias, both 1, with scalar hyperparameters."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    return Problem(model, HyperParameters({name: torch.tensor(value) for name, value in values.items()}), train, val)


def squares(m: Any, h: Any, b: Any) -> Tensor:
    return (m.weight - h["a"]).square().sum() + m.bias.square().sum()


def test_hyperparameter_of_neither_loss_is_an_error_that_names_it() -> None:
    problem = two_weights(squares, lambda m, h, b: m.weight.square().sum(), a=1.0, forgotten=2.0)
    with pytest.raises(ValueError, match=r"\['forgotten'\] are touched by neither loss"):
        hypergradient(problem, None, None)


def test_hyperparameter_of_the_validation_loss_alone_has_no_indirect_term() -> None:
    problem = two_weights(squares, lambda m, h, b: m.weight.sum() + h["direct"] ** 3, a=1.0, direct=2.0)
    result = hypergradient(problem, None, None, MANY)
    assert result.direct["direct"].item() == pytest.approx(12.0)
    assert result.indirect["direct"].item() == 0.0
    assert result.grads["direct"].item() == pytest.approx(12.0)
    assert result.indirect["a"].item() == pytest.approx(1.0)


def test_weights_untouched_by_the_training_loss_are_named_and_left_out() -> None:
    def train(m: Any, h: Any, b: Any) -> Tensor:
        return (m.weight - h["a"]).square().sum()

    problem = two_weights(train, lambda m, h, b: 3 * m.weight.sum() + m.bias.sum(), a=1.0)
    with pytest.warns(UserWarning, match=r"does not touch the weights \['bias'\]"):
        result = hypergradient(problem, None, None, MANY)
    assert list(result.solution.value) == ["weight"]
    assert result.grads["a"].item() == pytest.approx(3.0)


@pytest.mark.filterwarnings("ignore:the training loss does not touch")
def test_training_loss_that_touches_no_weight_is_an_error() -> None:
    problem = two_weights(lambda m, h, b: h["a"] ** 2, lambda m, h, b: m.weight.sum(), a=1.0)
    with pytest.raises(ValueError, match="weight"):
        hypergradient(problem, None, None)


def test_training_loss_linear_in_the_weights_has_no_curvature() -> None:
    problem = two_weights(lambda m, h, b: (h["a"] * m.weight + m.bias).sum(), lambda m, h, b: m.weight.sum(), a=1.0)
    assert hypergradient(problem, None, None).solution.status is Status.NO_CURVATURE
    damped = hypergradient(problem, None, None, Implicit(Neumann(terms=5), damping=2.0))
    assert damped.grads["a"].item() == pytest.approx(-0.5)  # (0 + 2)⁻¹ g, and B = 1


def test_damping_serves_a_curvature_whose_products_are_expanded_views() -> None:
    def train(m: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (m.weight.sum() - h["a"]).square() + 0.5 * m.bias.sum().square()

    model = nn.Linear(2, 2)
    problem = Problem(model, HyperParameters({"a": torch.tensor(1.0)}), train, lambda m, h, b: m.weight.sum())
    result = hypergradient(problem, None, None, Implicit(Neumann(terms=200), damping=1.0))
    assert result.grads["a"].item() == pytest.approx(4 / 5)  # 1ᵀ (11ᵀ + I)⁻¹ 1 over the four entries of the weight


def test_weight_of_no_dimension() -> None:
    model = nn.ParameterDict({"w": torch.tensor(2.0)})
    hparams = HyperParameters({"a": torch.tensor(1.0)})
    problem = Problem(model, hparams, lambda m, h, b: (m["w"] - h["a"]) ** 2, lambda m, h, b: 3 * m["w"])
    assert hypergradient(problem, None, None, MANY).grads["a"].item() == pytest.approx(3.0)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    x = torch.randn(5, 2)

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (m[0].weight + m[1].weight - h["a"]).square().sum()

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return m(x).square().sum()

    nn.init.constant_(model[0].weight, 0.35)  # the minimum: 2w = a
    problem = Problem(model, HyperParameters({"a": torch.tensor(0.7)}), train, val)
    result = hypergradient(problem, None, None, MANY)
    a = torch.tensor(0.7, requires_grad=True)
    w = torch.ones(2, 2) * a / 2
    (expected,) = torch.autograd.grad((x @ w.T @ w.T).square().sum(), a)
    assert list(result.solution.value) == ["0.weight"]
    torch.testing.assert_close(result.grads["a"], expected, rtol=1e-8, atol=0)


def test_frozen_weights_are_left_out() -> None:
    problem = two_weights(squares, lambda m, h, b: (m.weight * m.bias).sum(), a=1.0)
    problem.model.bias.requires_grad_(False)
    result = hypergradient(problem, None, None, MANY)
    assert list(result.solution.value) == ["weight"]
    assert result.grads["a"].item() == pytest.approx(1.0)


# What is not finite


def root(x: Tensor) -> Tensor:
    """Zero at zero, where its gradient is infinite."""
    return x.abs().sqrt().sum()


def bent(x: Tensor) -> Tensor:
    """Value and gradient are zero at zero, where the second derivative is infinite."""
    return x.abs().pow(1.5).sum()


def total(m: Any, h: Any, b: Any) -> Tensor:
    return m.weight.sum()


BAD: dict[str, tuple[Any, Any, Status, str]] = {
    "val loss": (squares, lambda m, h, b: m.weight.sum() / 0, Status.NON_FINITE_LOSS, "validation"),
    "train loss": (lambda m, h, b: squares(m, h, b) * math.nan, total, Status.NON_FINITE_LOSS, "training"),
    "val gradient": (squares, lambda m, h, b: root(m.weight - 1), Status.NON_FINITE_GRADIENT, ""),
    "direct gradient": (squares, lambda m, h, b: m.weight.sum() + root(h["a"] - 1), Status.NON_FINITE_GRADIENT, "direct"),
    "train gradient": (lambda m, h, b: squares(m, h, b) + root(m.weight - 1), total, Status.NON_FINITE_GRADIENT, ""),
    "product": (lambda m, h, b: squares(m, h, b) + bent(m.weight - 1), total, Status.NON_FINITE_PRODUCT, ""),
}


@pytest.mark.parametrize("solver", [Neumann(), Neumann(terms=3, step_size=0.1)])
@pytest.mark.parametrize("name", BAD)
def test_what_is_not_finite_is_named_and_gives_nan(name: str, solver: Neumann) -> None:
    train, val, status, words = BAD[name]
    result = hypergradient(two_weights(train, val, a=1.0), None, None, Implicit(solver))
    assert result.solution.status is status, result.solution.detail
    assert words in result.solution.detail
    assert result.grads["a"].isnan()
    assert result.indirect["a"].isnan()


def test_training_gradient_that_is_not_finite_fails_without_a_product_too() -> None:
    train, val, status, _ = BAD["train gradient"]
    assert hypergradient(two_weights(train, val, a=1.0), None, None, Implicit(Identity())).solution.status is status


def test_failed_solve_keeps_its_losses_and_direct_term() -> None:
    problem = two_weights(squares, lambda m, h, b: m.weight.sum() + 2 * h["a"], a=1.0)
    result = hypergradient(problem, None, None, Implicit(Neumann(terms=100, step_size=9.0)))
    assert result.solution.status is Status.STEP_TOO_LARGE
    assert result.grads["a"].isnan()
    assert (result.direct["a"].item(), result.val_loss.item(), result.train_loss.item()) == (2.0, 3.0, 1.0)


# No trace


@pytest.mark.parametrize("filled", [False, True])
def test_hypergradient_leaves_no_trace(filled: bool) -> None:
    problem = noisy_problem()
    problem.model.train()
    problem.model[4][1].eval()  # a mode of its own inside
    if filled:
        problem.loss(classes(8, 0)).backward()
    before = snapshot(problem)
    assert (before["grads"]["model"][0] is not None) == filled
    result = hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    assert result.solution.status.ok
    assert same(snapshot(problem), before)
    assert before["grads"]["hparams"] == [None]


@pytest.mark.parametrize("broken", ["train_loss", "val_loss"])
def test_a_loss_that_raises_leaves_no_trace_either(broken: str) -> None:
    problem = noisy_problem()
    whole = getattr(problem, broken)

    def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        model.train(not model.training)
        whole(model, hparams, batch)
        raise RuntimeError("broken")

    setattr(problem, broken, loss)
    before = snapshot(problem)
    with pytest.raises(RuntimeError, match="broken"):
        hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    assert same(snapshot(problem), before)


def test_reassigned_buffer_is_put_back() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("count", torch.tensor(0.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.linear(x)

    problem = noisy_problem()
    problem = Problem(Counter(), problem.hparams, problem.train_loss, problem.val_loss)
    hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    assert problem.model.count.item() == 0


def test_same_random_state_gives_the_same_hypergradient_under_no_grad_too() -> None:
    problem = noisy_problem()
    first = hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    with torch.no_grad():
        second = hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    torch.rand(1)
    third = hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    assert torch.equal(first.grads["decay"], second.grads["decay"])
    assert not torch.equal(first.grads["decay"], third.grads["decay"])  # another dropout mask


def test_live_parameters_hooks_do_not_fire() -> None:
    problem = noisy_problem()
    fired: list[int] = []
    for p in (*problem.model.parameters(), *problem.hparams.parameters()):
        p.register_hook(lambda grad: fired.append(1))
    hypergradient(problem, classes(8, 1), classes(8, 2), FEW)
    assert fired == []


# Other hyperparameters


def test_any_module_serves_as_hyperparameters() -> None:
    hparams = nn.Linear(1, 1, bias=False)
    nn.init.constant_(hparams.weight, 2.0)
    model = nn.ParameterDict({"w": torch.tensor([6.0])})
    problem = Problem(
        model,
        hparams,
        lambda m, h, b: 0.5 * (m["w"] - h(torch.tensor([3.0]))).square().sum(),
        lambda m, h, b: 0.5 * m["w"].square().sum(),
    )
    assert hypergradient(problem, None, None, MANY).grads["weight"].item() == pytest.approx(6 * 3)


def test_hyperparameters_of_two_precisions() -> None:
    hparams = HyperParameters({"a": torch.tensor(1.0), "b": torch.tensor(2.0, dtype=torch.float32)})
    model = nn.ParameterDict({"w": torch.tensor([3.0])})
    problem = Problem(
        model, hparams, lambda m, h, b: 0.5 * (m["w"] - h["a"] - h["b"]).square().sum(), lambda m, h, b: 2 * m["w"].sum()
    )
    grads = hypergradient(problem, None, None, MANY).grads
    assert {name: (g.item(), g.dtype) for name, g in grads.items()} == {
        "a": (pytest.approx(2.0), torch.float64),
        "b": (pytest.approx(2.0), torch.float32),
    }


def test_the_graph_is_freed_at_once_and_waits_for_no_garbage_collection() -> None:
    run = noisy_run(every=None)
    while gc.collect():  # what other tests have left, and what its finalizers leave
        pass
    gc.disable()
    try:
        hypergradient(run.problem, run.batches[0], run.batches[0])
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:val_loss runs .* in training mode")
@pytest.mark.parametrize("evaluated", [False, True])
def test_checkpointed_activations_change_no_value_and_leave_no_trace(evaluated: bool) -> None:
    def block(checkpointed: bool) -> Problem:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))

        def forward(m: Any, x: Tensor) -> Tensor:
            return checkpoint(m, x, use_reentrant=False) if checkpointed else m(x)

        def val(m: Any, h: Any, x: Tensor) -> Tensor:
            return forward(m.eval() if evaluated else m, x).square().mean()

        def train(m: Any, h: Any, x: Tensor) -> Tensor:
            return (forward(m, x) - 1).square().mean() + h["a"] * sum(p.square().sum() for p in m.parameters())

        return Problem(model, HyperParameters({"a": torch.tensor(0.1)}), train, val)

    found = []
    for checkpointed in (False, True):
        problem, x = block(checkpointed), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        before = snapshot(problem)
        found.append(hypergradient(problem, x, x, FEW).grads["a"].item())
        assert same(snapshot(problem), before)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_fused_attention_serves_and_keeps_the_users_backend() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    problem = Problem(
        model,
        HyperParameters({"a": torch.tensor(0.1)}),
        lambda m, h, x: m(x).square().mean() + h["a"] * sum(p.square().sum() for p in m.parameters()),
        lambda m, h, x: (m(x) - 1).square().mean(),
    )
    x = torch.randn(4, 5, 8)
    flash = torch.backends.cuda.flash_sdp_enabled()
    result = hypergradient(problem, x, x, Implicit(Neumann(terms=1, step_size=0.1)))
    assert torch.backends.cuda.flash_sdp_enabled() == flash

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # one step of SGD, differentiated
        weights = list(model.parameters())
        g = torch.autograd.grad((model(x) - 1).square().mean(), weights)
        leaf = torch.tensor(0.1, requires_grad=True)
        loss = model(x).square().mean() + leaf * sum(p.square().sum() for p in weights)
        F = torch.autograd.grad(loss, weights, create_graph=True)
        Hg = torch.autograd.grad(F, weights, g, retain_graph=True)
        v = [0.1 * (2 * a - 0.1 * b) for a, b in zip(g, Hg, strict=True)]
        (mixed,) = torch.autograd.grad(F, leaf, v)
    assert result.grads["a"].item() == pytest.approx(-mixed.item(), rel=1e-4)


def test_sparse_gradients_are_an_error_that_names_the_weight() -> None:
    model, hparams = nn.Embedding(3, 2), HyperParameters({"a": torch.tensor(1.0)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return h["a"] * nn.functional.embedding(b, m.weight, sparse=True).sum()

    problem = Problem(model, hparams, train, lambda m, h, b: m(b).sum())
    with pytest.raises(TypeError, match=r"\['weight'\] have sparse gradients.*sparse=False"):
        hypergradient(problem, torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("solver", "error"), [(Neumann(terms=200, step_size=0.5), 0.01), (Neumann(terms=200), 0.01), (CG(terms=4), 0.1)]
)
def test_weights_in_half_precision_are_solved_for_in_float32(dtype: torch.dtype, solver: Any, error: float) -> None:
    curvature = torch.tensor([0.03125, 0.25, 1.0, 2.0])  # exact in either type

    def made(dtype: torch.dtype) -> Problem:
        model = nn.ParameterDict({"w": torch.ones(4, dtype=dtype)})
        hparams = HyperParameters({"a": torch.ones(4)})
        return Problem(
            model,
            hparams,
            lambda m, h, b: 0.5 * (curvature.to(m["w"].dtype) * (m["w"] - h["a"].to(m["w"].dtype)).square()).sum(),
            lambda m, h, b: m["w"].sum(),
        )

    full, half = (hypergradient(made(kind), None, None, Implicit(solver)) for kind in (torch.float32, dtype))
    assert half.solution.value["w"].dtype == torch.float32
    assert half.solution.status.kind == full.solution.status.kind == "ok"
    torch.testing.assert_close(half.grads["a"], full.grads["a"], rtol=error, atol=error)  # CG suffers from rounded products
