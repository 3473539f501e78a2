"""The study of wrong labels, scripts/examples/wrong_labels.py, on pictures of noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wrong_labels


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def images(root: str, train: bool, download: bool) -> Any:
        draw = torch.Generator().manual_seed(int(train))
        pictures = torch.randint(0, 256, (100 if train else 30, 28, 28), generator=draw, dtype=torch.uint8)
        return SimpleNamespace(data=pictures, targets=torch.arange(len(pictures)) % 10)

    monkeypatch.setattr(wrong_labels, "FashionMNIST", images)
    small = {"NOISY": 40, "CLEAN": 20, "BATCH": 10, "STEPS": 20, "EVERY": 2, "DRAWN": 20, "DECAYS": (1e-3, 1e-1)}
    for name, value in {**small, "STORED": tmp_path / "stored.json"}.items():
        monkeypatch.setattr(wrong_labels, name, value)


@pytest.mark.parametrize("noise", wrong_labels.NOISES)
def test_half_of_the_noisy_labels_are_wrong_and_each_way_trains_on_what_it_says(few: None, noise: str) -> None:
    labels = wrong_labels.Labels("", noise, "linear", 3)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:60]
    off = (labels.y - order % 10) % 10
    assert torch.equal(off[:40] != 0, labels.wrong)
    assert (off[40:] == 0).all()
    assert 10 < int(labels.wrong.sum()) < 30
    assert set(off[:40].tolist()) == {0, 1} if noise == "class-dependent" else len(set(off.tolist())) > 4

    seen: list[Any] = []
    labels.train = lambda model, optimizer, examples: (seen.append(set(examples.tolist())), optimizer.step())
    noisy, clean = set(range(40)), set(range(40, 60))
    labels.likely = torch.linspace(0, 1, 40)
    right = {i for i in noisy if not labels.wrong[i]}
    for way, expected in (
        ("all", noisy),
        ("clean", clean),
        ("all + clean", noisy | clean),
        ("GCE", noisy | clean),
        ("filter", {i for i in noisy if i / 39 >= 0.3} | clean),
        ("hoptim, the run", noisy),
        ("hoptim, retrained", noisy | clean),
        ("oracle", right | clean),
    ):
        labels.run(way, 1e-3, 0.3)
        assert seen.pop() == expected, way
    assert labels.f1("filter", 0.0) == 0.0
    assert labels.f1("filter", 1.1) == pytest.approx(2 * int(labels.wrong.sum()) / (40 + int(labels.wrong.sum())))


def test_gce_is_its_formula_between_cross_entropy_and_absolute_error() -> None:
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    p = z.softmax(1)[range(6), y]
    torch.testing.assert_close(wrong_labels.gce(z, y, 0.7), ((1 - p**0.7) / 0.7).mean())
    torch.testing.assert_close(wrong_labels.gce(z, y, 1e-7), torch.nn.functional.cross_entropy(z, y), rtol=1e-5, atol=0)


def test_settings_are_chosen_then_scored_and_told_with_paired_differences(
    few: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def call(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["wrong_labels.py", "linear", "--noise", "symmetric", *arguments])
        wrong_labels.main()
        return json.loads(wrong_labels.STORED.read_text())["symmetric, linear"]

    settings = call("--tune", "0", "1")["settings"]
    drawn = [wrong_labels.Labels("", "symmetric", "linear", seed, tuning=True) for seed in (0, 1)]
    for labels in drawn:
        assert not (labels.test[0][:, None] == labels.x).all(2).any()  # no image is both trained on and chosen by
    losses = {
        decay: sum(labels.scores(labels.run("clean", decay, None))["cross-entropy"] for labels in drawn)
        for decay in (1e-3, 1e-1)
    }
    assert settings["clean"]["cross-entropy"] == [min(losses, key=losses.get), None]
    capsys.readouterr()
    scores = call("--seeds", "2", "3")["scores"]
    told = capsys.readouterr().out
    for way in wrong_labels.WAYS[:-2]:
        first, second = (line.split(" | ") for line in told.splitlines() if line.startswith(f"| {way} |"))
        loss, ours = ([one[name]["cross-entropy"] for one in scores.values()] for name in (way, "hoptim, retrained"))
        assert float(first[2].split(" ± ")[0]) == pytest.approx(sum(loss) / 2, abs=6e-4)
        assert float(second[2].split(" ± ")[0]) == pytest.approx((sum(ours) - sum(loss)) / 2, abs=6e-4)
        spread = abs((ours[0] - loss[0]) - (ours[1] - loss[1])) / 2
        assert float(second[2].split(" ± ")[1].removesuffix(" |")) == pytest.approx(spread, abs=6e-4)
    assert wrong_labels.STORED.with_suffix(".png").stat().st_size > 10_000
