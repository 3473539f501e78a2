"""Any optimizer as the inner one: a table of them, and what is asked of each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import same
from test_optimizer import through_disk
from tiny import BATCHES, VAL, direct_of, g_of, hess, mixed, tiny
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hoptim import (
    GMRES,
    MINRES,
    BilevelOptimizer,
    Exact,
    HyperParameters,
    Implicit,
    Neumann,
    Problem,
    Unrolled,
    Update,
    WarmStart,
)
from hoptim.methods.kinds import KINDS

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:.*torch.jit.script",
    "ignore:Converting a tensor with requires_grad=True to a scalar",  # by LBFGS itself, in older versions of torch
)

TO_THE_END = Implicit(MINRES(terms=60, tolerance=1e-13), curvature=Exact())
FEW_TERMS = Implicit(MINRES(terms=3), curvature=Exact())  # where runs are compared with each other


# Optimizers that are not torch's -----------------------------------------------------------------------------------------


class Lion(optim.Optimizer):
    """The sign of an average; as found in many repositories."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.sub_(average.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                average.lerp_(p.grad, 1 - group["betas"][1])
        return loss


class SAM(optim.Optimizer):
    """Two gradients a step: at the weights, and where the loss is larger; the second moves the weights."""

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = optim.SGD(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        loss = closure()
        held = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in held]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        with torch.no_grad():
            for p in held:
                p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        closure()
        with torch.no_grad():
            for p, old in zip(held, before, strict=True):
                p.copy_(old)
        self.base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups


class Lookahead(optim.Optimizer):
    """Holds an optimizer, and every third step goes back half the way; it knows no ``super().__init__``, as some do not."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.base = optim.Adam(params, **options)
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            held = [p for group in self.param_groups for p in group["params"]]
            with torch.no_grad():
                for p, slow in zip(held, self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.slow, self.count = copy.deepcopy(state_dict["slow"]), state_dict["count"]


class Plain(optim.Optimizer):
    """A step that takes no closure, and no ``defaults``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.param_groups[0]["lr"] = 0.05
        del self.defaults

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def step(self) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(self.param_groups[0]["lr"] * p.grad)


# What they train ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A problem, its batches, and dL_V/dλ at the live weights and hyperparameters by other means, given the decay c."""

    problem: Problem
    batches: list[Any]
    val: Any
    truth: Callable[[Problem, Any, Tensor], Tensor]


def dense(problem: Problem, at: Any, c: Tensor) -> Tensor:
    """∂L_V/∂λ − Bᵀ (A + diag(c))⁻¹ g, of the weights that are trained."""
    names = list(problem.weights())
    kept = torch.cat([torch.full((p.numel(),), name in names) for name, p in problem.model.named_parameters()])
    whole = copy.deepcopy(problem)
    for p in whole.model.parameters():
        p.requires_grad_()
    x = torch.linalg.solve(hess(whole, at)[kept][:, kept] + c.diag(), g_of(whole)[kept])
    return direct_of(whole) - mixed(whole, at)[kept].T @ x


def net() -> Setting:
    return Setting(tiny(), list(BATCHES), VAL, dense)


def matrices() -> Setting:
    """The net with its biases frozen."""
    setting = net()
    for p in setting.problem.model.parameters():
        p.requires_grad_(p.ndim == 2)
    return setting


def quartic(model: nn.Module, see: Callable[[Any, Any], Tensor], batches: list[Any]) -> Setting:
    """L_T = Σ (w − a)²/2 + w⁴/4, L_V = Σ (w − 1)²/2 over the weights seen, so that dL_V/da = Σ (w − 1)/(1 + 3w² + c)."""
    hparams = nn.ParameterDict({"a": nn.Parameter(torch.tensor(0.3))})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (see(m, b) - h["a"]).square().sum() + 0.25 * see(m, b).pow(4).sum()

    def truth(problem: Problem, at: Any, c: Tensor) -> Tensor:
        w = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
        return ((w - 1) / (1 + 3 * w**2 + c)).sum()[None]

    problem = Problem(model, hparams, train, lambda m, h, b: 0.5 * (see(m, b) - 1).square().sum())
    return Setting(problem, batches, batches[0], truth)


