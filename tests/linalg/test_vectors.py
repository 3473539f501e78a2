"""Flat vectors: arithmetic on one and on several, long sums, and the layout of named tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SIZE, flat, like
from torch import Tensor

from hoptim.linalg import vectors
from hoptim.linalg.vectors import Layout, axpy_, aypx_, dot, gram, norm, scale_, unit

X, Y = (torch.arange(float(SIZE), dtype=torch.float64) + shift for shift in (1, -7))
BATCH = torch.stack([X, Y, X * Y])
COEFFICIENTS: list[Any] = [2.5, torch.tensor(2.5, dtype=torch.float64), torch.tensor([2.5, 0.0, -1.0], dtype=torch.float64)]


@pytest.mark.parametrize("a", COEFFICIENTS)
def test_arithmetic_in_place_with_a_number_or_one_for_each_of_several(a: Any) -> None:
    x, y = (BATCH, BATCH.flip(0)) if isinstance(a, Tensor) and a.ndim else (X, Y)
    column = a[:, None] if isinstance(a, Tensor) and a.ndim else a
    for function, expected in ((axpy_, y + column * x), (aypx_, x + column * y)):
        target, before = y.clone(), x.clone()
        assert function(target, a, x) is target
        torch.testing.assert_close(target, expected)
        assert torch.equal(x, before)
    target = y.clone()
    assert scale_(target, a) is target
    torch.testing.assert_close(target, column * y)


def test_one_vector_may_be_added_to_several() -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(axpy_(BATCH.clone(), a, X), BATCH + a[:, None] * X)


def test_dot_norm_and_gram_of_one_and_of_several() -> None:
    torch.testing.assert_close(dot(X, Y), X @ Y)
    torch.testing.assert_close(norm(X), X.norm())
    torch.testing.assert_close(dot(BATCH, BATCH.flip(0)), (BATCH * BATCH.flip(0)).sum(1))
    torch.testing.assert_close(norm(BATCH), BATCH.norm(dim=1))
    torch.testing.assert_close(gram(BATCH[:2], BATCH), BATCH[:2] @ BATCH.T)


def test_unit_is_a_copy_of_length_one_and_zero_stays_zero() -> None:
    x = X.clone()
    torch.testing.assert_close(unit(x), X / X.norm())
    assert torch.equal(x, X)
    assert not unit(torch.zeros(SIZE)).any()
    torch.testing.assert_close(norm(unit(torch.stack([X, 0 * X]))), torch.tensor([1.0, 0.0]))


def test_long_sums_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE", 3)
    torch.testing.assert_close(dot(X, Y), X @ Y)
    torch.testing.assert_close(norm(X), X.norm())
    torch.testing.assert_close(norm(BATCH), BATCH.norm(dim=1))


def test_a_long_sum_in_float32_is_that_of_float64() -> None:
    x = torch.full((3 * 2**23,), 0.1, dtype=torch.float32)
    expected = x.double().square().sum()
    torch.testing.assert_close(dot(x, x).double(), expected, rtol=2e-4, atol=0.0)
    torch.testing.assert_close(norm(x).double(), expected.sqrt(), rtol=2e-4, atol=0.0)
    torch.testing.assert_close(gram(x[None], x[None])[0, 0], expected, rtol=1e-9, atol=0.0)


# Layouts


def test_a_layout_goes_to_a_vector_and_back() -> None:
    tensors = {name: torch.randn(value.shape) for name, value in like().items()}
    layout = Layout.of(tensors)
    assert (layout.size, layout.names) == (SIZE, tuple(tensors))
    v = layout.flatten(tensors)
    assert torch.equal(v, flat(tensors))
    back = layout.unflatten(v)
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    v.zero_()
    assert not flat(back).any()  # views of the vector


@pytest.mark.parametrize("count", [1, 3])
def test_several_have_a_leading_axis_in_each_tensor(count: int) -> None:
    tensors = {name: torch.randn(count, *value.shape) for name, value in like().items()}
    layout = Layout.of(like())
    v = layout.flatten(tensors, (count,))
    assert torch.equal(v, flat(tensors, (count,)))
    assert all(torch.equal(value, tensors[name]) for name, value in layout.unflatten(v).items())


@pytest.mark.parametrize("lead", [(), (2,)])
def test_what_is_missing_is_zero_and_other_names_are_passed_over(lead: tuple[int, ...]) -> None:
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(()), "c": torch.zeros(0)})
    found = {"other": torch.ones(*lead, 7), "b": torch.full(lead, 3.0), "a": None}
    assert torch.equal(layout.flatten(found, lead), torch.tensor([0.0, 0.0, 3.0]).expand(*lead, 3))


def test_tensors_of_several_types_are_one_vector_of_the_widest() -> None:
    half = Layout.of({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(1, dtype=torch.float16)})
    assert half.dtype == torch.float32
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor([2.0], dtype=torch.float64)}
    layout = Layout.of(tensors)
    assert layout.dtype == torch.float64
    v = layout.flatten(tensors)
    assert torch.equal(v, torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
    back = layout.unflatten(v)
    assert {name: value.dtype for name, value in back.items()} == {"a": torch.bfloat16, "b": torch.float64}
    assert layout.unflatten(v.expand(3, 3))["a"].shape == (3, 2)


def test_a_layout_without_tensors_has_vectors_without_entries() -> None:
    layout = Layout.of({})
    assert layout.flatten({}).shape == (0,)
    assert layout.flatten({}, (3,)).shape == (3, 0)
    assert layout.unflatten(torch.zeros(0)) == {}
