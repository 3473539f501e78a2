from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import TreeSpec

from hoptim.curvature.compiled import programs, splitting
from hoptim.curvature.compiled.derivatives import Inputs, by_dual_numbers, by_second_pass
from hoptim.curvature.compiled.programs import compiled_linearization
from hoptim.curvature.exact import Exact
from hoptim.curvature.gauss_newton import GaussNewton
from hoptim.curvature.linearization import Linearization
from hoptim.linalg.vectors import Layout
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.problem import Problem, as_leaves

Tensors = dict[str, Tensor]
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


LOSS = CompositeLoss(lambda model, hparams, batch: model(batch["x"]), criterion, penalty)


def make(model: nn.Module, shape: tuple[int, ...], loss: Any = LOSS, size: int = 6) -> tuple[Problem, Any]:
    return Problem(model, Hparams(model), loss, LOSS), batch_of(size, shape)


def batch_of(size: int, shape: tuple[int, ...]) -> Any:
    return {"x": torch.randn(size, *shape), "y": torch.arange(size) % 3, "tag": "train"}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolution() -> nn.Module:
    """As few kernels as there are with a convolution and dropout, since inductor takes a second for each."""
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 3))


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


def ask(problem: Problem, batch: Any, gauss_newton: bool = False) -> Linearization | None:
    """As a curvature asks."""
    curvature = GaussNewton(compile=True) if gauss_newton else Exact(compile=True)
    with problem.leave_no_trace(), problem.at() as at:
        return compiled_linearization(at, batch, curvature)


def take(problem: Problem, batch: Any, seed: int = 0, gauss_newton: bool = False) -> Linearization:
    """The same, where it can be compiled."""
    with problem.leave_no_trace(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("error")
        found = ask(problem, batch, gauss_newton)
    assert found is not None
    return found


def flat(found: Linearization, v: Tensors) -> Tensor:
    """The vector of the weights that the loss touches, of shape (n,) or (R, n)."""
    name, shape = found.layout.names[0], found.layout.shapes[0]
    return found.layout.flatten(v, v[name].shape[: v[name].ndim - len(shape)])


def product(found: Linearization, v: Tensors) -> Tensors:
    """A v by name."""
    return found.layout.unflatten(found.A @ flat(found, v))


def mixed(found: Linearization, v: Tensors) -> Found:
    """Bᵀv by name."""
    return found.mixed(flat(found, v))


def plain(problem: Problem, batch: Any, v: Tensors, seed: int = 0) -> tuple[Tensor, Tensors, Found, Found]:
    """L_T, F, A v and Bᵀv by a double backward pass."""
    with problem.leave_no_trace(), problem.at() as at:
        weights, leaves = at.weights, at.leaves
        torch.manual_seed(seed)
        with at.loss("train_loss", batch) as (loss, *_):
            F = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
            outputs = [f for f in F if f is not None and f.requires_grad]
            along = [v[name] for name, f in zip(weights, F, strict=True) if f is not None and f.requires_grad]
            inputs = [*weights.values(), *leaves.values()]
            found = torch.autograd.grad(outputs, inputs, along, allow_unused=True)
            value = {name: f.detach() for name, f in zip(weights, F, strict=True) if f is not None}
            Av = dict(zip(weights, found, strict=False))
            return loss.detach(), value, Av, dict(zip(leaves, found[len(weights) :], strict=True))


def random_like(tree: Tensors, *lead: int) -> Tensors:
    return {name: torch.randn(*lead, *value.shape, dtype=value.dtype) for name, value in tree.items()}


def distance(ours: Found, theirs: Found) -> float:
    """Relative, over all entries; ``None`` has to stand in the same places."""
    assert list(ours) == list(theirs)
    assert [n for n, t in ours.items() if t is None] == [n for n, t in theirs.items() if t is None]
    pairs = [(ours[name].double(), t.double()) for name, t in theirs.items() if t is not None]
    assert all(a.shape == b.shape for a, b in pairs)
    return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())


