"""The recipes: their terms and gradients against plain formulas, their names under wrappers, and in a run."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import classes
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

import hoptim
from hoptim.recipes import ExampleWeights, LabelSmoothing, NoiseWidth, WeightDecay

DECAYED = {"0.weight": (6, 4), "3.weight": (3, 6)}
SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "tensor": lambda shape: (),
    "channel": lambda shape: shape[:1],
    "weight": lambda shape: shape,
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "DataParallel": DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: DataParallel(torch.compile(model, backend="eager")),
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def spread(decay: WeightDecay) -> WeightDecay:
    """The same with a different value for each λ."""
    for i, name in enumerate(decay):
        values = torch.linspace(0.01, 0.05, decay[name].numel()) * (i + 1)
        decay[name] = values.reshape(decay[name].shape).to(decay[name].dtype)
    return decay


def each(decay: WeightDecay, name: str, w: Tensor) -> Tensor:
    """λ as a matrix of the weight's shape, entry by entry."""
    value = (decay["decay"] if decay.per == "global" else decay["decay." + name]).detach()
    rows = [
        [value[i, j] if value.ndim == 2 else value[i] if value.ndim else value for j in range(w.shape[1])]
        for i in range(len(w))
    ]
    return torch.tensor([[float(one) for one in row] for row in rows])


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("per", ["global", "tensor", "channel", "weight"])
def test_penalty_and_its_gradients_are_those_of_the_formula(per: Any, norm: Any) -> None:
    model = net()
    decay = spread(WeightDecay(model, per=per, norm=norm))
    penalty = decay.penalty(model)
    weights = {name: p for name, p in model.named_parameters() if name in DECAYED}
    scales = {name: each(decay, name, w) for name, w in weights.items()}
    sizes = {name: w.detach() ** 2 / 2 if norm == 2 else w.detach().abs() for name, w in weights.items()}
    expected = sum(
        float(scales[name][i, j] * sizes[name][i, j]) for name, (n, m) in DECAYED.items() for i in range(n) for j in range(m)
    )
    assert penalty.ndim == 0
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-12)

    penalty.backward()
    for name, p in model.named_parameters():
        if name not in DECAYED:
            assert p.grad is None, name
        else:
            slope = p.detach() if norm == 2 else p.detach().sign()
            torch.testing.assert_close(p.grad, scales[name] * slope, rtol=1e-12, atol=0)
    # By log λ the derivative is λ times the size of the weights that share it.
    moved = sum((leaf.grad.sum() for leaf in decay.parameters()), torch.zeros(()))
    assert float(moved) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("per", ["global", *SHAPES])
def test_the_penalty_curves_by_its_decay_at_weights_of_zero_too(per: Any) -> None:
    """Where the square of a norm would have no second derivative; in forward mode and for a batch of weights as well."""
    model, zero = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False)}), torch.zeros(3, 2)
    both = nn.ModuleDict({"model": model, "decay": spread(WeightDecay(model, per=per))})
    scales = each(both["decay"], "a.weight", zero)

    def penalty(w: Tensor) -> Tensor:
        return torch.func.functional_call(Called(both), {"both.model.a.weight": w}, ())

    hessian = torch.func.hessian(penalty)(zero).reshape(6, 6)
    torch.testing.assert_close(hessian, torch.diag(scales.flatten()).to(hessian), rtol=1e-6, atol=1e-9)
    stacked = torch.stack([zero, zero + 1, zero + 2])
    expected = scales.sum() * torch.tensor([0.0, 0.5, 2.0])
    torch.testing.assert_close(torch.vmap(penalty)(stacked).detach(), expected, rtol=1e-6, atol=1e-9)


class Called(nn.Module):
    """The penalty of a model as a forward pass."""

    def __init__(self, both: nn.ModuleDict) -> None:
        super().__init__()
        self.both = both

    def forward(self) -> Tensor:
        return self.both["decay"].penalty(self.both["model"])


