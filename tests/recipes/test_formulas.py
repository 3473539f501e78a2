"""Each recipe's term of the loss and its derivative, against the formula written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import (
    Categorical,
    DistilledData,
    DomainWeights,
    Dropout,
    Gate,
    LossWeights,
    PriorScale,
    Schedule,
    SoftLabels,
    Temperature,
    WeightDecay,
)


def slopes(value: Callable[[], Tensor], hparams: nn.Module) -> tuple[Tensor, Tensor]:
    """The derivative in all leaves, by autograd and by central differences."""
    leaves = list(hparams.parameters())
    found = torch.cat([g.flatten() for g in torch.autograd.grad(value(), leaves)])
    at = nn.utils.parameters_to_vector(leaves).detach()
    differences = []
    for line in torch.eye(len(at)):
        ends = []
        for sign in (1e-6, -1e-6):
            nn.utils.vector_to_parameters(at + sign * line, leaves)
            ends.append(value().detach())
        differences.append((ends[0] - ends[1]) / 2e-6)
    nn.utils.vector_to_parameters(at, leaves)
    return found, torch.stack(differences)


def seeded(value: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The value with the same random numbers each time."""

    def again() -> Tensor:
        torch.manual_seed(3)
        return value()

    return again


Z, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(6) % 4
LOSSES = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1, 4.0], dtype=torch.float64)
SOURCE = torch.tensor([0, 1, 1, 2, 0, 2])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


DERIVATIVES: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]] = {
    "loss weights": lambda: (LossWeights(["a", "b", "c"]), lambda h: h.sum(dict(zip("abc", LOSSES[:3], strict=True)))),
    "domain weights": lambda: (DomainWeights({"a": 5, "b": 3, "c": 2}), lambda h: h.mean(LOSSES, SOURCE)),
    "temperature": lambda: (Temperature(start=1.7), lambda h: h.cross_entropy(Z, Y)),
    "soft labels": lambda: (SoftLabels(Y[:3], 4), lambda h: h.cross_entropy(Z[:3], torch.tensor([2, 0, 1]))),
    "distilled data": lambda: (DistilledData(4, (4,)), lambda h: F.cross_entropy(*h.examples())),
    "prior scale": lambda: (PriorScale(network(), 50), lambda h: h.penalty(network())),
    "schedule": lambda: (Schedule(11, 4, start=0.3), lambda h: torch.stack([h.at(t) for t in (0, 4, 10)]).prod()),
    "dropout": lambda: (Dropout(network(), start=0.3), seeded_call(Z)),
    "dropout of units": lambda: (Dropout(network(), per="unit", start=0.3), seeded_call(Z)),
    "softmax": lambda: (Categorical(["a", "b", "c"]), lambda h: h.mix(dict(zip("abc", Z[:3], strict=True))).square().sum()),
    "gates": lambda: (Gate(4, start=0.4), lambda h: seeded(lambda: (h.values() * Z[0]).square().sum() + h.count())()),
    "gates without noise": lambda: (Gate(4, start=0.4), lambda h: (h.values(training=False) * Z[0]).square().sum()),
}


def seeded_call(x: Tensor) -> Callable[[Any], Tensor]:
    model = network()
    return lambda h: seeded(lambda: h.call(model, x).square().sum())()


@pytest.mark.parametrize("name", DERIVATIVES)
def test_the_derivative_is_that_of_differences(name: str) -> None:
    hparams, value = DERIVATIVES[name]()
    hparams.double()
    found, expected = slopes(lambda: value(hparams), hparams)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert found.abs().max() > 1e-3
    fixed = isinstance(hparams, DomainWeights)  # their sum
    assert hparams.degrees_of_freedom == sum(leaf.numel() for leaf in hparams.parameters()) - fixed


