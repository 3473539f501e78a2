from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hoptim.problem.data import Batches


class Endless(IterableDataset[Any]):
    """A dataset without a length, as those that stream are."""

    def __iter__(self) -> Any:
        return iter([torch.tensor(float(i)) for i in range(6)])


class Again:
    """The least that can be iterated again and again; its iterator has a length, as DataLoader's has."""

    def __iter__(self) -> Any:
        return iter([0.0, 1.0, 2.0])


def loader(shuffle: bool, generator: bool) -> DataLoader[Any]:
    own = torch.Generator().manual_seed(3) if generator else None
    return DataLoader(TensorDataset(torch.arange(10.0)), batch_size=3, shuffle=shuffle, generator=own)


SOURCES: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: [0.0, 1.0, 2.0],
    "iterable": Again,
    "loader": lambda: loader(False, False),
    "shuffled": lambda: loader(True, False),
    "shuffled, own generator": lambda: loader(True, True),
    "streamed": lambda: DataLoader(Endless(), batch_size=2),
}


def values(batch: Any) -> Any:
    batch = batch[0] if isinstance(batch, list) else batch
    return batch.tolist() if isinstance(batch, Tensor) else batch


@pytest.mark.parametrize("name", SOURCES)
def test_passes_follow_one_another_without_end(name: str) -> None:
    torch.manual_seed(7)
    expected = [values(batch) for source in [SOURCES[name]()] for _ in range(3) for batch in source]
    torch.manual_seed(7)
    batches = Batches(SOURCES[name](), "val_batches")
    assert [values(batches.draw()) for _ in expected] == expected


@pytest.mark.parametrize("position", range(10))
@pytest.mark.parametrize("name", SOURCES)
def test_restored_position_gives_the_same_batches(name: str, position: int) -> None:
    torch.manual_seed(7)
    first = Batches(SOURCES[name](), "val_batches")
    for _ in range(position):
        first.draw()
        torch.rand(2)  # others draw random numbers in between
    state, rng = first.state_dict(), torch.get_rng_state()
    expected = [values(first.draw()) for _ in range(12)]

    torch.manual_seed(99)
    second = Batches(SOURCES[name](), "val_batches")
    before = torch.get_rng_state()
    second.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(rng)
    if position == 0 and "own" in name:  # nothing drawn: the generator is as the user made it
        assert state == {"position": 0, "begun": {}, "now": {}}
    assert [values(second.draw()) for _ in range(12)] == expected


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    before = torch.get_rng_state()
    Batches(loader(True, False), "val_batches")
    assert torch.equal(torch.get_rng_state(), before)


def test_state_holds_tensors_and_plain_values_only() -> None:
    batches = Batches(loader(True, True), "val_batches")
    batches.draw()
    state = batches.state_dict()
    assert state["position"] == 1
    assert all(isinstance(value, Tensor) for value in state["begun"].values())


def test_iterable_that_is_empty_on_a_later_pass_is_an_error() -> None:
    source = [0.0]
    batches = Batches(source, "val_batches")
    batches.draw()
    source.clear()
    with pytest.raises(ValueError, match="val_batches is empty"):
        batches.draw()


def test_a_generator_that_others_share_is_left_where_it_was() -> None:
    def made() -> tuple[Batches, torch.Generator]:
        generator = torch.Generator().manual_seed(3)
        return Batches(DataLoader(TensorDataset(torch.arange(8.0)), 2, shuffle=True, generator=generator), "val"), generator

    first, generator = made()
    first.draw()
    torch.randperm(5, generator=generator)  # the training loader draws from it too
    state, expected = first.state_dict(), generator.get_state()
    second, other = made()
    second.load_state_dict(state)
    assert torch.equal(other.get_state(), expected)
