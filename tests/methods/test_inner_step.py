from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from hoptim.methods.inner_step import InnerStep
from hoptim.methods.kinds import KINDS
from hoptim.methods.learned_options import Bound, learn

pytestmark = pytest.mark.filterwarnings("error")

# Each class with its options; the steps are large, so that what is off by a thousandth of a step shows in float32.
CASES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd decay": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd maximize": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "adam": (optim.Adam, {"lr": 0.1}),
    "adam amsgrad": (optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "betas": (0.5, 0.6)}),
    "adam maximize": (optim.Adam, {"lr": 0.1, "maximize": True, "eps": 0.1}),
    "adamw": (optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "nadam": (optim.NAdam, {"lr": 0.1, "weight_decay": 0.1}),
    "nadam decoupled": (optim.NAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (optim.RAdam, {"lr": 0.1, "weight_decay": 0.1}),
    "radam decoupled": (optim.RAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamax": (optim.Adamax, {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop centered": (optim.RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.9, "eps": 0.01}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
    "adadelta": (optim.Adadelta, {"weight_decay": 0.1, "eps": 0.01}),
    "rprop": (optim.Rprop, {"lr": 0.1}),
    "asgd": (optim.ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 1, "weight_decay": 0.1}),
}
# Differentiable Adam and NAdam fold the step size into another factor than the plain ones: their last bit differs.
INEXACT = (optim.Adam, optim.NAdam)
# Every option in which a step may be differentiated, in addition to weights, gradients and state.
FOLLOWED = {
    **{(optim.SGD, key): {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1} for key in ("lr", "momentum", "weight_decay")},
    **{(kind, key): {"lr": 0.1} for kind in (optim.Adam, optim.AdamW) for key in ("lr", "betas", "weight_decay")},
    **{(kind, "eps"): {"eps": 0.1} for kind in (optim.Adam, optim.AdamW, optim.NAdam, optim.Adamax, optim.Adagrad)},
    **{(optim.NAdam, key): {"lr": 0.1, "weight_decay": 0.1} for key in ("lr", "momentum_decay")},
    (optim.RAdam, "lr"): {"lr": 0.1, "weight_decay": 0.1},
    (optim.RAdam, "eps"): {"eps": 0.1},
    (optim.RMSprop, "momentum"): {"momentum": 0.9},
    (optim.RMSprop, "eps"): {"eps": 0.1, "momentum": 0.9},
    (optim.Adadelta, "eps"): {"eps": 0.1},
}
FLAGS = ("foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad", "nesterov", "centered")
REFUSED = [
    (kind, key)
    for kind in KINDS
    for key in inspect.signature(kind).parameters
    if key not in ("params", "decoupled_weight_decay", *FLAGS) and (kind, key) not in FOLLOWED
]

Tensors = dict[str, Tensor]
generator = torch.Generator().manual_seed(1)
X, Y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 2), (7,)))
SHAPES = {"a": (2, 3), "b": (3,), "c": (3,)}
START, PROBE = (
    {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()} for _ in range(2)
)


def loss(w: Tensors) -> Tensor:
    dtype = w["a"].dtype
    return (torch.tanh(X.to(dtype) @ w["a"] + w["b"]) @ w["c"] - Y.to(dtype)).square().mean()


def gradient(w: Tensors) -> Tensors:
    return dict(zip(w, torch.autograd.grad(loss(w), list(w.values()), create_graph=True), strict=True))


def probed(w: Tensors) -> Tensor:
    return torch.stack([(PROBE[name] * w[name]).sum() for name in w]).sum()


def parameters(w: Tensors = START, dtype: torch.dtype = torch.float64) -> Tensors:
    return {name: nn.Parameter(value.detach().to(dtype).clone()) for name, value in w.items()}


def real_step(inner: optim.Optimizer, w: Tensors) -> None:
    inner.zero_grad()
    loss(w).backward()
    inner.step()