@pytest.mark.parametrize("per", SHAPES)
def test_shapes_names_and_degrees_of_freedom(per: Any) -> None:
    decay = WeightDecay(net(), per=per, start=0.25)
    assert {name: tuple(decay[name].shape) for name in decay} == {f"decay.{n}": SHAPES[per](s) for n, s in DECAYED.items()}
    assert all(torch.allclose(decay[name], torch.tensor(0.25)) for name in decay)
    assert decay.degrees_of_freedom == {"tensor": 2, "channel": 9, "weight": 42}[per]
    assert repr(decay) == (
        f"WeightDecay(per={per!r}, norm=2): {decay.degrees_of_freedom} decays of 42 weights in 2 tensors, from 0.25 to 0.25"
    )


def test_global_is_one_number() -> None:
    decay = WeightDecay(net(), per="global", start=0.25)
    assert [(name, leaf.shape) for name, leaf in decay.named_parameters()] == [("decay", ())]
    assert decay.degrees_of_freedom == 1
    assert float(decay["decay"].detach()) == pytest.approx(0.25)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_and_a_loaded_state_give_the_same_penalty(again: Callable[[WeightDecay], WeightDecay]) -> None:
    model = net()
    decay, other = spread(WeightDecay(model, per="channel")), WeightDecay(model, per="channel")
    assert not torch.equal(other.penalty(model), decay.penalty(model))
    other.load_state_dict(decay.state_dict())
    for one in (other, again(decay)):
        assert torch.equal(one.penalty(model), decay.penalty(model))


