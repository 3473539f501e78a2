"""The training loss sees the hyperparameters as they are now, and gives them no gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import hoptim
from hoptim import HyperParameters, Problem
from hoptim.problem.detached_view import DetachedView

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(2.0))
        self.offset = 0.0

    def forward(self) -> Tensor:
        return self.b + self.offset + getattr(self, "more", 0.0)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("c", None)

    def forward(self) -> Tensor:
        return torch.tensor(1.0) if self.c is None else self.c


class Everything(nn.Module):
    """Hyperparameters with attributes of many kinds, all of which its value depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.optional, self.child = nn.Parameter(torch.tensor(3.0)), Optional(), Child()
        self.register_buffer("temperature", torch.tensor(1.0))
        self.number, self.text, self.flag, self.numpy_number = 1.0, "1.0", True, np.float64(1.0)
        self.cfg, self.nested = {"scale": 1.0}, {"deep": {"scale": [1.0]}}
        self.items, self.array = [1.0, 1.0], np.ones(2)
        self.other, self.tensor, self.lock = SimpleNamespace(scale=1.0), torch.tensor(1.0), threading.Lock()
        self.pair, self.function = (1.0, None), lambda: 1.0

    def forward(self) -> Tensor:
        with self.lock:
            plain = self.number * float(self.text) * (1 if self.flag else 7) * float(self.numpy_number)
            plain *= self.cfg["scale"] * self.nested["deep"]["scale"][0] * sum(self.items) * float(self.array.sum()) / 4
            plain *= self.other.scale * self.pair[0] * self.function()
        return (
            self.a * self.child() * self.optional() * self.tensor * self.temperature * plain * (1 if self.training else 11)
        )


CHANGES: dict[str, Callable[[Everything], Any]] = {
    "a dict, in place": lambda h: h.cfg.update(scale=10.0),
    "a dict, another": lambda h: setattr(h, "cfg", {"scale": 10.0}),
    "a dict in a dict": lambda h: h.nested["deep"]["scale"].__setitem__(0, 10.0),
    "a list, in place": lambda h: h.items.append(5.0),
    "a list, another": lambda h: setattr(h, "items", [5.0]),
    "an array, in place": lambda h: np.multiply(h.array, 3.0, out=h.array),
    "an array, another": lambda h: setattr(h, "array", np.full(2, 3.0)),
    "a number": lambda h: setattr(h, "number", 2.5),
    "a number of numpy": lambda h: setattr(h, "numpy_number", np.float32(2.5)),
    "a word": lambda h: setattr(h, "text", "2.5"),
    "a truth": lambda h: setattr(h, "flag", False),
    "a tuple": lambda h: setattr(h, "pair", (4.0, None)),
    "a function": lambda h: setattr(h, "function", lambda: 6.0),
    "an object, in place": lambda h: setattr(h.other, "scale", 4.0),
    "an object, another": lambda h: setattr(h, "other", SimpleNamespace(scale=4.0)),
    "a tensor, in place": lambda h: h.tensor.fill_(4.0),
    "a tensor, another": lambda h: setattr(h, "tensor", torch.tensor(4.0)),
    "a buffer, in place": lambda h: h.temperature.fill_(4.0),
    "a buffer, another": lambda h: setattr(h, "temperature", torch.tensor(4.0)),
    "a buffer, by float()": lambda h: h.float().temperature.fill_(4.0),
    "the mode": lambda h: h.eval(),
    "a child's attribute": lambda h: setattr(h.child, "offset", 3.0),
    "a child's new attribute": lambda h: setattr(h.child, "more", 3.0),
    "a child": lambda h: setattr(h, "child", Doubled(Child())),
    "a parameter, in place": lambda h: h.a.data.fill_(9.0),
    "a parameter's data": lambda h: setattr(h.a, "data", torch.tensor(9.0)),
    "a parameter, another": lambda h: setattr(h, "a", nn.Parameter(torch.tensor(9.0))),
    "a child's parameter, another": lambda h: setattr(h.child, "b", nn.Parameter(torch.tensor(9.0))),
    "a parameter where there was none": lambda h: setattr(h.optional, "c", nn.Parameter(torch.tensor(9.0))),
    "a parameter, not learned": lambda h: h.a.requires_grad_(False).fill_(9.0),
    "a method of its own": lambda h: setattr(h, "forward", lambda: torch.tensor(5.0)),
    "a hook": lambda h: h.register_forward_hook(lambda _, __, value: 2 * value),
}


class Doubled(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self) -> Tensor:
        return 2 * self.inside()


