from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hoptim.curvature.compiled import programs as compiled
from hoptim.curvature.compiled import splitting
from hoptim.curvature.compiled.programs import Products, compiled_products
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.problem import Problem

Tree = dict[str, Tensor]
Found = dict[str, Tensor | None]


class Hparams(nn.Module):
    """A decay for each weight, a temperature, and one leaf that nothing reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decay = nn.ParameterList([torch.full_like(w, -3.0) for w in model.parameters()])
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.idle = nn.Parameter(torch.ones(2))


def penalty(model: Any, hparams: Any) -> Tensor:
    return sum((0.5 * d.exp() * w**2).sum() for d, w in zip(hparams.decay, model.parameters(), strict=True))


def criterion(z: Tensor, hparams: Any, batch: Any) -> Tensor:
    return cross_entropy(hparams.temperature.exp() * z, batch["y"])


LOSS = CompositeLoss(lambda model, batch: model(batch["x"]), criterion, penalty)


def make(model: nn.Module, shape: tuple[int, ...], loss: Any = LOSS, size: int = 6) -> tuple[Problem, Any]:
    return Problem(model, Hparams(model), loss, LOSS), batch_of(size, shape)


def batch_of(size: int, shape: tuple[int, ...]) -> Any:
    return {"x": torch.randn(size, *shape), "y": torch.arange(size) % 3, "tag": "train"}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


class Transformer(nn.Module):
    """One layer, with dropout in four places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)  # one mask is transposed
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "cnn with BatchNorm": (cnn, (1, 8, 8)),
    "transformer with dropout": (Transformer, (5, 4)),
}


def leaves_of(live: Tree) -> Tree:
    return {name: value.detach().requires_grad_() for name, value in live.items()}


def take(problem: Problem, batch: Any, seed: int = 0, gauss_newton: bool = False) -> Products:
    """As a hypergradient calls it."""
    with problem.untouched():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            weights, leaves = leaves_of(problem.weights()), leaves_of(problem.leaves())
            found = compiled_products(problem, weights, leaves, batch, gauss_newton=gauss_newton)
    assert found is not None
    return found


def plain(problem: Problem, batch: Any, v: Tree, seed: int = 0) -> tuple[Tensor, Tree, Found, Found]:
    """L_T, F, A v and Bᵀv by a double backward pass."""
    weights, leaves = leaves_of(problem.weights()), leaves_of(problem.leaves())

    def then(loss: Tensor, _: Any) -> tuple[Tensor, Tree, Found, Found]:
        F = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        outputs = [f for f in F if f is not None and f.requires_grad]
        along = [v[name] for name, f in zip(weights, F, strict=True) if f is not None and f.requires_grad]
        inputs = [*weights.values(), *leaves.values()]
        found = torch.autograd.grad(outputs, inputs, along, allow_unused=True)
        value = {name: f.detach() for name, f in zip(weights, F, strict=True) if f is not None}
        Av = dict(zip(weights, found, strict=False))
        return loss.detach(), value, Av, dict(zip(leaves, found[len(weights) :], strict=True))

    with problem.untouched():
        torch.manual_seed(seed)
        return problem.pure("train_loss", weights, leaves, batch, then)


def random_like(tree: Tree, *lead: int) -> Tree:
    return {name: torch.randn(*lead, *value.shape, dtype=value.dtype) for name, value in tree.items()}


def distance(ours: Found, theirs: Found) -> float:
    """Relative, over all entries; ``None`` has to stand in the same places."""
    assert list(ours) == list(theirs)
    assert [n for n, t in ours.items() if t is None] == [n for n, t in theirs.items() if t is None]
    pairs = [(ours[name].double(), t.double()) for name, t in theirs.items() if t is not None]
    assert all(a.shape == b.shape for a, b in pairs)
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())


