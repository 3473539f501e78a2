"""The examples that have no test of their own, at a small size: they run, and their figures are what they should be."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from jobs import ROOT, run


def figures(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_random_starts_are_trained_alike_and_learning_moves_them(tmp_path) -> None:
    words = ("--starts", "2", "--seed", "0", "--steps", "300", "--out", tmp_path / "starts.png")
    said = run("studies/random_starts/run.py", *words).stdout
    (cost,), kept, learned = (figures(line) for line in said.splitlines() if figures(line) and "->" not in line)
    assert cost > 1
    assert max(learned[:3]) < max(kept[:3])
    assert (tmp_path / "starts.png").stat().st_size > 5_000


def test_optuna_keeps_the_losses_of_each_trials_trainings_and_goes_on(tmp_path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra tuners: pip install '.[tuners]'")
    text = (ROOT / "scripts" / "studies" / "several_trainings" / "run.py").read_text()
    (tmp_path / "shorter.py").write_text(text.replace("EPOCHS = 150", "EPOCHS = 60"))
    storage = f"sqlite:///{tmp_path}/digits.db"
    for count in (1, 2):
        said = run(tmp_path / "shorter.py", "--trials", "1", "--storage", storage).stdout.splitlines()
        assert len(said) == count + 1
    for trial in optuna.load_study(study_name="digits", storage=storage).trials:
        losses = list(trial.intermediate_values.values())
        assert len(set(losses)) == 4
        assert trial.value == min(losses)
        moved = abs(math.log(trial.user_attrs["decay, geometric mean"] / 1e-3))
        assert (moved < 1e-4) == (trial.value == losses[0])  # the decay is that of the best training
        assert moved < 3 * 3 * (0.6 + 0.2)  # three hypersteps, by the level and by what the larger tensor has of its own


def write_garments(folder: Path) -> None:
    """The files of Fashion-MNIST with 1,600 made-up images: a bright block for each class, and noise."""
    draw = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        y = torch.arange(1600) % 10
        x = torch.randint(0, 80, (1600, 28, 28), generator=draw)
        for k in range(10):
            x[y == k, 9 * (k // 4) : 9 * (k // 4) + 8, 7 * (k % 4) : 7 * (k % 4) + 6] += 120
        for name, value in (("images-idx3", x), ("labels-idx1", y)):
            head = bytes([0, 0, 8, value.ndim]) + b"".join(size.to_bytes(4, "big") for size in value.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(head + value.byte().numpy().tobytes())


def test_influence_finds_wrong_labels_and_draws_those_that_helped_and_hurt(tmp_path) -> None:
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    write_garments(tmp_path / "FashionMNIST" / "raw")
    said = run("examples/influence.py", "--data", tmp_path, "--out", tmp_path / "influence.png").stdout
    found = [int(words) for words in re.findall(r", (\d+) have wrong labels", said)]
    assert len(found) == 3
    assert min(found) >= 60  # of 100 among 1,000
    assert (tmp_path / "influence.png").stat().st_size > 20_000


def test_a_mixture_is_learned_for_code_and_beats_all_sources_alike(tmp_path) -> None:
    said = run("examples/mixture.py", "--steps", "300", "--out", tmp_path / "mixture.png").stdout
    shares, alike, learned = (figures(line) for line in said.splitlines()[:3])
    assert sum(shares) == pytest.approx(1.0, abs=0.03)
    assert shares[0] == max(shares), "Python's library is most like PyTorch's code"
    assert shares[3] < 0.12, "shuffled letters help nothing"
    assert learned < alike
    assert (tmp_path / "mixture.png").stat().st_size > 5_000


def test_a_rater_filters_the_next_digits_and_a_training_on_them_is_better(tmp_path) -> None:
    said = run("examples/rater.py", "--out", tmp_path / "rater.png").stdout
    before, after = (int(words) for words in re.findall(r"(\d+)%", said))
    assert 55 < before < 65
    assert after >= 95
    everything, kept, clean = (float(words) for words in re.findall(r"test accuracy ([\d.]+)", said))
    assert kept > everything + 0.2
    assert kept > clean
    assert (tmp_path / "rater.png").stat().st_size > 10_000


def test_learned_weights_fit_a_sinusoid_from_ten_points(tmp_path) -> None:
    said = run("examples/maml.py", "--steps", "800", "--out", tmp_path / "maml.png").stdout
    losses = {line.split(":")[0]: figures(line) for line in said.splitlines() if "after 10 steps" in line}
    assert losses["learned"][1] < 0.8 * losses["trained together"][1]  # after one step
    assert losses["learned"][3] < 0.8 * min(losses["trained together"][3], losses["random"][3])  # after ten
    assert (tmp_path / "maml.png").stat().st_size > 5_000
