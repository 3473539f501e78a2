"""Weights that are sharded over ranks, as by FSDP2 or tensor parallel: solves work on shards, losses on whole weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hoptim.linalg import vectors
from hoptim.linalg.operators import Operator, Wrapped
from hoptim.linalg.random import NormalNumbers
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.problem.distributed import Ranks


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are sharded, by ``fully_shard``, ``parallelize_module`` or ``distribute_tensor``."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(_is_fsdp(part) for part in model.modules()) or any(hasattr(p, "device_mesh") for p in model.parameters())


def _is_fsdp(part: nn.Module) -> bool:
    return hasattr(part, "set_reshard_after_backward")


def reshard(parts: Sequence[nn.Module]) -> None:
    """Put FSDP2's shards in their places: after a forward pass without gradients those of the root are whole weights."""
    fsdp: list[Any] = [part for part in parts if _is_fsdp(part)]
    for part in fsdp:
        part.reshard()


def whole(t: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all ranks, so that each has to call this; another one as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; another tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


@dataclass(frozen=True)
class ShardedWeight:
    """How one weight is sharded.

    Attributes:
        mesh: the ranks, as torch's ``DeviceMesh``.
        placements: for each axis of the mesh, along which axis of the weight it is sharded, or that it is copied.
        shape: the shape of the whole weight.
        own: the shape of the shard that this rank holds.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    own: torch.Size

    @classmethod
    def of(cls, weight: Any, widest: Any) -> ShardedWeight:
        """That of a live weight; a plain one is copied over all ranks of the mesh ``widest``."""
        if hasattr(weight, "device_mesh"):
            return cls(weight.device_mesh, tuple(weight.placements), weight.shape, local(weight).shape)
        return cls(widest, _copied(widest), weight.shape, weight.shape)

    def whole(self, shard: Tensor) -> Tensor:
        """The whole tensor, from the shard on each rank."""
        found: Tensor = self.tensor(shard).redistribute(placements=_copied(self.mesh)).to_local()
        return found

    def mean(self, own: Tensor) -> Tensor:
        """The shard of the mean of the whole tensors of all ranks."""
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(own, self.mesh, [Partial("avg")] * self.mesh.ndim, run_check=False)
        return parts.redistribute(placements=self.placements).to_local()

    def shard(self, own: Tensor) -> Tensor:
        """The shard of a whole tensor that is the same on all ranks; no rank waits for another."""
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(own, self.mesh, _copied(self.mesh), run_check=False)
        return whole.redistribute(placements=self.placements).to_local()

    def tensor(self, shard: Tensor) -> Any:
        """The shards as one of torch's ``DTensor``."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(shard, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)

    @property
    def pieces(self) -> int:
        """How many ranks share the weight between them; those beyond hold copies."""
        found = 1
        for size, placement in zip(self.mesh.shape, self.placements, strict=True):
            found *= 1 if placement.is_replicate() else size
        return found


def _copied(mesh: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate

    return (Replicate(),) * mesh.ndim


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model are sharded, by name; see :class:`ShardedWeight`."""

    weights: dict[str, ShardedWeight]
    ranks: Ranks

    @classmethod
    def of(cls, live: Tensors, ranks: Ranks) -> Sharding:
        """That of live weights.

        Raises:
            TypeError: a weight is kept on another device than it is used on.
            ValueError: the ranks do not have all shards between them.
        """
        sharded = {name: p for name, p in live.items() if hasattr(p, "device_mesh")}
        widest = max((p.device_mesh for p in sharded.values()), key=lambda mesh: mesh.size())
        for name, p in sharded.items():
            if (kept := local(p).device.type) != p.device_mesh.device_type:
                raise TypeError(
                    f"the shards of weight {name!r} are kept on {kept}, and used on {p.device_mesh.device_type}: "
                    "take fully_shard without an offload_policy"
                )
        if ranks.size < widest.size():
            raise ValueError(
                f"the weights are sharded over {widest.size()} ranks, and the losses are averaged over {ranks.size}: leave "
                "process_group as it is, 'auto', or give a group with all of them"
            )
        return cls({name: ShardedWeight.of(p, widest) for name, p in live.items()}, ranks)

    def vectors(self, layout: Layout) -> ShardedVectors:
        """The flat vectors of the weights in this layout."""
        return ShardedVectors(layout, tuple(self.weights[name] for name in layout.names), self.ranks)

    def tensors(self, shards: Tensors) -> Tensors:
        """These shards, each as a ``DTensor`` like the model's own weight of that name."""
        return {name: self.weights[name].tensor(shard) for name, shard in shards.items()}

    def check_losses(self, loss: Tensor) -> None:
        """Raise ``ValueError`` unless the ranks of each mesh have the mean loss that all have, as those of equal batches do.

        A mesh without all ranks, such as that of FSDP2 within tensor parallel, averages over its own.
        """
        meshes = {id(weight.mesh): weight.mesh for weight in self.weights.values()}
        if all(mesh.size() == self.ranks.size for mesh in meshes.values()):
            return
        everyone = loss.detach().double().reshape(1, -1)
        losses = everyone.new_empty(self.ranks.size, everyone.shape[1])
        dist.all_gather_into_tensor(losses, everyone, group=self.ranks.group)
        place = {number: n for n, number in enumerate(dist.get_process_group_ranks(self.ranks.group))}
        for mesh in meshes.values():
            own = losses[[place[number] for number in mesh.mesh.flatten().tolist()]].mean(0)
            if not torch.allclose(own, losses.mean(0), rtol=1e-6, equal_nan=True):
                raise ValueError(
                    f"weights are sharded over {mesh.size()} of {self.ranks.size} ranks, whose mean loss is "
                    f"{own.tolist()}, and that of all is {losses.mean(0).tolist()}: give ranks that hold parts of the same "
                    "layer, as in tensor parallel, the same batches and the same random seed"
                )


@dataclass(frozen=True)
class ShardedVectors:
    """Flat vectors of shards, of shape (n,) with another n on each rank, and of whole weights.

    Attributes:
        whole: the layout of a vector of whole weights.
        weights: how each of its weights is sharded.
        ranks: those that hold shards.
    """

    whole: Layout
    weights: tuple[ShardedWeight, ...]
    ranks: Ranks

    @cached_property
    def shards(self) -> Layout:
        """The layout of a vector of shards."""
        shapes = tuple(weight.own for weight in self.weights)
        return Layout(self.whole.names, shapes, self.whole.dtypes, self.whole.devices)

    def gathered(self, v: Tensor) -> Tensor:
        """The whole vector, or R of them; every rank has to call this."""
        if v.ndim > 1:
            return torch.stack([self.gathered(row) for row in v])
        found = v.new_empty(self.whole.size)
        for weight, shard, to in zip(
            self.weights, self.shards.views(v).values(), found.split(self.whole.sizes), strict=True
        ):
            to.copy_(weight.whole(shard).reshape(-1))
        return found

    def mean(self, v: Tensor) -> Tensor:
        """The shards of the mean of whole vectors, or of R of them, of all ranks; every rank has to call this."""
        if v.ndim > 1:
            return torch.stack([self.mean(row) for row in v])
        found = v.new_empty(self.shards.size)
        for weight, own, to in zip(self.weights, self.whole.views(v).values(), found.split(self.shards.sizes), strict=True):
            to.copy_(weight.mean(own).reshape(-1))
        return found

    @cached_property
    def share(self) -> Tensor | None:
        """1 / the number of ranks that hold an entry, for each entry; ``None`` if no entry is held twice."""
        counts = [self.ranks.size // weight.pieces for weight in self.weights]
        if set(counts) <= {1}:
            return None
        sizes = zip(self.shards.sizes, counts, strict=True)
        return torch.cat([torch.full((size,), 1 / c, dtype=self.whole.dtype, device=self.whole.device) for size, c in sizes])

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks."""
        total = x.clone()
        dist.all_reduce(total, group=self.ranks.group)
        return total

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, v⟩ of vectors of shards."""
        return self.sum(vectors.dot(u if self.share is None else u * self.share, v))

    def norm(self, v: Tensor) -> Tensor:
        """‖v‖."""
        return self.dot(v, v).sqrt()

    def gram(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u_i, v_j⟩ for all pairs of rows, in float64."""
        return self.sum(vectors.gram(u if self.share is None else u * self.share, v))

    def largest(self, v: Tensor) -> Tensor:
        """The largest entry of v."""
        found = v.amax() if v.numel() else v.new_full((), -torch.inf)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.ranks.group)
        return found

    def gaussian(self, *lead: int, seed: int) -> Tensor:
        """The shards of the standard normal vectors that one process would draw; no rank waits for another."""
        rows, found = math.prod(lead), []
        draws = NormalNumbers(rows * self.whole.size, seed, self.whole.dtype, self.whole.device)
        for _ in range(rows):
            wholes = zip(self.weights, self.whole.shapes, strict=True)
            found += [weight.shard(draws.take(shape.numel()).view(shape)).reshape(-1) for weight, shape in wholes]
        return torch.cat(found).view(*lead, self.shards.size)


class OverShards(Wrapped):
    """The mean of each rank's operator on whole vectors, as an operator on vectors of shards.

    A product gathers the vector, applies this rank's operator to it, and scatters the mean. The inner product is over all
    ranks, where an entry that several ranks hold counts once.
    """

    def __init__(self, base: Operator, space: ShardedVectors) -> None:
        super().__init__(base)
        self.size, self.space = space.shards.size, space

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.space.mean(self.base @ self.space.gathered(v))

    @property
    def total(self) -> int:
        """The number of all entries, on all ranks."""
        return self.space.whole.size

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, v⟩ over all ranks."""
        return self.space.dot(u, v)

    def norm(self, v: Tensor) -> Tensor:
        """‖v‖ over all ranks."""
        return self.space.norm(v)

    def gram(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u_i, v_j⟩ over all ranks."""
        return self.space.gram(u, v)

    def largest(self, v: Tensor) -> Tensor:
        """The largest entry of v on any rank."""
        return self.space.largest(v)

    def gaussian(self, *lead: int, seed: int = 0) -> Tensor:
        """Standard normal vectors."""
        return self.space.gaussian(*lead, seed=seed)


@contextmanager
def without_parallel_hooks(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, FSDP2's weights are sharded, and no hook of torch.distributed gathers, casts or shards anything."""
    reshard(parts)
    with ExitStack() as stack:
        for part in parts:
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(part, kind)
                own = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_parallel(hook))
                if len(own) < len(hooks):
                    setattr(part, kind, own)
                    stack.callback(setattr, part, kind, hooks)
        yield


def _is_parallel(hook: Any) -> bool:
    return str(getattr(getattr(hook, "__func__", hook), "__module__", "")).startswith("torch.distributed.")
