"""The processes that train together: their results are averaged, by one all-reduce for each product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hoptim.linalg import dicts
from hoptim.linalg.operators import Operator, Wrapped
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors

SAME = 1e-6  # vectors of the ranks count as the same up to this share of their length


@dataclass(frozen=True)
class Ranks:
    """Processes with the same weights and hyperparameters, each with batches of its own.

    The training loss is the mean over the ranks, as in ``DistributedDataParallel``, and so are its derivatives. They are
    averaged *inside* a solve: the mean of the solutions of each rank would be a different, wrong answer.

    Args:
        group: the process group; ``None``, the default, for this process alone, where all methods do nothing.
    """

    group: Any = None

    @classmethod
    def all(cls) -> Ranks:
        """All processes if ``torch.distributed`` is initialised, else this one alone."""
        return cls(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else cls()

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, on each rank; for small plain values."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def gathered_by_first(self, value: Any) -> list[Any] | None:
        """The values of all ranks, on the first one; ``None`` on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return found

    def mean_vector(self, v: Tensor) -> Tensor:
        """The mean of a flat vector, or of R of them, by one all-reduce."""
        if self.size == 1:
            return v
        total = v.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total.div_(self.size)

    def mean(self, x: Tensors) -> Tensors:
        """The mean of named tensors, the same names on all ranks, by one all-reduce in float32 or wider."""
        if self.size == 1:
            return x
        layout = Layout.of(x)
        return layout.unflatten(self.mean_vector(layout.flatten(x)))

    def mean_of_found(self, found: Mapping[str, Tensor | None], like: Tensors, lead: Sequence[int] = ()) -> OptionalTensors:
        """The mean of tensors shaped as ``like``: a missing one counts as zero, and is ``None`` if all ranks lack it.

        With ``lead`` = (R,) each has a leading axis of R, unlike ``like``.
        """
        if self.size == 1:
            return dict(found)
        like = dicts.expanded(like, lead)
        exists = torch.tensor([float(found.get(name) is not None) for name in like], device=next(iter(like.values())).device)
        averaged = self.mean({**dicts.filled(found, like), "": exists})
        shares = averaged.pop("").tolist()  # the share of ranks on which it exists
        return {name: value if share else None for (name, value), share in zip(averaged.items(), shares, strict=True)}

    def mean_with_loss(
        self, loss: Tensor, found: Mapping[str, Tensor | None], like: Tensors
    ) -> tuple[Tensor, OptionalTensors]:
        """The mean of a loss, and of tensors that may be missing as in ``mean_of_found``, by one all-reduce.

        The derivative of a mean is that of this rank's own tensor.
        """
        if self.size == 1:
            return loss, dict(found)
        averaged = self.mean_of_found({**found, ":loss": loss}, {**like, ":loss": loss})
        mean = averaged.pop(":loss")
        assert mean is not None
        for name, own in found.items():
            if own is not None and own.requires_grad:
                averaged[name] = averaged[name] + (own - own.detach())  # type: ignore[operator]
        return mean, averaged

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Copy these tensors, but for sharded ones, from the first rank to all others, as DDP does with the weights."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in (tensor for tensor in tensors if not hasattr(tensor, "device_mesh")):
                    dist.broadcast(tensor, src=dist.get_global_rank(self.group, 0), group=self.group)

    def check_same(self, x: Tensors, what: str, remedy: str) -> None:
        """Raise ``ValueError`` if the tensors differ between the ranks, by their lengths and their sums."""
        if self.size == 1:
            return
        first = next(iter(x.values())).device
        parts = [value.detach().double().to(first) for value in x.values()]
        length = torch.stack([part.norm() for part in parts]).norm()
        figures = torch.stack([length, torch.stack([part.sum() for part in parts]).sum()])
        ends = torch.cat([figures, -figures])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        high, total, low, least = ends.tolist()
        if max(high + low, total + least) > SAME * high:
            raise ValueError(
                f"the {what} differ between the {self.size} ranks (their norms go from {-low:.7g} to {high:.7g}): {remedy}. "
                "Where each rank trains alone, say so with Problem(..., process_group=None)"
            )


def all_gather(found: Tensor, own: Tensor, group: Any) -> None:
    """Fill ``found`` with the tensors of all ranks, one after the other."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.12
    gather(found, own.contiguous(), group=group)


def reduce_scatter(found: Tensor, own: Tensor, group: Any) -> None:
    """Fill ``found`` with this rank's piece of the sum of the tensors of all ranks."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name until torch 2.12
    scatter(found, own.contiguous(), group=group)


def is_first() -> bool:
    """Whether this process is the one that logs: rank 0, or the only process."""
    return Ranks.all().rank == 0


class OverRanks(Wrapped):
    """The mean of each rank's operator: one all-reduce for each product, or for R of them at once.

    >>> from hoptim.linalg.operators import Symmetric
    >>> OverRanks(Symmetric(lambda v: 2 * v, like=torch.ones(1)), Ranks()) @ torch.ones(1)
    tensor([2.])
    """

    def __init__(self, local: Operator, ranks: Ranks) -> None:
        super().__init__(local)
        self.ranks = ranks

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.ranks.mean_vector(self.base @ v)