class Parts(nn.Module):
    """All that the rule has to tell apart: a LayerNorm of two axes, a tied, a frozen and a bare weight, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(3, 3)  # as HyperParameters has a method of this name
        self.embedding = nn.Embedding(5, 3)
        self.norm, self.scale = nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3))
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embedding.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(3))
        self.position = nn.Parameter(torch.ones(1, 2, 3))
        self.register_buffer("running", torch.ones(2, 2))


def test_biases_norms_and_frozen_weights_are_left_out_and_tied_ones_count_once() -> None:
    model = Parts()
    decay = WeightDecay(model, start=0.5)
    assert set(decay) == {"decay.keys.weight", "decay.embedding.weight", "decay.position"}
    weights = (model.keys.weight, model.embedding.weight, model.position)
    expected = sum(0.25 * float(w.detach().square().sum()) for w in weights)
    assert decay.penalty(model).item() == pytest.approx(expected, rel=1e-12)


def test_weights_that_are_unfrozen_later_are_told_once() -> None:
    """In a run, where the loss of a step sees a view of the hyperparameters, and that of a hyperstep stand-ins of both."""
    model = net()
    model[0].requires_grad_(False)
    decay = WeightDecay(model)
    assert set(decay) == {"decay.3.weight"}
    problem = hoptim.Problem(model, decay, recipe_loss, val_loss)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hoptim.BilevelOptimizer(inner, decay.optimizer(), problem, val_batches=[classes(12, 2)], every=1)

    def step() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            optimizer.loss(classes(12, 1)).backward()
            optimizer.step()
        return [str(one.message) for one in caught if "WeightDecay" in str(one.message)]

    assert [step(), step()] == [[], []]
    model[0].requires_grad_(True)
    (message,) = step()
    assert "train now without a decay: '0.weight' and 0 more" in message  # not the bias, which is never decayed
    assert [step(), step()] == [[], []]


def test_include_replaces_the_rule_but_frozen_weights_stay_out() -> None:
    decay = WeightDecay(Parts(), include=lambda name, p: "embedding" not in name and p.ndim < 3)
    assert set(decay) == {
        f"decay.{n}" for n in ("keys.weight", "keys.bias", "norm.weight", "norm.bias", "scale.weight", "out.bias", "gain")
    }


@pytest.mark.parametrize("made_on", WRAPPERS)
@pytest.mark.parametrize("used_on", WRAPPERS)
def test_names_and_penalty_are_the_same_under_every_wrapper(made_on: str, used_on: str) -> None:
    model = net()
    decay = spread(WeightDecay(WRAPPERS[made_on](model), per="channel"))
    assert set(decay) == {"decay." + name for name in DECAYED}
    assert torch.equal(decay.penalty(WRAPPERS[used_on](model)), spread(WeightDecay(model, per="channel")).penalty(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decays_have_the_precision_of_an_outer_step_and_the_penalty_too(dtype: torch.dtype) -> None:
    """A step of 0.05 is lost on log 1e-4 = −9.2 in bf16, and 60,000 ones squared overflow fp16."""
    model = nn.Linear(300, 300, dtype=dtype)
    nn.init.ones_(model.weight)
    decay = WeightDecay(model, per="tensor", start=2.0)
    assert {leaf.dtype for leaf in decay.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert decay.penalty(model).item() == pytest.approx(90_000, rel=1e-6)
    decay.penalty(model).backward()
    torch.testing.assert_close(model.weight.grad, torch.full_like(model.weight, 2.0))


def by_hand(model: nn.Module, per_weight: bool) -> hoptim.HyperParameters:
    values = {name: torch.full(shape if per_weight else (), 1e-2) for name, shape in DECAYED.items()}
    return hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive))


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.eval()(batch[0]), batch[1])


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def recipe_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + hparams.penalty(model)


def hand_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    penalty = sum((hparams[name] * p.square()).sum() for name, p in model.named_parameters() if name in DECAYED)
    return cross_entropy(model, batch) + 0.5 * penalty


PAIRS = {
    "plain": (recipe_loss, hand_loss),
    "composite": tuple(
        hoptim.CompositeLoss(lambda m, h, b: m(b[0]), lambda z, h, b: F.cross_entropy(z, b[1]), penalty)
        for penalty in (
            lambda m, h: h.penalty(m),
            lambda m, h: 0.5 * sum((h[n] * p.square()).sum() for n, p in m.named_parameters() if n in DECAYED),
        )
    ),
}


@pytest.mark.parametrize("per", ["tensor", "weight"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("losses", PAIRS)
def test_hypergradient_is_that_of_the_lines_written_by_hand(per: Any, wrapper: str, losses: str) -> None:
    model = net()
    wrapped = WRAPPERS[wrapper](model)
    ours = hoptim.Problem(wrapped, WeightDecay(wrapped, per=per, start=1e-2), PAIRS[losses][0], val_loss)
    theirs = hoptim.Problem(model, by_hand(model, per == "weight"), PAIRS[losses][1], val_loss)
    found, expected = (hoptim.hypergradient(problem, classes(12, 1), classes(12, 2)) for problem in (ours, theirs))
    assert set(found.grads) == {"decay." + name for name in DECAYED}
    for name in DECAYED:
        assert expected.grads[name].abs().max() > 1e-6
        torch.testing.assert_close(found.grads["decay." + name], expected.grads[name], rtol=1e-12, atol=1e-15)


def test_its_optimizer_changes_decays_that_agree_by_their_level_alone() -> None:
    decay = spread(WeightDecay(net(), per="weight"))
    before = {name: decay[name].detach() for name in decay}
    outer = decay.optimizer()
    for leaf in decay.parameters():
        leaf.grad = torch.rand_like(leaf) + 0.1
    outer.step()
    for name in decay:
        together = (decay[name] / before[name]).detach().log().mean().item()
        assert together == pytest.approx(-0.6, rel=1e-5), "each is also drawn to the others, which leaves the mean"


def run(hparams: nn.Module, model: nn.Module, train_loss: Any, **options: Any) -> hoptim.BilevelOptimizer:
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.Adam(hparams.parameters(), lr=0.05)
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[classes(16, 5)], every=5, **options)
    for step in range(30):
        optimizer.zero_grad()
        optimizer.loss(classes(12, step % 3)).backward()
        optimizer.step()
    return optimizer


def test_a_run_is_that_of_the_lines_written_by_hand() -> None:
    models = []
    for hparams_of, loss in ((lambda m: WeightDecay(m, start=1e-2), recipe_loss), (lambda m: by_hand(m, False), hand_loss)):
        torch.manual_seed(0)
        model = net()
        optimizer = run(hparams_of(model), model, loss)
        assert optimizer.hyper_steps == 6
        assert optimizer.record.moved
        models.append((model, optimizer))
    (ours, first), (theirs, second) = models
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for name in DECAYED:
        moved = first.record.hyperparameters["decay." + name]
        assert abs(float(moved) - 1e-2) > 1e-4
        torch.testing.assert_close(moved, second.record.hyperparameters[name], rtol=1e-9, atol=0)


def test_it_stands_beside_others_in_a_module_dict_and_the_record_has_natural_values() -> None:
    def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        logits = hparams["rest"]["scale"] * model(batch[0]) + hparams["shift"][0]
        return F.cross_entropy(logits, batch[1]) + hparams["decay"].penalty(model)

    model = net()
    rest = hoptim.HyperParameters({"scale": torch.tensor(1.0)}, {"scale": constraints.positive})
    shift = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    hparams = nn.ModuleDict({"decay": WeightDecay(model, start=1e-2), "rest": rest, "shift": shift})
    seen = run(hparams, model, train_loss).record.hyperparameters
    assert set(seen) == {"decay.decay.0.weight", "decay.decay.3.weight", "rest.scale", "shift.0"}
    for name in DECAYED:
        assert torch.equal(seen["decay.decay." + name], hparams["decay"]["decay." + name].detach())
        assert 0 < float(seen["decay.decay." + name]) < 1
    assert torch.equal(seen["rest.scale"], rest["scale"].detach())
    assert float(seen["rest.scale"]) not in (0.0, 1.0)
    assert torch.equal(seen["shift.0"], shift[0].detach())


def test_a_weight_or_a_layer_that_has_become_another_is_not_taken_twice() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    decay, noise = WeightDecay(model), NoiseWidth(model)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'1\.weight' had shape \(2, 2\).* tied to another in this model"):
        decay.penalty(model)
    model[1] = model[0]
    with pytest.raises(ValueError, match="no layer '1', which NoiseWidth was made for"):
        noise.call(model, torch.ones(1, 2))
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: nn.Sequential(*m[:3]), r"'3\.weight' had shape \(3, 6\).* missing in this model"),
        (
            lambda m: nn.Sequential(*m[:3], nn.Linear(6, 7)),
            r"'3\.weight' had shape \(3, 6\).* of shape \(7, 6\) in this model",
        ),
        (lambda m: nn.ModuleDict({"net": m}), r"'0\.weight' had shape \(6, 4\).* missing in this model"),
    ],
)
def test_a_model_with_other_parameters_is_an_error_of_one_line(change: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message) as caught:
        WeightDecay(model).penalty(change(model))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("net",), {}, TypeError, "model is a str"),
        ((net(),), {"per": "layer"}, ValueError, "per is 'layer': give one of 'global', 'tensor', 'channel', 'weight'"),
        ((net(),), {"norm": 3}, ValueError, "norm is 3"),
        ((net(),), {"start": 0.0}, ValueError, "start is 0.0"),
        ((net(),), {"start": float("nan")}, ValueError, "start is nan"),
        ((net(),), {"start": torch.tensor(0.1)}, ValueError, "start is tensor"),
        ((nn.BatchNorm1d(3),), {}, ValueError, "no weight to decay"),
        ((net().requires_grad_(False),), {}, ValueError, "no weight to decay"),
        ((nn.LazyLinear(3),), {}, ValueError, "'weight' is not initialised yet"),
        ((nn.Linear(2, 2, dtype=torch.complex64),), {}, TypeError, "'weight' is torch.complex64"),
        ((nn.Linear(2, 2, device="meta"),), {}, ValueError, "'weight' is on the meta device"),
    ],
)
def test_wrong_arguments(arguments: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        WeightDecay(*arguments, **options)
    assert words in str(caught.value)


# Label smoothing and noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", ["classes", "some ignored", "all ignored", "probabilities", "no distribution"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (1, 4), (4,), (2, 4, 3), (4, 4, 4), (2, 4, 3, 5)])
def test_label_smoothing_is_torchs_at_the_same_number(shape: tuple[int, ...], target: str, reduction: str) -> None:
    """Also its derivative in the logits; where the batch has as many examples as there are classes, too."""
    hparams, z = LabelSmoothing(start=0.2).double(), torch.randn(shape, requires_grad=True)
    first = z[:, 0] if z.ndim > 1 else z[0]
    y = torch.arange(first.numel()).reshape(first.shape) % 4
    if "ignored" in target:
        y = torch.where(torch.rand(y.shape) < (0.4 if target == "some ignored" else 2.0), -100, y)
    if target in ("probabilities", "no distribution"):
        y = torch.rand(shape) if target == "no distribution" else torch.randn(shape).softmax(min(1, z.ndim - 1))
    found = hparams.cross_entropy(z, y, reduction=reduction)
    expected = F.cross_entropy(z, y, label_smoothing=0.2, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, equal_nan=True)
    slopes = [torch.autograd.grad(loss.sum(), z)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-8, equal_nan=True)


def test_the_derivative_in_the_smoothing_is_that_of_differences() -> None:
    hparams, z, y = LabelSmoothing(start=0.2).double(), torch.randn(6, 4), torch.arange(6) % 4
    (found,) = torch.autograd.grad(hparams.cross_entropy(z, y), list(hparams.parameters()))
    low, high = (F.cross_entropy(z, y, label_smoothing=0.2 + step) for step in (-1e-6, 1e-6))
    torch.testing.assert_close(found, (high - low) / 2e-6 * 0.2 * 0.8, rtol=1e-5, atol=0)  # through the sigmoid


def noisy_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 2)))


def test_noise_comes_before_each_layer_with_its_own_width() -> None:
    model, x = noisy_network(), torch.randn(4, 3)
    hparams = NoiseWidth(model, start=0.3).double()
    assert list(hparams) == ["width.0", "width.2.0"]
    hparams["width.2.0"] = torch.tensor(0.7)
    torch.manual_seed(1)
    found = hparams.call(model, x)
    torch.manual_seed(1)
    first = model[1](model[0](x + 0.3 * torch.randn(4, 3)))
    expected = model[2](first + 0.7 * torch.randn(4, 5))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(model(x), model(x))  # outside of call there is none
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_layer_in_evaluation_mode_gets_no_noise() -> None:
    model, x = noisy_network(), torch.randn(4, 3)
    hparams = NoiseWidth(model)
    assert torch.equal(hparams.call(model.eval(), x), model(x))


@pytest.mark.parametrize("curvature", [hoptim.Exact(), hoptim.GaussNewton()])
def test_the_hypergradient_of_a_width_is_that_of_the_noise_written_out(curvature: Any) -> None:
    """With one and the same noise a hypergradient, as for a dropout mask."""
    x, y, v = torch.randn(8, 3), torch.randn(8, 1), torch.randn(8, 3)

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return (model.eval()(v) - 0.5).square().mean()

    def by_hand(model: Any, hparams: Any, batch: Any) -> Tensor:
        return model(x + hparams["width.0"] * torch.randn_like(x))

    def by_name(model: Any, hparams: Any, batch: Any) -> Tensor:
        return hparams.call(model, x)

    found = []
    for predict in (by_hand, by_name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1))
        hparams = NoiseWidth(model, ["0"], start=0.4).double()
        loss = hoptim.CompositeLoss(predict, lambda z, h, b: (z - y).square().mean())
        problem = hoptim.Problem(model, hparams, loss, val_loss)
        torch.manual_seed(5)
        method = hoptim.Implicit(hoptim.CG(terms=10), curvature=curvature)
        found.append(hoptim.hypergradient(problem, None, None, method).grads["width.0"])
        problem.loss(None).backward()
        assert all(leaf.grad is None for leaf in hparams.parameters())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert abs(float(found[0])) > 1e-3


NOISE_FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "a layer that is not there": (lambda: NoiseWidth(noisy_network(), ["3"]), ValueError, "no layer '3': its layers are"),
    "no layer at all": (lambda: NoiseWidth(nn.Tanh()), ValueError, "name layers"),
    "a width out of range": (lambda: NoiseWidth(noisy_network(), start=1.5), ValueError, "start is 1.5"),
    "no model": (lambda: NoiseWidth("model"), TypeError, "model is a str"),
    "a smoothing out of range": (lambda: LabelSmoothing(1.0), ValueError, "start is 1.0"),
    "another model": (
        lambda: NoiseWidth(noisy_network()).call(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)),
        ValueError,
        "no layer '2.0', which NoiseWidth was made for",
    ),
    "whole numbers": (
        lambda: NoiseWidth(nn.Sequential(nn.Embedding(3, 2)), ["0"]).call(
            nn.Sequential(nn.Embedding(3, 2)), torch.tensor([1])
        ),
        TypeError,
        "layer '0' gets a Tensor, which can't be changed",
    ),
}


@pytest.mark.parametrize("name", NOISE_FAULTS)
def test_what_a_recipe_cannot_do_is_named(name: str) -> None:
    call, error, words = NOISE_FAULTS[name]
    with pytest.raises(error, match=words):
        call()


# Example weights ----------------------------------------------------------------------------------------------------


def weights_of(n: int = 8, trusted: Any = (2, 5)) -> ExampleWeights:
    """Every weight another one."""
    hparams = ExampleWeights(n, trusted=trusted).double()
    hparams["example_weight"] = torch.linspace(0.2, 0.9, n)
    return hparams


def test_the_weighted_mean_and_its_gradients_are_those_of_the_formula() -> None:
    hparams, index, losses = weights_of(), torch.tensor([0, 2, 7, 7]), torch.tensor([3.0, 5.0, 7.0, 11.0])
    losses.requires_grad_()
    low, high, start = 0.2, 0.9, 0.5
    mean = hparams.mean(losses, index)
    assert mean.item() == pytest.approx((low * 3 + 1 * 5 + high * 7 + high * 11) / 4 / start, rel=1e-12)
    mean.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([low, 1.0, high, high]) / 4 / start)
    (leaf,) = hparams.parameters()
    expected = torch.zeros(8)  # through the sigmoid, whose slope is w (1 − w)
    expected[0], expected[7] = low * (1 - low) * 3 / 4 / start, high * (1 - high) * 18 / 4 / start
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "trusted",
    [
        [2, 5],
        (5, 2),
        {5, 2},
        frozenset((2, 5)),
        torch.tensor([5, 2, 2]),
        torch.tensor([2, 5], dtype=torch.uint8),
        torch.tensor([2, 5], dtype=torch.int16),
        np.array([2, 5], dtype=np.uint8),
        range(2, 6, 3),
        torch.arange(8) % 3 == 2,
        (torch.arange(8) % 3 == 2).tolist(),
        np.arange(8) % 3 == 2,
    ],
)
def test_trusted_examples_have_the_weight_one_however_they_are_named(trusted: Any) -> None:
    hparams = weights_of(trusted=trusted)
    expected = torch.linspace(0.2, 0.9, 8)
    expected[[2, 5]] = 1.0
    torch.testing.assert_close(hparams["example_weight"].detach(), expected, rtol=1e-6, atol=0)
    assert (hparams["example_weight"][[2, 5]] == 1).all()
    assert hparams.degrees_of_freedom == 6
    assert repr(hparams) == "ExampleWeights(n=8): 6 learned weights from 0.2 to 0.9, 2 fixed at 1"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0.5, 0.1, 0.7, 0.999, 1e-4, 1 - 1e-6])
def test_the_start_is_the_plain_mean_to_the_bit(start: float, dtype: torch.dtype) -> None:
    """And so is its gradient in the model's weights, at any precision of the losses, the weights and a loaded state."""
    torch.manual_seed(0)
    x, y, n, model = torch.randn(37, 5, dtype=dtype), torch.arange(37) % 3, 37, nn.Linear(5, 3, dtype=dtype)
    torch.set_default_dtype(torch.float32)
    made = ExampleWeights(n, start=start, trusted=[3])
    loaded = ExampleWeights(n, start=0.3)
    loaded.load_state_dict(made.state_dict())
    index = torch.randperm(n)[:29]
    index = index[index != 3]
    for hparams in (made, copy.deepcopy(made).double(), loaded, pickle.loads(pickle.dumps(made))):
        losses = F.cross_entropy(model(x[index]), y[index], reduction="none")
        found, expected = hparams.mean(losses, index), losses.mean()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        slopes = (torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in (found, expected))
        assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))


