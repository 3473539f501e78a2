"""The outer rates: each recipe has that of the page, from its own optimizer, in an outer Adam for several, and in a fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim import recipes
from hoptim.problem.outer_adam import outer_adam

MODEL = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
MADE: dict[str, Callable[[], nn.Module]] = {
    "WeightDecay": lambda: recipes.WeightDecay(MODEL),
    "PriorScale": lambda: recipes.PriorScale(MODEL, 10),
    "NoiseWidth": lambda: recipes.NoiseWidth(MODEL),
    "Dropout": lambda: recipes.Dropout(MODEL),
    "LabelSmoothing": recipes.LabelSmoothing,
    "Temperature": recipes.Temperature,
    "ExampleWeights": lambda: recipes.ExampleWeights(5),
    "SoftLabels": lambda: recipes.SoftLabels(torch.arange(3)),
    "LossWeights": lambda: recipes.LossWeights(["a", "b"]),
    "DomainWeights": lambda: recipes.DomainWeights({"a": 1, "b": 2}),
    "Augmentation": recipes.Augmentation,
    "AugmentationNet": lambda: recipes.AugmentationNet(1, hidden=2),
    "DistilledData": lambda: recipes.DistilledData(2, (4,)),
    "Schedule": lambda: recipes.Schedule(5),
    "Categorical": lambda: recipes.Categorical(["a", "b"]),
    "Gate": lambda: recipes.Gate(3),
    "Rater": lambda: recipes.Rater(nn.Linear(2, 1)),
    "Initialization": lambda: recipes.Initialization(nn.Linear(2, 1)),
}
ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+)[^|]*\| ([\d.]+)(?:, falling)? \|", re.MULTILINE)
PAGE = Path(recipes.__file__).with_name("README.md").read_text()
RATES = {name: float(rate) for names, rate in ROW.findall(PAGE) for name in re.findall(r"\w+", names)}


def first_move(outer: torch.optim.Optimizer, hparams: nn.Module) -> dict[str, set[float]]:
    """How far each leaf goes in a first step, which for Adam is its rate."""
    before = {name: leaf.detach().clone() for name, leaf in hparams.named_parameters()}
    for leaf in hparams.parameters():
        leaf.grad = torch.full_like(leaf, 3.0)
    outer.step()
    return {
        name: {round(one, 5) for one in (before[name] - leaf.detach()).flatten().tolist()}
        for name, leaf in hparams.named_parameters()
    }


def test_the_page_has_a_rate_for_every_recipe() -> None:
    assert set(MADE) == set(recipes.__all__)
    assert {name: RATES[name] for name in ("AugmentationNet", "DistilledData", "Schedule", "Gate", "Rater")} == {
        "AugmentationNet": 0.01, "DistilledData": 0.03, "Schedule": 0.3, "Gate": 0.3, "Rater": 0.003
    }  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_alone_a_recipe_has_the_rate_of_the_page(name: str) -> None:
    for make in (lambda hparams: hparams.optimizer(), outer_adam):
        hparams = MADE[name]().double()
        moves = first_move(make(hparams), hparams)
        assert set().union(*moves.values()) == {RATES[name]}, "entries that agree move by their level alone"


def test_beside_others_each_recipe_has_its_own_rate_and_other_modules_that_of_a_logarithm() -> None:
    hparams = nn.ModuleDict(
        {"recipes": nn.ModuleDict({name: make() for name, make in MADE.items()}), "net": nn.Linear(1, 1)}
    )
    outer = outer_adam(hparams.double())
    rates = [group["lr"] for group in outer.param_groups]
    assert sorted(rates) == [0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.1, 0.3, 0.6, 0.6], "decays and prior scales have levels"
    for name, move in first_move(outer, hparams).items():
        recipe = name.split(".")[1]
        assert move == {RATES.get(recipe, 0.05)}, name
    assert {group["lr"] for group in outer_adam(hparams, 0.2).param_groups} == {0.2}


class Own(nn.Module):
    """Decides for all that is in it, also for the recipe."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.gate, self.shift, self.make = recipes.Gate(2), nn.Parameter(torch.ones(2)), make

    def optimizer(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def test_the_outermost_module_with_an_optimizer_decides_with_all_its_options() -> None:
    own = Own(lambda leaves: torch.optim.Adam(leaves, lr=0.7, betas=(0.5, 0.9), weight_decay=0.1))
    hparams = nn.ModuleDict({"own": own, "again": own.gate, "gate": recipes.Gate(2)})
    (first, second) = outer_adam(hparams).param_groups
    assert (first["lr"], first["betas"], first["weight_decay"], len(first["params"])) == (0.7, (0.5, 0.9), 0.1, 2)
    assert (second["lr"], second["betas"], len(second["params"])) == (0.3, (0.9, 0.999), 1)


def test_another_optimizer_than_adam_serves_alone_and_is_refused_beside_others() -> None:
    own = Own(lambda leaves: torch.optim.SGD(leaves, lr=7.0))
    assert isinstance(outer_adam(own), torch.optim.SGD)
    with pytest.raises(TypeError, match=r"a\.optimizer\(\) returns SGD, .*give outer"):
        outer_adam(nn.ModuleDict({"a": own}))


@pytest.mark.parametrize("name", ["optimizer", "net"])
def test_a_child_with_the_name_of_the_method_is_a_child(name: str) -> None:
    outer = outer_adam(nn.ModuleDict({name: nn.Linear(1, 1)}))
    assert [group["lr"] for group in outer.param_groups] == [0.05]


X = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 2


def val_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(X[batch]), Y[batch])


def augmented(model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(hparams(X[batch])), Y[batch]) + model[1].weight.square().sum()


def distilled(model: Any, hparams: Any, batch: Tensor) -> Tensor:
    x, y = hparams["data"].examples()
    return F.cross_entropy(model(x), y) + hparams["decay"].penalty(model)


def make() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def train(model: nn.Module, optimizer: Any, examples: Tensor) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.loss(examples).backward()
        optimizer.step()


FITS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, float]]] = {
    "a network alone": (lambda: recipes.AugmentationNet(1, hidden=2), augmented, {"layers.4.bias": 0.01}),
    "data and decays": (
        lambda: nn.ModuleDict({"data": recipes.DistilledData(2, (1, 4, 4)), "decay": recipes.WeightDecay(make())}),
        distilled,
        {"data.input": 0.03, "decay.decay.1.weight": 0.6},
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_over_folds_moves_each_leaf_by_its_own_rate(name: str) -> None:
    """The one hyperstep of this fit is a first step of Adam, whose size is the rate."""
    of, loss, rates = FITS[name]
    hparams = of().double()
    before = {key: leaf.detach().clone() for key, leaf in hparams.named_parameters()}
    hoptim.CrossValidated(
        make, hparams, loss, val_loss, inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        examples=12, steps=4, hypersteps=1, average=False,
    ).fit(train)  # fmt: skip
    for key, rate in rates.items():
        move = (dict(hparams.named_parameters())[key].detach() - before[key]).abs()
        torch.testing.assert_close(move, torch.full_like(move, rate), rtol=1e-3, atol=0)
