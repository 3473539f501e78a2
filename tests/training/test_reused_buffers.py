"""Loops and functions that fill the same tensors with each batch: hypergradients are those of a loop with fresh tensors."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BATCHES, VAL, leaf_vector, tiny
from torch import Tensor, nn

import hoptim
from hoptim import Averaged, BilevelOptimizer, CrossValidated, GaussNewton, Implicit, Neumann, Sampled, Unrolled
from hoptim.problem.held_batch import hold, hold_copy

Batch = tuple[Tensor, Tensor]
Fill = Callable[[Batch], Any]


def fresh() -> Fill:
    return lambda batch: (batch[0].clone(), batch[1].clone())


def one_buffer() -> Fill:
    x, y = torch.empty(6, 2), torch.empty(6, dtype=torch.long)

    def fill(batch: Batch) -> Batch:
        return x.copy_(batch[0]), y.copy_(batch[1])

    return fill


def one_dict() -> Fill:
    held = {0: torch.empty(6, 2), 1: torch.empty(6, dtype=torch.long)}

    def fill(batch: Batch) -> dict[int, Tensor]:
        for key, part in enumerate(batch):
            held[key].copy_(part)
        return held

    return fill


def numpy_buffer() -> Fill:
    """NumPy fills the memory of two tensors, whose versions stay as they are."""
    x, y = np.empty((6, 2)), np.empty(6, dtype=np.int64)
    tensors = torch.from_numpy(x), torch.from_numpy(y)

    def fill(batch: Batch) -> Batch:
        x[:], y[:] = batch[0].numpy(), batch[1].numpy()
        return tensors

    return fill


BUFFERS: dict[str, Callable[[], Fill]] = {"torch": one_buffer, "numpy": numpy_buffer, "one dict": one_dict}


def optimizer_of(method: Any = None, **options: Any) -> BilevelOptimizer:
    problem = tiny()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.1)
    return BilevelOptimizer(inner, outer, problem, hypergradient=method, **{"val_batches": [VAL], "every": 1, **options})


def train(optimizer: BilevelOptimizer, fill: Fill, steps: int = 6, micro: int = 1, between: Any = None) -> list[Tensor]:
    """The hypergradients of a loop with accumulated gradients."""
    found: list[Tensor] = []
    optimizer.hooks = (lambda record: found.append(leaf_vector(record.result.grads)),)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(micro):
            (optimizer.loss(fill(BATCHES[(micro * step + part) % len(BATCHES)])) / micro).backward()
        optimizer.step()
        if between is not None:
            between(step)
    assert found
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("buffer", BUFFERS)
def test_accumulation_in_one_buffer_is_that_of_fresh_tensors(buffer: str) -> None:
    expected = train(optimizer_of(), fresh(), micro=3)
    assert not same(expected, train(optimizer_of(), lambda batch: BATCHES[0], micro=3))
    assert same(train(optimizer_of(), BUFFERS[buffer](), micro=3), expected)


@pytest.mark.parametrize("method", [Unrolled(4), Unrolled(4, checkpoint=True)], ids=str)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_the_steps_kept_for_unrolling_have_their_own_batches(buffer: str, method: Unrolled) -> None:
    expected = train(optimizer_of(method, every=5), fresh(), steps=10, micro=2)
    optimizer = optimizer_of(method, every=5)
    assert same(train(optimizer, BUFFERS[buffer](), steps=10, micro=2), expected)
    assert optimizer.record is not None
    assert optimizer.record.status.name == "FINISHED"


METHODS: dict[str, Any] = {
    "averaged": Implicit(curvature=Averaged(batches=3, curvature=GaussNewton())),
    "sampled": Implicit(Neumann(terms=4, step_size=0.1), curvature=Sampled(curvature=GaussNewton())),
    "unrolled": Unrolled(3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_function_that_draws_into_one_buffer_is_that_which_draws_fresh_tensors(buffer: str, method: str) -> None:
    def drawn(fill: Fill) -> list[Tensor]:
        places = iter(range(100))

        def draw() -> Any:
            return fill(BATCHES[next(places) % len(BATCHES)])

        optimizer = optimizer_of(METHODS[method], train_batches=draw, val_batches=draw, every=None)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.loss(BATCHES[0]).backward()
            optimizer.step()
            found.append(leaf_vector(optimizer.hyperstep().result.grads))
        return found

    assert same(drawn(BUFFERS[buffer]()), drawn(fresh()))


@pytest.mark.parametrize("buffer", ["torch", "numpy"])
def test_folds_that_share_a_buffer_are_those_with_fresh_tensors(buffer: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(36, 2, generator=draw)
    y = x @ torch.tensor([1.0, -2.0]) + torch.randn(36, generator=draw)

    def fit(fill: Callable[[Tensor], Any]) -> list[Any]:
        def loss(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
            return (model(batch[0])[:, 0] - batch[1]).square().mean() + hparams["decay"].exp() * model.weight.square().sum()

        def loop(model: nn.Module, optimizer: Any, examples: Tensor) -> None:
            for step in range(12):
                optimizer.zero_grad()
                for part in range(2):
                    optimizer.loss(fill(examples.roll(5 * (2 * step + part))[:6])).backward()
                optimizer.step()

        found = CrossValidated(
            lambda: nn.Linear(2, 1),
            nn.ParameterDict({"decay": nn.Parameter(torch.tensor(-1.0))}),
            loss,
            lambda model, hparams, rows: (model(x[rows])[:, 0] - y[rows]).square().mean(),
            examples=36, folds=3, steps=12, hypersteps=3,
            inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
        ).fit(loop)  # fmt: skip
        return [row["hypergradient_norm"] for row in found.history]

    if buffer == "torch":
        held = torch.empty(6, 2), torch.empty(6)
        reused = fit(lambda rows: (held[0].copy_(x[rows]), held[1].copy_(y[rows])))
    else:
        arrays = np.empty((6, 2)), np.empty(6)
        tensors = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])

        def fill(rows: Tensor) -> Any:
            arrays[0][:], arrays[1][:] = x[rows].numpy(), y[rows].numpy()
            return tensors

        reused = fit(fill)
    assert reused == fit(lambda rows: (x[rows], y[rows]))


# Hypersteps by hand, for which batches are held by reference -----------------------------------------------------------

WRITTEN = r"the tensor batch\[0\] was written to after .*batch\.clone\(\).*train_batch"


@pytest.mark.parametrize("every", [None, 100])
@pytest.mark.parametrize("buffer", ["torch", "one dict"])
def test_a_hyperstep_by_hand_on_a_buffer_that_was_filled_anew_is_refused(every: int | None, buffer: str) -> None:
    optimizer, fill = optimizer_of(every=every), BUFFERS[buffer]()
    optimizer.loss(fill(BATCHES[2])).backward()
    optimizer.step()  # batches of the first step may be copied, to be looked at
    optimizer.zero_grad()
    for batch in BATCHES[:2]:
        optimizer.loss(fill(batch)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=WRITTEN):
        optimizer.hyperstep()
    assert not optimizer.hyper_steps
    expected = optimizer.hyperstep(train_batch=BATCHES[1]).result
    optimizer.zero_grad()
    optimizer.loss(fill(BATCHES[1])).backward()  # each batch is used before it is filled again
    optimizer.step()
    assert leaf_vector(optimizer.hyperstep().result.grads).shape == leaf_vector(expected.grads).shape


@pytest.mark.parametrize("every", [None, 100])
def test_a_hyperstep_by_hand_on_a_buffer_before_it_is_filled_again_is_that_of_fresh_tensors(every: int | None) -> None:
    def loop(fill: Fill) -> list[Tensor]:
        optimizer = optimizer_of(every=every)
        return train(optimizer, fill, between=lambda step: optimizer.hyperstep())

    assert same(loop(one_buffer()), loop(fresh()))


def test_one_dict_whose_tensors_are_replaced_is_refused_if_their_values_differ() -> None:
    optimizer, batch = optimizer_of(every=None), dict(enumerate(BATCHES[0]))
    optimizer.loss(batch).backward()
    batch[0] = batch[0].float().double() if torch.equal(batch[0].float().double(), batch[0]) else batch[0].clone()
    expected = leaf_vector(hoptim.hypergradient(optimizer.problem, BATCHES[0], VAL).grads)
    assert torch.equal(leaf_vector(optimizer.hyperstep().result.grads), expected)  # the same values in another tensor
    batch[0] = BATCHES[1][0]
    with pytest.raises(ValueError, match=WRITTEN):
        optimizer.hyperstep()


@dataclasses.dataclass
class Pair:
    x: Tensor
    y: Tensor

    def __getitem__(self, place: int) -> Tensor:
        return (self.x, self.y)[place]


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor
    y: Tensor

    def __getitem__(self, place: int) -> Tensor:
        return (self.x, self.y)[place]


@dataclasses.dataclass(slots=True)
class Inherited(Slotted):
    more: int = 0


class Nested:
    """Like a Data of torch_geometric: the tensors are in a dict of an object inside."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.store = Pair(x, y)
        self.parent = {"self": self}

    def __getitem__(self, place: int) -> Tensor:
        return self.store[place]