def scaled(model: Any, hparams: Any, batch: Any) -> Tensor:
    return hparams() * model(batch).square().mean()


@pytest.mark.parametrize("name", CHANGES)
def test_a_training_step_sees_what_has_changed(name: str) -> None:
    hparams, model, values = Everything(), nn.Linear(2, 1), []
    problem = Problem(model, hparams, scaled, scaled)
    for change in (CHANGES[name], lambda _: None):
        ours, theirs = problem.loss(X), scaled(model, hparams, X)
        assert torch.equal(ours, theirs)
        ours.backward()
        assert torch.equal(model.weight.grad, torch.autograd.grad(theirs, model.weight)[0])
        assert [p.grad for p in hparams.parameters()] == [None] * len(list(hparams.parameters()))
        values.append(ours.item())
        model.weight.grad = None
        change(hparams)
    assert values[0] != values[1]


def test_a_step_and_a_hypergradient_see_the_same_attribute() -> None:
    hparams, model = Everything(), nn.Linear(2, 1)
    problem = Problem(model, hparams, scaled, scaled)
    problem.loss(X)
    hparams.cfg["scale"] = 10.0
    result = hoptim.hypergradient(problem, X, X)
    assert problem.loss(X).item() == pytest.approx(result.train_loss.item())


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a deep copy"))
    hparams = Everything()
    view = DetachedView(hparams)
    hparams.number = 2.0
    with view as seen:
        assert seen.lock is hparams.lock
        assert seen.cfg is hparams.cfg
        assert seen.array is hparams.array
        assert seen.temperature is hparams.temperature
        assert seen.a.data_ptr() == hparams.a.data_ptr()
        assert type(seen) is Everything
        assert isinstance(seen.a, nn.Parameter)


def test_the_view_stays_the_same_object_when_attributes_change() -> None:
    """Else a compiled loss would be compiled again."""
    hparams = Everything()
    view = DetachedView(hparams)
    with view as first:
        parts = [*first.modules(), *first.parameters()]
    hparams.number, hparams.child.offset = 2.0, 1.0
    with view as second:
        assert all(a is b for a, b in zip(parts, [*second.modules(), *second.parameters()], strict=True))


def test_an_attribute_that_is_gone_is_gone_in_the_view() -> None:
    hparams = Everything()
    view = DetachedView(hparams)
    del hparams.number
    with view as seen:
        assert not hasattr(seen, "number")


def test_a_child_under_another_name_has_it_in_the_view() -> None:
    hparams = nn.ModuleDict({"one": nn.Linear(1, 1)})
    view = DetachedView(hparams)
    hparams["other"] = hparams.pop("one")
    with view as seen:
        assert [name for name, _ in seen.named_parameters()] == ["other.weight", "other.bias"]


# References to parameters and modules


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.third = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x))).sum()


def test_what_is_tied_stays_tied() -> None:
    hparams = Tied()
    view = DetachedView(hparams)
    with view as seen:
        assert seen.third is seen.first
        assert seen.second.weight is seen.first.weight
        assert [name for name, _ in seen.named_parameters()] == [name for name, _ in hparams.named_parameters()]
        assert torch.equal(seen(X), hparams(X))
        assert not seen(X).requires_grad
    hparams.second.weight = nn.Parameter(torch.ones(2, 2))
    with view as seen:
        assert seen.second.weight is not seen.first.weight
        assert torch.equal(seen(X), hparams(X))


