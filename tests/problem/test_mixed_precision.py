"""Mixed precision: autocast around the loss, the step or the loop, and inside the losses; GradScaler; half precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import loss_at
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim import BilevelOptimizer, Exact, FiniteDifference, GaussNewton, Implicit, Unrolled
from hoptim.curvature.compiled import splitting
from hoptim.curvature.linearization import SymmetricByName, on_flat
from hoptim.linalg.vectors import Layout
from hoptim.problem.data import MicroBatches
from hoptim.problem.mixed_precision import full_precision, losses_precision, lowered
from hoptim.solvers.solution import Solution

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


def autocast(dtype: torch.dtype = BF16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype)


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(32, 8, generator=draw), torch.randint(0, 3, (32,), generator=draw)


DAMPING = 1.0  # makes the curvature definite, so that rounding is not magnified
TRAIN, VAL = [batch_of(seed) for seed in range(4)], batch_of(99)


def problem_of(
    within: Callable[[], AbstractContextManager[Any]] = nullcontext, composite: bool = True, dtype: torch.dtype | None = None
) -> hoptim.Problem:
    """A net with a decay for weights and one for biases; ``within``: what its losses are computed in."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    hparams = nn.ParameterDict({"decay": nn.Parameter(torch.full((2,), -2.5)), "scale": nn.Parameter(torch.tensor(0.3))})
    hparams.to(dtype)

    def predict(m: Any, h: Any, b: Any) -> Tensor:
        with within():
            return m(b[0].to(next(m.parameters()).dtype))

    def criterion(z: Tensor, h: Any, b: Any) -> Tensor:
        with within():
            return F.cross_entropy(h["scale"].exp() * z, b[1])

    def penalty(m: Any, h: Any) -> Tensor:
        return sum(h["decay"][p.ndim - 1].exp() * p.square().sum() for p in m.parameters())

    loss = hoptim.CompositeLoss(predict, criterion, penalty)
    train = loss if composite else lambda m, h, b: loss(m, h, b)
    return hoptim.Problem(model, hparams, train, lambda m, h, b: F.cross_entropy(predict(m, h, b), b[1]))


def optimizer_of(problem: hoptim.Problem, method: Any = None, inner: Any = None, **options: Any) -> BilevelOptimizer:
    inner = inner or torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.1)
    return BilevelOptimizer(inner, outer, problem, hypergradient=method, **{"val_batches": [VAL], "every": 1, **options})


def vector(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree["decay"].float(), tree["scale"].float()[None]])


def assert_near(found: hoptim.Hypergradient, expected: hoptim.Hypergradient, relative: float) -> None:
    a, b = vector(found.grads), vector(expected.grads)
    assert found.solution.status.ok
    assert (a - b).norm() < relative * b.norm(), (a, b)


@dataclass(frozen=True)
class Watching(hoptim.Solver):
    """A solver that looks at what it is given."""

    seen: list[Any]
    solver: hoptim.Solver = field(default_factory=lambda: hoptim.CG(terms=8))

    def solve(self, A: Any, rhs: Tensor, state: Any = None) -> Solution:
        self.seen.extend([torch.is_autocast_enabled("cpu"), rhs.dtype, (A @ rhs.clone()).dtype])
        solution = self.solver.solve(A, rhs, state)
        self.seen.append(solution.value.dtype)
        return solution


# Autocast -------------------------------------------------------------------------------------------------------------

CURVATURES: dict[str, Any] = {
    "exact": Exact(),
    "gauss-newton": GaussNewton(),
    "differences": FiniteDifference(),
    "averaged": hoptim.Averaged(batches=2),
    "sampled": hoptim.Sampled(),
    "compiled": GaussNewton(compile=True),
}
PLAIN = {**CURVATURES, "differences": FiniteDifference(step=0.2), "compiled": GaussNewton()}  # 0.2: that of bfloat16


