"""A weight decay that the optimizer's own step applies, learned for single weights: values in all three of its forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from hoptim import MINRES, BilevelOptimizer, Implicit, Problem, Unrolled, hypergradient, retrain
from hoptim.methods.inner_step import InnerStep
from hoptim.methods.learned_options import learn
from hoptim.recipes import WeightDecay

TO_THE_END = Implicit(MINRES(terms=60, tolerance=1e-13))
DRAW = torch.Generator().manual_seed(0)
X, Y, X_VAL, Y_VAL = (torch.randn(n, m, generator=DRAW, dtype=torch.float64) for n, m in ((12, 4), (12, 2), (9, 4), (9, 2)))

Make = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda ps: optim.SGD(ps, lr=0.1, weight_decay=0.3),
    "SGD nesterov": lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.3),
    "SGD maximize": lambda ps: optim.SGD(ps, lr=0.1, weight_decay=0.3, maximize=True),
    "Adam": lambda ps: optim.Adam(ps, lr=0.01, weight_decay=0.3),
    "Adam without foreach": lambda ps: optim.Adam(ps, lr=0.01, weight_decay=0.3, foreach=False),
    "Adam fused": lambda ps: optim.Adam(ps, lr=0.01, weight_decay=0.3, fused=True),
    "AdamW": lambda ps: optim.AdamW(ps, lr=0.01, weight_decay=0.3),
    "AdamW fused": lambda ps: optim.AdamW(ps, lr=0.01, weight_decay=0.3, fused=True),
    "AdamW with a tensor": lambda ps: optim.AdamW(ps, lr=torch.tensor(0.01), weight_decay=0.3),
    "AdamW amsgrad": lambda ps: optim.AdamW(ps, lr=0.01, weight_decay=0.3, amsgrad=True),
    "NAdam": lambda ps: optim.NAdam(ps, lr=0.01, weight_decay=0.3),
    "NAdam decoupled": lambda ps: optim.NAdam(ps, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True),
    "RAdam decoupled": lambda ps: optim.RAdam(ps, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True),
    "RMSprop": lambda ps: optim.RMSprop(ps, lr=0.01, weight_decay=0.3),
    "Adagrad": lambda ps: optim.Adagrad(ps, lr=0.01, weight_decay=0.3),
    "Adamax": lambda ps: optim.Adamax(ps, lr=0.01, weight_decay=0.3),
    "Adadelta": lambda ps: optim.Adadelta(ps, lr=0.5, weight_decay=0.3),
    "ASGD": lambda ps: optim.ASGD(ps, lr=0.01, weight_decay=0.3),
}
KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "from the start": {"towards": "start"},
    "decoupled": {"decoupled": True},
    "coupled": {"decoupled": False},
    "decoupled from the start": {"towards": "start", "decoupled": True},
    "norm 1": {"norm": 1},
    "norm 1 from the start": {"norm": 1, "towards": "start"},
}
with_each = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
with_each_per = pytest.mark.parametrize("per", ["global", "tensor", "channel", "weight"])


def fit(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model(X) - Y).square().mean()


def val(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model(X_VAL) - Y_VAL).square().mean()


def a_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def wrapped(model: nn.Module, inner: optim.Optimizer, decays: WeightDecay, loss: Any = fit, **more: Any) -> BilevelOptimizer:
    problem = Problem(model, decays, loss, val)
    options = {"options": {"weight_decay": decays}, "every": None, "val_batches": [None], **more}
    return BilevelOptimizer(inner, decays.optimizer(), problem, **options)


def steps(optimizer: optim.Optimizer, loss: Callable[[], Tensor], count: int, *, closure: bool = False) -> None:
    def compute() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    for _ in range(count):
        if closure:
            optimizer.step(compute)  # type: ignore[arg-type]
        else:
            compute()
            optimizer.step()


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


@with_each_per
@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@with_each
def test_from_the_optimizers_own_number_a_training_is_the_one_without_hoptim(make: Make, closure: bool, per: Any) -> None:
    plain, model = a_net(), a_net()
    inner = make(plain.parameters())
    steps(inner, lambda: fit(plain, None, None), 20, closure=closure)
    optimizer = wrapped(model, make(model.parameters()), WeightDecay(model, per=per))
    steps(optimizer, lambda: optimizer.loss(None), 20, closure=closure)
    assert largest_difference(plain, model) < 1e-7  # a float32 λ is .3 but for rounding
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]
    without = a_net()
    inner = make(without.parameters())
    inner.param_groups[0]["weight_decay"] = 0.0
    steps(inner, lambda: fit(without, None, None), 20)
    assert largest_difference(without, model) > 1e-4


PURE = [(name, "", per) for name in OPTIMIZERS for per in ("global", "tensor", "channel", "weight")]
PURE += [
    (name, kind, per)
    for name in ("SGD", "SGD nesterov", "SGD maximize", "Adam", "AdamW fused", "AdamW with a tensor", "RAdam decoupled")
    for kind in list(KINDS)[1:]
    for per in ("tensor", "weight")
]


@pytest.mark.parametrize(("name", "kind", "per"), PURE)
def test_a_step_as_a_pure_function_is_the_real_step(name: str, kind: str, per: Any) -> None:
    model = a_net()
    make, decays = OPTIMIZERS[name], WeightDecay(model, per=per, **KINDS[kind])
    optimizer = wrapped(model, make(model.parameters()), decays)
    with torch.no_grad():
        for number, leaf in enumerate(decays.parameters()):
            leaf.add_(torch.linspace(-1 - number, 1, leaf.numel()).view(leaf.shape))
    steps(optimizer, lambda: optimizer.loss(None), 5)
    problem = optimizer.problem
    step = InnerStep.of(optimizer.inner, problem.weights(), problem.leaves(), learned=optimizer.learned_options)
    optimizer.zero_grad()
    optimizer.loss(None).backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    moved, _ = step.step({n: p.detach().clone() for n, p in model.named_parameters()}, raw, problem.leaves())
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(moved[name].detach(), p.detach(), rtol=1e-7, atol=1e-9)
        assert torch.equal(raw[name], p.grad)  # type: ignore[arg-type]


UNROLLED = [(name, "") for name in ("SGD", "SGD nesterov", "Adam", "AdamW", "NAdam", "RMSprop")]
UNROLLED += [(name, kind) for name in ("SGD nesterov", "AdamW") for kind in list(KINDS)[1:]]


@pytest.mark.parametrize("per", ["tensor", "weight"])
@pytest.mark.parametrize(("name", "kind"), UNROLLED)
def test_unrolled_is_what_differences_of_the_real_steps_say(name: str, kind: str, per: Any) -> None:
    line = {n: torch.linspace(-1, 1, p.numel()).view(p.shape) for n, p in WeightDecay(a_net(), per=per).named_parameters()}
    line = {n: t if t.numel() > 1 else torch.full_like(t, 0.5) for n, t in line.items()}

    def trained(shift: float) -> tuple[float, BilevelOptimizer]:
        model = a_net()
        decays = WeightDecay(model, per=per, **KINDS[kind]).double()
        optimizer = wrapped(model, OPTIMIZERS[name](model.parameters()), decays, hypergradient=Unrolled(5), every=5)
        with torch.no_grad():
            for n, leaf in decays.named_parameters():
                leaf += shift * line[n]
        steps(optimizer, lambda: optimizer.loss(None), 4)
        optimizer.zero_grad()
        optimizer.loss(None).backward()
        return val(model, None, None).item(), optimizer

    ends = []
    for sign in (1, -1):
        _, optimizer = trained(sign * 1e-4)
        optimizer.every = None
        optimizer.step()
        ends.append(val(optimizer.problem.model, None, None).item())
    _, optimizer = trained(0.0)
    optimizer.step()
    assert optimizer.record is not None
    slope = sum((g * line[n]).sum().item() for n, g in optimizer.record.result.grads.items())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)


H = torch.block_diag(*[2 * X.T @ X / Y.numel()] * 2)  # the Hessian of the least squares of a layer of 4 → 2
TO = (2 * Y.T @ X / Y.numel()).flatten()
START = torch.linspace(-0.4, 0.6, 8).double().view(2, 4)


def linear_end(decay: Tensor, centre: Tensor | None) -> Tensor:
    """Least squares with a decay for each weight, in closed form: (H + diag λ) w = Xᵀy + λ⊙c."""
    c = torch.zeros(8).double() if centre is None else centre.flatten()
    return torch.linalg.solve(H + torch.diag(decay.flatten()), TO + decay.flatten() * c).view(2, 4)


def lasso_end(decay: Tensor, centre: Tensor | None) -> Tensor:
    """The lasso in closed form, given the signs of w − c that proximal steps find: H w = Xᵀy − λ⊙sign on the free ones."""
    c = torch.zeros(2, 4).double() if centre is None else centre
    w, rate = c.clone(), 0.5 / torch.linalg.eigvalsh(H).max()
    for _ in range(3000):
        far = w - c - rate * ((H @ w.flatten()).view(2, 4) - TO.view(2, 4))
        w = c + far.sign() * (far.abs() - rate * decay.detach()).clamp(min=0)
    sign = (w - c).sign().flatten()
    free = sign != 0
    rest = TO - H[:, ~free] @ c.flatten()[~free] - decay.flatten() * sign
    return c.flatten().masked_scatter(free, torch.linalg.solve(H[free][:, free], rest[free])).view(2, 4)


# Not decoupled decays of Adam, whose second moments depend on the way; they have dense algebra below.
ENDS = [("Adam", kind) for kind in ("", "from the start")]
ENDS += [(name, kind) for name in ("SGD", "SGD nesterov", "SGD dampened") for kind in KINDS if kind != "coupled"]
ENDS += [("SGD maximize", kind) for kind in ("", "decoupled", "norm 1")]


@pytest.mark.parametrize("per", ["tensor", "channel", "weight"])
@pytest.mark.parametrize(("name", "kind"), ENDS)
def test_implicit_is_the_closed_form(name: str, kind: str, per: Any) -> None:
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(START)
    decays = WeightDecay(model, per=per, **KINDS[kind]).double()
    dampened = optim.SGD(model.parameters(), lr=0.1, momentum=0.8, dampening=0.5, weight_decay=0.3)
    inner = dampened if name == "SGD dampened" else OPTIMIZERS[name](model.parameters())
    loss = (lambda *given: -fit(*given)) if name == "SGD maximize" else fit
    optimizer = wrapped(model, inner, decays, loss, hypergradient=TO_THE_END)
    leaf = next(decays.parameters())
    with torch.no_grad():
        leaf += torch.linspace(-1, 1, leaf.numel()).view(leaf.shape) if leaf.numel() > 1 else 0.4
    is_beside = "decoupled" in kind or "norm" in kind
    scale = {"SGD nesterov": 0.1, "SGD dampened": 0.4}.get(name, 1.0) if is_beside else 1.0
    with torch.no_grad():
        leaf -= torch.tensor(scale).log()  # so that all of them end alike
    optimizer.param_groups[0]["lr"] *= 1 if name == "Adam" else 2
    steps(optimizer, lambda: optimizer.loss(None), 1500)
    at = leaf.detach().clone().requires_grad_()
    decay = scale * at.exp().reshape(*at.shape, *[1] * (2 - at.ndim)).expand(2, 4)
    end = (lasso_end if "norm" in kind else linear_end)(decay, START if "start" in kind else None)
    torch.testing.assert_close(model.weight.detach(), end.detach(), rtol=1e-4, atol=1e-5)
    (truth,) = torch.autograd.grad((X_VAL @ end.T - Y_VAL).square().mean(), at)
    found = hypergradient(optimizer.problem, None, None, TO_THE_END, inner=optimizer)
    torch.testing.assert_close(next(iter(found.grads.values())), truth, rtol=1e-3, atol=1e-6)
    if "norm" in kind:
        rests = model.weight == (START if "start" in kind else 0.0)
        assert 0 < rests.sum() < 8
        assert per != "weight" or not truth[rests].any()


def test_the_penalty_pulls_to_the_start_as_the_step_does() -> None:
    def penalised(model: Any, hparams: Any, batch: Any) -> Tensor:
        return fit(model, hparams, batch) + hparams.penalty(model)

    one, other = a_net(), a_net()
    in_step, in_loss = (WeightDecay(net, per="channel", start=0.05, towards="start") for net in (one, other))
    first = wrapped(one, optim.SGD(one.parameters(), lr=0.1), in_step, every=10)
    problem = Problem(other, in_loss, penalised, val)
    inner = optim.SGD(other.parameters(), lr=0.1)
    second = BilevelOptimizer(inner, in_loss.optimizer(), problem, val_batches=[None], every=10)
    for optimizer in (first, second):
        steps(optimizer, lambda optimizer=optimizer: optimizer.loss(None), 100)  # type: ignore[misc]
    assert largest_difference(one, other) < 1e-6
    assert largest_difference(in_step, in_loss) < 1e-4
    again = WeightDecay(one, per="channel", towards="start")  # made on trained weights, and loaded with the first ones
    again.load_state_dict(in_step.state_dict())
    torch.testing.assert_close(again.penalty(one), in_step.penalty(one), rtol=0, atol=0)


@pytest.mark.parametrize("per", ["tensor", "weight"])
def test_a_coupled_decay_is_the_penalty_in_the_loss_where_they_are_the_same(per: Any) -> None:
    def penalised(model: Any, hparams: Any, batch: Any) -> Tensor:
        return fit(model, hparams, batch) + hparams.penalty(model)

    one, other = a_net(), a_net()
    in_step, in_loss = WeightDecay(one, per=per, start=0.05), WeightDecay(other, per=per, start=0.05)
    first = wrapped(one, optim.SGD(one.parameters(), lr=0.1), in_step, every=10)
    inner = optim.SGD(other.parameters(), lr=0.1)
    problem = Problem(other, in_loss, penalised, val)
    second = BilevelOptimizer(inner, in_loss.optimizer(), problem, val_batches=[None], every=10)
    for optimizer in (first, second):
        steps(optimizer, lambda optimizer=optimizer: optimizer.loss(None), 100)  # type: ignore[misc]
    assert largest_difference(one, other) < 1e-6
    assert largest_difference(in_step, in_loss) < 1e-4
    assert largest_difference(in_step, WeightDecay(a_net(), per=per, start=0.05)) > 0.1


def test_a_decoupled_decay_is_what_dense_algebra_says_and_near_what_retraining_says() -> None:
    """With λ⊙D⊙w in F and D = √v̂ + ε held fixed, dL_V/dθ = −λ D w ⊙ (H + diag(λ D))⁻¹ g; retraining moves D as well."""
    line = torch.linspace(-1, 1, 8).view(2, 4).double()

    def trained(shift: float) -> tuple[BilevelOptimizer, WeightDecay]:
        model = nn.Linear(4, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        decays = WeightDecay(model, per="weight").double()
        inner = optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.9999), weight_decay=0.3)
        optimizer = wrapped(model, inner, decays)
        with torch.no_grad():
            next(decays.parameters()).add_(shift * line)
        schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, 4000)
        for _ in range(4000):
            steps(optimizer, lambda: optimizer.loss(None), 1)
            schedule.step()
        return optimizer, decays

    losses = [val(trained(shift)[0].problem.model, None, None).item() for shift in (1e-3, -1e-3)]
    optimizer, _ = trained(0.0)
    found = hypergradient(optimizer.problem, None, None, TO_THE_END, inner=optimizer)
    (w,), decay = optimizer.problem.model.parameters(), 0.3
    state = optimizer.state[w]
    D = (state["exp_avg_sq"] / (1 - 0.9999 ** state["step"].item())).sqrt() + 1e-8
    (g,) = torch.autograd.grad(val(optimizer.problem.model, None, None), w)
    x = torch.linalg.solve(H + torch.diag(decay * D.flatten()), g.flatten()).view(2, 4)
    torch.testing.assert_close(found.grads["decay.weight"], -decay * D * w.detach() * x, rtol=1e-6, atol=1e-9)
    slope = (found.grads["decay.weight"] * line).sum().item()
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.25)


def test_groups_keep_their_numbers_and_a_frozen_weight_stays() -> None:
    plain, model = a_net(), a_net()

    def make(net: Any) -> optim.Optimizer:
        net[0].bias.requires_grad_(False)
        return optim.AdamW([{"params": net[0].parameters(), "weight_decay": 0.5}, {"params": net[2].parameters()}], lr=0.01)

    inner = make(plain)
    steps(inner, lambda: fit(plain, None, None), 20)
    decays = WeightDecay(model)
    optimizer = wrapped(model, make(model), decays)
    assert [round(decays[name].item(), 6) for name in decays] == [0.5, 0.01]
    steps(optimizer, lambda: optimizer.loss(None), 20)
    assert largest_difference(plain, model) < 1e-7


class Tied(nn.Module):
    """Its first and its last weight are one tensor."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.head = nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 5)
        if not sparse:
            self.head.weight = self.words.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words((x[:, 0] > 0).long()))[:, :2]