def snapshot(inner: optim.Optimizer, w: Tensors) -> dict[str, Tensors]:
    return {name: {key: value.clone() for key, value in inner.state.get(p, {}).items()} for name, p in w.items()}


def started(
    kind: type[optim.Optimizer], options: dict[str, Any], w: Tensors = START, state: dict[str, Tensors] | None = None
) -> tuple[optim.Optimizer, Tensors]:
    """A real optimizer over new parameters at ``w``, with the state given: options past what its constructor allows."""
    live = parameters(w)
    inner = kind(list(live.values()), foreach=False)
    inner.param_groups[0].update(options)
    inner.defaults.update(options)
    for filled in inner.state.values():  # by the constructor, in older versions of Adagrad
        filled["sum"].fill_(options.get("initial_accumulator_value", 0.0))
    for name, entries in (state or {}).items():
        if entries:
            inner.state[live[name]] = {key: value.detach().clone() for key, value in entries.items()}
    return inner, live


def real(kind: type[optim.Optimizer], options: dict[str, Any], w: Tensors, state: dict[str, Tensors], steps: int) -> float:
    inner, live = started(kind, options, w, state)
    for _ in range(steps):
        real_step(inner, live)
    return probed(live).item()


def composed(dynamics: InnerStep, w: Tensors, leaves: Tensors, state: dict[str, Tensors] | None, steps: int) -> Tensors:
    for _ in range(steps):
        w, state = dynamics.step(w, gradient(w), leaves, state)
    return w


def central(f: Callable[[float], float], h: float = 1e-6) -> float:
    return (f(h) - f(-h)) / (2 * h)


def moved(x: Tensors, name: str, index: int, h: float) -> Tensors:
    value = x[name].detach().clone()
    value.view(-1)[index] += h
    return {**x, name: value}


def warm(kind: type[optim.Optimizer], options: dict[str, Any], steps: int) -> tuple[Tensors, dict[str, Tensors]]:
    """Weights and state after some real steps."""
    inner, live = started(kind, options)
    for _ in range(steps):
        real_step(inner, live)
    return {name: p.detach().clone() for name, p in live.items()}, snapshot(inner, live)


def learning(inner: optim.Optimizer, live: Tensors, leaves: Tensors, **options: Any) -> InnerStep:
    """The step of ``inner``, with ``leaves`` as options by name."""
    return InnerStep.of(inner, live, leaves, learn(inner, options, nn.ParameterDict(leaves), {}))


def bound(inner_step: InnerStep) -> list[str]:
    """The names of the leaves that are options."""
    options = [option for group in inner_step.groups for option in group.options.values()]
    members = [member for option in options for member in (option if isinstance(option, tuple) else (option,))]
    return [member.name for member in members if isinstance(member, Bound)]