def table() -> Setting:
    """The rows of an embedding, with sparse gradients."""
    return quartic(nn.Embedding(4, 2, sparse=True), lambda m, b: m(b), [torch.randperm(4) for _ in range(6)])


# The table ---------------------------------------------------------------------------------------------------------------


def one_group(named: dict[str, nn.Parameter]) -> Any:
    return list(named.values())


def two_groups(named: dict[str, nn.Parameter]) -> Any:
    """Matrices and biases, the biases with a rate of their own and without decay."""
    parts = [[p for p in named.values() if (p.ndim == 2) is matrix] for matrix in (True, False)]
    return [{"params": parts[0]}, {"params": parts[1], "lr": 0.01, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Row:
    kind: Any
    options: dict[str, Any] = field(default_factory=dict)
    setting: Callable[[], Setting] = net
    groups: Callable[[dict[str, nn.Parameter]], Any] = one_group
    closure: bool = False

    def build(self, problem: Problem) -> optim.Optimizer:
        options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.options.items()}
        named = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
        return self.kind(self.groups(named), **options)


DECAY = {"lr": 0.05, "weight_decay": 0.1}
ROWS: dict[str, Row] = {
    "SGD": Row(optim.SGD, {"lr": 0.1}),
    "SGD momentum": Row(optim.SGD, {"momentum": 0.9, "dampening": 0.3, **DECAY}),
    "SGD nesterov": Row(optim.SGD, {"momentum": 0.9, "nesterov": True, **DECAY}),
    "SGD maximize": Row(optim.SGD, {"momentum": 0.9, "lr": 1e-3, "maximize": True, "weight_decay": 0.05}),
    "Adam": Row(optim.Adam, {"lr": 0.02}),
    "Adam amsgrad": Row(optim.Adam, {"amsgrad": True, "betas": (0.5, 0.6), **DECAY}),
    "Adam maximize": Row(optim.Adam, {"lr": 1e-3, "maximize": True}),
    "AdamW": Row(optim.AdamW, {**DECAY}),
    "AdamW amsgrad": Row(optim.AdamW, {"amsgrad": True, "betas": (0.5, 0.6), **DECAY}),
    "AdamW maximize": Row(optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "maximize": True}),
    "NAdam": Row(optim.NAdam, {**DECAY}),
    "NAdam decoupled": Row(optim.NAdam, {"decoupled_weight_decay": True, **DECAY}),
    "RAdam": Row(optim.RAdam, {**DECAY}),
    "RAdam decoupled": Row(optim.RAdam, {"decoupled_weight_decay": True, **DECAY}),
    "RAdam decoupled, rectified": Row(optim.RAdam, {"decoupled_weight_decay": True, "betas": (0.5, 0.9), **DECAY}),
    "Adamax": Row(optim.Adamax, {**DECAY}),
    "RMSprop": Row(optim.RMSprop, {"lr": 0.01}),
    "RMSprop centered": Row(optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "Adagrad": Row(optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.3, **DECAY}),
    "Adadelta": Row(optim.Adadelta, {"lr": 0.9, "rho": 0.8}),
    "Rprop": Row(optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3)}),
    "ASGD": Row(optim.ASGD, {"t0": 2, "lambd": 0.1, **DECAY}),
    "LBFGS": Row(optim.LBFGS, {"lr": 0.3, "max_iter": 3}, closure=True),
    "LBFGS strong_wolfe": Row(optim.LBFGS, {"max_iter": 4, "line_search_fn": "strong_wolfe"}, closure=True),
    "SparseAdam": Row(optim.SparseAdam, {"lr": 0.05}, table),
    "Adafactor": Row(optim.Adafactor, {"lr": 0.05, "foreach": False}),
    "Adafactor foreach": Row(optim.Adafactor, {"lr": 0.05, "foreach": True}),
    **({"Muon": Row(optim.Muon, {"lr": 0.05, "weight_decay": 0.0}, matrices)} if hasattr(optim, "Muon") else {}),
    "foreach": Row(optim.SGD, {"foreach": True, "momentum": 0.9, **DECAY}),
    "not foreach": Row(optim.AdamW, {"foreach": False, **DECAY}),
    "fused SGD": Row(optim.SGD, {"fused": True, "momentum": 0.9, **DECAY}),
    "fused Adam": Row(optim.Adam, {"fused": True, "amsgrad": True, **DECAY}),
    "fused AdamW": Row(optim.AdamW, {"fused": True, **DECAY}),
    "fused Adagrad": Row(optim.Adagrad, {"fused": True, **DECAY}),
    "tensor lr": Row(optim.Adam, {"lr": torch.tensor(0.05), "foreach": False}),
    "tensor lr and betas": Row(
        optim.AdamW,
        {
            "lr": torch.tensor(0.05, dtype=torch.float64),
            "betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)),
            "foreach": False,
        },
    ),
    "two groups, SGD": Row(optim.SGD, {"momentum": 0.9, **DECAY}, groups=two_groups),
    "two groups, AdamW": Row(optim.AdamW, {**DECAY}, groups=two_groups),
    "named weights": Row(optim.Adam, {"lr": 0.02}, groups=lambda named: list(named.items())),
    "Lion": Row(Lion),
    "SAM": Row(SAM, {"lr": 0.05, "momentum": 0.9}, closure=True),
    "Lookahead": Row(Lookahead, {"lr": 0.02}),
    "Plain": Row(Plain),
}