def test_a_tied_weight_is_decayed_once_and_a_sparse_gradient_is_refused() -> None:
    plain, model = Tied(), Tied()
    inner = OPTIMIZERS["AdamW"](plain.parameters())
    steps(inner, lambda: fit(plain, None, None), 20)
    decays = WeightDecay(model, include=lambda name, weight: True)
    optimizer = wrapped(model, OPTIMIZERS["AdamW"](model.parameters()), decays)
    steps(optimizer, lambda: optimizer.loss(None), 20)
    assert len(decays) == 2
    assert largest_difference(plain, model) < 1e-7
    sparse = Tied(sparse=True)
    optimizer = wrapped(sparse, optim.SGD(sparse.parameters(), lr=0.1), WeightDecay(sparse), every=5)
    with pytest.raises(TypeError, match=r"the weights \['words.weight'\] have sparse gradients"):
        steps(optimizer, lambda: optimizer.loss(None), 1)


def test_names_by_weight_leave_the_others_with_the_groups_number() -> None:
    plain, model = a_net(), a_net()
    hparams = nn.ParameterDict({"first": torch.tensor(0.3, dtype=torch.float64)})
    inner = optim.Adam(plain.parameters(), lr=0.01, weight_decay=0.3)
    steps(inner, lambda: fit(plain, None, None), 20)
    optimizer = BilevelOptimizer(
        optim.Adam(model.parameters(), lr=0.01, weight_decay=0.3),
        optim.SGD(hparams.parameters(), lr=0.1),
        Problem(model, hparams, fit, val),
        val_batches=[None],
        every=None,
        options={"weight_decay": {"0.weight": "first"}},
    )
    steps(optimizer, lambda: optimizer.loss(None), 20)
    assert largest_difference(plain, model) < 1e-12
    optimizer.param_groups[0]["weight_decay"] = 0.6  # as a schedule would: a factor of 2 for the learned one, too
    inner.param_groups[0]["weight_decay"] = 0.6
    for one, loss in ((inner, lambda: fit(plain, None, None)), (optimizer, lambda: optimizer.loss(None))):
        steps(one, loss, 5)
    assert largest_difference(plain, model) < 1e-12