OPAQUE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": Pair,
    "slots": Slotted,
    "inherited slots": Inherited,
    "nested": Nested,
    "mapping": lambda x, y: UserDict({0: x, 1: y}),  # as a BatchEncoding is
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_objects_that_can_not_be_copied_are_right_if_new_and_refused_if_filled_again(kind: str) -> None:
    expected = train(optimizer_of(), fresh(), micro=2)
    assert same(train(optimizer_of(), lambda batch: OPAQUE[kind](*fresh()(batch)), micro=2), expected)
    fill = one_buffer()
    with pytest.raises(ValueError, match=r"the tensor batch\[.* was written to after"):
        train(optimizer_of(), lambda batch: OPAQUE[kind](*fill(batch)), micro=2)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_within_a_window_holds_the_batches_of_each_step() -> None:
    def loop(fill: Fill) -> list[Tensor]:
        first, saved = optimizer_of(Unrolled(4), every=5), io.BytesIO()
        model = first.problem.model
        for batch in BATCHES[:3]:
            first.zero_grad()
            first.loss(fill(batch)).backward()
            first.step()
        torch.save([model.state_dict(), first.state_dict()], saved)
        saved.seek(0)
        fill(BATCHES[5])
        second = optimizer_of(Unrolled(4), every=5)
        weights, state = torch.load(saved, weights_only=True)
        second.problem.model.load_state_dict(weights)
        second.load_state_dict(state)
        return train(second, fill, steps=2)

    expected = loop(fresh())
    assert all(same(loop(make()), expected) for make in BUFFERS.values())


