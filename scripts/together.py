"""Several processes under torchrun, each with its share of the data: they meet, and share out, and one of them writes."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import hoptim


def _part() -> None:
    """Gloo's threads outlive the group, since DDP keeps it, and free what the last collective held.

    They need the interpreter for that, and abort the process where it ends first (pytorch/pytorch issue 190489).
    """
    time.sleep(0.1)
    distributed.destroy_process_group()


@dataclass(frozen=True)
class Together:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def met(cls) -> Together:
        """All that torchrun has started, or this one alone."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_part)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def share(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Every size-th example, from this process's own on."""
        return tuple(part[self.rank :: self.size] for part in batch)

    def wrapped(self, problem: hoptim.Problem) -> hoptim.Problem:
        """The problem of all of them."""
        if self.size == 1:
            return problem
        model = DistributedDataParallel(problem.model)
        return hoptim.Problem(model, problem.hparams, problem.train_loss, problem.val_loss)

    def gathered(self, own: Any) -> list[Any]:
        """What each of them has, on all."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, own)
        return found
