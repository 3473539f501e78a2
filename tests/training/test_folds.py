"""Folds: what they divide, those of scikit-learn, and mistakes in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import model_selection

from hoptim.training.folds import make_folds

X, Y, GROUPS = np.zeros((12, 2)), np.array([0, 1] * 6), np.repeat([0, 1, 2, 3], 3)


def test_a_number_divides_a_random_order_into_equal_parts_each_held_out_once():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    folds = make_folds(3, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(fold.held_out) for fold in folds] == [4, 3, 3]
    assert sorted(torch.cat([fold.held_out for fold in folds]).tolist()) == list(range(10))
    for fold in folds:
        assert sorted([*fold.train.tolist(), *fold.held_out.tolist()]) == list(range(10))
    again = make_folds(3, 10)
    assert all(torch.equal(a.held_out, b.held_out) for a, b in zip(folds, again, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(make_folds(3, 10)[0].held_out, folds[0].held_out)


@pytest.mark.parametrize(
    "splitter",
    [
        model_selection.KFold(5),
        model_selection.StratifiedKFold(3, shuffle=True, random_state=0),
        model_selection.GroupKFold(4),
        model_selection.LeaveOneGroupOut(),
        model_selection.TimeSeriesSplit(3),
        model_selection.ShuffleSplit(4, random_state=0),
        model_selection.RepeatedKFold(n_splits=3, n_repeats=2, random_state=0),
        model_selection.LeaveOneOut(),
    ],
    ids=lambda splitter: type(splitter).__name__,
)
def test_the_splitters_of_scikit_learn(splitter):
    expected = list(splitter.split(X, Y, GROUPS))
    folds = make_folds(splitter.split(X, Y, GROUPS), 12)
    assert len(folds) == len(expected)
    for fold, (train, held_out) in zip(folds, expected, strict=True):
        assert fold.train.tolist() == train.tolist()
        assert fold.held_out.tolist() == held_out.tolist()


@pytest.mark.parametrize(
    ("folds", "error", "words"),
    [
        (1, ValueError, "folds=1 of 4 examples: give from 2 to 4"),
        (5, ValueError, "folds=5 of 4 examples"),
        (True, TypeError, "folds is a bool"),
        ("3", TypeError, "folds is a str"),
        (torch.arange(4), TypeError, "folds is a Tensor"),
        (
            model_selection.KFold(2),
            TypeError,
            r"folds is a KFold: give a number, or pairs of indices, as by splitter.split",
        ),
        ([], ValueError, "there are 0, give two or more"),
        ([([0, 1], [2])], ValueError, "there are 1, give two or more"),
        ([([0, 1], [2]), ([], [3])], ValueError, "the part to train of fold 2 is empty"),
        ([([0, 1], [])], ValueError, "the part that fold 1 holds out is empty"),
        ([([0, 1], [1, 2])], ValueError, "fold 1 trains on 1 of the examples that it holds out, such as 1"),
        ([([0, 1], [4])], ValueError, "holds out has index 4: examples=4, so indices go from 0 to 3"),
        ([([0, -1], [2])], ValueError, "the part to train of fold 1 has index -1"),
        ([([True, False], [2])], TypeError, "torch.bool"),
        ([([0.0, 1.0], [2])], TypeError, "torch.float"),
        ([([[0], [1]], [2])], TypeError, r"of shape \(2, 1\)"),
    ],
)
def test_a_mistake_is_named(folds, error, words):
    with pytest.raises(error, match=words):
        make_folds(folds, 4)
