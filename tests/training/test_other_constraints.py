"""What a BilevelOptimizer and a fit have saved is refused under another constraint, and nothing changes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hoptim

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = r"was saved under GreaterThan\(lower_bound=0.0\) and is GreaterThanEq\(lower_bound=0.0\) here"


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model(X[batch]) - X[batch].sum(1, keepdim=True)).square().mean()


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return val_loss(model, hparams, batch) + hparams["own"]["decay"] * model.weight.square().sum()


def decays(constraint: Any) -> nn.Module:
    return nn.ModuleDict({"own": hoptim.HyperParameters({"decay": torch.tensor(0.068)}, {"decay": constraint})})


def optimizer(constraint: Any) -> hoptim.BilevelOptimizer:
    model, hparams = nn.Linear(3, 1), decays(constraint)
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=0.0)
    found = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[torch.arange(6)], every=1)
    found.loss(torch.arange(6, 12)).backward()
    found.step()
    return found


def from_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [copy.deepcopy, from_file])
def test_an_optimizers_state_is_refused_under_another_constraint(way: Any) -> None:
    saved, other, again = (
        optimizer(constraints.positive),
        optimizer(constraints.nonnegative),
        optimizer(constraints.positive),
    )
    state = way(saved.state_dict())
    with pytest.raises(ValueError, match=f"'own.decay' {WORDS}"):
        other.load_state_dict(state)
    assert other.problem.hparams["own"]["decay"].item() == 0.068
    assert other.problem.hparams["own"].decay.item() == 0.068
    again.load_state_dict(state)
    assert torch.equal(again.problem.hparams["own"]["decay"], saved.problem.hparams["own"]["decay"])
    state["hoptim"]["hparams"] = dict(state["hoptim"]["hparams"])  # as safetensors gives it back
    again.load_state_dict(way(state))
    assert torch.equal(again.problem.hparams["own"]["decay"], saved.problem.hparams["own"]["decay"])


class StopError(Exception):
    pass


@pytest.mark.parametrize("phase", ["folds", "last"])
def test_a_fits_file_is_refused_under_another_constraint(phase: str, tmp_path: Path) -> None:
    path, steps = tmp_path / "fit.pt", 0

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        nonlocal steps
        for _ in optimizer.resumable(range(4)):
            if len(examples) == (8 if phase == "folds" else 12) and stop and steps in (3, 15):
                raise StopError
            steps += 1
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    def fit(constraint: Any) -> tuple[nn.Module, Any]:
        nonlocal steps
        steps, hparams = 0, decays(constraint)
        outer = torch.optim.SGD(hparams.parameters(), lr=0.0)
        torch.manual_seed(0)
        cross_validated = hoptim.CrossValidated(
            lambda: nn.Linear(3, 1), hparams, train_loss, val_loss, inner=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
            outer=outer, examples=12, steps=4, hypersteps=2,
        )  # fmt: skip
        return hparams, lambda: cross_validated.fit(train, checkpoint=path, every_seconds=0)

    stop = True
    with pytest.raises(StopError):
        fit(constraints.positive)[1]()
    assert torch.load(path, weights_only=True)["ranks"][0]["phase"] == phase
    stop = False
    hparams, run = fit(constraints.nonnegative)
    with pytest.raises(ValueError, match=f"'own.decay' {WORDS}"):
        run()
    assert hparams["own"]["decay"].item() == 0.068
    fit(constraints.positive)[1]()
