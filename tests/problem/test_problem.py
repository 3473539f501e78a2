from __future__ import annotations

import copy
import operator
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import classes, loss_at, noisy_problem, same, snapshot
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hoptim
from hoptim import HyperParameters, Problem, hypergradient


def mean_square(model: Any, hparams: Any, batch: Any) -> Tensor:
    return model(batch).square().mean() + hparams["a"] * sum(p.square().sum() for p in model.parameters())


def linear_problem() -> Problem:
    return Problem(nn.Linear(2, 1), HyperParameters({"a": torch.tensor(0.5)}), mean_square, mean_square)


def test_pure_loss_is_that_of_the_tensors_given() -> None:
    problem, x = linear_problem(), torch.randn(5, 2)
    weights = {"weight": torch.randn(1, 2, requires_grad=True), "bias": torch.randn(1, requires_grad=True)}
    leaves = {"a": torch.tensor(3.0, requires_grad=True)}
    loss = loss_at(problem, "train_loss", weights, leaves, x)
    penalty = 3.0 * (weights["weight"].square().sum() + weights["bias"].square().sum())
    torch.testing.assert_close(loss, (x @ weights["weight"].T + weights["bias"]).square().mean() + penalty)


def test_weights_and_leaves_are_the_live_ones_that_require_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    problem = Problem(model, HyperParameters({"a": torch.tensor(0.5)}), mean_square, mean_square)
    assert list(problem.weights()) == ["0.weight", "1.bias"]
    assert problem.weights()["0.weight"] is model[0].weight
    assert list(problem.leaves()) == ["a"]
    model[0].bias.requires_grad_(True)
    assert list(problem.weights()) == ["0.weight", "0.bias", "1.bias"]


def test_tied_weights_are_replaced_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    problem = Problem(model, HyperParameters({"a": torch.tensor(0.0)}), mean_square, mean_square)
    w, x = torch.randn(2, 2, requires_grad=True), torch.randn(3, 2)
    loss = loss_at(problem, "train_loss", {"0.weight": w}, {"a": torch.tensor(0.0)}, x)
    torch.testing.assert_close(loss, (x @ w.T @ w.T).square().mean())


def test_pure_loss_leaves_no_trace() -> None:
    problem = noisy_problem()
    before, tensors = snapshot(problem), [*problem.joint.parameters(), *problem.joint.buffers()]
    with problem.leave_no_trace(), problem.at() as at:
        for name in ("train_loss", "val_loss"):
            with at.loss(name, classes(8, 0)) as (loss, *_):
                torch.autograd.grad(loss, list(at.weights.values()), allow_unused=True)
    assert same(snapshot(problem), before)
    assert all(map(operator.is_, [*problem.joint.parameters(), *problem.joint.buffers()], tensors))


KERNELS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def kernels() -> list[bool]:
    cuda = torch.backends.cuda
    return [cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]


@pytest.mark.parametrize("chosen", [KERNELS, KERNELS[1:], [SDPBackend.CUDNN_ATTENTION]])
def test_attention_is_unfused_inside_and_as_the_user_chose_outside_even_after_an_error(chosen: list[SDPBackend]) -> None:
    problem = linear_problem()
    seen = []

    def fails() -> None:
        with problem.leave_no_trace():
            seen.append(kernels())
            with problem.leave_no_trace():
                seen.append(kernels())
            seen.append(kernels())
            raise ZeroDivisionError

    with sdpa_kernel(chosen):
        before = kernels()
        assert before == [kernel in chosen for kernel in KERNELS]
        with pytest.raises(ZeroDivisionError):
            fails()
        assert kernels() == before
    assert seen == [[True, False, False, False]] * 3


def test_a_pure_loss_inside_another_is_that_of_its_own_tensors() -> None:
    problem, x = linear_problem(), torch.randn(5, 2)
    first, second = ({"weight": torch.randn(1, 2), "bias": torch.randn(1)} for _ in range(2))
    leaves = {"a": torch.tensor(0.0)}
    losses = [(x @ w["weight"].T + w["bias"]).square().mean() for w in (first, second)]

    w = {name: value.requires_grad_() for name, value in first.items()}
    second = {name: value.requires_grad_() for name, value in second.items()}
    with problem.leave_no_trace():
        with problem.at(w, leaves) as at, at.loss("train_loss", x) as (outer, *_):
            assert at.weights["weight"] is w["weight"] is problem.model.weight
            live = problem.weights()["weight"]
            with problem.at(second, leaves):
                assert problem.weights()["weight"] is live
            found = outer, loss_at(problem, "train_loss", second, leaves, x)
        assert live is problem.model.weight is not w["weight"], "they are the live ones wherever they are asked for"
        again = loss_at(problem, "train_loss", second, leaves, x)
    torch.testing.assert_close(found, (losses[0], losses[1]))
    torch.testing.assert_close(again, losses[1])