class Run:
    """The user's loop, on a BilevelOptimizer or on the bare optimizer; ``weights`` and ``lambdas`` after each step."""

    def __init__(self, row: Row, every: int | None = None, method: Any = TO_THE_END, **options: Any) -> None:
        torch.manual_seed(0)
        self.row, self.setting = row, row.setting()
        self.problem = self.setting.problem
        self.inner = row.build(self.problem)
        outer = optim.Adam(self.problem.hparams.parameters(), lr=0.05)
        self.optimizer = BilevelOptimizer(
            self.inner, outer, self.problem, val_batches=[self.setting.val], every=every, hypergradient=method, **options
        )
        self.weights: list[Any] = []
        self.lambdas: list[Any] = []

    def go(self, first: int, last: int, each: Callable[[], None] = lambda: None) -> Run:
        for i in range(first, last):
            self.lambdas.append({name: p.detach().clone() for name, p in self.problem.hparams.named_parameters()})
            step(self.row, self.optimizer, lambda i=i: self.optimizer.loss(self.setting.batches[i % 6]), each)
            self.weights.append(copy.deepcopy(self.problem.model.state_dict()))
        return self


def step(row: Row, optimizer: Any, loss: Callable[[], Tensor], each: Callable[[], None] = lambda: None) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        each()
        return value

    if row.closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def bare(row: Row, lambdas: list[Any]) -> tuple[optim.Optimizer, list[Any]]:
    """The same training without hoptim, at hyperparameters that are given for each step; a new LBFGS after they moved."""
    torch.manual_seed(0)
    setting = row.setting()
    optimizer, problem, found = row.build(setting.problem), setting.problem, []
    for i, hparams in enumerate(lambdas):
        if row.kind is optim.LBFGS and i and not same(hparams, lambdas[i - 1]):
            optimizer = row.build(setting.problem)
        step(row, optimizer, lambda i=i, h=hparams: problem.train_loss(problem.model, h, setting.batches[i % 6]))
        found.append(copy.deepcopy(problem.model.state_dict()))
    return optimizer, found


def without_hoptim(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "hoptim"}


def own_decay(problem: Problem, inner: optim.Optimizer) -> Tensor:
    """c, where training ends at ∇L_T + c ⊙ w = 0, for all weights that are trained; 0 where hoptim does not know it.

    A decoupled decay is found by two real steps u from copies of the state: u₀ without gradient and first moment, which is
    the decay alone, and u₁ with a gradient of δ, which all former ones had too. So c = (u₀ / w) / ((u₁ − u₀) / δ).
    """
    found = {id(p): torch.zeros_like(p) for p in problem.weights().values()}
    for group in inner.param_groups if type(inner) in KINDS else ():
        decay = group.get("weight_decay", 0.0) + group.get("lambd", 0.0)
        for p in group["params"]:
            is_decoupled = group.get("decoupled_weight_decay", False) and decay
            found[id(p)] += _by_steps(inner, group, p) if is_decoupled else decay * (-1 if group.get("maximize") else 1)
    return torch.cat([c.flatten() for c in found.values()])