def test_weights_of_losses_are_all_one_at_the_start_and_keep_their_sum() -> None:
    hparams = LossWeights(["a", "b", "c"])
    losses = {"c": torch.tensor(3.0), "a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert hparams.sum(losses).item() == pytest.approx(6.0)
    with torch.no_grad():
        for leaf in hparams.parameters():
            leaf.add_(torch.tensor([0.7, -1.3]))
    weights = 3 * hparams["share"].detach()
    assert weights.sum().item() == pytest.approx(3.0)
    assert hparams.sum(losses).item() == pytest.approx(float(weights @ torch.tensor([1.0, 2.0, 3.0])))


def test_a_mixture_is_the_plain_mean_at_the_start_and_each_sources_mean_by_its_share() -> None:
    """On all data the estimate is exact: Σ_d p_d·(mean loss of source d)."""
    hparams = DomainWeights({"a": 2, "b": 2, "c": 2})
    assert hparams.mean(LOSSES, SOURCE).item() == pytest.approx(LOSSES.mean().item(), rel=1e-6)
    hparams["mixture"] = torch.tensor([0.5, 0.2, 0.3])
    means = torch.stack([LOSSES[d == SOURCE].mean() for d in range(3)])
    assert hparams.mean(LOSSES, SOURCE).item() == pytest.approx(float(means @ torch.tensor([0.5, 0.2, 0.3])), rel=1e-6)


def test_soft_labels_are_those_of_the_batch() -> None:
    hparams, index = SoftLabels(Y, start=0.7).double(), torch.tensor([4, 1])
    q = torch.full((6, 4), 0.1).scatter(1, Y[:, None], 0.7)
    torch.testing.assert_close(hparams["label"].detach(), q, rtol=1e-6, atol=1e-7, check_dtype=False)
    expected = -(q[index] * Z[:2].log_softmax(1)).sum(1)
    torch.testing.assert_close(hparams.cross_entropy(Z[:2], index, reduction="none").detach(), expected, rtol=1e-6, atol=0)


def test_distilled_examples_come_class_by_class() -> None:
    x, y = DistilledData(3, (2, 5), per_class=2).examples()
    assert (tuple(x.shape), y.tolist()) == ((6, 2, 5), [0, 0, 1, 1, 2, 2])
    assert 0.03 < x.std() < 0.3


@pytest.mark.parametrize("per", ["global", "tensor", "channel", "weight"])
def test_a_prior_is_the_decay_that_it_stands_for(per: Any) -> None:
    model = network()
    prior, decay = PriorScale(model, 50, per=per, start=0.4), WeightDecay(model, per=per, start=1 / (50 * 0.16))
    torch.testing.assert_close(prior.penalty(model), decay.penalty(model))
    by_hand = -torch.distributions.Normal(0.0, 0.4).log_prob(model[0].weight).sum() / 50
    shift = -torch.distributions.Normal(0.0, 0.4).log_prob(torch.zeros(())) * model[0].weight.numel() / 50
    only = PriorScale(model, 50, per=per, start=0.4, include=lambda name, _: name == "0.weight")
    torch.testing.assert_close(only.penalty(model), by_hand - shift, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(prior.scale("0.weight"), torch.full_like(prior.scale("0.weight"), 0.4))


@pytest.mark.parametrize(("steps", "knots"), [(11, 3), (11, 11), (2, 2), (100, 7)])
def test_a_schedule_is_straight_on_a_log_scale_between_its_knots(steps: int, knots: int) -> None:
    hparams = Schedule(steps, knots)
    values = torch.linspace(1, 3, knots).exp().flip(0)
    values[0] = 0.5
    hparams["value"] = values
    places = [t * (knots - 1) / (steps - 1) for t in range(steps)]
    expected = np.exp(np.interp(places, range(knots), values.log().numpy()))
    found = torch.stack([hparams.at(t) for t in range(steps)]).detach()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0, check_dtype=False)
    assert hparams.at(10 * steps).item() == pytest.approx(values[-1].item(), rel=1e-6)


def test_dropout_has_its_rate_and_keeps_the_mean() -> None:
    """The relaxed mask at a low temperature is that of nn.Dropout."""
    model = nn.Sequential(nn.Linear(2000, 3))
    hparams = Dropout(model, start=0.3, temperature=1e-3).double()
    torch.manual_seed(0)
    found = hparams.changed("0", torch.ones(50, 2000)).detach()
    assert (found < 0.5).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert found.mean().item() == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(found[found > 0.5].max(), torch.tensor(1 / 0.7))


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(5, 2), (7, 3, 5)), (nn.Conv1d(5, 2, 3), (7, 5, 9)), (nn.Conv2d(5, 2, 3), (7, 5, 9, 8))]
)
def test_each_unit_has_a_rate_of_its_own_on_the_axis_of_units(layer: nn.Module, shape: tuple[int, ...]) -> None:
    hparams = Dropout(nn.Sequential(layer), per="unit").double()
    hparams["rate.0"] = torch.tensor([0.001, 0.999, 0.001, 0.001, 0.001])
    torch.manual_seed(0)
    found = hparams.changed("0", torch.ones(shape))
    units = found.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    dropped = (units < 0.5).double().mean(1)
    assert dropped[1] > 0.9
    assert (dropped[[0, 2, 3, 4]] < 0.1).all()