@pytest.mark.parametrize("none", [None, [], (), set(), torch.tensor([]), torch.tensor([], dtype=torch.uint8), np.array([])])
def test_an_empty_list_trusts_none(none: Any) -> None:
    assert not ExampleWeights(3, trusted=none).trusted.any()
    assert ExampleWeights(3, trusted=none).degrees_of_freedom == 3


def test_trusted_examples_count_as_the_best_of_the_learned_ones() -> None:
    hparams, losses = ExampleWeights(3, start=0.25, trusted=[2]).double(), torch.tensor([1.0, 1.0])
    hparams["example_weight"] = torch.tensor([1 - 1e-9, 1e-9, 0.5])
    assert [hparams.mean(losses[:1], torch.tensor([i])).item() for i in range(3)] == pytest.approx([4.0, 0.0, 4.0], abs=1e-6)


@pytest.mark.parametrize("prefix", ["", "a."])
def test_a_state_of_an_earlier_version_goes_on_with_the_mean_that_it_was_learned_with(prefix: str) -> None:
    """Which was (1/B) Σ w_i ℓ_i."""
    of, index, losses = weights_of(), torch.tensor([0, 2, 7, 7]), torch.tensor([3.0, 5.0, 7.0, 11.0])
    state = {prefix + key: value for key, value in of.state_dict().items() if key != "start"}
    loaded = ExampleWeights(8, start=0.5).double()
    (nn.ModuleDict({"a": loaded}) if prefix else loaded).load_state_dict(state)
    assert loaded.mean(losses, index).item() == pytest.approx((0.2 * 3 + 5 + 0.9 * 7 + 0.9 * 11) / 4, rel=1e-12)


