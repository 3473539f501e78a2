"""Batches: drawn from a re-iterable without end, with a position that a checkpoint can hold; several as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hoptim.validation import describe_type

NO_BATCHES = (torch.Tensor, Mapping, str, bytes)  # iterated, they give rows, keys, letters


@dataclass(frozen=True)
class MicroBatches:
    """The batches of one inner step, whose training losses are averaged, as one batch.

    Args:
        batches: in the order seen.
        shares: the weight of each loss in the mean; their absolute values add up to 1.
    """

    batches: tuple[Any, ...]
    shares: torch.Tensor


pytree.register_pytree_node(
    MicroBatches, lambda one: ([one.batches, one.shares], None), lambda parts, _: MicroBatches(*parts)
)


class Batches:
    """The batches of a re-iterable, over and over.

    A shuffling loader cannot be resumed from its position alone, so the position comes with the states of the random
    generators from which the present pass was begun: the pass is begun again from them and walked to the position.

    Args:
        source: anything that can be iterated again and again: a ``DataLoader``, a list of batches.
        name: what to call it in errors.

    Raises:
        TypeError: ``source`` can be iterated only once, or not at all, or is a loader that Accelerate prepared.
        ValueError: it is empty; at construction where its length is known, else at the first draw.

    >>> batches = Batches(["a", "b"], "val_batches")
    >>> [batches.draw() for _ in range(3)]
    ['a', 'b', 'a']
    """

    def __init__(self, source: Iterable[Any], name: str) -> None:
        if isinstance(source, NO_BATCHES) or hasattr(source, "__array__") or not isinstance(source, Iterable):
            raise TypeError(f"{name} is {describe_type(source)}: give a DataLoader or a list of batches, such as [batch]")
        if isinstance(source, Iterator):
            raise TypeError(f"{name} is a one-shot iterator: give what makes it, such as the DataLoader or a list")
        if hasattr(source, "gradient_state"):
            raise TypeError(
                f"{name} is a loader that Accelerate prepared, and gradient accumulation looks at the loader begun last: "
                "give it as it was before prepare(), and move its batches in the loss"
            )
        if _length(source) == 0:
            raise ValueError(f"{name} is empty: it must hold at least one batch, which drop_last may leave out")
        self.source, self.name = _apart(source), name
        self._iterator: Iterator[Any] | None = None
        self._position = 0
        self._begun: dict[str, torch.Tensor] = {}

    def draw(self) -> Any:
        """The next batch, from a new pass where the last one has ended."""
        before = self._position
        for _ in range(2):
            if self._iterator is None:
                self._begun, self._position = self._generators(), 0
                self._iterator = iter(self.source)
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
            else:
                self._position += 1
                return batch
        if before:
            raise ValueError(f"{self.name} is empty on a new pass, after {before} batches: give what can be iterated again")
        raise ValueError(f"{self.name} is empty: it gave no batch")

    def state_dict(self) -> dict[str, Any]:
        """The position in the present pass, and the generators' states at its start and now."""
        if self._iterator is None:
            return {"position": 0, "begun": {}, "now": {}}
        return {"position": self._position, "begun": dict(self._begun), "now": self._generators()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the saved pass again and walk to its position; torch's global generator stays as it is."""
        self._iterator, self._position, self._begun = None, 0, {}
        if not state["position"]:
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state["begun"][""].cpu())
            for name, generator in _own_generators(self.source).items():
                if name in state["begun"]:
                    generator.set_state(state["begun"][name].cpu())
            for _ in range(state["position"]):
                self.draw()
            for name, generator in _own_generators(self.source).items():  # others may draw from it too
                if name in state["now"]:
                    generator.set_state(state["now"][name].cpu())

    def _generators(self) -> dict[str, torch.Tensor]:
        """The states of torch's global generator and of the loader's and its samplers' own, by where they are."""
        return {"": torch.get_rng_state()} | {path: own.get_state() for path, own in _own_generators(self.source).items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"source": _apart(self.source), "name": self.name, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source, self.name = state["source"], state["name"]
        self.load_state_dict(state["state"])


def _length(source: Iterable[Any]) -> int | None:
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:  # a DataLoader of an iterable data set has __len__, and no length
        return None


def _apart(source: Iterable[Any]) -> Iterable[Any]:
    """A loader whose workers persist has one iterator for all its users: ours would move theirs."""
    if not getattr(source, "persistent_workers", False):
        return source
    source = copy.copy(source)
    source._iterator = None  # type: ignore[attr-defined]
    return source


def _own_generators(source: Any) -> dict[str, torch.Generator]:
    places = {"generator": source, "sampler": getattr(source, "sampler", None)}
    places["batch_sampler"] = getattr(getattr(source, "batch_sampler", None), "sampler", None)
    found = {name: getattr(place, "generator", None) for name, place in places.items()}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}