@pytest.mark.filterwarnings("error:hoptim")
@pytest.mark.parametrize("name", CURVATURES)
def test_under_autocast_losses_alone_are_in_lower_precision(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(splitting, "compiled", lambda graph, _: lambda given: graph(*given))  # inductor has tests of its own
    problem, seen = problem_of(), []
    outputs: list[Any] = []
    problem.model.register_forward_hook(lambda m, _, z: outputs.append((z.dtype, torch.is_autocast_enabled("cpu"))))
    solver = hoptim.Neumann(terms=8, step_size=0.2) if name == "sampled" else hoptim.CG(terms=8)
    method = Implicit(Watching(seen, solver), curvature=CURVATURES[name], damping=DAMPING)
    plain = Implicit(solver, curvature=PLAIN[name], damping=DAMPING)
    expected = hoptim.hypergradient(problem, TRAIN[0], VAL, plain, train_batches=TRAIN[1:2])
    outputs.clear()
    with autocast():
        found = hoptim.hypergradient(problem, TRAIN[0], VAL, method, train_batches=TRAIN[1:2])
        assert torch.is_autocast_enabled("cpu")
    assert {(BF16, True)} <= set(outputs) <= {(BF16, True)} | ({(torch.float32, False)} if name == "compiled" else set())
    assert set(seen) == {False, torch.float32}
    assert {value.dtype for tree in (found.grads, found.indirect, found.direct) for value in tree.values()} == {
        torch.float32
    }
    assert_near(found, expected, 0.2 if name == "differences" else 0.05)
    assert not torch.equal(vector(found.grads), vector(expected.grads))


def test_a_criterion_is_computed_for_its_curvature_as_in_the_loss() -> None:
    problem, seen = problem_of(), []
    loss: Any = problem.train_loss
    criterion = loss.criterion

    def noting(z: Tensor, h: Any, b: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return criterion(z, h, b)

    problem.train_loss = hoptim.CompositeLoss(loss.predict, noting, loss.penalty)
    with autocast():
        hoptim.hypergradient(problem, TRAIN[0], VAL)
    assert len(seen) > 1
    assert all(seen)


@pytest.mark.parametrize("name", ["exact", "gauss-newton", "differences"])
def test_autocast_inside_the_losses_reaches_no_backward_pass(name: str) -> None:
    seen: list[Any] = []
    curvature = FiniteDifference(step=0.1) if name == "differences" else CURVATURES[name]  # of its own accord it cannot know
    method = Implicit(Watching(seen), curvature=curvature, damping=DAMPING)
    expected = hoptim.hypergradient(
        problem_of(), TRAIN[0], VAL, Implicit(hoptim.CG(terms=8), curvature=curvature, damping=DAMPING)
    )
    found = hoptim.hypergradient(problem_of(autocast), TRAIN[0], VAL, method)
    assert set(seen) == {False, torch.float32}
    assert_near(found, expected, 0.05)


def test_unrolled_steps_under_autocast() -> None:
    results = []
    for context in (nullcontext, autocast):
        optimizer = optimizer_of(problem_of(), Unrolled(3), every=3)
        for batch in TRAIN[:3]:
            with context():
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()
        results.append(optimizer.record.result)
    assert_near(results[1], results[0], 0.05)
    assert results[1].solution.status is hoptim.Status.FINISHED  # the replay is under autocast as the steps were


@pytest.mark.parametrize("batches", [1, 3])
def test_autocast_around_the_loss_alone_leaves_hypersteps_in_full_precision(batches: int) -> None:
    """To the last bit."""
    problem = problem_of()
    optimizer = optimizer_of(problem, every=None)
    optimizer.zero_grad()
    for batch in TRAIN[:batches]:
        with autocast():
            loss = optimizer.loss(batch)
        loss.backward()
    optimizer.step()
    train = TRAIN[0] if batches == 1 else MicroBatches(tuple(TRAIN[:batches]), torch.full((batches,), 1.0) / batches)
    expected = hoptim.hypergradient(problem, train, VAL)
    assert torch.equal(vector(optimizer.hyperstep().result.grads), vector(expected.grads))


def test_one_autocast_around_the_whole_loop_is_one_around_each_step() -> None:
    """Where torch alone would go on with the first step's weights, which autocast keeps in lower precision."""
    ends = []
    for whole in (True, False):
        problem = problem_of()
        problem.train_loss = lambda m, h, b: (
            F.cross_entropy(m(b[0]), b[1]) + h["decay"].exp().sum() * m[0].weight.square().sum()
        )
        problem.hparams["scale"].requires_grad_(False)
        optimizer = optimizer_of(problem, every=4)
        losses = []
        with autocast() if whole else nullcontext():
            for batch in (*TRAIN, *TRAIN):
                with nullcontext() if whole else autocast():
                    optimizer.zero_grad()
                    loss = optimizer.loss(batch)
                    loss.backward()
                    optimizer.step()
                losses.append(loss.detach())
        ends.append(torch.stack([*losses, *problem.hparams["decay"].detach()]))
    assert torch.equal(*ends)


def test_what_autocast_keeps_of_one_tensor_is_not_taken_for_another() -> None:
    problem = problem_of()
    weights, leaves = (
        {n: p.detach().clone().requires_grad_() for n, p in t().items()} for t in (problem.weights, problem.leaves)
    )
    values = []
    with autocast(), problem.leave_no_trace():
        for _ in range(2):
            values.append(loss_at(problem, "train_loss", weights, leaves, TRAIN[0]).item())
            for value in weights.values():
                value.data.mul_(2)
    with autocast(), problem.leave_no_trace():
        for value in weights.values():
            value.data.div_(2)
        assert loss_at(problem, "train_loss", weights, leaves, TRAIN[0]).item() == values[1] != values[0]


def test_under_float16_hypersteps_are_in_full_precision() -> None:
    """Small gradients, which become zero in float16, are not scaled there."""
    problem = problem_of()
    expected = hoptim.hypergradient(problem, TRAIN[0], VAL)
    with autocast(torch.float16):
        found = hoptim.hypergradient(problem, TRAIN[0], VAL)
    assert torch.equal(vector(found.grads), vector(expected.grads))


def test_the_weighted_sum_of_several_losses_is_in_full_precision() -> None:
    problem = problem_of()
    problem.val_loss = lambda m, h, b: F.cross_entropy(m(b[0]), b[1], reduction="none").reshape(4, 8).mean(1)
    result = hoptim.hypergradient(problem, TRAIN[0], VAL)
    with autocast():
        found = result.combined([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(vector(found), vector(result.combined([0.1, 0.2, 0.3, 0.4])))


def test_an_audit_under_autocast_knows_its_noise() -> None:
    problem = problem_of()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    for _ in range(200):
        inner.zero_grad()
        problem.loss(TRAIN[0]).backward()
        inner.step()
    with autocast():
        found = hoptim.audit(problem, TRAIN[0], VAL, inner=inner, steps=60, directions=1, longer=30, chunks=4)
    assert [line.verdict for line in found.directions if line.verdict == "opposite sign"] == []
    assert found.directions[0].measured == pytest.approx(found.directions[0].predicted, rel=0.5)


def test_contexts_of_precision() -> None:
    problem = problem_of()
    assert problem.lowered == lowered() == ()
    with autocast():
        assert problem.lowered == lowered() == (("cpu", BF16),)
        with problem.leave_no_trace():
            assert (problem.lowered, torch.is_autocast_enabled("cpu")) == ((("cpu", BF16),), False)
            with problem.leave_no_trace(), losses_precision(problem.lowered):
                assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        with full_precision():
            assert lowered() == ()
    with pytest.raises(RuntimeError, match="within"), problem.leave_no_trace():
        raise RuntimeError("within")
    assert problem.lowered == lowered() == ()


# GradScaler -----------------------------------------------------------------------------------------------------------

INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


class Run:
    """A loop under a GradScaler, or without one."""

    def __init__(self, inner: str, scaler: torch.amp.GradScaler | None, micro: int = 1, clip: float | None = None) -> None:
        self.problem = problem_of()
        self.optimizer = optimizer_of(self.problem, None, INNERS[inner](self.problem.model.parameters()), every=2)
        self.scaler, self.micro, self.clip = scaler, micro, clip

    def step(self, number: int, factor: float = 1.0) -> None:
        optimizer, scaler = self.optimizer, self.scaler
        optimizer.zero_grad()
        for batch in itertools.islice(itertools.cycle(TRAIN), number, number + self.micro):
            loss = optimizer.loss(batch) * (factor / self.micro)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None and self.clip is not None:
            scaler.unscale_(optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.problem.model.parameters(), self.clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def state(self) -> Tensor:
        tensors = [*self.problem.model.parameters(), *self.problem.hparams.parameters()]
        return torch.cat([*(p.detach().flatten() for p in tensors), vector(self.optimizer.record.result.grads)])


@pytest.mark.parametrize("clip", [None, 0.05], ids=["plain", "clipped"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("inner", INNERS)
def test_a_scaler_changes_no_bit(inner: str, micro: int, clip: float | None) -> None:
    """Its factors are powers of two; what goes through it is undone before the step, fused or not."""
    runs = [
        Run(inner, scaler, micro, clip)
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
    ]
    for number in range(4):
        for run in runs:
            run.step(number)
    assert runs[1].optimizer.hyper_steps == 2
    assert torch.equal(runs[0].state(), runs[1].state())


@pytest.mark.parametrize("inner", INNERS)
def test_a_skipped_step_does_not_count_and_is_followed_by_no_hyperstep(inner: str) -> None:
    run, without = (Run(inner, torch.amp.GradScaler("cpu", init_scale=4.0), micro=2) for _ in range(2))
    for number, factor in ((0, 1.0), (1, math.inf), (1, 1.0), (2, math.inf), (2, 1.0), (3, 1.0)):
        before = run.optimizer.inner_steps, run.optimizer.hyper_steps
        run.step(number, factor)
        if math.isinf(factor):
            assert (run.optimizer.inner_steps, run.optimizer.hyper_steps) == before
    for number in range(4):
        without.step(number)
    assert (run.optimizer.inner_steps, run.optimizer.hyper_steps) == (4, 2)
    assert torch.equal(run.state(), without.state())


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_under_a_scaler_is_resumed_to_the_same_bits(cut: int) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    whole, first, second = (Run("fused adam", scaler(), micro=2) for _ in range(3))
    factors = [1.0, 1.0, math.inf, 1.0, 1.0]
    for number, factor in enumerate(factors):
        whole.step(number, factor)
    for number in range(cut):
        first.step(number, factors[number])
    saved = [x.state_dict() for x in (first.problem.model, first.optimizer, first.scaler)]
    for x, state in zip((second.problem.model, second.optimizer, second.scaler), saved, strict=True):
        x.load_state_dict(state)
    for number in range(cut, 5):
        second.step(number, factors[number])
    assert second.scaler.get_scale() == whole.scaler.get_scale()
    assert torch.equal(second.state(), whole.state())


def test_float16_autocast_and_a_scaler_learn_as_float32_does() -> None:
    ends = []
    for mixed in (True, False):
        run = Run("sgd", torch.amp.GradScaler("cpu", init_scale=2.0**12) if mixed else None, micro=2)
        for number in range(6):
            with autocast(torch.float16) if mixed else nullcontext():
                run.step(number)
        assert run.optimizer.hyper_steps == 3
        ends.append(run.optimizer.record.result)
    assert_near(*ends, 0.02)


# Weights in half precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", ["exact", "gauss-newton", "differences"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_solved_in_float32(dtype: torch.dtype, name: str, several: bool) -> None:
    seen: list[Any] = []
    batch = MicroBatches(tuple(TRAIN[:2]), torch.tensor([0.5, 0.5])) if several else TRAIN[0]
    curvature = CURVATURES[name]
    method = Implicit(Watching(seen), curvature=curvature, damping=DAMPING)
    steps = {torch.bfloat16: 0.2, torch.float16: 0.1}  # which it chooses
    plain = FiniteDifference(step=steps[dtype]) if name == "differences" else curvature
    wide = Implicit(hoptim.CG(terms=8), curvature=plain, damping=DAMPING)
    expected = hoptim.hypergradient(problem_of(), batch, VAL, wide)
    found = hoptim.hypergradient(problem_of(dtype=dtype), batch, VAL, method)
    assert set(seen) == {False, torch.float32}
    assert {value.dtype for value in found.grads.values()} == {dtype}
    assert found.gradient_norm.dtype == torch.float32
    assert_near(found, expected, 0.2 if name == "differences" else 0.06)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e12])
def test_small_and_large_vectors_keep_their_size_in_float16(size: float, lead: tuple[int, ...]) -> None:
    A = SymmetricByName(lambda v, _: {"w": 3 * v["w"]}, Layout.of({"w": torch.zeros(5, dtype=torch.float16)}))
    v = torch.linspace(1, 2, 5).expand(*lead, 5) * size
    torch.testing.assert_close(A @ v, 3 * v, rtol=2e-3, atol=0)


def test_each_vector_keeps_its_own_size_in_float16() -> None:
    layout = Layout.of({"w": torch.zeros(5, dtype=torch.float16)})
    A, v = SymmetricByName(lambda v, _: {"w": 3 * v["w"]}, layout), torch.linspace(1, 2, 5)
    several = torch.stack([1e-3 * v, 1e6 * v, 0 * v])
    torch.testing.assert_close(A @ several, 3 * several, rtol=2e-3, atol=0)
    found = on_flat(lambda v, _: {"λ": v["w"].sum(-1), "none": None}, layout)(several)
    torch.testing.assert_close(found["λ"], several.sum(-1), rtol=2e-3, atol=0)
    assert found["none"] is None
