"""Augmentation against images moved by hand, and its hypergradient against differences of retrainings."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from test_learning import train
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import Augmentation, AugmentationNet

IMAGES = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fixed(monkeypatch: pytest.MonkeyPatch, u: float) -> None:
    """Every u that is drawn is this one."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, (u + 1) / 2, **options))


@pytest.mark.parametrize(("change", "magnitude", "expected"), [
    ("rotation", torch.pi / 2, lambda x: torch.rot90(x, 1, (2, 3))),
    ("rotation", torch.pi, lambda x: x.flip(2, 3)),
    ("shift", 4 / 9, lambda x: F.pad(x[:, :, 2:, 2:], (0, 2, 0, 2))),
    ("brightness", 0.3, lambda x: x + 0.3),
    ("contrast", math.log(2), lambda x: 2 * x - x.mean((1, 2, 3), keepdim=True)),
])  # fmt: skip
def test_a_change_by_a_known_amount(monkeypatch: pytest.MonkeyPatch, change: Any, magnitude: float, expected: Any) -> None:
    hparams = Augmentation([change], start=float(magnitude)).double()
    fixed(monkeypatch, 1.0)
    torch.testing.assert_close(hparams.augment(IMAGES), expected(IMAGES), rtol=1e-5, atol=1e-5)


def test_scale_and_shear_are_the_affine_maps_that_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, 1.0)
    for change, matrix in (("scale", [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), ("shear", [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])):
        magnitude = torch.tensor(2.0).log().item() if change == "scale" else 0.5
        hparams = Augmentation([change], start=magnitude).double()  # type: ignore[list-item]
        grid = F.affine_grid(torch.tensor(matrix).double().expand(3, 2, 3), [3, 2, 9, 9], align_corners=False)
        torch.testing.assert_close(
            hparams.augment(IMAGES), F.grid_sample(IMAGES, grid, align_corners=False), rtol=1e-5, atol=1e-6
        )


def test_noise_and_draws_have_the_size_that_is_said() -> None:
    torch.manual_seed(0)
    noisy = Augmentation(["noise"], start=0.2).double().augment(torch.zeros(20, 1, 30, 30).double())
    assert noisy.std().item() == pytest.approx(0.2, rel=0.05)
    shifts = Augmentation(["brightness"], start=0.4).double().augment(torch.zeros(3000, 1, 1, 1).double()).flatten()
    assert shifts.abs().max() <= 0.4
    assert shifts.std().item() == pytest.approx(0.4 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["all", "net"])
def test_its_hypergradient_is_the_slope_of_retraining(kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(20, 1, 6, 6), torch.arange(20) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    hparams: Any = Augmentation(start=0.15).double()
    if kind == "net":
        hparams = AugmentationNet(1, hidden=3).double()
        for p in hparams.parameters():
            nn.init.normal_(p, std=0.3)

    def train_loss(model: Any, h: Any, batch: Any) -> Tensor:
        torch.manual_seed(7)
        changed = h.augment(x[batch]) if kind == "all" else h(x[batch])
        return F.cross_entropy(model(changed), y[batch]) + 0.02 * sum(p.square().sum() for p in model.parameters())

    def val_loss(model: Any, h: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(x[batch]), y[batch])

    problem, leaves = hoptim.Problem(model, hparams, train_loss, val_loss), list(hparams.parameters())
    train_part, val_part = torch.arange(12), torch.arange(12, 20)
    at = nn.utils.parameters_to_vector(leaves).detach()
    train(problem, train_part)
    method = hoptim.Implicit(hoptim.CG(terms=150, tolerance=1e-10), curvature=hoptim.Exact())
    found = hoptim.hypergradient(problem, train_part, val_part, method)
    gradient = torch.cat([grad.flatten() for grad in found.grads.values()])
    for line in (gradient / gradient.norm(), torch.randn(len(at))):
        ends = []
        for sign in (1e-5, -1e-5):
            nn.utils.vector_to_parameters(at + sign * line, leaves)
            train(problem, train_part)
            ends.append(problem.val_loss(model, hparams, val_part).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(gradient @ line), rel=1e-3, abs=1e-8)
    assert gradient.norm() > 1e-4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Augmentation(["flip"]), "changes has 'flip': give some of rotation"),  # type: ignore[list-item]
        (lambda: Augmentation([]), "changes is []: give one or more"),
        (lambda: Augmentation(["noise", "noise"]), "each once"),
        (lambda: Augmentation(start=0.0), "start is 0.0: give a number above 0"),
        (lambda: Augmentation().augment(torch.rand(3, 9, 9)), "the images have shape (3, 9, 9): give (B, C, H, W)"),
        (lambda: AugmentationNet(0), "channels is 0"),
    ],
)
def test_what_it_cannot_do_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


@pytest.mark.parametrize(("spot", "turned"), [((10, 26), (4, 20)), ((16, 20), (10, 26))])
def test_a_rotation_keeps_lengths_in_an_image_that_is_not_square(
    monkeypatch: pytest.MonkeyPatch, spot: tuple[int, int], turned: tuple[int, int]
) -> None:
    """By a quarter turn, a spot right of the middle by 6 pixels comes to be 6 above it, and one below it 6 to the right."""
    image = torch.zeros(1, 1, 21, 41, dtype=torch.float64)
    image[0, 0][spot] = 1.0
    fixed(monkeypatch, 1.0)
    found = Augmentation(["rotation"], start=math.pi / 2).double().augment(image)
    assert divmod(found.argmax().item(), 41) == turned