def test_weights_can_be_set_to_what_they_are_and_copied() -> None:
    hparams = weights_of()
    before = hparams["example_weight"].detach()
    hparams["example_weight"] = before
    loaded = ExampleWeights(8, trusted=[0]).double()
    loaded.load_state_dict(hparams.state_dict())
    for one in (hparams, loaded, copy.deepcopy(hparams), pickle.loads(pickle.dumps(hparams))):
        torch.testing.assert_close(one["example_weight"].detach(), before, rtol=1e-12, atol=0)
        assert one.degrees_of_freedom == 6


def test_the_hypergradient_of_example_weights_is_that_of_the_closed_form() -> None:
    """Of a weighted ridge regression, whose solution is a line of linear algebra."""
    x, y, v, u = torch.randn(8, 3), torch.randn(8), torch.randn(9, 3), torch.randn(9)
    hparams, index = weights_of(), torch.tensor([0, 1, 2, 4, 5, 7])
    (leaf,) = hparams.parameters()

    def solution(leaf: Tensor) -> Tensor:
        w = torch.where(torch.arange(8) % 3 == 2, 1.0, leaf.sigmoid())[index] / 0.5 / len(index)
        return torch.linalg.solve(x[index].T @ (w[:, None] * x[index]) + 0.1 * torch.eye(3), x[index].T @ (w * y[index]))

    def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        losses = (model(x[batch])[:, 0] - y[batch]).square()
        return hparams.mean(losses, batch) + 0.1 * model.weight.square().sum()

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return (model(v)[:, 0] - u).square().mean()

    model = nn.Linear(3, 1, bias=False)
    model.weight.data.copy_(solution(leaf.detach()))
    method = hoptim.Implicit(hoptim.CG(terms=3, tolerance=0.0))
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    found = hoptim.hypergradient(problem, index, None, method).grads["example_weight"]
    expected = torch.func.grad(lambda leaf: (v @ solution(leaf) - u).square().mean())(leaf.detach())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert set(found.nonzero()[:, 0].tolist()) == {0, 1, 4, 7}  # neither what is trusted nor what is not in the batch