def test_a_drawn_option_is_one_alone_by_its_probability_and_has_the_relaxed_derivative() -> None:
    hparams = Categorical(["a", "b", "c"], relaxation="gumbel", temperature=0.7).double()
    p = torch.tensor([0.2, 0.3, 0.5])
    hparams["probability"] = p
    torch.manual_seed(0)
    drawn = torch.stack([hparams.weights().detach() for _ in range(4000)])
    assert set(drawn.sum(1).tolist()) == {1.0}
    assert ((drawn == 0) | (drawn == 1)).all()
    torch.testing.assert_close(drawn.mean(0), p, rtol=0, atol=0.03)
    torch.testing.assert_close(hparams.weights(training=False), p, rtol=1e-6, atol=1e-8, check_dtype=False)
    torch.manual_seed(1)
    (found,) = torch.autograd.grad((hparams.weights() * torch.tensor([1.0, 2.0, 4.0])).sum(), list(hparams.parameters()))
    torch.manual_seed(1)
    noise = -torch.empty(3).exponential_().log()
    soft = ((hparams["probability"].log() + noise) / 0.7).softmax(0)
    (expected,) = torch.autograd.grad((soft * torch.tensor([1.0, 2.0, 4.0])).sum(), list(hparams.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gates_are_open_and_closed_as_often_as_the_formula_says() -> None:
    gate = Gate(4).double()
    openness = torch.tensor([0.05, 0.3, 0.6, 0.95])
    gate["openness"] = openness
    torch.manual_seed(0)
    drawn = torch.stack([gate.values().detach() for _ in range(8000)])
    assert drawn.min() == 0.0
    assert drawn.max() == 1.0
    log_alpha = torch.logit(openness)
    expected = torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close((drawn > 0).double().mean(0), expected, rtol=0, atol=0.02)
    assert gate.count().item() == pytest.approx(expected.sum().item())
    torch.testing.assert_close(
        gate.values(training=False).detach(), (openness * 1.2 - 0.1).clamp(0, 1), rtol=1e-6, atol=1e-7
    )
    opened, far = gate.harden()
    assert opened.tolist() == [False, False, True, True]
    assert far == pytest.approx(0.4 * 1.2 - 0.1 + 0.0, abs=0.2)


FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one loss": (lambda: LossWeights(["a"]), ValueError, "names is ['a']: give a list of two names or more"),
    "a name twice": (lambda: LossWeights(["a", "a"]), ValueError, "each once"),
    "names as text": (lambda: LossWeights("ab"), ValueError, "names is 'ab': give a list of two names"),
    "a loss is missing": (lambda: LossWeights(["a", "b"]).sum({"a": Z}), ValueError, "losses has ['a']"),
    "an empty source": (lambda: DomainWeights({"a": 1, "b": 0}), ValueError, "'mixture' starts on the edge of"),
    "one loss for all": (
        lambda: DomainWeights({"a": 1, "b": 1}).mean(LOSSES.sum(), SOURCE), ValueError, "losses have shape () and source"
    ),
    "no temperature": (lambda: Temperature(0.0), ValueError, "start is 0.0: give a number above 0"),
    "labels with a point": (lambda: SoftLabels(LOSSES), TypeError, "labels is a Tensor: give the class"),
    "a label too large": (lambda: SoftLabels(Y, 3), ValueError, "labels go from 0 to 3 and classes is 3"),
    "no classes": (lambda: DistilledData(0, (2,)), ValueError, "classes is 0"),
    "no examples": (lambda: PriorScale(network(), 0), ValueError, "examples is 0"),
    "too many knots": (lambda: Schedule(5, 6), ValueError, "knots is 6: give a whole number from 2 to steps=5"),
    "a step before the first": (lambda: Schedule(5).at(-1), ValueError, "step is -1: give one from 0 to 4"),
    "dropout for each weight": (lambda: Dropout(network(), per="weight"), ValueError, "per is 'weight'"),  # type: ignore[arg-type]
    "dropout of one": (lambda: Dropout(network(), start=1.0), ValueError, "start is 1.0: give a number between 0 and 1"),
    "a layer that is not there": (lambda: Dropout(network(), ["9"]), ValueError, "no layer '9': its layers are"),
    "units of no known layer": (
        lambda: Dropout(nn.Sequential(nn.Tanh()), ["0"], per="unit"), ValueError, "layer '0' is Tanh, whose units"
    ),
    "one option": (lambda: Categorical(["a"]), ValueError, "options is ['a']: give a list of two names or more"),
    "another relaxation": (
        lambda: Categorical(["a", "b"], relaxation="hard"), ValueError, "relaxation is 'hard'"  # type: ignore[arg-type]
    ),
    "an option too many": (
        lambda: Categorical(["a", "b"]).mix(dict.fromkeys("abc", Z)), ValueError, "found has ['a', 'b', 'c']"
    ),
    "other names than losses": (lambda: LossWeights(["a", "b"]).sum({"a": Z, 3: Z}), ValueError, "losses has ['3', 'a']"),  # type: ignore[dict-item]
    "labels as pairs": (lambda: SoftLabels(Z.to(torch.complex64)[0]), TypeError, "labels is a Tensor: give the class"),
    "logits of other classes": (
        lambda: SoftLabels(Y).cross_entropy(Z[:2, :3], torch.tensor([0, 1])), ValueError,
        "z has shape (2, 3) and index (2,): give 4 logits for each index",
    ),
    "a call without a model": (lambda: Dropout(network()).call("model", Z), TypeError, "model is a str: give an nn.Module"),
    "a penalty without a model": (lambda: WeightDecay(network()).penalty(Z), TypeError, "model is a Tensor: give"),
    "no gates": (lambda: Gate(0), ValueError, "n is 0: give the number of gates"),
}  # fmt: skip


def test_whole_numbers_are_weighted_as_they_are() -> None:
    """In whose type a weight would be 0."""
    x, source = torch.tensor([1, 3, 8]), torch.tensor([0, 1, 1])
    shares, mixture = LossWeights(["a", "b"]), DomainWeights({"a": 1, "b": 1})
    shares["share"] = mixture["mixture"] = torch.tensor([0.25, 0.75])
    assert shares.sum({"a": x[0], "b": x[1]}).item() == pytest.approx(0.5 * 1 + 1.5 * 3)
    assert mixture.mean(x, source).item() == pytest.approx((0.5 * 1 + 1.5 * 3 + 1.5 * 8) / 3)
    torch.testing.assert_close(Temperature(start=4.0).scaled(x).tolist(), [0.25, 0.75, 2.0])


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_recipe_cannot_do_is_named(name: str) -> None:
    call, error, words = FAULTS[name]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_all_recipes_are_on_the_page() -> None:
    page = Path(hoptim.recipes.__file__).with_name("README.md").read_text()
    assert [name for name in hoptim.recipes.__all__ if f"`{name}" not in page] == []