def _by_steps(inner: optim.Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    before = inner.state[p]
    delta = 1e-4 * before["exp_avg_sq"].sqrt()

    def change(gradient: Tensor) -> Tensor:
        w = p.detach().clone().requires_grad_()
        twin = type(inner)([{**group, "params": [w]}])
        beta1, beta2 = map(float, group["betas"])
        # The step will decay the second moment and count itself: begin so that it ends at the present ones.
        state = {key: value.clone() for key, value in before.items()}
        state |= {"exp_avg": gradient * (1 - beta1 ** (before["step"] - 1)), "exp_avg_sq": before["exp_avg_sq"] / beta2}
        if group["maximize"]:
            state["exp_avg"].neg_()
        state["step"] -= 1
        if "mu_product" in state:
            state["mu_product"] /= beta1 * (1 - 0.5 * 0.96 ** (before["step"] * group["momentum_decay"]))
        twin.state[w] = state
        w.grad = gradient
        twin.step()
        return p.detach() - w.detach()

    u0, u1 = change(torch.zeros_like(p)), change(delta)
    return (u0 / p.detach()) / ((u1 - u0) / delta)


def compare_with_truth(run: Run, found: list[Tensor]) -> None:
    """At each hyperstep from now on, before the hyperparameters move."""

    def compare(outer: Any, args: Any, kwargs: Any) -> None:
        ours = torch.cat([p.grad.flatten() for p in run.problem.hparams.parameters()])
        at, c = run.setting.batches[(run.optimizer.inner_steps - 1) % 6], own_decay(run.problem, run.inner)
        truth = run.setting.truth(run.problem, at, c)
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-9)
        found.append(leaf_values(run.problem))

    run.optimizer.outer.register_step_pre_hook(compare)


def leaf_values(problem: Problem) -> Tensor:
    return torch.cat([p.detach().flatten() for p in problem.hparams.parameters()])


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    found = {kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert found - {optim.Optimizer} == {row.kind for row in ROWS.values() if row.kind.__module__.startswith("torch.")}


def assert_is_the_bare_run(run: Run) -> None:
    plain, weights = bare(run.row, run.lambdas)
    assert same(run.weights, weights)
    assert not same(run.weights[0], run.weights[1])
    assert same(without_hoptim(run.optimizer.state_dict()), plain.state_dict())
    assert getattr(run.inner, "defaults", {}).keys() == getattr(plain, "defaults", {}).keys()


@pytest.mark.parametrize("name", ["SGD", "LBFGS", "Plain"])  # of the others the next test says so
def test_a_run_without_hypersteps_is_the_bare_optimizers_bit_for_bit(name: str) -> None:
    run = Run(ROWS[name]).go(0, 5)
    assert_is_the_bare_run(run)
    assert (run.optimizer.inner_steps, run.optimizer.hyper_steps) == (5, 0)


@pytest.mark.parametrize("name", ROWS)
def test_a_hyperstep_has_the_right_hypergradient_and_the_run_is_the_bare_optimizers_bit_for_bit(name: str) -> None:
    run = Run(ROWS[name], every=2)
    found: list[Tensor] = []
    compare_with_truth(run, found)
    run.go(0, 5)
    assert (len(found), run.optimizer.hyper_steps, run.optimizer.record.moved) == (2, 2, True)
    assert not torch.equal(found[0], found[1])
    assert_is_the_bare_run(run)


@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_run_goes_on_to_the_same_bits(name: str) -> None:
    whole, second = (Run(ROWS[name], every=2, method=FEW_TERMS) for _ in range(2))
    whole.go(0, 3)
    saved = through_disk([whole.problem.model.state_dict(), whole.optimizer.state_dict()])
    whole.go(3, 5)
    for p in (*second.problem.model.parameters(), *second.problem.hparams.parameters()):
        p.data.add_(1.0)
    second.go(0, 1)
    second.problem.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.go(3, 5)
    assert same(second.weights[1:], whole.weights[3:])
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert (second.optimizer.inner_steps, second.optimizer.hyper_steps) == (5, 2)


# Optimizer.__getstate__ drops what a subclass holds besides groups and state: torch copies no LBFGS either.
COPIED = [name for name, row in ROWS.items() if row.kind.__module__.startswith("torch.") and not row.closure]


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_goes_on_to_the_same_bits(name: str) -> None:
    run = Run(ROWS[name], every=2, method=FEW_TERMS).go(0, 3)
    twin = copy.copy(run)
    twin.optimizer, twin.weights, twin.lambdas = copy.deepcopy(run.optimizer), [], []
    twin.problem = twin.optimizer.problem
    twin.go(3, 5)
    run.go(3, 5)
    assert same(twin.weights, run.weights[3:])
    assert same(twin.optimizer.state_dict(), run.optimizer.state_dict())


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.kind not in KINDS])
def test_a_step_that_torch_cannot_differentiate_is_named_with_two_remedies(name: str) -> None:
    words = (
        rf"class {ROWS[name].kind.__name__}, whose step.*take one of torch.optim's SGD, .*or Implicit\(\) on Gradient\(\)"
    )
    for method in (Unrolled(1), Implicit(GMRES(terms=2), condition=Update(), curvature=Exact())):
        with pytest.raises(TypeError, match=words):
            Run(ROWS[name], every=1, method=method).go(0, 1)