def test_a_run_moves_the_weights_down_for_wrong_labels_and_leaves_trusted_ones_alone() -> None:
    x, y = torch.randn(120, 2), torch.arange(120) % 2
    x[:, 0] += 4 * y
    y[:20] = 1 - y[:20]
    clean = torch.arange(80, 120)
    model, hparams = nn.Linear(2, 2), ExampleWeights(120, trusted=clean).double()

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(x[batch]), y[batch])

    def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return hparams.mean(F.cross_entropy(model(x[batch]), y[batch], reduction="none"), batch)

    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    inner = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer = hoptim.BilevelOptimizer(inner, hparams.optimizer(), problem, val_batches=[clean], every=5, warmup=100)
    for _ in range(300):
        optimizer.zero_grad()
        optimizer.loss(torch.arange(80)).backward()
        optimizer.step()
    weight = optimizer.record.hyperparameters["example_weight"]
    assert weight[:20].mean() < 0.2
    assert weight[20:80].mean() > 0.8
    assert (weight[80:] == 1).all()
    (leaf,) = hparams.parameters()
    assert (leaf[80:] == 0).all()  # the logit of 0.5


EXAMPLE_FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no examples": (lambda: ExampleWeights(0), ValueError, "n is 0"),
    "a tensor": (lambda: ExampleWeights(torch.ones(3)), ValueError, "n is tensor"),
    "a start at the edge": (lambda: ExampleWeights(3, start=1.0), ValueError, "start is 1.0"),
    "a short mask": (lambda: ExampleWeights(3, trusted=[True, False]), TypeError, "trusted is of torch.bool"),
    "an index too large": (lambda: ExampleWeights(3, trusted=[1, 3]), IndexError, "out of bounds"),
    "an index below zero": (lambda: ExampleWeights(3, trusted=[-1]), IndexError, "out of bounds"),
    "all of them": (lambda: ExampleWeights(2, trusted=[0, 1]), ValueError, "all 2 examples are trusted"),
    "a mask of numbers": (
        lambda: ExampleWeights(4, trusted=torch.tensor([1, 0, 0, 1], dtype=torch.uint8)),
        ValueError,
        "trusted has 4 numbers that are 0 or 1, as a mask: give it as bool",
    ),
    "a mask of numbers in a list": (lambda: ExampleWeights(3, trusted=[1, 0, 1]), ValueError, "trusted has 3 numbers"),
    "weights for trusted": (lambda: ExampleWeights(2, trusted=[0.5, 1.0]), TypeError, "trusted is of torch"),
    "a mean": (
        lambda: weights_of().mean(torch.tensor(1.0), torch.tensor([1])),
        ValueError,
        r"losses have shape \(\) and index \(1,\).*reduction=",
    ),
    "a column of losses": (lambda: weights_of().mean(torch.ones(2, 1), torch.tensor([1, 2])), ValueError, r"shape \(2, 1\)"),
    "images for indices": (lambda: weights_of().mean(torch.ones(2), torch.ones(2)), TypeError, "index is of torch.float64"),
    "a list": (lambda: weights_of().mean(torch.ones(1), [1]), TypeError, "index is a list"),
}


@pytest.mark.parametrize("name", EXAMPLE_FAULTS)
def test_what_example_weights_cannot_do_is_named(name: str) -> None:
    call, error, words = EXAMPLE_FAULTS[name]
    with pytest.raises(error, match=words):
        call()