def test_threads_leave_the_settings_of_the_process_as_they_were() -> None:
    """The last to leave puts them back: not what the first had already changed when the second came."""
    before, seen = kernels(), []
    first_in, second_in = threading.Event(), threading.Event()

    def first() -> None:
        with linear_problem().leave_no_trace():
            first_in.set()
            second_in.wait(10)

    def second() -> None:
        first_in.wait(10)
        with linear_problem().leave_no_trace():
            second_in.set()
            one.join()
            seen.append(kernels())

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    one.start(), other.start()
    other.join()
    assert seen == [[True, False, False, False]]
    assert kernels() == before


def test_a_pure_loss_by_itself_is_twice_differentiable() -> None:
    """Weight norm's own backward pass has no right second derivative."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    problem = Problem(model, HyperParameters({"a": torch.tensor(0.5, dtype=torch.float64)}), mean_square, mean_square)
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = {name: p.detach().clone().requires_grad_() for name, p in problem.weights().items()}
    values = list(weights.values())

    def hessian() -> Tensor:
        with problem.at(weights) as at, at.loss("train_loss", x) as (loss, *_):
            slopes = torch.cat([one.flatten() for one in torch.autograd.grad(loss, values, create_graph=True)])
            rows = [torch.autograd.grad(slope, values, retain_graph=True, materialize_grads=True) for slope in slopes]
            return torch.stack([torch.cat([one.flatten() for one in row]) for row in rows])

    bare = hessian()
    with problem.leave_no_trace():
        inside = hessian()
    torch.testing.assert_close(bare, bare.T)
    torch.testing.assert_close(bare, inside)


@pytest.mark.filterwarnings("ignore:val_loss runs .* in training mode")
def test_a_part_that_the_first_forward_pass_builds_keeps_its_buffers() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "norm"):
                self.norm = nn.BatchNorm1d(2, affine=False)
            return self.norm(self.layer(x))

    problem = Problem(Late(), HyperParameters({"a": torch.tensor(0.5)}), mean_square, mean_square)
    x = torch.randn(5, 2)
    with problem.leave_no_trace():
        loss_at(problem, "train_loss", problem.weights(), problem.leaves(), x)
        built = problem.model.norm.running_mean.clone()
        for name in ("val_loss", "train_loss"):
            loss_at(problem, name, problem.weights(), problem.leaves(), x)
    assert torch.equal(problem.model.norm.running_mean, built)


def test_weights_that_are_put_in_between_two_hypersteps_are_seen() -> None:
    problem = linear_problem()
    with problem.leave_no_trace():
        pass
    problem.model.weight = nn.Parameter(torch.ones(1, 2))
    with problem.leave_no_trace():
        assert problem.weights()["weight"] is problem.model.weight


def test_live_loss_is_the_training_loss_and_moves_buffers_as_training_does() -> None:
    problem, plain = noisy_problem(), noisy_problem()
    plain.model.load_state_dict(problem.model.state_dict())
    torch.manual_seed(1)
    ours = problem.loss(classes(8, 0))
    torch.manual_seed(1)
    theirs = plain.train_loss(plain.model, plain.hparams, classes(8, 0))
    assert torch.equal(ours, theirs)
    assert same(dict(problem.model.state_dict()), dict(plain.model.state_dict()))


def test_live_loss_gives_the_weights_their_gradient_under_checkpointing_too() -> None:
    problem, plain, x = linear_problem(), linear_problem(), torch.randn(5, 2)
    plain.model.load_state_dict(problem.model.state_dict())

    def checkpointed(model: Any, hparams: Any, batch: Any) -> Tensor:
        return checkpoint(lambda: mean_square(model, hparams, batch), use_reentrant=False)

    problem.train_loss = checkpointed
    problem.loss(x).backward()
    mean_square(plain.model, plain.hparams, x).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True)
    )
    assert [p.grad for p in problem.hparams.parameters()] == [None]
    assert all(p.requires_grad for p in problem.hparams.parameters())


def test_loss_sees_values_written_in_place_and_values_put_in_place_of_the_old() -> None:
    problem, x = linear_problem(), torch.zeros(1, 2)
    nn.init.ones_(problem.model.weight)
    nn.init.zeros_(problem.model.bias)
    (leaf,) = problem.hparams.parameters()
    for write in (lambda: leaf.data.fill_(2.0), lambda: setattr(leaf, "data", torch.tensor(3.0))):
        write()
        assert problem.loss(x).item() == 2 * leaf.item()


def test_loss_pays_for_no_copy_of_the_hyperparameters(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, x = linear_problem(), torch.randn(5, 2)
    copies: list[Any] = []
    monkeypatch.setattr("copy.deepcopy", lambda *given: copies.append(given))
    for _ in range(3):
        problem.loss(x).backward()
    assert copies == []


def test_loss_gives_a_module_of_hyperparameters_its_mode_and_its_buffers() -> None:
    hparams = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))

    def train(model: Any, hparams: Any, batch: Any) -> Tensor:
        return model(hparams(batch)).square().mean()

    problem, x = Problem(nn.Linear(2, 1), hparams, train, train), torch.randn(6, 2)
    torch.manual_seed(1)
    ours = problem.loss(x)
    torch.manual_seed(1)
    assert torch.equal(ours, train(problem.model, hparams, x))
    assert hparams[1].num_batches_tracked.item() == 2
    hparams.eval()
    assert torch.equal(problem.loss(x), train(problem.model, hparams, x))
    assert hparams[1].num_batches_tracked.item() == 2


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
def test_errors_name_the_loss(which: str) -> None:
    problem = linear_problem()
    setattr(problem, which, lambda m, h, b: m(b))
    with pytest.raises(ValueError, match=rf"{which} returned a tensor of shape \(5, 1\): return a scalar"):
        loss_at(problem, which, problem.weights(), problem.leaves(), torch.randn(5, 2))


class Scaled(nn.Module):
    """Hyperparameters with a buffer and a plain attribute that the user changes between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.scale = 1.0

    def forward(self) -> Tensor:
        return self.a * self.temperature * self.scale