# Two optimizers, one of them inside --------------------------------------------------------------------------------------


def matrices_only(named: dict[str, nn.Parameter]) -> Any:
    return [p for p in named.values() if p.ndim == 2]


def test_a_second_optimizer_for_the_other_weights_steps_beside_the_wrapper() -> None:
    kind = getattr(optim, "Muon", optim.SGD)
    found: dict[int | None, Any] = {}
    for every in (None, 2):
        with pytest.warns(UserWarning, match=r"not hold \['0.bias', '3.bias'\].*right if another optimizer trains them"):
            run = Run(Row(kind, {"lr": 0.05, "weight_decay": 0.0}, groups=matrices_only), every=every)
        beside = optim.AdamW([p for p in run.problem.model.parameters() if p.ndim == 1], lr=0.02, weight_decay=0.0)
        truths: list[Tensor] = []
        compare_with_truth(run, truths)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the inner optimizer does not hold")
            for i in range(4):
                beside.zero_grad()
                run.optimizer.zero_grad()
                run.optimizer.loss(run.setting.batches[i]).backward()
                beside.step()  # before the wrapper, so that a hyperstep finds all weights moved
                run.optimizer.step()
        found[every] = [copy.deepcopy(run.problem.model.state_dict()), len(truths)]
    assert [count for _, count in found.values()] == [0, 2]

    problem = tiny()
    pair = (
        kind(matrices_only(dict(problem.model.named_parameters())), lr=0.05, weight_decay=0.0),
        optim.AdamW([p for p in problem.model.parameters() if p.ndim == 1], lr=0.02, weight_decay=0.0),
    )
    for i in range(4):
        problem.model.zero_grad()
        problem.loss(BATCHES[i]).backward()
        for one in pair:
            one.step()
    assert same(found[None][0], copy.deepcopy(problem.model.state_dict()))


# Weights that come later -------------------------------------------------------------------------------------------------

METHODS: dict[str, Any] = {
    "MINRES": TO_THE_END,
    "warm MINRES": Implicit(WarmStart(MINRES(terms=60, tolerance=1e-13)), curvature=Exact()),
    "Neumann": Implicit(Neumann(terms=100), curvature=Exact()),
    "warm Neumann": Implicit(WarmStart(Neumann(terms=100)), curvature=Exact()),
}


def growing() -> Setting:
    """Weights under names, all of which the losses see, however many there are."""
    model = nn.ParameterDict({"first": nn.Parameter(torch.linspace(-1.0, 1.0, 4))})
    return quartic(model, lambda m, b: torch.cat([p.flatten() for p in m.parameters()]), [0] * 6)