def assert_same(found: Linearization, expected: tuple[Tensor, Tensors, Found, Found], v: Tensors, tolerance: float) -> None:
    loss, value, Av, Bv = expected
    assert abs(float(found.loss - loss)) <= tolerance * abs(float(loss))
    assert distance(found.layout.unflatten(found.value), value) < tolerance
    assert distance(product(found, v), {name: Av[name] for name in value}) < tolerance
    assert distance(mixed(found, v), Bv) < tolerance


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compilations, and none of them done: graphs run as they are, which is enough for what is not about inductor."""
    calls: list[str] = []
    monkeypatch.setattr(splitting, "compiled", lambda graph, _: calls.append("compiled") or (lambda given: graph(*given)))
    return calls


# By inductor ------------------------------------------------------------------------------------------------------------


def test_products_are_those_of_a_double_backward_pass() -> None:
    equal_to_a_double_backward_pass(convolution, (1, 4))


@pytest.mark.parametrize("name", CASES)
def test_so_are_those_of_the_graphs_as_they_are(name: str, counted: list[str]) -> None:
    equal_to_a_double_backward_pass(*CASES[name])


def equal_to_a_double_backward_pass(model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
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
    assert distance(product(found, v), product(take(problem, batch), v)) > 1e-3, "the first products stay at their point"


def test_float32_dropout_and_right_hand_sides_at_once() -> None:
    torch.set_default_dtype(torch.float32)
    problem, batch = make(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), (4,))
    found = take(problem, batch)
    v = random_like(problem.weights(), 3)
    rows = [{name: value[r] for name, value in v.items()} for r in range(3)]
    many, several = product(found, v), mixed(found, v)
    for r, row in enumerate(rows):
        assert_same(found, plain(problem, batch, row), row, 1e-5)
        assert distance({name: value[r] for name, value in many.items()}, product(found, row)) < 1e-5
        assert distance({n: None if t is None else t[r] for n, t in several.items()}, mixed(found, row)) < 1e-5
    one = flat(found, row)
    assert torch.equal(found.A @ torch.stack([one, -one], 1)[:, 0], found.A @ one), "a vector of another layout"
    assert torch.equal(found.A @ one.double(), found.A @ one), "or of another type"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_weights_in_half_precision_are_in_float32(counted: list[str], dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    problem, batch = make(small(), (4,))
    v = random_like(problem.weights())
    _, value, Av, Bv = plain(problem, batch, v)
    problem.model.to(dtype)
    found = take(problem, {**batch, "x": batch["x"].to(dtype)})
    assert set(found.layout.dtypes) == {dtype}
    assert found.value.dtype == torch.float32
    v, Av = flat(found, v), torch.cat([Av[name].flatten() for name in value])
    sizes = torch.tensor([[1e-6], [1.0], [1e6]])  # too small and too large for float16, each scaled by itself
    assert (found.A @ v).dtype == torch.float32
    for many in (found.A @ (sizes * v), torch.stack([found.A @ (size * v) for size in sizes])):
        assert all(float((row / size - Av).norm() / Av.norm()) < 0.05 for row, size in zip(many, sizes, strict=True))
    assert float((found.mixed(1e6 * v)["temperature"] / 1e6 / Bv["temperature"] - 1).abs()) < 0.05


def gauss_newton_by_hand(problem: Problem, batch: Any, v: Tensors) -> Tensors:
    """Jᵀ H J v + ∂²penalty v with dense J and H."""
    weights = as_leaves(problem.weights())
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
    problem, batch = make(small(), (4,))
    v = random_like(problem.weights())
    found = take(problem, batch, gauss_newton=True)
    assert distance(product(found, v), gauss_newton_by_hand(problem, batch, v)) < 1e-10
    loss, value, Av, Bv = plain(problem, batch, v)
    assert abs(float(found.loss - loss)) < 1e-12
    assert distance(found.layout.unflatten(found.value), value) < 1e-12
    assert distance(mixed(found, v), Bv) < 1e-10, "B is that of the exact gradient"
    assert distance(product(found, v), Av) > 1e-2, "and A is not"
    take(problem, batch, gauss_newton=True)
    assert distance(product(take(problem, batch), v), Av) < 1e-10, "each curvature has a program of its own"


# The graphs as they are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_dual_numbers_and_a_second_backward_pass_agree(name: str) -> None:
    problem, batch = make(CASES[name][0](), CASES[name][1])
    layout, both = Layout.of(problem.weights()), []
    v = torch.randn(layout.size)
    with problem.leave_no_trace(), problem.at() as at:
        inputs = Inputs.of(at, batch)
        for way, how in ((by_dual_numbers, layout), (by_second_pass, Exact())):
            with problem.leave_no_trace():  # the same masks
                both.append(way(problem, inputs, how, inputs.tensors(), v))
    (loss, F, Av, Bv), (loss2, F2, Av2, Bv2) = both
    assert torch.equal(loss, loss2)
    assert distance({"F": F, "A v": Av, **Bv}, {"F": F2, "A v": Av2, **Bv2}) < 1e-10


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
    assert use(batch) == 0
    problem.model[1].p = 0.25
    assert use(batch) == 3
    assert use({**batch, "tag": "other"}) == 3
    product(take(problem, batch_of(6, (4,))), random_like(v, 3))
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
        assert distance(product(found, v), product(found, v)) == 0.0, "one mask for all products"
        losses.add(float(found.loss))
    assert len(losses) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_noise_is_the_same_in_all_products(counted: list[str]) -> None:
    def noisy(model: Any, hparams: Any, batch: Any) -> Tensor:
        return hparams.temperature * (torch.rand(6, 3) * model(batch["x"]) + torch.randn(3)).square().sum()

    problem, batch = make(nn.Linear(4, 3), (4,), noisy)
    v = random_like(problem.weights())
    for seed in range(2):
        assert_same(take(problem, batch, seed), plain(problem, batch, v, seed), v, 1e-10)


def test_frozen_weights_constants_and_buffers_are_read_anew(counted: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model.eval()
    model[3].requires_grad_(False)
    scale = torch.ones(())
    problem, batch = make(model, (4,), lambda m, h, b: scale * LOSS(m, h, b))
    problem.hparams.temperature.requires_grad_(False)
    v = random_like(problem.weights())
    assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)
    before = len(counted)
    with torch.no_grad():
        model[3].bias.mul_(2)
        scale.fill_(3.0)
    model[3].weight = nn.Parameter(torch.randn(3, 5), requires_grad=False)  # another tensor in its place
    model[1].running_mean = torch.randn(5)
    problem.hparams.temperature = nn.Parameter(torch.tensor(0.6), requires_grad=False)
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
        first = product(take(problem, batch), v)
        annealed.beta = factor = 2.0
        annealed.calls += 1  # nothing that the loss names
        assert distance(product(take(problem, batch), v), {n: 2 * t for n, t in first.items()}) < 1e-12
        before = len(counted)
        annealed.calls += 1
        take(problem, batch)
        assert len(counted) == before


class Slots:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


ARRAY = np.ones(2)
SLOTS = Slots()
NESTED = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(d=SimpleNamespace(e=[1.0])))))


def of_a_dict() -> tuple[Any, Callable[[], Any]]:
    factors = {"a": 0.5, "b": 0.5}
    return lambda m, h, b: sum(factors.values()) * LOSS(m, h, b), lambda: factors.update(b=1.5)


def of_a_list() -> tuple[Any, Callable[[], Any]]:
    factors = [0.5, 0.5]
    return lambda m, h, b: sum(factors) * LOSS(m, h, b), lambda: factors.append(1.0)


def of_a_global_array() -> tuple[Any, Callable[[], Any]]:
    ARRAY[:] = 1.0
    return lambda m, h, b: float(ARRAY[1]) * LOSS(m, h, b), lambda: ARRAY.fill(2.0)


def of_an_array_in_a_module() -> tuple[Any, Callable[[], Any]]:
    box = SimpleNamespace()

    def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        box.module = model.more
        return float(model.more.scale.prod()) * LOSS(model, hparams, batch)

    return loss, lambda: setattr(box.module, "scale", np.array([2.0]))


def of_slots() -> tuple[Any, Callable[[], Any]]:
    SLOTS.factor = 1.0
    return lambda m, h, b: SLOTS.factor * LOSS(m, h, b), lambda: setattr(SLOTS, "factor", 2.0)


def of_a_nested_object() -> tuple[Any, Callable[[], Any]]:
    NESTED.a.b.c.d.e[0] = 1.0
    return lambda m, h, b: NESTED.a.b.c.d.e[0] * LOSS(m, h, b), lambda: NESTED.a.b.c.d.e.__setitem__(0, 2.0)


READ = [of_a_dict, of_a_list, of_a_global_array, of_an_array_in_a_module, of_slots, of_a_nested_object]


@pytest.mark.parametrize("read", READ)
def test_a_value_that_changed_is_found_at_once_wherever_the_loss_reads_it(counted: list[str], read: Any) -> None:
    loss, change = read()
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model.more = nn.Identity()
    model.more.scale = np.array([1.0])
    problem, batch = make(model, (4,), loss)
    v = random_like(problem.weights())
    first, before = take(problem, batch), len(counted)
    assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)
    product(take(problem, batch), v)
    change()
    found = take(problem, batch)
    assert_same(found, plain(problem, batch, v), v, 1e-10)
    assert float(found.loss / first.loss) == pytest.approx(2.0)
    assert len(counted) == before + 3


class Reversed(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a plain number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


def reversing(factor: list[float]) -> Any:
    return lambda m, h, b: Reversed.apply(LOSS(m, h, b), factor[0])


def proximal(factor: list[float]) -> Any:
    return lambda m, h, b: LOSS(m, h, b) + factor[0] * sum((w - w.detach()).square().sum() for w in m.parameters())


def at_zero(factor: list[float]) -> Any:
    return lambda m, h, b: LOSS(m, h, b) + factor[0] * (h.idle - h.idle.detach()).sum() * m[0].bias.square().sum()


@pytest.mark.parametrize("loss_of", [reversing, proximal, at_zero])
def test_a_change_that_leaves_the_loss_as_it_is_is_found_in_time(
    counted: list[str], loss_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "CHECK_EVERY", 4)
    factor = [-1.0]
    problem, batch = make(nn.Sequential(nn.Linear(4, 3)), (4,), loss_of(factor))
    v = random_like(problem.weights())
    before = take(problem, batch)
    for _ in range(5):
        assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)
    made, factor[0] = len(counted), -3.0
    expected = plain(problem, batch, v)
    assert float(before.loss) == float(expected[0])
    for _ in range(programs.CHECK_EVERY):
        found = take(problem, batch)
    assert_same(found, expected, v, 1e-10)
    assert len(counted) == made + 3


def test_where_values_change_at_every_point_plain_pytorch_takes_over(counted: list[str]) -> None:
    count = iter(range(100))
    problem, batch = make(nn.Linear(4, 3), (4,), lambda m, h, b: next(count) * LOSS(m, h, b))
    with pytest.warns(UserWarning, match="^hoptim: "):
        assert [ask(problem, batch) for _ in range(10)][-1] is None


def test_what_a_module_counts_makes_no_program(counted: list[str]) -> None:
    problem, batch = make(nn.Linear(4, 3), (4,))
    take(problem, batch)
    problem.model.calls = 1
    before = len(counted)
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
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten())  # where dual numbers are tried first
    problem, batch = make(model, (4,), lambda m, h, b: LOSS(m, h, b) + Cube.apply(m[1].weight).sum())
    v = random_like(problem.weights())
    assert_same(take(problem, batch), plain(problem, batch, v), v, 1e-10)


def test_weights_that_the_loss_does_not_touch(counted: list[str]) -> None:
    problem, batch = make(nn.ModuleList([nn.Linear(4, 3), nn.Linear(2, 2)]), (4,), lambda m, h, b: m[0](b["x"]).pow(2).sum())
    found = take(problem, batch)
    assert found.untouched == ("1.weight", "1.bias")
    v = {name: torch.randn_like(value) for name, value in found.layout.unflatten(found.value).items()}
    assert list(v) == ["0.weight", "0.bias"]
    expected = plain(problem, batch, v)[2]
    assert distance(product(found, v), {name: expected[name] for name in v}) < 1e-10
    assert set(mixed(found, v).values()) == {None}


def test_no_curvature_is_a_zero_product(counted: list[str]) -> None:
    problem, batch = make(nn.Linear(4, 3), (4,), lambda m, h, b: h.temperature * m(b["x"]).sum())
    found = take(problem, batch)
    for lead in ((), (3,)):
        v = random_like(problem.weights(), *lead)
        assert all(torch.equal(t, torch.zeros_like(v[name])) for name, t in product(found, v).items())
    assert {name for name, t in mixed(found, v).items() if t is not None} == {"temperature"}
    one = random_like(problem.weights())
    expected = (batch["x"] @ one["weight"].T + one["bias"]).sum()  # the derivative of Σ (w x + b) along v
    assert float((mixed(found, one)["temperature"] - expected).abs()) < 1e-12


class Blocked(torch.autograd.Function):
    """The identity, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.zeros(())