def close(a: Tensor, b: Any) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b).reshape(a.shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_the_real_optimizer(name: str, steps_before: int, foreach: bool) -> None:
    torch.set_default_dtype(torch.float32)
    kind, options = CASES[name]
    live = parameters(dtype=torch.float32)
    inner = kind(list(live.values()), **options, foreach=foreach)
    for _ in range(steps_before):
        real_step(inner, live)
    dynamics = InnerStep.of(inner, live, {})
    new: Tensors = {name: p.detach().clone().requires_grad_() for name, p in live.items()}
    before, state = {name: p.detach().clone() for name, p in live.items()}, None
    for _ in range(3):
        new, state = dynamics.step(new, gradient(new), {}, state)
        real_step(inner, live)
    assert state is not None
    exact = not issubclass(kind, INEXACT) and not foreach
    for key, p in live.items():
        assert set(state[key]) == set(inner.state.get(p, {}))
        pairs = [(new[key], p, before[key]), *((state[key][k], v, torch.zeros_like(v)) for k, v in inner.state[p].items())]
        for ours, theirs, origin in pairs:
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            if exact:
                assert torch.equal(ours, theirs)
            elif kind is not optim.ASGD:  # whose foreach differs from its own loop by 5e-5: torch's matter
                rounding = 2.0**-22 * theirs.abs() + 2e-6 * (theirs - origin).abs().max()
                assert ((ours - theirs).abs() <= rounding).all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_derivative_in_the_weights(name: str, steps_before: int, steps: int) -> None:
    kind, options = CASES[name]
    w, state = warm(kind, options, steps_before)
    inner, live = started(kind, options, w, state)
    ours = torch.autograd.grad(probed(composed(InnerStep.of(inner, live, {}), live, {}, None, steps)), list(live.values()))
    for key, derivative in zip(live, ours, strict=True):
        fd = [
            central(lambda h, i=i, key=key: real(kind, options, moved(w, key, i, h), state, steps))
            for i in range(derivative.numel())
        ]
        close(derivative, fd)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_derivative_in_the_state(name: str, steps: int) -> None:
    kind, options = CASES[name]
    w, state = warm(kind, options, 4)
    inner, live = started(kind, options, w, state)
    dynamics = InnerStep.of(inner, live, {})
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "grad_avg", "sum", "acc_delta"):
        if key not in state["a"]:
            continue
        given = {n: {k: v.clone().requires_grad_(k == key) for k, v in entries.items()} for n, entries in state.items()}
        result = probed(composed(dynamics, live, {}, given, steps))
        (ours,) = torch.autograd.grad(result, [given["a"][key]], allow_unused=True)

        def at(i: int, h: float, key: str = key) -> float:
            return real(kind, options, w, {**state, "a": moved(state["a"], key, i, h)}, steps)

        of_squares = key in ("exp_avg_sq", "square_avg", "sum", "acc_delta")  # small, and positive: a relative step
        sizes = [1e-4 * abs(value) if of_squares else 1e-6 for value in state["a"][key].flatten().tolist()]
        fd = [central(lambda h, i=i: at(i, h), h) for i, h in enumerate(sizes)]
        close(torch.zeros(2, 3) if ours is None else ours, fd)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("steps_before", [0, 5])
