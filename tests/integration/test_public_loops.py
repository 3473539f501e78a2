"""Loops of public scripts: one as torchvision's, one on two ranks as imagenet's, one as Accelerate's example.

With no hypersteps and no penalty each ends in the bits of the same loop without hoptim; with hypersteps the decays move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import public_loops as loops
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from cases import same
from torch import Tensor, distributed
from transformers import BertConfig, BertForSequenceClassification

import hoptim

LARGE = 1e-2  # a decay of the script alone whose trace is in every weight


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    """Every Accelerator shares a state: it is cleared."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@contextlib.contextmanager
def inert() -> Iterator[None]:
    """No hypersteps, and no penalty."""
    with pytest.MonkeyPatch.context() as patch:
        made = hoptim.BilevelOptimizer
        patch.setattr(hoptim, "BilevelOptimizer", lambda *a, **options: made(*a, **{**options, "every": None}))
        patch.setattr(hoptim.recipes.WeightDecay, "penalty", lambda self, model: torch.zeros(()))
        yield


def ends(script: Any, train: Any, val: Any) -> dict[str, Any]:
    """How the script ends without decay, with the same and hoptim that does nothing, with hoptim, and with a large decay."""
    ways = {"plain": ("training", 0.0), "inert": ("hoptim", 0.0), "hoptim": ("hoptim", 0.0), "decayed": ("training", LARGE)}
    found = {}
    for name, (arm, decay) in ways.items():
        torch.manual_seed(0)
        with inert() if name == "inert" else contextlib.nullcontext():
            model, optimizer = replace(script, decay=decay).train(arm, train, val)
        found[name] = {key: value.clone() for key, value in model.state_dict().items()}
        found[f"{name} drawn"] = torch.rand(3)
        if name == "hoptim":
            record = optimizer.record
            found["decays"] = {key: value.clone() for key, value in record.hyperparameters.items()}
            found["counts"] = (optimizer.inner_steps, optimizer.hyper_steps, record.moved)
    return found


def check(found: dict[str, Any], steps: int, hypersteps: int) -> None:
    assert same(found["inert"], found["plain"])
    assert not same(found["decayed"], found["plain"])
    assert not same(found["hoptim"], found["plain"])
    assert torch.equal(found["hoptim drawn"], found["plain drawn"])  # hypersteps draw from a stream of their own
    assert found["counts"] == (steps, hypersteps, True)
    moved = torch.stack(list(found["decays"].values())).log() - torch.tensor(loops.DECAY).log()
    assert (moved.abs() > 1e-3).all()
    falling = sum((1 + step / 2) ** -0.5 for step in range(hypersteps))
    assert (moved.abs() <= (0.6 + 0.2) * falling * 1.01).all()  # a level's steps at 0.6, and twice 0.1 from the others


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    rows = torch.sin(torch.arange(28) * (0.2 + 0.1 * labels[:, None]))
    return rows[:, None, :, None] + torch.randn(n, 1, 28, 28, generator=draw), labels


def test_a_loop_as_torchvisions() -> None:
    script = loops.Torchvision(epochs=4, rise=1, batch_size=8)
    found = ends(script, pictures(80, 1), pictures(20, 2))
    check(found, steps=40, hypersteps=4)
    assert found["hoptim"]["n_averaged"] == 9  # 3 in each epoch, of which the first epoch's do not count


def two_ranks(folder: str) -> None:
    found = ends(loops.ImageNet(epochs=4, batch_size=8), pictures(80, 1), pictures(20, 2))
    torch.save(found, f"{folder}/{distributed.get_rank()}.pt")


def test_a_loop_as_imagenets_on_two_ranks(tmp_path: Path) -> None:
    loops.on_ranks(two_ranks, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    check(first, steps=40, hypersteps=4)
    weights = [name for name in first["hoptim"] if "running" not in name]  # the norms' averages are each rank's own
    for way in ("plain", "inert", "hoptim", "decayed"):
        assert all(torch.equal(first[way][name], second[way][name]) for name in weights)
    assert same(first["decays"], second["decays"])


def test_a_loop_as_accelerates() -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=40, num_labels=2, **size)
    draw = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(5, 40, (60, 12), generator=draw), torch.arange(60) % 2
    script = loops.Accelerated(lambda: BertForSequenceClassification(config).float(), epochs=5, batch_size=2, lr=1e-2)
    found = ends(script, (tokens[:40], labels[:40]), (tokens[40:], labels[40:]))
    check(found, steps=50, hypersteps=4)