def test_training_step_sees_the_buffers_and_attributes_of_the_hyperparameters() -> None:
    hparams = Scaled()
    problem = Problem(
        nn.Linear(1, 1), hparams, lambda m, h, b: h() * m.weight.abs().sum() / m.weight.abs().sum(), mean_square
    )
    seen = [problem.loss(None).item()]
    hparams.temperature = torch.tensor(5.0)
    seen.append(problem.loss(None).item())
    hparams.scale = 2.0
    seen.append(problem.loss(None).item())
    hparams.more = nn.Linear(1, 1)
    seen.append(problem.loss(None).item())
    assert seen == pytest.approx([1.0, 5.0, 10.0, 10.0])


# What only a whole hypergradient shows

X = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2)


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
@pytest.mark.parametrize("what", ["weights", "a hyperparameter"])
def test_a_loss_that_goes_past_what_it_is_given_is_refused(which: str, what: str) -> None:
    problem = linear_problem()
    before = list(problem.model.parameters()) if what == "weights" else [problem.hparams["a"]]
    name = "'bias', 'weight'" if what == "weights" else "'a'"

    def past(model: Any, hparams: Any, batch: Any) -> Tensor:
        return mean_square(model, hparams, batch) + sum(p.square().sum() for p in before)

    setattr(problem, which, past)
    with pytest.raises(
        ValueError, match=rf"{which} uses \[{name}\], but not through the model and hparams that it is given"
    ):
        hoptim.hypergradient(problem, X, X)


