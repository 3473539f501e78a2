"""Models whose forward pass writes: Replay and Unrolled against real retraining by plain torch, or told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import through_disk
from torch import Tensor, nn, optim

from hoptim import BilevelOptimizer, Problem, Replay, Unrolled, audit, hypergradient
from hoptim.problem.functional import DifferentiableStatistics
from hoptim.solvers.solution import Status

STEPS = 8


class Scaled(nn.Module):
    """Outputs over their running mean size, which is written in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.size = nn.Linear(4, 2), how, 1.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        now = z.detach().abs().mean()
        if self.training and self.how == "in place":
            self.scale.mul_(0.7).add_(0.3 * now)
        elif self.training and self.how == "by data":
            self.scale.data = 0.7 * self.scale.data + 0.3 * now
        elif self.training and self.how == "assigned":
            self.scale = 0.7 * self.scale + 0.3 * now
        elif self.training and self.how == "a plain number":
            self.size = 0.7 * self.size + 0.3 * now.item()
        return z / (self.scale * self.size)


class Counting(nn.Module):
    """A temperature that falls with the number of forward passes, counted in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.number, self.held = nn.Linear(4, 2), how, 0, [0]
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("whole", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.number, self.held[0] = self.number + 1, self.held[0] + 1
            self.real += 1
            self.whole += 1
        count = {"an attribute": self.number, "a list": self.held[0], "a buffer": self.real, "an integer": self.whole}
        return self.layer(x) / (1 + 0.1 * count[self.how])


class Noting(nn.Module):
    """Writes what nothing reads, as for a log."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last, self.total = nn.Linear(4, 2), 0.0, torch.zeros(2)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        if self.training:
            self.last, self.total = z.mean().item(), self.total + z.detach().sum(0)
            self.seen += z.detach().sum(0)
        return z


class Remembering(nn.Module):
    """A recurrent cell that keeps its state in the module, as a stateful LSTM does."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.RNNCell(4, 2), torch.zeros(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.cell(x, torch.zeros(len(x), 2))
        z = self.cell(x, self.state)
        self.state = z.detach()
        return z


class Codebook(nn.Module):
    """Vector quantisation, whose codes are moving means of what is near them (EMA)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("codes", torch.linspace(-1, 1, 9).reshape(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        nearest = torch.cdist(z.detach(), self.codes).argmin(1)
        if self.training:
            for code in range(3):
                if bool((mine := nearest == code).any()):
                    self.codes.data[code].lerp_(z.detach()[mine].mean(0), 0.2)
        return self.head(z + (self.codes[nearest] - z).detach() * 0.5)


class Observed(nn.Module):
    """Fake quantisation by the extremes that an observer has seen, as in quantisation-aware training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.observer = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        if self.training:
            self.observer(z.detach())
        return z / (self.observer.max_val - self.observer.min_val)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), norm, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        z = self.norm(z[:, :, None] * torch.tensor([1.0, -0.5, 2.0])).mean(2) if z.ndim < 3 else z
        return self.last(z.tanh())


class Words(nn.Module):
    """An embedding that shortens the rows that it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, max_norm=0.1, padding_idx=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, :2].abs() * 3).long() % 5
        return self.head(self.table(index[:, 0]) + self.table(index[:, 1]))


class Hidden(nn.Module):
    """A layer whose outputs are moved by a state, which is written in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 5), nn.Linear(5, 2), how
        self.count, self.held = 0, {"inside": [torch.zeros(5)]}
        self.register_buffer("state", torch.zeros(5))
        self.register_buffer("weight", self.first.weight.detach().clone())
        if how == "at first None":
            self.later = None

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        now = z.detach().mean(0)
        if not self.training:
            pass
        elif self.how == "reset":
            self.count += 1
            self.state = now if self.count % 3 else torch.zeros(5)
        elif self.how == "late":
            self.count += 1
            self.state = {1: torch.ones(5), 5: now}.get(self.count, self.state)
        elif self.how == "nested":
            self.held["inside"][0] = now
        elif self.how in ("at first None", "at first missing"):
            self.later = now if getattr(self, "later", None) is None else 0.9 * self.later + 0.1 * now
        elif self.how == "partly":
            self.weight = 0.8 * self.weight.detach() + 0.2 * self.first.weight
        if self.how == "partly":
            return self.last((x @ (self.first.weight if self.training else self.weight).T).tanh())
        later = getattr(self, "later", None)
        return self.last((z - self.state - self.held["inside"][0] - (0 if later is None else later)).tanh())


class Recomputed(nn.Module):
    """A batch norm inside activation checkpointing, which writes its statistics twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.utils.checkpoint.checkpoint(lambda x: self.norm(self.first(x)), x, use_reentrant=False)
        return self.last(z.tanh())