class Aliased(nn.Module):
    """Layers and parameters that plain attributes refer to as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.layers, self.pair = [self.one, self.two], (self.two, "two")
        self.by_name = OrderedDict(one=self.one)
        self.weights, self.biases = {"one": self.one.weight}, [self.one.bias]
        self.one.parent = [self]
        self.scale, self.method, self.methods = 1.0, self.by_one, {"two": self.two.forward}
        self.hooked = 0
        self.two.register_forward_hook(self.count)

    def by_one(self, x: Tensor) -> Tensor:
        return self.one(x) * self.one.parent[0].scale

    def count(self, *_: Any) -> None:
        self.hooked += 1

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        x = self.by_name["one"](self.pair[0](x)) + self.methods["two"](x) + self.method(x)
        return (x @ self.weights["one"] + self.biases[0]).sum()


def test_aliases_of_layers_and_parameters_are_those_of_the_view() -> None:
    hparams = Aliased()
    view = DetachedView(hparams)
    hooked = 0
    for change in (
        lambda: hparams.one.weight.data.mul_(2),
        lambda: setattr(hparams, "scale", 5.0),
        lambda: hparams.layers.append(hparams.one),
        lambda: hparams.layers.reverse(),
        lambda: hparams.weights.update(one=hparams.two.weight),
        lambda: None,
    ):
        with view as seen:
            value = seen(X)
        hooked += 2
        assert hparams.hooked == hooked
        assert not value.requires_grad
        assert torch.equal(value, hparams(X))
        hooked += 2
        change()


def test_a_new_list_of_layers_is_followed_and_stays_the_users() -> None:
    hparams = Aliased()
    view = DetachedView(hparams)
    layers = hparams.layers = [hparams.two]
    for _ in range(3):
        with view as seen:
            assert torch.equal(seen(X), hparams(X))
            assert not seen(X).requires_grad
        assert hparams.layers is layers
        layers.append(hparams.one)


@pytest.mark.parametrize("bad", ["closure", "partial", "nested"])
def test_a_loss_that_reaches_the_parameters_past_the_view_is_refused(bad: str) -> None:
    hparams = Child()
    if bad == "closure":
        hparams.function = lambda: hparams.b.exp()
    elif bad == "partial":
        hparams.function = functools.partial(Child.forward, hparams)
    else:
        held = {"deep": [hparams.b]}
        hparams.function = lambda: held["deep"][0] * 2
    view = DetachedView(hparams)
    with view as seen:
        value = seen.function()
    with pytest.raises(
        ValueError, match=r"train_loss uses \['b'\], but not through the model and hparams that it is given.*closure"
    ):
        view.check_detached(value)


def test_a_loss_within_the_view_passes_and_is_checked_once() -> None:
    hparams, w = Everything(), torch.ones((), requires_grad=True)
    view = DetachedView(hparams)
    with view as seen, torch.no_grad():
        view.check_detached(seen() * w)  # it has no graph, so that nothing can be told from it
    with pytest.raises(ValueError, match=r"uses \['a', 'child\.b'\], but not through"):
        view.check_detached(hparams() * w)
    with view as seen:
        view.check_detached(seen() * w)
    view.check_detached(hparams() * w)  # later ones cost nothing


class Layered(nn.Module):
    """Hyperparameters that hold a frozen layer of the model, and refer to the model."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.a, self.layer, self.models = nn.Parameter(torch.tensor(2.0)), model[0], [model]

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.layer(x).sum() * self.models[0](x).sum()


def test_the_model_and_its_layers_are_the_live_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    hparams = Layered(model)
    with DetachedView(hparams, beside=model) as seen:
        assert seen.layer is model[0]
        assert seen.models[0] is model
        seen(X).backward()
    expected = torch.autograd.grad(hparams(X), model[1].weight)[0]
    assert torch.equal(model[1].weight.grad, expected)
    assert hparams.a.grad is None


# What the loss writes


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.layer = nn.Parameter(torch.tensor(2.0)), nn.Linear(2, 2)
        self.calls, self.seen, self.log, self.once = 0, None, [], True
        self.register_buffer("count", torch.tensor(0))
        self.layers = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.seen, self.log = x, [*self.log, self.calls]
        self.chosen, self.nothing = [self.layer, self.a], None
        if "once" in vars(self):
            del self.once
        if len(self.layers) == 1:
            self.built = nn.Linear(2, 2)
            self.layers.append(self.built)
        return self.a * self.built(x).sum()


def test_what_the_loss_writes_into_attributes_reaches_the_module() -> None:
    hparams = Writing()
    view = DetachedView(hparams)
    for step in range(1, 4):
        with view as seen:
            value = seen(X)
        assert (hparams.calls, hparams.count.item(), hparams.log) == (step, step, list(range(1, step + 1)))
        assert hparams.seen is X
        assert not hasattr(hparams, "once")
        assert hparams.nothing is None
        assert hparams.chosen[0] is hparams.layer
        assert hparams.chosen[1] is hparams.a
        assert hparams.layers == [hparams.layer, hparams.built]
        assert [name for name, _ in hparams.named_children()] == ["layer", "built"]
        assert torch.equal(value, hparams.a * hparams.built(X).sum())
        assert value.requires_grad == (step == 1)  # the layer that the first step has built was no hyperparameter before
    hparams.calls = 10
    with view as seen:
        seen(X)
    assert hparams.calls == 11