def assert_same(found: Products, expected: tuple[Tensor, Tree, Found, Found], v: Tree, tolerance: float) -> None:
    loss, value, Av, Bv = expected
    assert abs(float(found.loss - loss)) <= tolerance * abs(float(loss))
    assert distance(found.value, value) < tolerance
    assert distance(found.product(v), {name: Av[name] for name in value}) < tolerance
    assert distance(found.mixed(v), Bv) < tolerance


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compilations, and none of them done: graphs run as they are, which is enough for what is not about inductor."""
    calls: list[str] = []
    monkeypatch.setattr(splitting, "compiled", lambda graph, _: calls.append("compiled") or (lambda given: graph(*given)))
    return calls


# By inductor ------------------------------------------------------------------------------------------------------------


def test_products_are_those_of_a_double_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    same, found = splitting._same, []
    monkeypatch.setattr(splitting, "_same", lambda *given: found.append(same(*given)) or found[-1])
    equal_to_a_double_backward_pass("cnn with BatchNorm")
    assert len(found) == sum(found) > 0  # inductor's innermost functions serve
    assert not splitting._same(lambda given: [given[0].add_(1)], [torch.ones(2)], [torch.full((2,), 2.0)])  # one that writes
    assert not splitting._same(lambda given: [2 * given[0]], [torch.ones(2)], [torch.ones(2)])


@pytest.mark.parametrize("name", CASES)
def test_so_are_those_of_the_graphs_as_they_are(name: str, counted: list[str]) -> None:
    equal_to_a_double_backward_pass(name)


def equal_to_a_double_backward_pass(name: str) -> None:
    model, shape = CASES[name]
    problem, batch = make(model(), shape)
    before = copy.deepcopy(problem.model.state_dict())
    v = random_like(problem.weights())
    found = take(problem, batch)
    expected = plain(problem, batch, v)
    assert_same(found, expected, v, 1e-10)
    assert expected[3]["idle"] is None
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    # other values, nothing compiled: the weights, the hyperparameters, the batch and the masks
    with torch.no_grad():
        for p in (*problem.model.parameters(), *problem.hparams.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    other, v = batch_of(6, shape), random_like(v)
    assert_same(take(problem, other, seed=5), plain(problem, other, v, seed=5), v, 1e-10)
    assert distance(found.product(v), take(problem, batch).product(v)) > 1e-3, "the first products stay at their point"


def test_float32_dropout_and_right_hand_sides_at_once() -> None:
    torch.set_default_dtype(torch.float32)
    problem, batch = make(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), (4,))
    found = take(problem, batch)
    v = random_like(problem.weights(), 3)
    rows = [{name: value[r] for name, value in v.items()} for r in range(3)]
    many, mixed = found.product(v), found.mixed(v)
    for r, row in enumerate(rows):
        assert_same(found, plain(problem, batch, row), row, 1e-5)
        assert distance({name: value[r] for name, value in many.items()}, found.product(row)) < 1e-5
        assert distance({n: None if t is None else t[r] for n, t in mixed.items()}, found.mixed(row)) < 1e-5
    turned = {n: value.T.contiguous().T if value.ndim == 2 else value for n, value in row.items()}
    assert distance(found.product(turned), found.product(row)) < 1e-5, "a vector of another layout"


def gauss_newton_by_hand(problem: Problem, batch: Any, v: Tree) -> Tree:
    """Jᵀ H J v + ∂²penalty v with dense J and H."""
    weights = leaves_of(problem.weights())
    model, hparams, names = problem.model, problem.hparams, list(weights)

    def z(*w: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, w, strict=True)), (batch["x"],)).flatten()

    at = z(*weights.values()).detach()
    blocks = torch.autograd.functional.jacobian(z, tuple(weights.values()))
    J = torch.cat([block.reshape(len(at), -1) for block in blocks], 1)
    H = torch.autograd.functional.hessian(lambda t: criterion(t.reshape(-1, 3), hparams, batch), at)
    flat = J.T @ (H @ (J @ torch.cat([value.flatten() for value in v.values()])))
    decays = dict(zip(names, hparams.decay, strict=True))
    parts = flat.split([w.numel() for w in weights.values()])
    return {n: (p.reshape(v[n].shape) + decays[n].exp() * v[n]).detach() for n, p in zip(names, parts, strict=True)}


def test_gauss_newton(counted: list[str]) -> None:
    problem, batch = make(mlp(), (4,))
    v = random_like(problem.weights())
    found = take(problem, batch, gauss_newton=True)
    assert distance(found.product(v), gauss_newton_by_hand(problem, batch, v)) < 1e-10
    loss, value, Av, Bv = plain(problem, batch, v)
    assert abs(float(found.loss - loss)) < 1e-12
    assert distance(found.value, value) < 1e-12
    assert distance(found.mixed(v), Bv) < 1e-10, "B is that of the exact gradient"
    assert distance(found.product(v), Av) > 1e-2, "and A is not"


# The graphs as they are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_both_ways_of_tracing_agree(counted: list[str], monkeypatch: pytest.MonkeyPatch, gauss_newton: bool) -> None:
    found = []
    for ways in (("forward",), ("reverse",)):
        torch.manual_seed(0)
        problem, batch = make(mlp(), (4,))
        monkeypatch.setattr(compiled, "WAYS", ways)
        products = take(problem, batch, gauss_newton=gauss_newton)
        v = random_like(problem.weights())
        found.append((products.product(v), products.mixed(v)))
    (A, B), (A2, B2) = found
    assert distance(A, A2) < 1e-10
    assert distance(B, B2) < 1e-10


def test_only_another_shape_or_mode_compiles_again(counted: list[str]) -> None:
    problem, batch = make(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), (4,))
    v = random_like(problem.weights())

    def use(batch: Any) -> int:
        before = len(counted)
        found = take(problem, batch)
        assert_same(found, plain(problem, batch, v), v, 1e-10)
        return len(counted) - before

    assert use(batch) == 3  # at the point, A v, Bᵀv
    assert use(batch_of(6, (4,))) == 0
    assert use(batch_of(7, (4,))) == 3
    assert use(batch_of(6, (4,))) == 0
    problem.model.eval()
    assert use(batch) == 3
    problem.model.train()
    problem.model[1].p = 0.25
    assert use(batch) == 3
    assert use({**batch, "tag": "other"}) == 3
    take(problem, batch_of(6, (4,))).product(random_like(v, 3))
    problem.train_loss = lambda model, hparams, batch: 2 * LOSS(model, hparams, batch)
    assert use(batch) == 3


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_masks_are_torchs_own(counted: list[str], p: float) -> None:
    problem, batch = make(nn.Sequential(nn.Linear(4, 8), nn.Dropout(p), nn.Linear(8, 3), nn.Dropout(p)), (4,))
    v = random_like(problem.weights())
    state = torch.get_rng_state()
    losses = set()
    for seed in range(4):
        found = take(problem, batch, seed)
        assert_same(found, plain(problem, batch, v, seed), v, 1e-10)
        assert distance(found.product(v), found.product(v)) == 0.0, "one mask for all products"
        losses.add(float(found.loss))
    assert len(losses) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_frozen_weights_constants_and_buffers_are_read_anew(counted: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model.eval()
    model[3].requires_grad_(False)
    scale = torch.ones(())
    problem, batch = make(model, (4,), lambda m, h, b: scale * LOSS(m, h, b))
    v = random_like(problem.weights())
    assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)
    before = len(counted)
    with torch.no_grad():
        model[3].bias.mul_(2)
        scale.fill_(3.0)
    model[3].weight = nn.Parameter(torch.randn(3, 5), requires_grad=False)  # another tensor in its place
    model[1].running_mean = torch.randn(5)
    assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)
    assert len(counted) == before


class Annealed:
    """A loss that reads a plain number from its object, from a variable around it and from a default."""

    def __init__(self) -> None:
        self.beta, self.calls = 1.0, 0

    def loss(self, model: Any, hparams: Any, batch: Any) -> Tensor:
        return self.beta * LOSS(model, hparams, batch)


def test_plain_values_that_a_loss_reads_are_not_kept_from_the_first_time(counted: list[str]) -> None:
    annealed = Annealed()
    factor = 1.0
    losses = (annealed.loss, lambda model, hparams, batch: factor * LOSS(model, hparams, batch))
    for loss in losses:
        annealed.beta = factor = 1.0
        problem, batch = make(nn.Linear(4, 3), (4,), loss)
        v = random_like(problem.weights())
        first = take(problem, batch).product(v)
        annealed.beta = factor = 2.0
        annealed.calls += 1  # nothing that the loss names
        assert distance(take(problem, batch).product(v), {n: 2 * t for n, t in first.items()}) < 1e-12
        before = len(counted)
        annealed.calls += 1
        take(problem, batch)
        assert len(counted) == before


class Cube(torch.autograd.Function):
    """x³ with a backward pass and no rule for dual numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_where_there_are_no_dual_numbers_a_second_backward_pass_serves(counted: list[str]) -> None:
    problem, batch = make(nn.Linear(4, 3), (4,), lambda m, h, b: LOSS(m, h, b) + Cube.apply(m.weight).sum())
    v = random_like(problem.weights())
    assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)