def test_a_checkpoint_goes_on_to_the_bit() -> None:
    def start() -> tuple[nn.Module, BilevelOptimizer]:
        model = a_net()
        inner = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
        return model, wrapped(model, inner, WeightDecay(model, per="weight"), every=5, hypergradient=Unrolled(4))

    model, optimizer = start()
    steps(optimizer, lambda: optimizer.loss(None), 8)
    saved = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    steps(optimizer, lambda: optimizer.loss(None), 8)
    again, resumed = start()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(resumed, lambda: resumed.loss(None), 8)
    assert largest_difference(model, again) == 0.0
    assert largest_difference(optimizer.problem.hparams, resumed.problem.hparams) == 0.0


def test_retrain_trains_with_what_was_learned() -> None:
    model = a_net()
    decays = WeightDecay(model, per="weight")
    optimizer = wrapped(model, optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3), decays, every=5)
    steps(optimizer, lambda: optimizer.loss(None), 20)
    problem = optimizer.problem
    learned = {name: decays[name].detach().clone() for name in decays}

    def train(net: nn.Module, own: Any, examples: Any) -> None:
        steps(own, lambda: own.loss(None), 3)

    def new_net() -> nn.Module:
        net = a_net()
        nn.init.ones_(net[0].weight)  # type: ignore[index, arg-type]
        return net

    found = retrain(problem, new_net, train, None, inner=lambda net: OPTIMIZERS["AdamW"](net.parameters()))
    by_hand = new_net()
    inner = OPTIMIZERS["AdamW"](by_hand.parameters())
    for _ in range(3):
        inner.zero_grad()
        fit(by_hand, None, None).backward()
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                if name.endswith("weight"):
                    p.mul_(1 - 0.01 * learned[f"decay.{name}"])
                    p.div_(1 - 0.01 * 0.3)  # what torch's own step takes off
        inner.step()
    assert largest_difference(found, by_hand) < 1e-7
    assert all(torch.equal(learned[name], decays[name]) for name in decays)