def test_a_mixed_product_that_is_zero_whatever_the_vector_is(counted: list[str]) -> None:
    problem, batch = make(nn.Linear(4, 3), (4,), lambda m, h, b: Blocked.apply(h.temperature) * m(b["x"]).square().sum())
    assert set(mixed(take(problem, batch), random_like(problem.weights(), 3)).values()) == {None}


def test_after_many_programs_plain_pytorch_takes_over_with_a_word(
    counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 2)
    problem, _ = make(nn.Linear(4, 3), (4,))
    take(problem, batch_of(3, (4,)))
    take(problem, batch_of(4, (4,)))
    with pytest.warns(UserWarning, match="^hoptim: .*compiled 2 times.* make a number that changes a tensor"):
        assert ask(problem, batch_of(5, (4,))) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert ask(problem, batch_of(6, (4,))) is None
    before = len(counted)
    take(problem, batch_of(3, (4,)))
    take(problem, batch_of(4, (4,)))
    assert len(counted) == before, "those that were made go on"


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
    with pytest.warns(UserWarning, match=f"^hoptim: .*({operation})"):
        assert ask(problem, batch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(problem, batch) is None
        assert ask(problem, batch_of(9, (4,))) is None


def test_a_batch_of_an_unknown_class_is_not_compiled() -> None:
    problem, batch = make(nn.Linear(4, 3), (4,))
    with pytest.warns(UserWarning, match="^hoptim: .*Annealed"):
        assert ask(problem, {**batch, "more": Annealed()}) is None


@pytest.mark.parametrize(("wrong", "name"), [(0, "L_T"), (1, "Bᵀv"), (2, "A v")])
def test_a_graph_that_gives_something_else_than_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: int, name: str
) -> None:
    order = iter(range(3))  # in which pieces are compiled

    def compiled(graph: Any, arguments: Any) -> Any:
        factor = 1.01 if next(order) == wrong else 1.0
        return lambda given: [factor * t for t in graph(*given)]

    monkeypatch.setattr(splitting, "compiled", compiled)
    problem, batch = make(nn.Linear(4, 3), (4,))
    with pytest.warns(UserWarning, match=f"^hoptim: .*compiled {name} (is|are) "):
        assert ask(problem, batch) is None


