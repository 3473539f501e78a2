"""The recipes' experiments at a tiny size: what learns moves, its baselines do not, and a fit by folds is hoptim's own."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT, result, rows, run, train
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay

FILES = sorted((ROOT / "conf" / "experiment" / "recipes").glob("*.yaml"))
EXPERIMENTS = [path.stem for path in FILES if path.stem != "folds"]
TINY = ("hoptim/tracker=[]", "outer_steps=1", "inner_steps=2", "every=2", "warmup=0")
PLACES = (
    "weight_decay", "prior_scale", "label_smoothing", "noise_width", "dropout", "example_weights", "soft_labels",
    "domain_weights", "temperature", "distilled_data", "augmentation_net", "augmentation", "gate",
    "rater",
)  # fmt: skip


def test_every_experiment_learns(tmp_path: Path) -> None:
    small = ("++task.test=50", "plots=false", f"root={tmp_path}")
    own = {"temperature": ("task.data=digits", "task.train=300", "task.val=100")}  # Fashion-MNIST is not on every machine
    train("-m", f"experiment={','.join(f'recipes/{name}' for name in EXPERIMENTS if name not in own)}", *TINY, *small)
    for name, more in own.items():
        train("-m", f"experiment=recipes/{name}", *TINY, *small, *more)
    finals = [result(path.parent) for path in tmp_path.rglob("result.json")]
    assert sorted(final["name"] for final in finals) == sorted(f"recipes/{name}" for name in EXPERIMENTS)
    for final in finals:
        assert (final["inner_steps"], final["hypersteps"], final["moved"]) == (2, 1, 1), final["name"]
        assert all(math.isfinite(value) for key, value in final.items() if key.endswith("loss"))


def test_the_baselines_of_an_experiment_do_not_learn(tmp_path: Path) -> None:
    train("experiment=recipes/dropout", *TINY, "++task.test=50", f"hydra.run.dir={tmp_path}")
    found = {path.parent.name: result(path.parent) for path in tmp_path.glob("baselines/*/result.json")}
    assert set(found) == {"no dropout", "dropout 0.2", "dropout 0.5"}
    assert all((final["inner_steps"], final["hypersteps"], final["moved"]) == (2, 0, 0) for final in found.values())
    assert len({final["test_loss"] for final in found.values()}) == 3
    starts = {name: load_file(tmp_path / "baselines" / name / "hyperparameters.safetensors") for name in found}
    rates = {name: round(values["dropout.rate.1"].item(), 6) for name, values in starts.items() if name != "no dropout"}
    assert rates == {"dropout 0.2": 0.2, "dropout 0.5": 0.5}
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_every_recipe_learns_by_folds(tmp_path: Path) -> None:
    options = ["experiment=[]", "name=try", "task=classification", "task/model_of=linear", f"root={tmp_path}", "plots=false"]
    options += ["task.train=60", "task.val=30", "task.test=50", "folds=2", "outer_steps=2", "inner_steps=18", TINY[0]]
    every = ",".join(f"[{name}]" for name in PLACES)
    train("-m", f"hoptim/recipe={every}", *options, "outer=by_constraint", "task.wrong_labels=[0,0.5]")
    found = [path.parent for path in tmp_path.rglob("result.json")]
    assert len(found) == len(PLACES)
    for folder in found:
        final = result(folder)
        assert (final["status"], final["hypersteps"], final["moved"]) == ("finished", 25, 25)  # the default
        assert all(value.isfinite().all() for value in load_file(folder / "hyperparameters.safetensors").values())


def digits(train_size: int, val_size: int, test_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The digits in the order in which a run of this seed has them, standardised by its training part."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: train_size + val_size + test_size]
    x = x[order].float() / 16
    own = x[:train_size]
    return ((x - own.mean()) / own.std()).reshape(-1, 1, 8, 8), y[order]


def test_folds_are_hoptims_own_cross_validation(tmp_path: Path) -> None:
    fewer = ("task.train=60", "task.val=30", "task.test=50", "batch_size=null", "outer_steps=2", "inner_steps=25")
    train("experiment=recipes/folds", f"hydra.run.dir={tmp_path}", TINY[0], *fewer, "plots=false", "seed=3")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    x, y = digits(60, 30, 50, seed=3)

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    model = make()
    hparams = nn.ModuleDict(
        {
            "weight_decay": WeightDecay(model, per="channel", start=0.001),
            "label_smoothing": LabelSmoothing(start=0.01),
            "noise_width": NoiseWidth(model, start=0.05),
        }
    )
    loss = hoptim.CompositeLoss(
        lambda model, hparams, batch: hparams["noise_width"].call(model, x[batch]),
        lambda z, hparams, batch: hparams["label_smoothing"].cross_entropy(z, y[batch], reduction="none").mean(),
        lambda model, hparams: hparams["weight_decay"].penalty(model),
    )

    def val_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model.eval()(x[batch]), y[batch])

    def fit(model: nn.Module, optimizer: Any, examples: Tensor) -> None:
        for _ in range(50):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    inner = partial(torch.optim.SGD, lr=0.03, momentum=0.9, nesterov=True)
    found = hoptim.CrossValidated(
        make, hparams, loss, val_loss, inner=lambda model: inner(model.parameters()), examples=90, steps=50, folds=3
    ).fit(fit)
    final = result(tmp_path)
    with torch.no_grad():
        test = F.cross_entropy(found.model.eval()(x[90:]), y[90:]).item()
    assert final["test_loss"] == pytest.approx(test, rel=1e-5)
    assert final["val_loss"] == pytest.approx(found.history[-1]["val_loss"], rel=1e-5)
    assert rows(tmp_path)[-1]["trainings"] > 1


def test_a_fixed_decay_is_a_plain_training_on_everything(tmp_path: Path) -> None:
    """The last training of a study's baseline is gradient descent written here, on training and validation data."""
    sizes = ["task.data=digits", "task.train=500", "task.val=500", "task.test=200", "outer_steps=10", "inner_steps=100"]
    plain = [
        "learn=false",
        "hoptim.recipe.weight_decay.start=0.1",
        "inner.momentum=0",
        "inner.nesterov=false",
        "inner.lr=0.1",
    ]
    train("experiment=paper/holdout", f"hydra.run.dir={tmp_path}", *sizes, *plain, TINY[0], "plots=false")
    x, y = digits(500, 500, 200, seed=0)
    x, w, b = x.double().flatten(1), torch.zeros(64, 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    for _ in range(1000):
        loss = F.cross_entropy(x[:1000] @ w + b, y[:1000]) + 0.05 * w.square().sum()
        gradients = torch.autograd.grad(loss, [w, b])
        with torch.no_grad():
            for weight, gradient in zip((w, b), gradients, strict=True):
                weight -= 0.1 * gradient
    test = F.cross_entropy(x[1000:] @ w + b, y[1000:]).item()
    assert result(tmp_path)["retrained_test_loss"] == pytest.approx(test, rel=5e-3)  # convex: it forgets where it began


def test_the_table_pairs_by_seed_and_takes_the_retrained_model(tmp_path: Path) -> None:
    def write(path: str, **figures: float) -> None:
        folder = tmp_path / path
        folder.mkdir(parents=True)
        row = {"inner_seconds": 2.0, "hyper_seconds": 3.0 * ("baselines" not in path)}
        (folder / "result.json").write_text(json.dumps({"status": "finished", **figures}))
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    for seed, (own, other) in enumerate([(0.5, 0.6), (0.3, 0.2)]):
        again = {"retrained_test_loss": own, "retrained_test_accuracy": 0.9}
        write(f"recipes/gate/seed={seed}", test_loss=9.0, test_accuracy=0.1, **again)
        write(f"recipes/gate/seed={seed}/baselines/all", test_loss=other, test_accuracy=0.8)
        write(f"recipes/gate/seed={seed}/baselines/none", test_loss=2 * other, test_accuracy=0.7)
    told = run("studies/recipes/run.py", tmp_path).stdout.splitlines()
    line = "| gate | 0.400 ± 0.100 | all 0.400 | +0.000 ± 0.100 (1 of 2) | 0.900 and 0.800 | none 0.800 | 3.5 |"
    assert told[2] == line
    assert (tmp_path / "recipes.png").stat().st_size > 5_000
