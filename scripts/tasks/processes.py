"""Training in several processes, started by torchrun. Each has its share of the data; the first one writes the files."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import hoptim
from hoptim.problem.distributed import Ranks
from hoptim.problem.sharding import local

log = logging.getLogger("hoptim.train")


def _leave() -> None:
    """Leave the process group once gloo's threads are idle.

    DDP keeps the group alive, so that its threads run on after it is destroyed. They need the interpreter to free what the
    last collective held, and abort the process if the interpreter has ended before (pytorch/pytorch issue 190489).
    """
    time.sleep(0.1)
    distributed.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """The number of this process, how many there are, and whether they shard the model between them."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @classmethod
    def join(cls, sharded: bool = False) -> Processes:
        """Join the processes that torchrun has started. Without torchrun there is only this one."""
        if sharded and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise ValueError("sharded=true in one process: start several, torchrun --nproc-per-node 2 scripts/train.py")
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_leave)
        return cls(distributed.get_rank(), distributed.get_world_size(), sharded)

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

    def wrapped(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """The model, in ``DistributedDataParallel`` if there are several processes, or sharded, each block by itself."""
        if self.size == 1:
            return model
        if not self.sharded:
            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # takes long to import, and few runs need it

        mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
        Ranks.all().broadcast_((*model.parameters(), *model.buffers()))  # as DistributedDataParallel does
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
        return model

    def wrap(self, problem: hoptim.Problem, blocks: Sequence[nn.Module]) -> hoptim.Problem:
        """The problem with its model wrapped or sharded."""
        if self.size == 1:
            return problem
        model = self.wrapped(problem.model, blocks)
        if self.sharded and self.is_main:
            weights = list(model.parameters())
            own, all_of_them = sum(local(p).numel() for p in weights), sum(p.numel() for p in weights)
            log.info("sharded=true: this process has %d of %d weights", own, all_of_them)
        return hoptim.Problem(model, problem.hparams, problem.train_loss, problem.val_loss)

    def gathered(self, own: Any) -> list[Any]:
        """In the main process the values of all processes; in others, which may have less memory to spare, nothing."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size if self.is_main else []
        distributed.gather_object(own, found if self.is_main else None)
        return found
