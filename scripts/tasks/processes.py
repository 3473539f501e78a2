"""Training in several processes, started by torchrun. Each has its share of the data; the first one writes the files."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import hoptim


def _leave() -> None:
    """Leave the process group once gloo's threads are idle.

    DDP keeps the group alive, so that its threads run on after it is destroyed. They need the interpreter to free what the
    last collective held, and abort the process if the interpreter has ended before (pytorch/pytorch issue 190489).
    """
    time.sleep(0.1)
    distributed.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """The number of this process, and how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Join the processes that torchrun has started. Without torchrun there is only this one."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_leave)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the files."""
        return self.rank == 0

    def share(self, examples: Tensor) -> Tensor:
        """This process's share of the examples: every ``size``-th one. All shares have the same length.

        >>> Processes(rank=0, size=2).share(torch.arange(5))
        tensor([0, 2])
        """
        return examples[: len(examples) // self.size * self.size][self.rank :: self.size]

    def share_of(self, batch_size: int | None) -> int | None:
        """How many examples of a batch this process has."""
        return None if batch_size is None else max(1, batch_size // self.size)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, in ``DistributedDataParallel`` if there are several processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def wrap(self, problem: hoptim.Problem) -> hoptim.Problem:
        """The problem with its model wrapped."""
        if self.size == 1:
            return problem
        return hoptim.Problem(self.wrapped(problem.model), problem.hparams, problem.train_loss, problem.val_loss)

    def gather(self, own: Any) -> list[Any]:
        """The values of all processes, gathered in each of them."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, own)
        return found