class Filled(nn.Module):
    """A buffer that the first forward pass fills, or registers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 2), how
        if how == "filled":
            self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        if self.training and getattr(self, "mean", None) is None:
            if self.how == "filled":
                self.mean = z.detach().mean(0)
            else:
                self.register_buffer("mean", z.detach().mean(0))
        elif self.training:
            self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        return z - self.mean


class Sparse(nn.Module):
    """Reads a sparse matrix, which is a buffer or an attribute, and counts."""

    def __init__(self, layout: str, registered: bool) -> None:
        super().__init__()
        mixing = (torch.eye(4) + 0.5 * torch.eye(4).roll(1, 0)).to_sparse(layout=getattr(torch, layout))
        self.layer, self.count = nn.Linear(4, 2), 0
        if registered:
            self.register_buffer("mixing", mixing)
        else:
            self.mixing = mixing

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return self.layer(torch.sparse.mm(self.mixing, x.T).T) / (1 + 0.1 * self.count)


def spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 2)))


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Normed(nn.BatchNorm1d(6)),
    "batch norm without momentum": lambda: Normed(nn.BatchNorm1d(6, momentum=None, affine=False)),
    "instance norm": lambda: Normed(nn.InstanceNorm1d(6, track_running_stats=True)),
    **{f"counter, {how}": lambda how=how: Counting(how) for how in ("an attribute", "a list", "a buffer", "an integer")},
    "notes": Noting,
    "a sparse buffer": lambda: Sparse("sparse_coo", True),
    "a sparse buffer, by rows": lambda: Sparse("sparse_csr", True),
    "a sparse attribute": lambda: Sparse("sparse_coo", False),
}
TOLD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral_norm": (spectral, "_u"),
    **{f"running scale, {how}": (lambda how=how: Scaled(how), "scale") for how in ("in place", "by data", "assigned")},
    "running scale, a plain number": (lambda: Scaled("a plain number"), "Scaled.size"),
    "max_norm": (Words, "table.weight"),
    "hidden state": (Remembering, "Remembering.state"),
    "hidden, reset": (lambda: Hidden("reset"), "state"),
    **{f"hidden, {how}": (lambda how=how: Hidden(how), "later") for how in ("at first None", "at first missing")},
    "hidden, nested": (lambda: Hidden("nested"), "held"),
    "hidden, partly": (lambda: Hidden("partly"), "weight"),
    "codebook": (Codebook, "codes"),
    "observer": (Observed, "observer.max_val, observer.min_val"),
}
MODELS = RIGHT | {name: make for name, (make, _) in TOLD.items()}


class Case:
    """A model of the table, trained for a few steps; the hyperparameter is the logarithm of a decay."""

    def __init__(self, name: str) -> None:
        draw = torch.Generator().manual_seed(0)
        self.make, (self.x, self.x_val) = MODELS[name], (torch.randn(n, 4, generator=draw) for n in (12, 8))
        self.y, self.y_val = (torch.randn(n, 2, generator=draw) for n in (12, 8))

    def train_loss(self, model: nn.Module, hparams: Any, batch: Any) -> Tensor:
        loss = (model.train()(self.x) - self.y).square().mean()
        return loss + hparams["decay"].exp() * sum(p.square().sum() for p in model.parameters())

    def val_loss(self, model: nn.Module, hparams: Any, batch: Any) -> Tensor:
        return (model.eval()(self.x_val) - self.y_val).square().mean()

    def begin(self) -> tuple[nn.Module, optim.Optimizer]:
        torch.manual_seed(1)
        model = self.make()
        return model, optim.SGD(model.parameters(), lr=0.3, momentum=0.5)

    def problem(self) -> tuple[Problem, optim.Optimizer]:
        model, inner = self.begin()
        return Problem(model, nn.ParameterDict({"decay": torch.tensor(-2.0)}), self.train_loss, self.val_loss), inner

    def trained(self, decay: float) -> float:
        """The validation loss at the end of a plain training."""
        model, inner = self.begin()
        for _ in range(STEPS):
            inner.zero_grad()
            self.train_loss(model, {"decay": torch.tensor(decay)}, None).backward()
            inner.step()
        return self.val_loss(model, {}, None).item()

    def slope(self) -> float:
        return (self.trained(-2 + 1e-5) - self.trained(-2 - 1e-5)) / 2e-5

    def replayed(self, **options: Any) -> Any:
        problem, inner = self.problem()
        return hypergradient(problem, None, None, Replay([None] * STEPS, **options), inner=inner)

    def unrolled(self, *, checkpoint: bool = False, stop: int = STEPS) -> BilevelOptimizer:
        problem, inner = self.problem()
        method = Unrolled(STEPS, checkpoint=checkpoint)
        outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
        optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[None], hypergradient=method, every=STEPS)
        self.go(optimizer, stop)
        return optimizer

    def go(self, optimizer: BilevelOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.loss(None).backward()
            optimizer.step()


def found_ways(case: Case) -> dict[str, Any]:
    return {
        "Replay": case.replayed(),
        "Replay in two segments": case.replayed(segments=2),
        "Unrolled": case.unrolled().record.result,
        "Unrolled with checkpoints": case.unrolled(checkpoint=True).record.result,
    }


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_written_is_carried_from_step_to_step_with_its_derivative(name: str) -> None:
    case = Case(name)
    truth = case.slope()
    for way, found in found_ways(case).items():
        assert found.grads["decay"].item() == pytest.approx(truth, rel=1e-6), way
        assert found.val_loss.item() == pytest.approx(case.trained(-2.0), rel=1e-12), way
        assert found.solution.status is Status.FINISHED, way


@pytest.mark.parametrize("name", TOLD)
def test_what_is_written_without_a_derivative_is_told_and_its_values_are_carried(name: str) -> None:
    case, word = Case(name), TOLD[name][1]
    truth = case.slope()
    for way, found in found_ways(case).items():
        assert found.val_loss.item() == pytest.approx(case.trained(-2.0), rel=1e-12), way
        assert found.solution.status is Status.UNSEEN_WRITES, way
        assert word in found.solution.detail, way
        assert abs(found.grads["decay"].item() / truth - 1) > 1e-3, way  # else there would be nothing to tell


@pytest.mark.parametrize("how", ["filled", "registered"])
def test_a_buffer_that_the_first_forward_pass_makes_is_refused_and_leaves_no_trace(how: str) -> None:
    case = Case("notes")
    case.make = lambda: Filled(how)
    with pytest.raises(ValueError, match=r"registers or fills the buffer 'mean'.*run the model on one batch before"):
        case.replayed()
    problem, inner = case.problem()
    with pytest.raises(ValueError, match="registers or fills"):
        hypergradient(problem, None, None, Replay([None] * 2), inner=inner)
    assert getattr(problem.model, "mean", None) is None
    problem.loss(None)
    assert hypergradient(problem, None, None, Replay([None] * 2), inner=inner).solution.status is Status.UNSEEN_WRITES


def train_then_eval(model: nn.Module, x: Tensor) -> Tensor:
    z = model.train()(x)
    return (model.eval()(x) - z).square().mean()


def test_statistics_are_constants_for_a_step_and_what_is_missing_in_its_derivative_is_told() -> None:
    """The steps are those of plain torch, to the bit of the validation loss."""
    case = Case("batch norm")
    plain = case.train_loss
    case.train_loss = lambda m, h, b: plain(m, h, b) + h["decay"].exp() * train_then_eval(m, case.x)
    found = case.replayed()
    assert found.val_loss.item() == pytest.approx(case.trained(-2.0), rel=1e-12)
    assert found.solution.status is Status.UNSEEN_WRITES
    assert found.solution.detail == "written: running statistics"
    unrolled = case.unrolled().record
    assert (unrolled.status, unrolled.result.solution.detail) == (Status.UNSEEN_WRITES, found.solution.detail)


def test_statistics_that_a_checkpoint_writes_again_are_told() -> None:
    case = Case("batch norm")
    case.make = Recomputed
    found = case.replayed()
    assert found.solution.status is Status.UNSEEN_WRITES
    assert "running statistics" in found.solution.detail


def test_a_micro_batch_in_eval_mode_after_one_in_training_mode() -> None:
    case = Case("batch norm")

    def losses(model: nn.Module, hparams: Any, half: int) -> Tensor:
        z = model.train(half == 0)(case.x)
        return (z - case.y).square().mean() + hparams["decay"].exp() * sum(p.square().sum() for p in model.parameters())

    model, inner = case.begin()
    problem = Problem(model, nn.ParameterDict({"decay": torch.tensor(-2.0)}), losses, case.val_loss)
    outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[None], hypergradient=Unrolled(3), every=3)
    for _ in range(3):
        optimizer.zero_grad()
        for half in (0, 1):
            optimizer.loss(half).backward()
        optimizer.step()
    assert optimizer.record.status is Status.UNSEEN_WRITES


@pytest.mark.parametrize(
    "name", ["batch norm", "instance norm", "max_norm", "hidden state", "counter, a list", "hidden, nested"]
)
def test_a_replay_leaves_no_trace(name: str) -> None:
    problem, inner = Case(name).problem()
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    held = {key: repr(value) for part in problem.model.modules() for key, value in vars(part).items()}
    hypergradient(problem, None, None, Replay([None] * 3), inner=inner)
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    assert {key: repr(value) for part in problem.model.modules() for key, value in vars(part).items()} == held
    assert not inner.state


@pytest.mark.parametrize("name", ["batch norm", "max_norm", "running scale, assigned"])
def test_a_checkpoint_within_a_window_holds_the_buffers(name: str) -> None:
    case = Case(name)
    whole, first, second = case.unrolled(), case.unrolled(stop=3), case.unrolled(stop=0)
    saved = through_disk([first.problem.model.state_dict(), first.state_dict()])
    second.problem.model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    case.go(second, STEPS - 3)
    assert torch.equal(second.record.result.grads["decay"], whole.record.result.grads["decay"])
    assert second.record.status is whole.record.status


def test_buffers_that_do_not_change_are_held_once() -> None:
    """As a causal mask: 20 steps hold one copy."""
    case = Case("counter, a buffer")
    problem, inner = case.problem()
    problem.model.register_buffer("mask", torch.ones(1000))
    outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[None], hypergradient=Unrolled(STEPS), every=STEPS)
    case.go(optimizer, STEPS - 1)
    begins = optimizer._progress.recent.trajectory(problem.weights()).begins
    assert len({at.modules.tensors["model.mask"].data_ptr() for _, at in begins}) == 1
    assert len({at.modules.tensors["model.real"].data_ptr() for _, at in begins}) == STEPS - 1


def test_gradient_accumulation_writes_twice_a_step() -> None:
    case = Case("batch norm")

    def losses(model: nn.Module, hparams: Any, half: Any) -> Tensor:
        x, y = case.x[half], case.y[half]
        decay = sum(p.square().sum() for p in model.parameters())
        return ((model.train()(x) - y).square().mean() + hparams["decay"].exp() * decay) / 2

    def trained(decay: float) -> float:
        model, inner = case.begin()
        for _ in range(4):
            inner.zero_grad()
            for half in (slice(0, 5), slice(5, 12)):
                losses(model, {"decay": torch.tensor(decay)}, half).backward()
            inner.step()
        return case.val_loss(model, {}, None).item()

    model, inner = case.begin()
    problem = Problem(model, nn.ParameterDict({"decay": torch.tensor(-2.0)}), losses, case.val_loss)
    outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[None], hypergradient=Unrolled(4), every=4)
    for _ in range(4):
        optimizer.zero_grad()
        for half in (slice(0, 5), slice(5, 12)):
            optimizer.loss(half).backward()
        optimizer.step()
    slope = (trained(-2 + 1e-5) - trained(-2 - 1e-5)) / 2e-5
    assert optimizer.record.result.grads["decay"].item() == pytest.approx(slope, rel=1e-6)
    assert optimizer.record.status is Status.FINISHED


@pytest.mark.parametrize("name", ["batch norm", "running scale, in place", "spectral_norm"])
def test_an_audit_retrains_with_what_is_written(name: str) -> None:
    case = Case(name)
    problem, inner = case.problem()
    found = audit(problem, None, None, Replay([None] * STEPS), inner=inner)
    line = found.directions[0]
    sign = 1 if case.slope() > 0 else -1
    assert line.measured * sign == pytest.approx(case.slope(), rel=1e-3)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3, momentum=None), (5, 3, 4, 4)),
    "BatchNorm3d, no affine": (lambda: nn.BatchNorm3d(3, affine=False), (5, 3, 2, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True, affine=True), (5, 3, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (5, 3, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_differentiable_statistics_are_torchs_do(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    plain, ours = (make().to(dtype) for _ in range(2))
    x = torch.randn(shape, dtype=dtype)
    for mode in (True, True, False):
        expected = plain.train(mode)(x)
        with DifferentiableStatistics().around(ours):
            torch.testing.assert_close(ours.train(mode)(x), expected)
        torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["notes", "running scale, in place"])
def test_what_is_tried_draws_no_random_numbers_of_the_validation_loss(name: str) -> None:
    case = Case(name)
    plain = case.val_loss
    case.val_loss = lambda m, h, b: plain(m, h, b) * (1 + torch.rand(()))
    found = case.replayed()
    assert found.val_loss.item() == pytest.approx(case.trained(-2.0), rel=1e-12)
    assert (found.solution.status is Status.FINISHED) is (name == "notes")


def test_a_write_that_depends_on_the_weights_in_a_later_step_alone_is_told() -> None:
    case = Case("notes")
    case.make = lambda: Hidden("late")
    for found in (case.replayed(), case.unrolled().record.result):
        assert found.solution.status is Status.UNSEEN_WRITES
        assert found.solution.detail == "written: state"
