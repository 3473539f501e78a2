"""The training batches of one inner step, for the training loss of the hyperstep after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hoptim.problem.data import MicroBatches
from hoptim.problem.kept import Kept

_WHOLE = torch.ones(())


class Window:
    """The batches whose losses went backward since the gradients were last cleared or used.

    They are kept until the next step starts, since a hyperstep comes after the step, at once or later by hand.

    Attributes:
        cleared: whether no loss has gone backward yet, so that the next one that does replaces the batches.
    """

    def __init__(self) -> None:
        self.cleared = self._stepped = True
        self._seen: list[tuple[int, Kept, Tensor]] = []  # number of the loss, batch, gradient of the loss
        self._waiting: list[Kept] = []  # the batch of the last loss, until it goes backward
        self._number = 0

    @property
    def is_between_steps(self) -> bool:
        """Whether no loss was counted since the last step, so that no gradient waits for a step."""
        return self._stepped

    @property
    def has_seen(self) -> bool:
        """Whether any loss has gone backward."""
        return bool(self._seen)

    def note(self, batch: Kept) -> None:
        """Count ``batch`` at once, at a third of the cost of :meth:`watch`, for steps before no hyperstep."""
        if self._stepped:
            self._seen, self.cleared, self._stepped = [], False, False
        if not (self._seen and self._seen[-1][1].batch is batch.batch):  # as in repeated calls of a closure
            self._number += 1
            self._seen.append((self._number, batch, _WHOLE))

    def watch(self, batch: Kept, loss: Tensor) -> None:
        """Count ``batch`` once the backward pass of its ``loss`` begins."""
        self._number = number = self._number + 1
        self._waiting = waiting = [batch]

        def count(share: Tensor) -> None:
            if waiting:
                if self.cleared:
                    self._seen, self.cleared, self._stepped = [], False, False
                self._seen.append((number, waiting.pop(), share))  # a loss kept for a log must not keep its batch

        loss.register_hook(count)

    def stepped(self) -> None:
        """Call this after a step, which has used the gradients."""
        if self.cleared and self._waiting:  # the gradients came in another way than by a backward pass
            self._seen = [(self._number, self._waiting[0], _WHOLE)]
        self._waiting, self.cleared, self._stepped = [], True, True

    def batch(self) -> Any:
        """The batch, or several batches as one, weighted by their shares in the gradient.

        Raises:
            ValueError: there is none, or it has changed.
        """
        if self.cleared and self._waiting:
            return self._waiting[0].get()
        if not self._seen:
            raise ValueError(
                "a hyperstep needs a training batch and none has been seen: compute the loss with optimizer.loss(batch), "
                "or give train_batches"
            )
        _, kept, shares = zip(*sorted(self._seen, key=lambda one: one[0]), strict=True)
        batches = tuple(one.get() for one in kept)
        if len(batches) == 1:
            return batches[0]
        weights = torch.stack([share.to(torch.promote_types(share.dtype, torch.float32)) for share in shares])
        total = weights.abs().sum()
        return MicroBatches(batches, weights / torch.where(total > 0, total, 1.0))