@pytest.mark.parametrize(("kind", "key"), FOLLOWED, ids=lambda x: getattr(x, "__name__", x))
def test_derivative_in_a_hyperparameter(kind: type[optim.Optimizer], key: str, steps_before: int, steps: int) -> None:
    check_derivative_in_a_hyperparameter(kind, key, FOLLOWED[kind, key], steps_before, steps)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.0}),
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2}),
        (optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.0}),
        (optim.Adam, {"lr": 0.1, "weight_decay": 0.0}),
        (optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
        (optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
        (optim.NAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        (optim.RAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ],
)
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_derivative_in_lr_and_decay_also_where_the_decay_is_zero(
    kind: type[optim.Optimizer], options: dict[str, Any], key: str
) -> None:
    for steps_before, steps in ((0, 1), (2, 1), (0, 3), (2, 3)):
        check_derivative_in_a_hyperparameter(kind, key, options, steps_before, steps)


def check_derivative_in_a_hyperparameter(
    kind: type[optim.Optimizer], key: str, options: dict[str, Any], steps_before: int, steps: int
) -> None:
    options = {k: v.default for k, v in inspect.signature(kind).parameters.items() if k == key} | options
    w, state = warm(kind, options, steps_before)
    many = isinstance(options[key], tuple)
    values = list(options[key]) if many else [float(options[key])]
    leaves: Tensors = {f"leaf {i}": nn.Parameter(torch.tensor(value)) for i, value in enumerate(values)}

    def with_names(names: list[Any]) -> dict[str, Any]:
        return {key: tuple(names) if many else names[0]}

    def with_values(values: list[Any]) -> dict[str, Any]:
        return {**options, **with_names(values)}

    inner, live = started(kind, with_values(values), w, state)
    dynamics = learning(inner, live, leaves, **with_names(list(leaves)))
    assert bound(dynamics) == list(leaves)
    result = probed(composed(dynamics, live, leaves, None, steps))
    assert result.item() == pytest.approx(real(kind, options, w, state, steps), rel=1e-12)
    for i, ours in enumerate(torch.autograd.grad(result, list(leaves.values()), allow_unused=True)):
        moving = [[v + h * (j == i) for j, v in enumerate(values)] for h in (1e-6, -1e-6)]
        up, down = (real(kind, with_values(at), w, state, steps) for at in moving)
        close(torch.tensor(0.0) if ours is None else ours, (up - down) / 2e-6)


def test_derivatives_in_hyperparameters_and_weights_at_once_through_the_gradient() -> None:
    """The decay in the loss acts through the gradients, the rate through the optimizer: mixed second derivatives too."""
    lr = nn.Parameter(torch.tensor(0.1))
    inner, live = started(optim.SGD, {"momentum": 0.9})
    dynamics = learning(inner, live, {"lr": lr}, lr="lr")

    def slope(rate: Tensor) -> Tensor:
        new = composed(dynamics, live, {"lr": rate}, None, 3)
        return torch.autograd.grad(probed(new), rate, create_graph=True)[0]

    (second,) = torch.autograd.grad(slope(lr), lr)
    close(second, central(lambda h: slope((lr + h).detach().requires_grad_()).item(), 1e-5))


@pytest.mark.parametrize(("kind", "key"), REFUSED, ids=lambda x: getattr(x, "__name__", x))
def test_option_that_torch_makes_a_constant_of_is_refused(kind: type[optim.Optimizer], key: str) -> None:
    default = inspect.signature(kind).parameters[key].default
    leaf = nn.Parameter(torch.tensor(0.5))
    is_pair = isinstance(default, tuple)
    inner, live = started(kind, {key: (0.5, 0.5) if is_pair else 0.5})
    with pytest.raises(TypeError, match=rf"'mine' is the {key} of {kind.__name__}"):
        learning(inner, live, {"mine": leaf}, **{key: (None, "mine") if is_pair else "mine"})
    if key != "initial_accumulator_value":  # there torch itself takes no tensor
        inner, live = started(kind, {key: (0.5, leaf) if is_pair else leaf})
        assert bound(InnerStep.of(inner, live, {})) == []  # no hyperparameter: a constant


def test_momentum_of_nesterov_is_refused() -> None:
    leaf = nn.Parameter(torch.tensor(0.5))
    inner, live = started(optim.SGD, {"lr": 0.1, "nesterov": True})
    with pytest.raises(TypeError, match="'m' is the momentum of SGD"):
        learning(inner, live, {"m": leaf}, momentum="m")


def dead(kind: type[optim.Optimizer], options: dict[str, Any], x: float, steps: int) -> tuple[Tensor, Tensor]:
    """The real steps' end, and the derivative of the dynamics', on L = w² from x."""
    w = nn.Parameter(torch.tensor([x, 1.0]))
    inner = kind([w], **options)
    dynamics = InnerStep.of(inner, {"w": w}, {})
    new, state = {"w": w.detach().clone().requires_grad_()}, None
    first = new["w"]
    for _ in range(steps):
        new, state = dynamics.step(new, {"w": 2 * new["w"]}, {}, state)
        w.grad = 2 * w.detach()
        inner.step()
    return w.detach(), torch.autograd.grad(new["w"][0], first)[0][0]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "name", ["adam", "adam amsgrad", "adamw", "nadam", "rmsprop", "rmsprop centered", "adagrad", "adadelta", "adamax"]
)
def test_derivative_is_right_where_the_gradient_is_zero(name: str, steps: int) -> None:
    """torch's own is NaN: the root of a second moment of 0 has an infinite slope."""
    kind, options = CASES[name]
    options = {**options, "eps": 0.5, "weight_decay": 0} | ({"initial_accumulator_value": 0} if name == "adagrad" else {})
    ours = dead(kind, options, 0.0, steps)[1]
    h = 1e-7
    fd = (dead(kind, options, h, steps)[0][0] - dead(kind, options, -h, steps)[0][0]) / (2 * h)
    assert ours.item() == pytest.approx(fd.item(), rel=1e-5)


def test_weights_and_state_of_a_dead_unit_have_finite_derivatives() -> None:
    w = nn.Parameter(torch.randn(4))
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    new, _ = InnerStep.of(optim.Adam([w]), {"w": w}, {}).step({"w": w}, {"w": mask * w**2}, {})
    assert torch.autograd.grad(new["w"].sum(), w)[0][2:].tolist() == [1.0, 1.0]


def everything(inner: optim.Optimizer, live: Tensors) -> list[Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    ids = [id(p) for group in inner.param_groups for p in group["params"]]
    return [copy.deepcopy(groups), ids, snapshot(inner, live), [(p.detach().clone(), p.grad.clone()) for p in live.values()]]


@pytest.mark.parametrize("name", [*CASES, "learned decay"])
def test_nothing_of_the_users_is_touched_and_no_hook_is_called(name: str) -> None:
    leaf, calls = nn.Parameter(torch.tensor(0.1)), []
    kind, options = CASES.get(name, (optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}))
    live = parameters()
    inner = kind(list(live.values()), **options)
    learned = learn(
        inner, {} if name in CASES else {"lr": "leaf", "weight_decay": "leaf"}, nn.ParameterDict({"leaf": leaf}), {}
    )
    real_step(inner, live)
    before = everything(inner, live)
    inner.register_step_post_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    leaf.grad = None
    state = inner.state
    dynamics = InnerStep.of(inner, live, {"leaf": leaf}, learned)
    assert bound(dynamics) == [] if name in CASES else ["leaf", "leaf"]
    grads = {name: p.grad for name, p in live.items()}
    given = copy.deepcopy(dynamics.state)
    new, after = dynamics.step(live, grads, {"leaf": leaf})
    for value in (*new.values(), *(v for entries in after.values() for v in entries.values())):
        value.detach().fill_(7)  # what comes out shares no memory with what went in
    handle.remove()
    assert not calls
    assert inner.state is state
    assert leaf.grad is None
    for old, now in ((before, everything(inner, live)), (given, dynamics.state)):
        torch.testing.assert_close(now, old, rtol=0, atol=0)
    assert all(p.grad is grads[name] for name, p in live.items())


def test_later_steps_and_schedules_of_the_live_optimizer_change_nothing() -> None:
    lr = torch.tensor(0.1)
    live = parameters()
    inner = optim.Adam(list(live.values()), lr=lr)
    real_step(inner, live)
    dynamics, w = InnerStep.of(inner, live, {}), {name: p.detach().clone() for name, p in live.items()}
    grads = {name: torch.ones_like(p) for name, p in w.items()}
    old = dynamics.step(w, grads, {})
    lr.fill_(5.0)
    inner.param_groups[0]["eps"] = 3.0
    real_step(inner, live)
    torch.testing.assert_close(dynamics.step(w, grads, {}), old, rtol=0, atol=0)


def test_groups_have_their_own_options_and_what_has_no_gradient_or_group_stays() -> None:
    live = parameters()
    frozen, extra = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    decay = nn.Parameter(torch.tensor([0.3]))
    groups = [
        {"params": [live["a"], frozen], "lr": 0.2},
        {"params": [live["b"], live["c"]], "momentum": 0.5},
    ]
    inner = optim.SGD(groups, lr=0.1)
    weights, leaves = {**live, "extra": extra}, {"decay": decay}
    dynamics = learning(inner, weights, leaves, weight_decay=["decay", None])
    assert bound(dynamics) == ["decay"]
    assert set(dynamics.state) == {"a", "b", "c"}
    grads = {name: torch.ones_like(p) for name, p in weights.items() if name != "b"}
    new, state = dynamics.step(weights, grads, leaves)
    torch.testing.assert_close(new["a"], live["a"] - 0.2 * (1 + 0.3 * live["a"]))
    torch.testing.assert_close(new["c"], live["c"] - 0.1)
    assert torch.equal(new["b"], live["b"])
    assert torch.equal(new["extra"], extra)
    assert state["b"] == {}  # torch makes its buffer in the first step with a gradient
    new, state = dynamics.step(new, {name: torch.ones_like(p) for name, p in weights.items()}, leaves, state)
    torch.testing.assert_close(new["b"], live["b"] - 0.1)
    torch.testing.assert_close(new["c"], live["c"] - 0.1 - 0.15)
    new, state = dynamics.step(weights, {}, leaves)
    assert all(torch.equal(new[name], weights[name]) for name in weights)
    new, _ = dynamics.step({"a": live["a"]}, grads, leaves)
    assert set(new) == {"a"}


def test_dampening_spares_the_first_gradient_of_each_weight_only() -> None:
    live = parameters()
    inner = optim.SGD(list(live.values()), lr=0.1, momentum=0.9, dampening=0.3)
    ones = {name: torch.ones_like(p) for name, p in live.items()}
    late = {name: g for name, g in ones.items() if name != "b"}
    dynamics = InnerStep.of(inner, live, {})
    new, state = dynamics.step(live, late, {})
    assert "momentum_buffer" not in state["b"]
    new, state = dynamics.step(new, ones, {}, state)
    for grads in (late, ones):
        for name, p in live.items():
            p.grad = grads.get(name)
        inner.step()
    for name, p in live.items():
        assert torch.equal(new[name], p)
        assert torch.equal(state[name]["momentum_buffer"], inner.state[p]["momentum_buffer"])


def test_without_gradients_the_bits_are_the_same_and_there_is_no_graph() -> None:
    leaves: Tensors = {
        name: nn.Parameter(torch.tensor([value])) for name, value in (("lr", 0.1), ("one", 0.5), ("two", 0.9))
    }
    live: Tensors = {"a": nn.Parameter(torch.randn(1001))}  # enough for torch's two forms of one product to differ in a bit
    inner = optim.Adam(live.values())
    dynamics = learning(inner, live, leaves, lr="lr", betas=("one", "two"))
    grads = {"a": live["a"] ** 2}
    state = {"a": {**dynamics.state["a"], "exp_avg_sq": torch.rand(1001)}}
    with_graph = dynamics.step(live, grads, leaves, state)
    with torch.no_grad():
        without = dynamics.step(live, grads, leaves, state)
    torch.testing.assert_close(with_graph, without, rtol=0, atol=0)
    for values, expected in ((with_graph, True), (without, False)):
        assert values[0]["a"].requires_grad is expected
        assert values[1]["a"]["exp_avg_sq"].requires_grad is expected


def test_a_leaf_that_is_not_given_is_named() -> None:
    leaves: Tensors = {"one": nn.Parameter(torch.tensor([0.9])), "two": nn.Parameter(torch.tensor([0.99]))}
    inner, live = started(optim.Adam, {})
    with pytest.raises(ValueError, match="leaves lack 'two', which is the betas of Adam"):
        learning(inner, live, leaves, betas=("one", "two")).step(live, gradient(live), {"one": leaves["one"]})


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)])
def test_adam_with_a_step_size_of_zero_stays_and_keeps_its_derivative(lr: Any) -> None:
    inner, live = started(optim.AdamW, {"lr": lr})
    new, state = InnerStep.of(inner, live, {}).step(live, gradient(live), {})
    real_step(inner, live)
    for name, p in live.items():
        assert torch.equal(new[name], p)
        torch.testing.assert_close(state[name], dict(inner.state[p]), rtol=0, atol=0)
        assert torch.equal(torch.autograd.grad(new[name].sum(), p, retain_graph=True)[0], torch.ones_like(p))