def test_weights_that_the_loss_does_not_touch(counted: list[str]) -> None:
    problem, batch = make(nn.ModuleList([nn.Linear(4, 3), nn.Linear(2, 2)]), (4,), lambda m, h, b: m[0](b["x"]).pow(2).sum())
    found = take(problem, batch)
    assert found.untouched == ["1.weight", "1.bias"]
    v = {name: torch.randn_like(value) for name, value in found.value.items()}
    assert list(v) == ["0.weight", "0.bias"]
    expected = plain(problem, batch, v)[2]
    assert distance(found.product(v), {name: expected[name] for name in v}) < 1e-10
    assert set(found.mixed(v).values()) == {None}


def test_no_curvature_is_a_zero_product(counted: list[str]) -> None:
    problem, batch = make(nn.Linear(4, 3), (4,), lambda m, h, b: h.temperature * m(b["x"]).sum())
    found = take(problem, batch)
    for lead in ((), (3,)):
        v = random_like(problem.weights(), *lead)
        assert all(torch.equal(t, torch.zeros_like(v[name])) for name, t in found.product(v).items())
    mixed = {name for name, t in found.mixed(v).items() if t is not None}
    assert mixed == {"temperature"}
    one = random_like(problem.weights())
    expected = (batch["x"] @ one["weight"].T + one["bias"]).sum()  # the derivative of Σ (w x + b) along v
    assert float((found.mixed(one)["temperature"] - expected).abs()) < 1e-12