class Halving(optim.Optimizer):
    """An optimizer of one's own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_what_can_not_be_applied_is_refused() -> None:
    model = a_net()
    decays = WeightDecay(model)
    with pytest.raises(TypeError, match="of class Halving, whose step has no differentiable form"):
        wrapped(model, Halving(model.parameters()), decays)
    with pytest.raises(ValueError, match=r"a weight_decay to '0.weight', which the optimizer does not hold"):
        wrapped(model, optim.SGD(model[2].parameters(), lr=0.1), decays)  # type: ignore[index]
    with pytest.raises(TypeError, match="beside the step of RMSprop, whose size hoptim knows for SGD, Adam,"):
        wrapped(model, optim.RMSprop(model.parameters()), WeightDecay(model, norm=1))
    with pytest.raises(ValueError, match="decoupled is False: give True, False or None, and not False with norm=1"):
        WeightDecay(model, norm=1, decoupled=False)
    with pytest.raises(ValueError, match="towards is 'end'"):
        WeightDecay(model, towards="end")  # type: ignore[arg-type]
    options = {"weight_decay": WeightDecay(model)}
    with pytest.raises(ValueError, match="no part of the problem's hparams"):
        wrapped(model, optim.SGD(model.parameters(), lr=0.1), decays, options=options)
    hparams = nn.ParameterDict({"wide": torch.ones(2)})
    with pytest.raises(ValueError, match=r"of shape \(3, 4\), the weight_decay 'wide', which has shape \(2,\)"):
        learn(optim.SGD(model.parameters()), {"weight_decay": {"0.weight": "wide"}}, hparams, dict(model.named_parameters()))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.5}, {"params": model[2].parameters()}]  # type: ignore[index]
    with pytest.raises(ValueError, match='per is "global", and the optimizer\'s parameter groups have different numbers'):
        wrapped(model, optim.AdamW(groups, lr=0.01), WeightDecay(model, per="global"))


def test_a_scaler_that_skips_a_step_decays_nothing() -> None:
    model = a_net()
    optimizer = wrapped(model, optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3), WeightDecay(model))
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(optimizer.loss(None) * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_in_bfloat16_it_is_close_to_float32() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).to(dtype)
        decays = WeightDecay(model, per="weight")

        def loss(model: Any, hparams: Any, batch: Any, dtype: torch.dtype = dtype) -> Tensor:
            return F.mse_loss(model(X.to(dtype)), Y.to(dtype))

        optimizer = BilevelOptimizer(
            optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3),
            decays.optimizer(),
            Problem(model, decays, loss, loss),
            val_batches=[None],
            every=10,
            options={"weight_decay": decays},
        )
        steps(optimizer, lambda optimizer=optimizer: optimizer.loss(None), 10)  # type: ignore[misc]
        assert optimizer.record is not None
        assert optimizer.record.status.ok
        found.append(next(iter(optimizer.record.result.grads.values())))
    assert F.cosine_similarity(*(g.flatten() for g in found), dim=0) > 0.99
