"""The training batches of one inner step, which a hyperstep after it takes the training loss on again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hoptim.problem.data import MicroBatches

_WHOLE = torch.ones(())


class Window:
    """The batches whose losses went backward since the gradients were last cleared or used.

    They stay until the next step's begin, since a hyperstep follows the step, at once or later by hand.

    Attributes:
        cleared: whether none has gone backward yet, so that the next one to do so begins anew.
    """

    def __init__(self) -> None:
        self.cleared = self._stepped = True
        self._seen: list[tuple[int, Any, Tensor]] = []  # the loss's number, its batch, and what its backward pass began with
        self._waiting: list[Any] = []  # the batch of the last loss, until that goes backward
        self._number = 0

    @property
    def is_between_steps(self) -> bool:
        """Whether no loss was counted since the last step, so that no gradient waits for one."""
        return self._stepped

    def note(self, batch: Any) -> None:
        """Count ``batch`` at once: a third of what :meth:`watch` costs, for steps after which no hyperstep is due."""
        if self._stepped:
            self._seen, self.cleared, self._stepped = [], False, False
        if not (self._seen and self._seen[-1][1] is batch):  # as of a closure that is called again and again
            self._number += 1
            self._seen.append((self._number, batch, _WHOLE))

    def watch(self, batch: Any, loss: Tensor) -> None:
        """Count ``batch`` once the backward pass of its ``loss`` begins."""
        self._number = number = self._number + 1
        self._waiting = waiting = [batch]

        def count(share: Tensor) -> None:
            if waiting:
                if self.cleared:
                    self._seen, self.cleared, self._stepped = [], False, False
                self._seen.append((number, waiting.pop(), share))  # a loss kept for a log shall not keep its batch

        loss.register_hook(count)

    def stepped(self) -> None:
        """The gradients were used."""
        if self.cleared and self._waiting:  # they came in another way than by a backward pass
            self._seen = [(self._number, self._waiting[0], _WHOLE)]
        self._waiting, self.cleared, self._stepped = [], True, True

    def batch(self) -> Any:
        """The batch, or several as one, by their shares in the gradient.

        Raises:
            ValueError: there is none.
        """
        if self.cleared and self._waiting:
            return self._waiting[0]
        if not self._seen:
            raise ValueError(
                "a hyperstep needs a training batch and none has been seen: compute the loss with optimizer.loss(batch), "
                "or give train_batches"
            )
        _, batches, shares = zip(*sorted(self._seen, key=lambda one: one[0]), strict=True)
        if len(batches) == 1:
            return batches[0]
        weights = torch.stack([share.to(torch.promote_types(share.dtype, torch.float32)) for share in shares])
        total = weights.abs().sum()
        return MicroBatches(batches, weights / torch.where(total > 0, total, 1.0))