def test_too_many_graphs_are_dropped_with_a_word(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST", 2)
    problem, _ = make(nn.Linear(4, 3), (4,))
    take(problem, batch_of(3, (4,)))
    take(problem, batch_of(4, (4,)))
    with pytest.warns(UserWarning, match="^hoptim: .*compiled for 2 shapes"):
        found = compiled_products(problem, problem.weights(), problem.leaves(), batch_of(5, (4,)))
    assert found is not None
    take(problem, batch_of(6, (4,)))  # said once
    assert len([program for program in compiled._PROGRAMS[problem].values() if program is not None]) == 2


# What can't be traced ---------------------------------------------------------------------------------------------------


def branching(model: Any, hparams: Any, batch: Any) -> Tensor:
    loss = LOSS(model, hparams, batch)
    return loss if loss < 100 else 2 * loss


def selecting(model: Any, hparams: Any, batch: Any) -> Tensor:
    return model(batch["x"])[batch["y"] > 0].pow(2).mean()


def scaling(model: Any, hparams: Any, batch: Any) -> Tensor:
    return LOSS(model, hparams, batch) * batch["x"].max().item()


@pytest.mark.parametrize(
    ("loss", "operation"),
    [(branching, "_local_scalar_dense"), (scaling, "_local_scalar_dense"), (selecting, "aten.nonzero|aten.index")],
)
def test_what_cannot_be_traced_warns_once_and_names_the_operation(loss: Any, operation: str) -> None:
    problem, batch = make(nn.Linear(4, 3), (4,), loss)
    args = (problem, leaves_of(problem.weights()), leaves_of(problem.leaves()))
    with pytest.warns(UserWarning, match=f"^hoptim: .*({operation})"):
        assert compiled_products(*args, batch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled_products(*args, batch) is None
        assert compiled_products(*args, batch_of(9, (4,))) is None


def test_a_batch_of_an_unknown_class_is_not_compiled() -> None:
    problem, batch = make(nn.Linear(4, 3), (4,))
    args = (problem, leaves_of(problem.weights()), leaves_of(problem.leaves()))
    with pytest.warns(UserWarning, match="^hoptim: .*Annealed"):
        assert compiled_products(*args, {**batch, "more": Annealed()}) is None


def test_a_graph_that_answers_otherwise_than_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Callable[..., Any] = lambda graph, arguments: lambda given: [1.01 * t for t in graph(*given)]  # noqa: E731
    monkeypatch.setattr(splitting, "compiled", wrong)
    problem, batch = make(nn.Linear(4, 3), (4,))
    with pytest.warns(UserWarning, match="^hoptim: .*off by"):
        assert compiled_products(problem, leaves_of(problem.weights()), leaves_of(problem.leaves()), batch) is None


# Memory -----------------------------------------------------------------------------------------------------------------


def test_dropped_products_and_problems_are_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []

    def noted(graph: Any, arguments: Any) -> Any:
        def run(given: list[Tensor]) -> Any:
            results = graph(*given)
            held.extend(weakref.ref(t) for t in results)
            return results

        return run

    monkeypatch.setattr(splitting, "compiled", noted)
    problem, batch = make(mlp(), (4,))
    v = random_like(problem.weights())
    gc.collect()
    gc.disable()
    found = take(problem, batch)
    del held[:]
    found = take(problem, batch)
    results = len(held)
    found.product(v)
    found.mixed(v)
    products = len(held) - results
    kept = [ref() is not None for ref in held]
    del found
    alive = [ref() is not None for ref in held]
    gc.enable()
    assert products == len(v) + len(v) + 1
    assert sum(kept) > len(v) + 1, "loss, F and residuals"
    assert not any(alive)
    gone = weakref.ref(problem)
    del problem
    gc.collect()
    assert gone() is None
