"""Train with another library and with hoptim in turn, and print how far apart they are."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from digits_task import test_loss
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from with_hoptim import METHODS, with_hoptim

Train = Callable[[Any], list[Tensor]]
REPEATS = 1 if "--once" in sys.argv else 5  # how often each training is run; times are medians


@contextlib.contextmanager
def hypergradients() -> Iterator[list[Tensor]]:
    """A list that collects the gradients which the outer optimizer gets; it is the only Adam in these scripts."""
    seen: list[Tensor] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, torch.optim.Adam):
            (leaf,) = (p for group in optimizer.param_groups for p in group["params"])
            seen.append(leaf.grad.detach().clone())

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest ‖theirs − ours‖ / ‖ours‖ over all hypersteps of a run; NaN if hoptim skipped some."""
    if len(ours) < len(theirs):
        return float("nan")
    return max(float((a - b).norm() / b.norm()) for a, b in zip(theirs, ours, strict=True))


def run(train: Train, option: Any) -> tuple[list[Tensor], float, float]:
    """The hypergradients of one training, its test loss and its CPU time in seconds."""
    with hypergradients() as seen:
        begin = time.process_time()
        weights = train(option)
        seconds = time.process_time() - begin
    return seen, test_loss(weights), seconds


def compare(name: str, rows: dict[str, tuple[Train, Any]]) -> None:
    """Print a line for each row.

    Args:
        name: the name of the other library.
        rows: for names of hoptim's ``METHODS``, the other library's function and the option that it is called with.
    """
    print(f"{'':22} {'hypergradients':>15} {'test loss':^19} {'CPU seconds':^19}")
    print(f"{'':22} {'differ by':>15} {name:>10} {'hoptim':>8} {name:>10} {'hoptim':>8}")
    for label, (train, option) in rows.items():
        runs = [(run(train, option), run(with_hoptim, METHODS[label])) for _ in range(REPEATS)]
        (their_grads, their_loss, _), (our_grads, our_loss, _) = runs[0]
        theirs, ours = (median(pair[side][2] for pair in runs) for side in (0, 1))
        apart = f"{difference(their_grads, our_grads):15.0e} {their_loss:10.6f} {our_loss:8.6f}"
        print(f"{label:22} {apart} {theirs:10.2f} {ours:8.2f}")