def grow(run: Run, seed: float = 0.7) -> None:
    run.problem.model["second"] = nn.Parameter(torch.full((2, 3), seed))
    run.optimizer.add_param_group({"params": [run.problem.model["second"]], "lr": 0.02})


@pytest.mark.parametrize("name", METHODS)
def test_weights_added_in_mid_training_take_part_in_the_next_hyperstep(name: str) -> None:
    row = Row(optim.AdamW, {"lr": 0.05}, growing)
    run, fresh = (Run(row, every=2, method=METHODS[name]) for _ in range(2))
    truths: list[Tensor] = []
    compare_with_truth(run, truths)
    run.go(0, 3)
    grow(run)
    run.go(3, 5)
    assert len(truths) == 2
    assert set(run.optimizer.record.result.solution.value) == {"first", "second"}
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.05, 0.02]

    saved = through_disk([run.problem.model.state_dict(), run.optimizer.state_dict()])
    before = copy.deepcopy(fresh.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups|weights|model"):
        fresh.optimizer.load_state_dict(saved[1])
    assert same(fresh.optimizer.state_dict(), before)
    grow(fresh, seed=0.0)
    fresh.problem.model.load_state_dict(saved[0])
    fresh.optimizer.load_state_dict(saved[1])
    fresh.go(5, 8)
    run.go(5, 8)
    assert same(fresh.weights, run.weights[5:])
    assert same(fresh.optimizer.state_dict(), run.optimizer.state_dict())


def test_unrolled_steps_go_through_weights_that_were_added_between_two_hypersteps() -> None:
    row = Row(optim.SGD, {"lr": 0.05}, growing)
    run = Run(row, every=2, method=Unrolled(2)).go(0, 2)
    grow(run)
    w = {name: p.detach().clone() for name, p in run.problem.model.named_parameters()}
    a = run.problem.hparams["a"].detach().clone().requires_grad_()
    for _ in range(2):
        w = {name: v - (0.05 if name == "first" else 0.02) * (v - a + v**3) for name, v in w.items()}
    loss = sum(0.5 * (v - 1).square().sum() for v in w.values())
    truth = torch.autograd.grad(loss, a)[0]
    run.go(2, 4)
    torch.testing.assert_close(run.optimizer.record.result.grads["a"], truth)


# What is done to gradients and weights between -----------------------------------------------------------------------------


def clip_norm(problem: Problem) -> None:
    nn.utils.clip_grad_norm_(problem.model.parameters(), 0.05)


def clip_value(problem: Problem) -> None:
    nn.utils.clip_grad_value_(problem.model.parameters(), 0.01)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
@pytest.mark.parametrize("every", [None, 2])
def test_clipped_gradients_are_those_of_the_bare_run(clip: Callable[[Problem], None], every: int | None) -> None:
    row = ROWS["SGD momentum"]
    run = Run(row, every=every)
    run.go(0, 5, each=lambda: clip(run.problem))
    torch.manual_seed(0)
    problem = row.setting().problem
    plain = row.build(problem)
    for i, hparams in enumerate(run.lambdas):
        step(row, plain, lambda i=i, h=hparams: problem.train_loss(problem.model, h, BATCHES[i]), lambda: clip(problem))
        assert same(copy.deepcopy(problem.model.state_dict()), run.weights[i])
    assert not same(run.weights, bare(row, run.lambdas)[1])


def test_gradients_that_are_zeroed_in_place_make_the_same_run() -> None:
    run, row = Run(ROWS["SGD momentum"], every=2, method=Unrolled(2)), ROWS["SGD momentum"]
    clear = run.optimizer.zero_grad
    run.optimizer.zero_grad = lambda: clear(set_to_none=False)  # type: ignore[method-assign]
    run.go(0, 4)
    assert run.optimizer.record.status.name == "FINISHED"
    assert same(run.weights, bare(row, run.lambdas)[1])
    run.optimizer.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in run.problem.model.parameters())


