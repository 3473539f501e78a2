"""How much data to hold out: every job trains on what it says, and the table and the picture are those of the records."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT, result
from tasks import classification, data

from hoptim.recipes import Gate

SIZES = ["task.data=digits", "task.test=200", "outer_steps=2", "inner_steps=40", "every=20", "warmup=40"]


@pytest.fixture
def script() -> dict[str, Any]:
    torch.set_default_dtype(torch.float32)  # as in a process of its own; the next test has float64 again
    sys.path.insert(0, str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / "examples" / "holdout.py"), run_name="example")


def test_jobs_hold_out_their_share_and_the_last_training_has_everything(script: dict[str, Any], tmp_path: Path) -> None:
    found = script["jobs"]([3])
    assert len(found) == 2 * (5 + 1) + 3
    for name, count in {"weight 0.1": 640, "global folds 3": 1, "fixed 0.03": 1}.items():
        place, overrides = found[name]
        measured = script["measured"]("data", 0, [*overrides, *SIZES], tmp_path / name)
        final = result(tmp_path / name)
        assert final["hyperparameters"] == count
        assert measured["test_loss"] == final["test_loss"]
        if "share" in place:
            val = round(1000 * place["share"])
            assert [f"task.val={val}", f"task.train={1000 - val}"] == overrides[1:]
            assert measured["retrained_test_loss"] != measured["test_loss"]
            assert final["hypersteps"] == 3
            assert measured["hyper_seconds"] > 0
        if "fixed" in place:
            assert final["hypersteps"] == 0
        if "folds" in place:
            assert "retrained_test_loss" not in measured


def test_a_fixed_decay_is_a_plain_training_on_everything(script: dict[str, Any], tmp_path: Path) -> None:
    """The figure of ``fixed 0.1`` is that of gradient descent written here, on the thousand."""
    _, overrides = script["jobs"]([3])["fixed 0.1"]
    more = ["inner.momentum=0", "inner.nesterov=false", "outer_steps=10", "inner_steps=100", "inner.lr=0.1"]
    measured = script["measured"]("data", 0, [*overrides, *SIZES, *more], tmp_path)
    found = data.read("digits", "data")
    parts = data.split(found, 500, 500, 200, 0)
    used = torch.cat(list(parts.values()))
    x, y = data.standardised(found.x[used], torch.arange(500)).flatten(1), found.y[used]
    w, b = torch.zeros(64, 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    for _ in range(1000):
        loss = torch.nn.functional.cross_entropy(x[:1000] @ w + b, y[:1000]) + 0.05 * w.square().sum()
        gradients = torch.autograd.grad(loss, [w, b])
        with torch.no_grad():
            for weight, gradient in zip((w, b), gradients, strict=True):
                weight -= 0.1 * gradient
    test = torch.nn.functional.cross_entropy(x[1000:] @ w + b, y[1000:]).item()
    assert measured["retrained_test_loss"] == pytest.approx(test, rel=5e-3)  # convex: it forgets where it began


def test_the_table_is_that_of_the_records(script: dict[str, Any], tmp_path: Path) -> None:
    records = []
    for number, (name, (place, _)) in enumerate(script["jobs"]([3]).items()):
        for seed in (0, 1):
            figures = {f"{p}test_{n}": number + seed for p in ("", "retrained_") for n in ("loss", "accuracy")}
            records.append({"job": name, "seed": seed, **place, **figures, "seconds": 2.0})
    lines = script["table"](records).splitlines()
    assert lines[2] == "| one decay | 10% | 0.500 ± 0.500 | 0.500 ± 0.500 | 0.500 ± 0.500 | 0.500 ± 0.500 | 2.0 |"
    assert lines[7] == "| one decay | 3 folds |  |  | 5.500 ± 0.500 | 5.500 ± 0.500 | 2.0 |"
    script["draw"](records, tmp_path / "holdout.png")
    assert (tmp_path / "holdout.png").stat().st_size > 10_000
    script["write"](tmp_path / "records.json", records)
    assert script["studied"](tmp_path, "nowhere", [0, 1], [3]) == records  # nothing is run again


def test_data_that_are_read_once_are_not_changed_by_a_task() -> None:
    options = {"data": "digits", "train": 100, "val": 50, "model_of": None, "recipes": {"gate": Gate}}
    before = data.read("digits", "data").y.clone()
    task = classification.Classification(**options, wrong_labels=0.5)
    task.setup(0)
    assert torch.equal(data.read("digits", "data").y, before)
