from __future__ import annotations

import torch
from cases import SIZE, like, unflat

from hoptim.linalg import dicts

X, Y = (torch.arange(float(SIZE), dtype=torch.float64) + shift for shift in (1, -7))


def test_dot_and_norm_go_by_name_over_all_entries() -> None:
    x, y = unflat(X, like()), unflat(Y, like())
    torch.testing.assert_close(dicts.dot(x, dict(reversed(y.items()))), X @ Y)
    torch.testing.assert_close(dicts.norm(x), X.norm())
    half = {"w": torch.full((4,), 300.0, dtype=torch.float16)}  # whose squares are infinite in float16
    assert dicts.norm(half).item() == 600.0


def test_what_is_missing_is_left_out_or_filled_with_zeros() -> None:
    found = {"a": torch.ones(2), "b": None}
    assert list(dicts.present(found)) == ["a"]
    filled = dicts.filled({"a": torch.ones(2), "other": torch.ones(1)}, {"b": torch.ones(3), "a": torch.zeros(2)})
    assert {name: value.tolist() for name, value in filled.items()} == {"b": [0.0, 0.0, 0.0], "a": [1.0, 1.0]}


def test_several_dicts_are_one_with_a_leading_axis() -> None:
    rows = [{"a": torch.full((2,), float(k)), "b": None} for k in range(3)]
    found = dicts.stack(rows)
    assert found["b"] is None
    assert found["a"].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_none_counts_as_zero_in_a_sum() -> None:
    one = torch.ones(1)
    x, y = {"neither": None, "x": one, "y": None, "both": one}, {"both": one, "y": one, "x": None, "neither": None}
    found = dicts.add(x, y)
    assert found["neither"] is None
    assert {name: value.item() for name, value in found.items() if value is not None} == {"x": 1.0, "y": 1.0, "both": 2.0}
