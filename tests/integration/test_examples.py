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


def test_optuna_keeps_the_losses_of_each_trials_trainings_and_goes_on(tmp_path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra tuners: pip install '.[tuners]'")
    text = (EXAMPLES / "several_trainings.py").read_text()
    (tmp_path / "shorter.py").write_text(text.replace("EPOCHS = 150", "EPOCHS = 60"))
    storage = f"sqlite:///{tmp_path}/digits.db"
    for count in (1, 2):
        said = run(tmp_path / "shorter.py", "--trials", "1", "--storage", storage).stdout.splitlines()
        assert len(said) == count + 1
    for trial in optuna.load_study(study_name="digits", storage=storage).trials:
        losses = list(trial.intermediate_values.values())
        assert len(set(losses)) == 4
        assert trial.value == min(losses)
        started = trial.user_attrs["decay, geometric mean"] == pytest.approx(1e-3, rel=1e-4)
        assert started == (trial.value == losses[0])  # the decay is that of the best training


def test_a_training_of_several_is_a_plain_one_with_the_values_of_the_hyperstep_before(float64, monkeypatch) -> None:
    torch.set_default_dtype(torch.float32)
    pytest.importorskip("optuna", reason="needs the extra tuners: pip install '.[tuners]'")
    names = script("several_trainings.py")
    trainings = names["trainings"]
    monkeypatch.setitem(trainings.__globals__, "EPOCHS", 3)
    x, y, train = names["x"], names["y"], names["train"]
    found = trainings(width=6, size=100, start=0.05)
    learned, loss, decay = next(found)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 6), torch.nn.ReLU(), torch.nn.Linear(6, 10))
    biases, weights = [model[0].bias, model[2].bias], [model[0].weight, model[2].weight]
    groups = [{"params": biases}, {"params": weights, "weight_decay": 0.05}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(3):
        for batch in train[torch.randperm(200)].split(100):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            sgd.step()
    for own, by_hand in zip(learned.parameters(), model.parameters(), strict=True):
        assert torch.allclose(own, by_hand, atol=1e-5)
    assert decay == pytest.approx(0.05, rel=1e-5)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(model(x[names["val"]]), y[names["val"]]).item(), rel=1e-4)
    second = next(found)
    moved = abs(torch.tensor(second[2] / decay).log().item())
    assert moved == pytest.approx(3 * 0.6, abs=3 * 0.2)  # by the level, and by what the larger tensor has of its own


def test_features_are_chosen_on_the_training_part_alone() -> None:
    x, y, x_test, y_test = script("select_features.py")["split"](0)
    assert (x.shape, x_test.shape) == ((220, 65), (222, 65))
    assert abs(x.mean(0)).max() < 1e-12
    assert abs(x_test.mean(0)).max() > 1e-3
    assert abs(y.mean()) < 1e-12
    assert abs(y_test.mean()) > 1e-3