@pytest.mark.parametrize("by_disk", [True, False])
def test_a_copy_of_what_is_kept_is_as_good_as_the_original(by_disk: bool) -> None:
    def again(kept: Any) -> Any:
        return pickle.loads(pickle.dumps(kept)) if by_disk else copy.deepcopy(kept)

    batch = {"x": torch.zeros(2), "y": torch.zeros(2)}
    held, own = hold(batch), hold_copy(batch)
    assert all(again(one).get().keys() == batch.keys() for one in (held, own))
    later = again(held)
    batch["y"].add_(1)
    assert later.get()["y"].tolist() == again(own).get()["y"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"batch\['y'\] was written to"):
        again(held).get()


@pytest.mark.parametrize("name", ["averaged", "sampled", "unrolled"])
def test_objects_that_are_drawn_again_before_they_were_used_are_refused(name: str) -> None:
    places, fill = iter(range(100)), one_buffer()
    optimizer = optimizer_of(METHODS[name], every=None, train_batches=lambda: Pair(*fill(BATCHES[next(places) % 6])))
    with pytest.raises(ValueError, match=r"the tensor batch\['x'\] was written to after .* drawn"):
        optimizer.hyperstep()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_full_batch_is_copied_once_for_all_steps_of_a_window(kind: str) -> None:
    optimizer = optimizer_of(Unrolled(5), every=5)
    fill = {"torch": lambda _: BATCHES[0], "numpy": numpy_buffer()}[kind]
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.loss(fill(BATCHES[0])).backward()
        optimizer.step()
    trajectory = optimizer._progress.recent.trajectory(optimizer.problem.weights())
    assert trajectory is not None
    batches = [loss.batch for step in trajectory.steps for loss in step.losses]
    assert len(batches) == 4
    assert len({id(x) for x, _ in batches}) == 1
    assert batches[0][0] is not BATCHES[0][0]