def test_what_is_written_during_the_backward_pass_and_by_the_user_meet() -> None:
    """A checkpointed loss runs again after it has returned; of two writes the user's stays."""
    hparams = Everything()
    view = DetachedView(hparams)
    with view as seen:
        pass
    seen.number, seen.text, hparams.text, hparams.pair = 2.0, "2.0", "3.0", (3.0, None)
    for _ in range(2):
        with view as seen:
            assert (seen.number, seen.text, seen.pair) == (2.0, "3.0", (3.0, None))
        assert (hparams.number, hparams.text, hparams.pair) == (2.0, "3.0", (3.0, None))


def test_what_a_failing_loss_had_written_is_not_lost() -> None:
    hparams = Writing()
    view = DetachedView(hparams)
    with contextlib.suppress(ZeroDivisionError), view as seen:
        seen(X)
        raise ZeroDivisionError
    with view as seen:
        seen(X)
    assert hparams.calls == 2


@pytest.mark.parametrize("which", ["a", "layer.bias"])
def test_a_write_into_a_hyperparameter_is_an_error(which: str) -> None:
    hparams = Writing()
    with (
        pytest.raises(ValueError, match=rf"train_loss writes into hyperparameter '{which}': a loss only reads"),
        DetachedView(hparams) as seen,
    ):
        seen.get_parameter(which).add_(1)


# Gradients


class Hyper(nn.Module):
    """A net whose output scales the model's, by a list of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.calls, self.layers = 0, [self.net]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers[0](x).exp()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_steps_have_the_gradient_of_plain_ones(reentrant: bool) -> None:
    """During the backward pass the function runs again, and must find the gradient-free parameters again."""

    def plain(model: Any, hparams: Any, batch: Any) -> Tensor:
        return (model[1](hparams(batch) * model[0](batch).tanh()) * hparams(batch)).square().mean()

    def train(model: Any, hparams: Any, batch: Any) -> Tensor:
        hidden = checkpoint(lambda x: hparams(x) * model[0](x).tanh(), batch, use_reentrant=reentrant)
        scale = checkpoint(hparams, batch, use_reentrant=reentrant)
        return (model[1](hidden) * scale).square().mean()

    x, model, hparams = X.clone().requires_grad_(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), Hyper()
    problem = Problem(model, hparams, train, plain)
    for scale in (1.0, 2.0):
        with torch.no_grad():
            hparams.net[0].weight.mul_(scale)
        expected = torch.autograd.grad(plain(model, hparams, x), list(model.parameters()))
        problem.loss(x).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
        assert [p.grad for p in hparams.parameters()] == [None] * 4
        model.zero_grad()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(2, 1),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 1)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(2, 3), "weight", 2),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 1), nn.Tanh())),
    "transformer": lambda: nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(2, momentum=1.0), nn.Linear(2, 1)),
    "list": lambda: nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]),
}


def test_an_rnn_keeps_its_list_of_weights() -> None:
    """It refers to them weakly; if they were others, it would make the list again, and lay the weights out anew on a GPU."""
    hparams = nn.LSTM(2, 1)
    view = DetachedView(hparams)
    with view as seen:
        weights = seen._flat_weights
        seen(X)
        assert seen._flat_weights is weights
    assert all(held is p for held, p in zip(hparams._flat_weights, hparams.parameters(), strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_torchs_own_modules_are_seen_as_they_are(name: str) -> None:
    hparams = MODULES[name]()
    view = DetachedView(hparams)
    for _ in range(3):
        with view as seen:
            value = seen(X)
        live = hparams(X)
        value, live = (one[0] if isinstance(one, tuple) else one for one in (value, live))
        assert torch.equal(value, live)
        assert live.requires_grad
        assert not value.requires_grad
        with torch.no_grad():
            for p in hparams.parameters():
                p.mul_(1.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript_is_refused() -> None:
    hparams = nn.Sequential(torch.jit.script(nn.Linear(2, 1)))
    view = DetachedView(hparams)
    with view as seen:
        value = seen(X).sum()
    with pytest.raises(ValueError, match=r"train_loss uses \['0.bias', '0.weight'\], but not through"):
        view.check_detached(value)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copy_is_a_view_of_the_copied_module(duplicate: Callable[[DetachedView], DetachedView]) -> None:
    hparams = HyperParameters({"0.weight": torch.ones(2)})
    view = DetachedView(hparams)
    other = duplicate(view)
    other.module["0.weight"] = torch.full((2,), 5.0)
    with view as seen, other as seen_by_other:
        assert seen["0.weight"].tolist() == [1.0, 1.0]
        assert seen_by_other["0.weight"].tolist() == [5.0, 5.0]
        assert not seen_by_other["0.weight"].requires_grad