ZEROS: dict[str, tuple[type[optim.Optimizer], str, dict[str, Any]]] = {
    "sgd, momentum": (optim.SGD, "momentum", {"lr": 0.1}),
    "sgd, momentum beside a decay": (optim.SGD, "momentum", {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop, momentum": (optim.RMSprop, "momentum", {"lr": 0.1, "eps": 0.1}),
    "sgd, lr": (optim.SGD, "lr", {"momentum": 0.9, "weight_decay": 0.1}),
    "adam, lr": (optim.Adam, "lr", {"weight_decay": 0.1}),
    "adam amsgrad, lr": (optim.Adam, "lr", {"amsgrad": True, "betas": (0.5, 0.6)}),
    "adamw, lr": (optim.AdamW, "lr", {"weight_decay": 0.1}),
    "nadam, lr": (optim.NAdam, "lr", {"weight_decay": 0.1}),
    "radam, lr": (optim.RAdam, "lr", {"weight_decay": 0.1}),
}


def from_zero(f: Callable[[float], float], h: float = 1e-4) -> float:
    """f'(0) by one-sided differences, to the third order."""
    return (-11 * f(0.0) + 18 * f(h) - 9 * f(2 * h) + 2 * f(3 * h)) / (6 * h)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("name", ZEROS)
def test_derivative_in_a_hyperparameter_that_is_zero_is_that_from_above(name: str, steps_before: int, steps: int) -> None:
    """Where torch's own code takes another branch, or divides by it."""
    kind, key, options = ZEROS[name]
    w, state = warm(kind, {**options, key: 0.5}, steps_before)
    leaf = nn.Parameter(torch.tensor(0.0))
    inner, live = started(kind, options, w, state)
    result = probed(composed(learning(inner, live, {"mine": leaf}, **{key: "mine"}), live, {"mine": leaf}, None, steps))
    assert result.item() == pytest.approx(real(kind, {**options, key: 0.0}, w, state, steps), rel=1e-12)
    (ours,) = torch.autograd.grad(result, [leaf])
    close(ours, from_zero(lambda h: real(kind, {**options, key: h}, w, state, steps)))
    assert ours != 0 or (key == "momentum" and (steps_before, steps) == (0, 1))  # no gradient has come before the first


def test_momentum_that_begins_at_zero_builds_on_the_gradients_of_its_steps() -> None:
    """The live SGD has no buffer then, however many steps it has taken."""
    options = {"lr": 0.1, "momentum": 0.0}
    w, state = warm(optim.SGD, options, 3)
    assert not state["a"]
    leaf = nn.Parameter(torch.tensor(0.0))
    inner, live = started(optim.SGD, options, w)
    result = probed(composed(learning(inner, live, {"mine": leaf}, momentum="mine"), live, {"mine": leaf}, None, 2))
    (ours,) = torch.autograd.grad(result, [leaf])
    close(ours, from_zero(lambda h: real(optim.SGD, {**options, "momentum": h}, w, {}, 2)))
    assert ours != 0


def test_derivatives_at_zero_in_closed_form() -> None:
    """SGD: w⁺ = w − lr·(μ·buffer + g), so that ∂w⁺/∂μ = −lr·buffer. Adam: ∂w⁺/∂lr is the whole of a step with lr = 1."""
    leaf = nn.Parameter(torch.tensor(0.0))
    inner, live = started(optim.SGD, {"lr": 0.1})
    grads = {name: torch.ones_like(p) for name, p in live.items()}
    buffers = {name: {"momentum_buffer": torch.full_like(p, 3.0)} for name, p in live.items()}
    new, _ = learning(inner, live, {"mine": leaf}, momentum="mine").step(live, grads, {"mine": leaf}, buffers)
    assert torch.autograd.grad(new["a"][0, 0], leaf)[0].item() == pytest.approx(-0.1 * 3.0, rel=1e-12)
    inner, live = started(optim.Adam, {})
    new, _ = learning(inner, live, {"mine": leaf}, lr="mine").step(live, grads, {"mine": leaf})
    assert torch.equal(new["a"], live["a"])
    assert torch.autograd.grad(new["a"][0, 0], leaf)[0].item() == pytest.approx(-1 / (1 + 1e-8), rel=1e-12)


def test_a_dampened_step_at_zero_momentum_is_torchs_undamped_one() -> None:
    leaf = nn.Parameter(torch.tensor(0.0))
    options = {"lr": 0.1, "dampening": 0.3}
    w, state = warm(optim.SGD, {**options, "momentum": 0.9}, 3)
    inner, live = started(optim.SGD, options, w, state)
    new, _ = learning(inner, live, {"mine": leaf}, momentum="mine").step(live, gradient(live), {"mine": leaf})
    assert probed(new).item() == pytest.approx(real(optim.SGD, {**options, "momentum": 0.0}, w, state, 1), rel=1e-12)
    expected = -0.1 * sum((PROBE[name] * state[name]["momentum_buffer"]).sum() for name in w)
    close(torch.autograd.grad(probed(new), leaf)[0], expected)


class OwnStep(optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OwnGroup(optim.Adam):
    def _init_group(self, *args: Any) -> Any:
        return super()._init_group(*args)


class OwnOptimizer(optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        return None


MUON = [optim.Muon] if hasattr(optim, "Muon") else []  # since torch 2.9


@pytest.mark.parametrize("make", [optim.LBFGS, optim.SparseAdam, optim.Adafactor, *MUON, OwnOptimizer, OwnStep, OwnGroup])
def test_class_that_torch_cannot_differentiate_is_refused(make: Any) -> None:
    w = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match=rf"{make.__name__}\b.*SGD, Adam, AdamW"):
        InnerStep.of(make([w]), {"w": w}, {})


def test_step_that_was_replaced_on_the_instance_is_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    inner = optim.SGD([w])
    inner.step = lambda closure=None: None  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="has a step that is not SGD's"):
        InnerStep.of(inner, {"w": w}, {})


def test_every_class_of_torch_with_a_differentiable_step_is_served() -> None:
    found = {c for c in vars(optim).values() if isinstance(c, type) and "differentiable" in inspect.signature(c).parameters}
    assert set(KINDS) == found
    assert set(KINDS) == {kind for kind, _ in CASES.values()}


class Wide(optim.SGD):
    """A subclass with a constructor of its own, and torch's step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.25, momentum=0.5)


def test_subclass_with_torchs_own_step_and_a_scheduled_optimizer_are_served() -> None:
    model = nn.Linear(2, 1)
    inner = Wide(model)
    optim.lr_scheduler.StepLR(inner, 1)  # wraps inner.step
    weights: Tensors = dict(model.named_parameters())
    new, _ = InnerStep.of(inner, weights, {}).step(weights, {name: torch.ones_like(p) for name, p in weights.items()}, {})
    torch.testing.assert_close(new["bias"], weights["bias"] - 0.25)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scalar_weights_and_half_precision(kind: type[optim.Optimizer], dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    live: Tensors = {"x": nn.Parameter(torch.tensor(0.7, dtype=dtype)), "y": nn.Parameter(torch.ones(2, dtype=dtype))}
    inner = kind(list(live.values()), lr=0.1)
    dynamics = InnerStep.of(inner, live, {})
    grads: Tensors = {name: torch.full_like(p, 0.3) for name, p in live.items()}
    new, state = dynamics.step(live, grads, {})
    for name, p in live.items():
        p.grad = grads[name]
    inner.step()
    for name, p in live.items():
        torch.testing.assert_close(new[name], p.detach(), rtol=float(torch.finfo(dtype).eps) * 2, atol=0)
        assert new[name].dtype == dtype
        assert {k: (v.dtype, v.shape) for k, v in state[name].items()} == {
            k: (v.dtype, v.shape) for k, v in inner.state[p].items()
        }


def test_a_step_leaves_no_gradient_on_its_result_and_is_freed_without_the_collector() -> None:
    inner, live = started(optim.Adam, {"lr": 0.1})
    new, state = InnerStep.of(inner, live, {}).step(live, gradient(live), {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert new["a"].grad is None
    assert len(caught) == 1  # torch's own, for a tensor with a graph and no gradient
    alive = [weakref.ref(new["a"]), weakref.ref(state["a"]["exp_avg"])]
    del new, state
    assert [ref() for ref in alive] == [None, None]
