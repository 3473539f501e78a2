"""The examples that have no test of their own, at a small size: they run, and their baselines are right."""

from __future__ import annotations

import re
import runpy
import sys
from typing import Any

import pytest
import torch
from jobs import ROOT, run

EXAMPLES = ROOT / "scripts" / "examples"


def figures(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def script(name: str) -> dict[str, Any]:
    sys.path.insert(0, str(EXAMPLES))
    with torch.random.fork_rng():
        return runpy.run_path(str(EXAMPLES / name), run_name="example")


def test_ten_learned_images_are_better_than_ten_real_ones(tmp_path) -> None:
    said = run("examples/distilled_digits.py", "--hypersteps", "60", "--out", tmp_path / "images.png").stdout
    learned, drawn, means, everything = (figures(line)[0] for line in said.splitlines()[:4])
    assert drawn < learned < everything + 0.05
    assert drawn < means < everything
    assert (tmp_path / "images.png").stat().st_size > 5_000


def test_random_starts_are_trained_alike_and_learning_moves_them(tmp_path) -> None:
    text = (EXAMPLES / "random_starts.py").read_text()
    (tmp_path / "shorter.py").write_text(text.replace("STEPS, BATCH = 1000, 64", "STEPS, BATCH = 300, 64"))
    said = run(tmp_path / "shorter.py", "--starts", "2", "--seed", "0", "--out", tmp_path / "starts.png").stdout
    (cost,), kept, learned = (figures(line) for line in said.splitlines() if figures(line) and "->" not in line)
    assert cost > 1
    assert max(learned[:3]) < max(kept[:3])
    assert (tmp_path / "starts.png").stat().st_size > 5_000


def test_the_best_of_n_is_chosen_by_the_validation_loss() -> None:
    best_of = script("random_starts.py")["best_of"]
    found = [(0.1, 5.0, 0.0), (0.2, 1.0, 0.0), (float("nan"), 0.5, 0.0)]
    assert best_of(found, 200) == pytest.approx(5.0)  # of so many draws the first is always one


def test_features_are_chosen_on_the_training_part_alone() -> None:
    x, y, x_test, y_test = script("select_features.py")["split"](0)
    assert (x.shape, x_test.shape) == ((220, 65), (222, 65))
    assert abs(x.mean(0)).max() < 1e-12
    assert abs(x_test.mean(0)).max() > 1e-3
    assert abs(y.mean()) < 1e-12
    assert abs(y_test.mean()) > 1e-3
