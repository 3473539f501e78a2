from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

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


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "shuffled"])
def test_passes_follow_one_another_without_end(name: str) -> None:
    expected = [values(batch) for source in [SOURCES[name]()] for _ in range(3) for batch in source]
    batches = Batches(SOURCES[name](), "val_batches")
    assert [values(batches.draw()) for _ in expected] == expected


def test_each_pass_of_a_loader_that_shuffles_has_an_order_of_its_own_by_the_global_seed() -> None:
    def orders(seed: int, name: str = "val_batches") -> list[list[float]]:
        torch.manual_seed(seed)
        torch.rand(seed)  # what was drawn before does not matter
        batches = Batches(loader(True, False), name)
        return [[x for _ in range(4) for x in values(batches.draw())] for _ in range(3)]

    found = orders(7)
    assert all(sorted(order) == list(range(10)) for order in found)
    different = [*found, *orders(8), *orders(7, "train_batches")]
    assert len(set(map(tuple, different))) == 9
    torch.manual_seed(7)
    assert found == orders(7)


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
        assert state == {"position": 0, "begun": {}}
    assert [values(second.draw()) for _ in range(12)] == expected


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    before = torch.get_rng_state()
    Batches(loader(True, False), "val_batches")
    assert torch.equal(torch.get_rng_state(), before)


def test_iterable_that_is_empty_on_a_later_pass_is_an_error() -> None:
    source = [0.0]
    batches = Batches(source, "val_batches")
    batches.draw()
    source.clear()
    with pytest.raises(ValueError, match="val_batches is empty"):
        batches.draw()


def test_a_generator_that_others_share_stays_as_it_is() -> None:
    def made() -> tuple[Batches, torch.Generator]:
        generator = torch.Generator().manual_seed(3)
        return Batches(DataLoader(TensorDataset(torch.arange(8.0)), 2, shuffle=True, generator=generator), "val"), generator

    (first, generator), (second, other) = made(), made()
    before = generator.get_state()
    first.draw()
    assert torch.equal(generator.get_state(), before)
    torch.randperm(5, generator=generator)  # the training loader draws from it too
    second.load_state_dict(first.state_dict())
    assert torch.equal(other.get_state(), before)
    assert [values(first.draw()) for _ in range(9)] == [values(second.draw()) for _ in range(9)]


class Jittered(Dataset[Any]):
    """Each item has a number from each of the global generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()), torch.randn(())]
        return torch.tensor([i, *drawn], dtype=torch.float64)


def global_states() -> list[Any]:
    numpy = np.random.get_state(legacy=False)
    return [random.getstate(), {**numpy, "state": numpy["state"]["key"].tolist()}, torch.get_rng_state().tolist()]


@pytest.mark.parametrize(("workers", "position"), [*((0, n) for n in (1, 2, 3, 4, 5, 8)), (2, 2), (2, 5)])
def test_transforms_draw_aside_and_are_resumed_to_the_bit(workers: int, position: int) -> None:
    def made() -> Batches:
        torch.manual_seed(3)
        return Batches(DataLoader(Jittered(), 2, shuffle=True, num_workers=workers), "val_batches")

    first, second = made(), made()
    before = global_states()
    drawn = [first.draw() for _ in range(position)]
    assert global_states() == before
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    expected = [first.draw() for _ in range(4)]
    torch.manual_seed(99)
    random.random(), np.random.rand()
    before = global_states()
    second.load_state_dict(torch.load(saved, weights_only=True))
    found = [second.draw() for _ in range(4)]
    assert global_states() == before
    assert all(map(torch.equal, found, expected))
    jitter = torch.cat([*drawn, *expected])[:, 1:].flatten().tolist()
    assert len(set(jitter)) == len(jitter)  # no number is drawn twice, in this pass or in another


@pytest.mark.skipif(not hasattr(np.random, "set_bit_generator"), reason="NumPy has set_bit_generator from 1.24 on")
def test_a_generator_of_another_kind_in_numpys_place_stays_where_it_is() -> None:
    before = np.random.mtrand._rand._bit_generator
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = np.random.get_state(legacy=False)
        Batches(loader(True, False), "val_batches").draw()
        assert np.random.get_state(legacy=False) == state
    finally:
        np.random.set_bit_generator(before)


# ruff: noqa: NPY002 (transforms draw from the global generators)


@pytest.mark.parametrize("position", [1, 5])
def test_a_function_that_draws_is_resumed_to_the_bit_with_a_single_call(position: int) -> None:
    calls: list[Tensor] = []

    def draw() -> Tensor:
        calls.append(torch.rand(2))
        return calls[-1]

    torch.manual_seed(3)
    first, second = Batches(draw, "val_batches"), Batches(draw, "val_batches")
    before = global_states()
    drawn = [first.draw() for _ in range(position)]
    saved = first.state_dict()
    expected = [first.draw() for _ in range(3)]
    assert global_states() == before
    calls.clear()
    second.load_state_dict(saved)
    assert len(calls) == 1
    assert all(map(torch.equal, [second.draw() for _ in range(3)], expected))
    assert len({float(x[0]) for x in [*drawn, *expected]}) == position + 3


def test_a_function_that_wants_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match=r"val_batches takes \(split\), but is called as val_batches\(\)"):
        Batches(lambda split: split, "val_batches")


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(40).split(20),
        [torch.ones(3, 2), torch.zeros(3, 2)],
        [torch.ones(4, 7, dtype=torch.long), torch.ones(4, 9, dtype=torch.long)],  # sequences of other lengths
        [torch.ones(3, 2), torch.ones(2, dtype=torch.long)],
        [(torch.ones(3, 2), torch.ones(3))],
        [torch.tensor(1.0), torch.tensor(2)],
    ],
)
def test_two_tensors_that_may_be_two_batches_are_two_batches(source: Any) -> None:
    assert all(Batches(source, "val_batches").draw() is one for one in source[:1])