@pytest.mark.parametrize("every", [None, 2])
def test_averages_of_the_weights_are_those_of_the_weights_that_were_there(every: int | None) -> None:
    run = Run(ROWS["SGD"], every=every)
    mean = swa_utils.AveragedModel(run.problem.model)
    moving = swa_utils.AveragedModel(run.problem.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    for i in range(5):
        run.go(i, i + 1)
        mean.update_parameters(run.problem.model)
        moving.update_parameters(run.problem.model)
    for name, p in mean.module.named_parameters():
        torch.testing.assert_close(p.detach(), torch.stack([w[name] for w in run.weights]).mean(0))
    for name, p in moving.module.named_parameters():
        expected = run.weights[0][name]
        for w in run.weights[1:]:
            expected = 0.8 * expected + 0.2 * w[name]
        torch.testing.assert_close(p.detach(), expected)


def test_statistics_of_an_averaged_model_are_updated_as_ever() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    hparams = HyperParameters({"decay": torch.tensor(0.1)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1]) + h["decay"] * m[0].weight.square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: F.cross_entropy(m.eval()(b[0]), b[1]))
    inner, outer = optim.SGD(model.parameters(), lr=0.1), optim.SGD(hparams.parameters(), lr=0.1)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], every=2)
    average = swa_utils.AveragedModel(problem.model)
    for i in range(4):
        optimizer.zero_grad()
        optimizer.loss(BATCHES[i]).backward()
        optimizer.step()
        average.update_parameters(problem.model)
    swa_utils.update_bn(BATCHES[:3], average)
    seen = [average.module[0](x) for x, _ in BATCHES[:3]]
    norm = average.module[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([z.mean(0) for z in seen]).mean(0).detach())
    torch.testing.assert_close(norm.running_var, torch.stack([z.var(0) for z in seen]).mean(0).detach())
    assert optimizer.hyper_steps == 2


# Flags of the implementations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused SGD", "fused Adam", "SGD momentum"])
def test_scaled_losses_and_fused_steps_make_the_bare_run(name: str) -> None:
    found = []
    for wrapped in (True, False):
        run, scaler = Run(ROWS[name]), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        optimizer: Any = run.optimizer if wrapped else run.inner
        for i, factor in enumerate((1.0, 1.0, 1e999, 1.0)):
            optimizer.zero_grad()
            scaler.scale(run.optimizer.loss(BATCHES[i]) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append([scaler.get_scale(), copy.deepcopy(run.problem.model.state_dict()), run.inner.state_dict()])
        assert run.optimizer.inner_steps == 3 * wrapped
    assert same(*found)


@pytest.mark.parametrize("kind", [optim.Adam, optim.RAdam, optim.ASGD])
def test_capturable_is_refused_by_torch_on_a_cpu_as_ever_and_the_step_does_not_count(kind: Any) -> None:
    run = Run(Row(kind, {"capturable": True, "foreach": False}))
    run.optimizer.loss(BATCHES[0]).backward()
    for optimizer in (run.inner, run.optimizer):
        with pytest.raises(AssertionError, match="capturable=True"):
            optimizer.step()
    assert run.optimizer.inner_steps == 0


# Hooks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 2])
def test_each_hook_of_a_step_is_called_once_a_step(every: int | None) -> None:
    run = Run(ROWS["Adam"], every=every)
    seen: list[str] = []
    kinds = {id(run.inner): "inner", id(run.optimizer): "wrapper", id(run.optimizer.outer): "outer"}

    def hook(what: str) -> Any:
        return lambda optimizer, args, kwargs: seen.append(f"{what} {kinds[id(optimizer)]}")

    handles = [register_optimizer_step_pre_hook(hook("global pre")), register_optimizer_step_post_hook(hook("global post"))]
    for optimizer in (run.inner, run.optimizer):
        optimizer.register_step_pre_hook(hook("pre"))
        optimizer.register_step_post_hook(hook("post"))
    try:
        run.go(0, 2)
    finally:
        for handle in handles:
            handle.remove()
    once = ["pre wrapper", "global pre inner", "pre inner", "post inner", "global post inner"]
    moved = ["global pre outer", "global post outer"] if every else []
    assert seen == [*once, "post wrapper", *once, *moved, "post wrapper"]


def test_a_hook_before_the_step_may_change_what_it_is_given() -> None:
    run, called = Run(ROWS["SGD"]), []
    run.optimizer.loss(BATCHES[0]).backward()
    run.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: called.append(1)), {}))
    run.optimizer.step()
    assert called == [1]