@pytest.mark.parametrize(("noise", "fits"), [(5e-3, True), (0.2, False)])
def test_in_float32_a_relu_at_zero_may_fall_to_either_side(
    monkeypatch: pytest.MonkeyPatch, noise: float, fits: bool
) -> None:
    torch.set_default_dtype(torch.float32)

    def compiled(graph: Any, arguments: Any) -> Any:
        def run(given: Any) -> Any:
            loss, *others = graph(*given)
            return [loss if not loss.ndim else (1 + noise) * loss, *((1 + noise) * t for t in others)]

        return run

    monkeypatch.setattr(splitting, "compiled", compiled)
    problem, batch = make(nn.Linear(4, 3), (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (ask(problem, batch) is not None) is fits


def test_a_batch_whose_tree_has_no_hash_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every tree on old versions of torch."""
    problem, batch = make(nn.Linear(4, 3), (4,))
    monkeypatch.setattr(TreeSpec, "__hash__", None)
    with pytest.warns(UserWarning, match="^hoptim: .*unhashable"):
        assert ask(problem, batch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(problem, batch) is None


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
    problem, batch = make(small(), (4,))
    v = random_like(problem.weights())
    gc.collect()
    gc.disable()
    found = take(problem, batch)
    del held[:]
    found = take(problem, batch)
    results = len(held)
    product(found, v)
    mixed(found, v)
    products = len(held) - results
    kept = [ref() is not None for ref in held]
    del found
    alive = [ref() is not None for ref in held]
    gc.enable()
    assert products == 1 + len(v) + 1, "A v, and Bᵀv for a decay each and the temperature"
    assert sum(kept) > len(v) + 1, "loss, F and residuals"
    assert not any(alive)
    gone = weakref.ref(problem)
    del problem
    gc.collect()
    assert gone() is None