def test_the_originals_of_copies_are_not_kept() -> None:
    optimizer, alive = optimizer_of(Unrolled(4), every=4), []
    for number in range(3):
        x, y = BATCHES[number][0].clone(), BATCHES[number][1]
        alive.append(weakref.ref(x))
        optimizer.zero_grad()
        optimizer.loss((x, y)).backward()
        optimizer.step()
        del x
    gc.collect()
    assert [one() is None for one in alive] == [True, True, False]  # the last one is compared with the next batch


class Named(Tensor):
    """A tensor of another class."""


def test_a_copy_is_like_its_batch() -> None:
    x, named = torch.randn(3, 4).t().requires_grad_(), torch.ones(2).as_subclass(Named)
    x.note = "mine"  # type: ignore[attr-defined]
    weight, array = nn.Parameter(torch.ones(2)), np.asfortranarray(np.ones((2, 3)))
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    batch = {"x": [x, named], "more": (weight, array, None, "text", packed), "index": torch.tensor([1, 0])}
    copy = hold_copy(batch).get()
    (other, other_named), (other_weight, other_array, nothing, text, other_packed) = copy["x"], copy["more"]
    assert (other is not x, torch.equal(other, x), other.requires_grad, other.is_leaf) == (True, True, True, True)
    assert (other.stride(), other.note) == (x.stride(), "mine")
    assert (type(other_named), other_named is named) == (Named, False)
    assert other_weight is weight  # a copy would be no Parameter
    assert (other_array is not array, other_array.flags.f_contiguous, np.array_equal(other_array, array)) == (True,) * 3
    assert (nothing, text) == (None, "text")
    assert torch.equal(other_packed.data, packed.data)
    assert copy["index"].dtype == torch.int64


def test_a_copy_shares_only_what_has_not_changed() -> None:
    batch = [torch.ones(2), np.ones(2), torch.from_numpy(np.ones(2)), torch.zeros(2)]
    first = hold_copy(batch)
    again = hold_copy(batch, first)
    assert all(a is b for a, b in zip(first.get(), again.get(), strict=True))
    batch[0].add_(1)
    batch[1] += 1
    batch[2].numpy()[:] = 5
    third = hold_copy([*batch[:3], torch.zeros(2)], again)
    assert [part.tolist() for part in third.get()] == [[2, 2], [2, 2], [5, 5], [0, 0]]
    assert [part.tolist() for part in first.get()] == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_a_tensor_made_in_inference_mode_has_no_version_and_is_kept() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    assert torch.equal(hold_copy([x]).get()[0], x)
    assert hold([x]).get()[0] is x


def test_the_check_of_the_first_step_compares_with_the_batch_of_the_loss(recwarn: pytest.WarningsRecorder) -> None:
    optimizer, fill = optimizer_of(), numpy_buffer()
    for batch in BATCHES[:2]:
        optimizer.zero_grad()
        optimizer.loss(fill(batch)).backward()
        fill(BATCHES[3])  # the next batch is fetched before the step
        optimizer.step()
    assert not recwarn.list