def test_a_profile_shows_one_step_of_the_inner_optimizer_for_each_step() -> None:
    run = Run(ROWS["SGD"])
    with torch.autograd.profiler.profile() as profile:
        run.go(0, 3)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    assert counts == {"Optimizer.step#SGD.step": 3, "Optimizer.zero_grad#SGD.zero_grad": 3}


def test_hooks_of_a_state_dict_are_called_once_and_see_the_whole() -> None:
    run = Run(ROWS["Adam"], every=2).go(0, 3)
    other, seen = Run(ROWS["Adam"], every=2), []
    run.inner.register_state_dict_post_hook(lambda o, state: state.update(mark="inner"))
    run.optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    run.optimizer.register_state_dict_post_hook(lambda o, state: seen.append(sorted(state)))
    state = run.optimizer.state_dict()
    assert seen == ["before saving", ["hoptim", "mark", "param_groups", "state"]]

    seen.clear()
    other.optimizer.register_load_state_dict_pre_hook(lambda o, given: seen.append(sorted(given)))
    other.optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.inner_steps))
    other.optimizer.register_state_dict_post_hook(lambda o, given: seen.append("saving"))
    other.optimizer.load_state_dict(state)
    assert seen == [["hoptim", "mark", "param_groups", "state"], 3]


def in_place(optimizer: Any, given: dict[str, Any]) -> None:
    given["hoptim"] = given.pop("theirs")


def returned(optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"hoptim": given["theirs"], "state": given["state"], "param_groups": given["param_groups"]}


@pytest.mark.parametrize("convert", [in_place, returned])
def test_a_hook_may_convert_what_is_loaded_and_a_load_that_fails_is_taken_back_without_it(convert: Any) -> None:
    run, other = Run(ROWS["Adam"], every=2).go(0, 3), Run(ROWS["Adam"], every=2).go(0, 2)
    state, before = run.optimizer.state_dict(), copy.deepcopy(other.optimizer.state_dict())
    renamed = {"theirs": state["hoptim"], "state": state["state"], "param_groups": state["param_groups"]}

    other.optimizer.register_load_state_dict_pre_hook(convert)
    other.optimizer.register_state_dict_post_hook(lambda o, given: {"nothing": None})
    with pytest.raises(ValueError, match="parameter groups"):
        other.optimizer.load_state_dict({**renamed, "param_groups": []})
    other.optimizer._optimizer_state_dict_post_hooks.popitem()
    assert same(other.optimizer.state_dict(), before)
    other.optimizer.load_state_dict(renamed)
    assert same(other.optimizer.state_dict(), state)
    assert "theirs" in renamed


# The wrapper inside another optimizer -------------------------------------------------------------------------------------


class Outside(optim.Optimizer):
    """Lookahead around any optimizer that is given."""

    def __init__(self, base: optim.Optimizer) -> None:
        super().__init__(base.param_groups, dict(base.defaults))
        self.base, self.param_groups = base, base.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        loss, self.count = self.base.step(closure), self.count + 1
        if self.count % 2 == 0:
            held = [p for group in self.param_groups for p in group["params"]]
            with torch.no_grad():
                for p, slow in zip(held, self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))
        return loss


def test_an_optimizer_around_the_wrapper_makes_the_run_that_it_makes_around_the_inner_one() -> None:
    found = []
    for wrapped in (True, False):
        run = Run(ROWS["Adam"])
        around = Outside(run.optimizer if wrapped else run.inner)
        for i in range(5):
            around.zero_grad()
            run.optimizer.loss(BATCHES[i]).backward()
            around.step()
        found.append([copy.deepcopy(run.problem.model.state_dict()), run.inner.state_dict()])
    assert same(*found)
