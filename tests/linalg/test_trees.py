from __future__ import annotations

import pytest
import torch
from cases import SIZE, flat, like, unflat

from hoptim.linalg import trees

X, Y = (torch.arange(float(SIZE), dtype=torch.float64) + shift for shift in (1, -7))
BATCH = torch.stack([X, Y, X * Y])


def test_arithmetic_in_place_is_that_of_vectors() -> None:
    x, y = unflat(X.clone(), like()), unflat(Y, like())
    assert trees.add_(x, y, alpha=-0.5) is x
    assert torch.equal(flat(x), X - 0.5 * Y)
    assert trees.scale_(x, 3.0) is x
    assert torch.equal(flat(x), 3 * (X - 0.5 * Y))


def test_add_goes_by_name_and_takes_what_the_first_names() -> None:
    x, y = unflat(X.clone(), like()), unflat(Y, like())
    trees.add_(x, {**dict(reversed(y.items())), "other": torch.ones(5)})
    assert torch.equal(flat(x), X + Y)


def test_dot_norm_and_size() -> None:
    x, y = unflat(X, like()), unflat(Y, like())
    torch.testing.assert_close(trees.dot(x, y), X @ Y)
    torch.testing.assert_close(trees.norm(x), X.norm())
    assert trees.size(x) == SIZE


def test_dot_and_norm_of_several_at_once() -> None:
    x, y = unflat(BATCH, like()), unflat(BATCH.flip(0), like())
    torch.testing.assert_close(trees.dot(x, y, batched=True), (BATCH * BATCH.flip(0)).sum(1))
    torch.testing.assert_close(trees.norm(x, batched=True), BATCH.norm(dim=1))


@pytest.mark.parametrize("value", [torch.tensor([3.0, -4.0]), torch.tensor([[3.0], [-4.0]])])
def test_dot_and_norm_of_several_at_once_with_a_parameter_of_no_dimension(value: torch.Tensor) -> None:
    x = {"w": value}
    assert trees.norm(x, batched=True).tolist() == [3.0, 4.0]
    assert trees.dot(x, x, batched=True).tolist() == [9.0, 16.0]


def test_unit_is_a_copy_of_length_one_and_zero_stays_zero() -> None:
    x = unflat(X, like())
    torch.testing.assert_close(flat(trees.unit(x)), X / X.norm())
    assert not flat(trees.unit(like())).any()
    assert torch.equal(flat(x), X)


def test_clone_and_zeros_like_are_copies() -> None:
    x = unflat(X.clone(), like())
    copy = trees.clone(x)
    trees.scale_(copy, 2.0)
    assert torch.equal(flat(x), X)
    assert not flat(trees.zeros_like(x)).any()


def test_long_sums_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "PIECE", 3)
    x, y = unflat(X, like()), unflat(Y, like())
    for batched, a, b in ((False, x, y), (True, unflat(BATCH, like()), unflat(BATCH.flip(0), like()))):
        dots = trees.dot_parts(list(a.values()), list(b.values()), batched=batched)
        norms = trees.norm_parts(list(a.values()), batched=batched)
        assert len(norms) > len(a)
        assert len(dots) == (len(a) if batched else len(norms))  # a sum over an axis is pairwise
        torch.testing.assert_close(sum(dots), (flat(a, (3,)) * flat(b, (3,))).sum(1) if batched else X @ Y)
    torch.testing.assert_close(trees.norm(x), X.norm())
    torch.testing.assert_close(trees.dot(x, y), X @ Y)


def test_a_long_sum_in_float32_is_that_of_float64() -> None:
    x = {"w": torch.full((3 * 2**23,), 0.1, dtype=torch.float32)}
    expected = x["w"].double().square().sum()
    torch.testing.assert_close(trees.dot(x, x).double(), expected, rtol=2e-4, atol=0.0)
    torch.testing.assert_close(trees.norm(x).double(), expected.sqrt(), rtol=2e-4, atol=0.0)