class Merging(nn.Linear):
    """Folds a learned part into a frozen weight when it is evaluated, as LoRA's own library does."""

    def __init__(self) -> None:
        super().__init__(2, 1, bias=False)
        self.weight.requires_grad_(False)
        self.part = nn.Parameter(torch.ones(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.weight.data = self.weight.data + self.part.data
        return x @ (self.weight + self.part).T


def test_a_frozen_weight_that_is_written_through_its_data_is_seen() -> None:
    def val(m: Any, h: Any, b: Any) -> Tensor:
        return m.eval()(b).square().mean()

    problem = Problem(Merging(), HyperParameters({"a": torch.tensor(0.5)}), mean_square, val)
    with pytest.raises(ValueError, match="val_loss writes into weight 'weight'"):
        hoptim.hypergradient(problem, X, X)


def test_a_frozen_weight_may_keep_a_gradient_of_before() -> None:
    problem = linear_problem()
    problem.model(X).sum().backward()
    problem.model.bias.requires_grad_(False)
    kept = problem.model.bias.grad.clone()
    assert hoptim.hypergradient(problem, X, X).solution.status.ok
    assert torch.equal(problem.model.bias.grad, kept)


class Borrowing(nn.Module):
    """Hyperparameters that look at the model, by a plain reference, and share a frozen layer with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.looks_at, self.frozen, self.a = [model], model[0], nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.looks_at[0](x).detach().square().mean() * self.frozen(x).square().mean()


def test_hyperparameters_may_look_at_the_model_and_share_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    hparams = Borrowing(model)

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return h(b) * m(b).square().mean()

    problem = Problem(model, hparams, train, lambda m, h, b: (m(b) - 1).square().mean())
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([hparams.a], lr=0.1)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[X], every=None)
    for _ in range(3):
        assert torch.equal(optimizer.loss(X), train(model, hparams, X))
        optimizer.zero_grad()
        optimizer.loss(X).backward()
        optimizer.step()
    assert optimizer.hyperstep().status.ok


class Counting(nn.Linear):
    """Keeps the state of a metric, and makes a buffer when it is first called."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.calls = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(2))
        return super().forward(x * self.mask)


def test_what_a_forward_pass_counts_or_registers_is_not_there_afterwards() -> None:
    problem = Problem(Counting(), HyperParameters({"a": torch.tensor(0.5)}), mean_square, mean_square)
    hoptim.hypergradient(problem, X, X)
    assert problem.model.calls == 0
    assert "mask" not in problem.model.state_dict()
    problem.model(X)
    hoptim.hypergradient(problem, X, X)
    assert problem.model.calls == 1
    assert "mask" in problem.model.state_dict()


def test_a_wrapped_model_answers_in_a_loss_as_the_one_inside_does() -> None:
    seen: list[Any] = []

    def train(m: Any, h: Any, b: Any) -> Tensor:
        other = copy.deepcopy(m)
        seen.append((bool(m), repr(m), "bias" in dir(m), type(other), isinstance(m, nn.Linear)))
        m.note = 1
        del m.note
        return mean_square(m, h, b)

    inside = nn.Linear(2, 1)
    Problem(nn.DataParallel(inside), HyperParameters({"a": torch.tensor(0.5)}), train, mean_square).loss(X)
    assert seen == [(True, repr(inside), True, nn.Linear, True)]


def test_hparams_inside_the_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    model.add_module("outer", nn.Module())
    hparams = HyperParameters({"a": torch.tensor(0.5)})
    model.outer.hparams = hparams
    with pytest.raises(ValueError, match=r"as 'outer\.hparams'.*do not register hparams inside the model") as caught:
        Problem(model, hparams, mean_square, mean_square)
    assert "part of the model that is trained" in str(caught.value)
    assert list(Problem(model[0], hparams, mean_square, mean_square).leaves()) == ["a"]  # the remedy


# A validation loss in training mode


PARTS: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.1),
    "AlphaDropout": lambda: nn.AlphaDropout(0.1),
    "BatchNorm1d": lambda: nn.BatchNorm1d(2),
    "MultiheadAttention": lambda: Attending(0.1),
}
EXEMPT: dict[str, Callable[[], nn.Module]] = {
    "p of zero": lambda: nn.Dropout(0.0),
    "without running statistics": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "LayerNorm": lambda: nn.LayerNorm(2),
    "attention without dropout": lambda: Attending(0.0),
}


class Attending(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(2, 1, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x, x, x)[0]


def validated(part: nn.Module, mode: Callable[[Any], Any]) -> list[str]:
    """The warnings of two hypergradients whose validation loss puts the model in this mode."""
    model = nn.Sequential(nn.Linear(2, 2), part, part, nn.Linear(2, 1))
    model[0].register_module("unused", nn.Dropout(0.5))

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return mean_square(mode(m), h, b)

    problem = Problem(model, HyperParameters({"a": torch.tensor(0.5)}), mean_square, val)
    hooks = [len(one._forward_pre_hooks) for one in model.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            hypergradient(problem, torch.randn(5, 2), torch.randn(5, 2))
    assert [len(one._forward_pre_hooks) for one in model.modules()] == hooks
    return [str(one.message) for one in caught if "val_loss" in str(one.message)]


@pytest.mark.parametrize("name", PARTS)
def test_a_validation_loss_in_training_mode_is_told_once(name: str) -> None:
    (message,) = validated(PARTS[name](), lambda m: m)
    assert f"val_loss runs 1 {name} in training mode, such as '1" in message
    assert "Call model.eval() in val_loss" in message
    assert validated(PARTS[name](), lambda m: m.eval()) == []


@pytest.mark.parametrize("name", EXEMPT)
def test_what_is_the_same_in_both_modes_is_not_told(name: str) -> None:
    assert validated(EXEMPT[name](), lambda m: m) == []


def test_masks_that_are_meant_are_silenced_by_the_ordinary_filter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    problem = Problem(model, HyperParameters({"a": torch.tensor(0.5)}), mean_square, mean_square)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "val_loss runs .* in training mode")
        assert hypergradient(problem, torch.randn(5, 2), torch.randn(5, 2)).solution.status.ok
