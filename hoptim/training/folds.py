"""Folds: the examples that each model is trained on, and those held out for its hypergradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from hoptim.checks import describe_type, is_whole
from hoptim.problem.distributed import Ranks
from hoptim.problem.random_stream import RandomStream


@dataclass(frozen=True)
class Fold:
    """The examples that a model is trained on, and those held out.

    Attributes:
        train: indices of the examples to train on.
        held_out: indices of the examples of the validation loss.
    """

    train: Tensor
    held_out: Tensor


def make_folds(folds: int | Iterable[Any], examples: int, ranks: Ranks | None = None) -> list[Fold]:
    """The folds, after checks.

    Args:
        folds: their number, for equal parts of a random order, each held out once; ``torch.manual_seed`` sets the order. Or
            pairs of indices (train, held out), as ``split`` of a splitter of scikit-learn gives them.
        examples: the number of examples.
        ranks: the processes that train together, which all take the random order of the first; default: this one alone.

    Raises:
        TypeError: ``folds`` is neither of these.
        ValueError: there are fewer than two folds; a fold is empty, has an index out of range, or trains on
            examples that it holds out; ranks have different folds.

    >>> make_folds([([0, 1], [2]), ([0, 1, 2], [3])], 4)[1]
    Fold(train=tensor([0, 1, 2]), held_out=tensor([3]))
    """
    if isinstance(folds, Integral) and is_whole(folds):
        found = list(_random_folds(int(folds), examples, ranks or Ranks()))
    elif isinstance(folds, (str, bytes, Tensor)) or not isinstance(folds, Iterable):
        raise TypeError(f"folds is {describe_type(folds)}: give a number, or pairs of indices, as by splitter.split(x, y)")
    else:
        found = [_checked(number, pair, examples) for number, pair in enumerate(folds, 1)]
    if len(found) < 2:
        raise ValueError(f"folds: there are {len(found)}, give two or more")
    digest = [zlib.crc32(part.numpy().tobytes()) for fold in found for part in (fold.train, fold.held_out)]
    if any(other != digest for other in (ranks or Ranks()).gathered(digest)):
        raise ValueError("folds: the ranks have other ones. Give all the same, as by a splitter with a random_state")
    return found


def _random_folds(count: int, examples: int, ranks: Ranks) -> Iterator[Fold]:
    if not 2 <= count <= examples:
        raise ValueError(f"folds={count} of {examples} examples: give from 2 to {examples}")
    with RandomStream("folds").drawing():
        order = torch.tensor(ranks.gathered(torch.randperm(examples, device="cpu").tolist())[0])
    parts = order.tensor_split(count)
    for number, part in enumerate(parts):
        rest = torch.cat([*parts[:number], *parts[number + 1 :]])
        yield Fold(rest.sort().values, part.sort().values)


def _checked(number: int, pair: Any, examples: int) -> Fold:
    """A pair of indices as a fold."""
    train, held_out = pair
    parts = {}
    for name, given in (("train", train), ("held out", held_out)):
        part = torch.as_tensor(given, device="cpu")
        where = f"the part to {name} of fold {number}" if name == "train" else f"the part that fold {number} holds out"
        if not part.numel():
            raise ValueError(f"{where} is empty: give at least one example")
        if part.ndim != 1 or part.dtype == torch.bool or part.is_floating_point():
            raise TypeError(f"{where} is {part.dtype} of shape {tuple(part.shape)}: give a list of indices")
        if int(part.min()) < 0 or int(part.max()) >= examples:
            wrong = int(part.min() if part.min() < 0 else part.max())
            raise ValueError(f"{where} has index {wrong}: examples={examples}, so indices go from 0 to {examples - 1}")
        parts[name] = part.long()
    both = parts["train"][torch.isin(parts["train"], parts["held out"])]
    if len(both):
        raise ValueError(
            f"fold {number} trains on {len(both)} of the examples that it holds out, such as {int(both[0])}: then they "
            "can't tell how well its model does on others"
        )
    return Fold(parts["train"], parts["held out"])
