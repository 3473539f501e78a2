"""An endless stream of batches whose position a checkpoint can hold, and several batches as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hoptim.checks import describe_type
from hoptim.problem.held_batch import hold_copy
from hoptim.problem.loss_checks import check_takes
from hoptim.problem.random_stream import RandomStream

NO_BATCHES = (torch.Tensor, Mapping, str, bytes)  # iterating over these gives rows, keys and letters, not batches
_END = object()


@dataclass(frozen=True)
class MicroBatches:
    """The batches of one inner step, whose training losses are averaged, as one batch.

    Args:
        batches: in the order of their losses.
        shares: the weight of each loss in the mean; their absolute values add up to 1.
    """

    batches: tuple[Any, ...]
    shares: torch.Tensor


pytree.register_pytree_node(
    MicroBatches, lambda one: ([one.batches, one.shares], None), lambda parts, _: MicroBatches(*parts)
)


class Batches:
    """The batches of a re-iterable, pass after pass.

    Random numbers for a batch, such as the order of a pass or those of a transform, come from a random stream of its own:
    the generators of the process and of the loader do not change.

    A position alone does not resume a loader that shuffles. So the state also holds the random state at the start of the
    present pass: loading it starts the pass again and skips to the position.

    Args:
        source: a ``DataLoader``, a list of batches, or whatever else can be iterated repeatedly; or a function without
            arguments that draws a batch.
        name: its name in errors.

    Raises:
        TypeError: ``source`` can be iterated only once, or not at all, or is a loader that Accelerate prepared.
        ValueError: it is empty, raised at the first draw if its length is unknown; or a single batch ``(x, y)``.

    >>> batches = Batches(["a", "b"], "val_batches")
    >>> [batches.draw() for _ in range(3)]
    ['a', 'b', 'a']
    """

    def __init__(self, source: Iterable[Any] | Callable[[], Any], name: str) -> None:
        if callable(source) and not isinstance(source, (Iterable, type)):
            check_takes(name, source, "")
            source = _Draws(source)
        if isinstance(source, NO_BATCHES) or hasattr(source, "__array__") or not isinstance(source, Iterable):
            raise TypeError(
                f"{name} is {describe_type(source)}: give a DataLoader, a list of batches, such as [batch], or a function"
            )
        if isinstance(source, (tuple, list)) and _is_one_batch(source):
            raise ValueError(
                f"{name} looks like one batch of inputs and targets, for {len(source[0])} examples, and each of the two "
                f"would be a batch: give a list of batches, {name}=[(x, y)]"
            )
        if isinstance(source, Iterator):
            raise TypeError(f"{name} is a one-shot iterator: give what makes it, such as the DataLoader or a list")
        if hasattr(source, "gradient_state"):
            raise TypeError(
                f"{name} is a loader that Accelerate prepared, and its gradient accumulation follows the loader that was "
                "started last: give the loader as it was before prepare(), and move its batches in the loss"
            )
        if _length(source) == 0:
            raise ValueError(f"{name} is empty: it must hold at least one batch, which drop_last may leave out")
        self.source, self.name = _with_own_iterator(source), name
        self._iterator: Iterator[Any] | None = None
        self._position = 0
        self._stream = RandomStream(name)
        self._begun: dict[str, Any] = {}  # the state of the stream at the start of the present pass

    def draw(self) -> Any:
        """The next batch, from a new pass if the last one has ended; a copy, unless it is of a list.

        A loader or a function may fill the same tensors each time, and a hyperstep may draw several batches before it uses
        them.
        """
        batch = self._next()
        return batch if isinstance(self.source, (list, tuple)) else hold_copy(batch).batch

    def _next(self) -> Any:
        with self._stream.drawing(_own_generators(self.source)) as states_now:
            batch = _END if self._iterator is None else next(self._iterator, _END)
            if batch is _END:
                drawn, self._position, self._begun = self._position, 0, states_now()
                self._iterator = iter(self.source)
                batch = next(self._iterator, _END)
        if batch is _END:
            on_new_pass = f" on a new pass, after {drawn} batches: give what can be iterated again"
            raise ValueError(f"{self.name} is empty{on_new_pass if drawn else ': it gave no batch'}")
        self._position += 1
        return batch

    def peek(self) -> Any:
        """The first batch of a separate pass, without drawing it. For use before the first draw."""
        with RandomStream(self.name).drawing(_own_generators(self.source)):
            batch = next(iter(self.source), _END)
        if batch is _END:
            raise ValueError(f"{self.name} is empty: it gave no batch")
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the present pass, and the state of the random stream at its start."""
        return {"position": self._position, "begun": dict(self._begun)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the saved pass again and skip to its position; with new random numbers if ``"begun"`` is ``None``."""
        self._iterator, self._position, self._begun = None, 0, {}
        begun = state["begun"] or {}
        if state["position"] and state["begun"] is not None and "" not in begun:
            raise ValueError(f"the state of {self.name} lacks that of torch's generator: it is damaged")
        self._stream.load(begun)
        for _ in range(state["position"]):
            self._next()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": _with_own_iterator(self.source), "name": self.name, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source, self.name, self._stream = state["source"], state["name"], RandomStream(state["name"])
        self.load_state_dict(state["state"])


@dataclass(frozen=True)
class _Draws:
    """A function that draws a batch, as passes of one batch each, so that a state holds where its last call started."""

    draw: Callable[[], Any]

    def __iter__(self) -> Iterator[Any]:
        yield self.draw()


def _is_one_batch(source: Sequence[Any]) -> bool:
    """Whether these are inputs and targets of the same examples; the parts of a tensor that was split are not."""
    if len(source) != 2 or not all(isinstance(one, (torch.Tensor, np.ndarray)) and one.ndim for one in source):
        return False
    x, y = source
    is_column = y.ndim == 2 and y.shape[1] == 1 and x.shape != y.shape
    return len(x) == len(y) and (x.dtype != y.dtype or x.ndim != y.ndim or is_column)


def _length(source: Iterable[Any]) -> int | None:
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:  # also from a DataLoader over an iterable data set, which has a __len__
        return None


def _with_own_iterator(source: Iterable[Any]) -> Iterable[Any]:
    """A copy of a loader with persistent workers, which has one iterator for all users: ours must not restart theirs."""
    if not getattr(source, "persistent_workers", False):
        return source
    source = copy.copy(source)
    source._iterator = None  # type: ignore[attr-defined]
    return source


def _own_generators(source: Any) -> dict[str, torch.Generator]:
    """The generators of a loader and of its samplers, by the name of their owner."""
    places = {"generator": source, "sampler": getattr(source, "sampler", None)}
    places["batch_sampler"] = getattr(getattr(source, "batch_sampler", None), "sampler", None)
    found = {place: getattr(owner, "generator", None) for place, owner in places.items()}
    return {place: generator for place, generator in found.items() if isinstance(generator, torch.Generator)}
