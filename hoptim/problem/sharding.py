"""Weights that are sharded over ranks, as by FSDP2 or tensor parallel: solves work on shards, losses on whole weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hoptim.linalg import vectors
from hoptim.linalg.operators import Operator, Wrapped
from hoptim.linalg.random import NormalNumbers
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.problem.distributed import Ranks, all_gather, reduce_scatter

RIGHT_FROM = "2.13"  # with torch 2.8 hypergradients of sharded models were wrong; those between were not tried
LARGE = 2**16  # a weight of so many entries has collectives of its own; smaller ones share one
ALIKE = 1e-4  # losses of the same batch may differ by rounding, up to this share


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


def types_of_policies(parts: Sequence[nn.Module]) -> set[torch.dtype]:
    """The types to which FSDP2 casts weights, gradients or outputs, by the ``MixedPrecisionPolicy`` of each part."""
    fsdp: list[Any] = [part for part in parts if _is_fsdp(part)]
    policies = [part._get_fsdp_state()._mp_policy for part in fsdp]  # torch shows it in no other way
    types = {t for policy in policies for t in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)}
    return types - {None}


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
        if self._axis is None:
            gathered: Tensor = self.tensor(shard).redistribute(placements=_copied(self.mesh)).to_local()
            return gathered
        found = shard.new_empty(self.shape)
        all_gather(found, shard, self.mesh.get_group(self._axis))
        return found

    def mean(self, own: Tensor) -> Tensor:
        """The shard of the mean of the whole tensors of all ranks of the mesh."""
        from torch.distributed.tensor import DTensor, Partial

        if self._axis is None:
            parts = DTensor.from_local(own, self.mesh, [Partial("avg")] * self.mesh.ndim, run_check=False)
            return parts.redistribute(placements=self.placements).to_local()
        found = own.new_empty(self.own)
        reduce_scatter(found, own, self.mesh.get_group(self._axis))
        for axis in set(range(self.mesh.ndim)) - {self._axis}:
            dist.all_reduce(found, group=self.mesh.get_group(axis))
        return found.div_(self.mesh.size())

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

    @cached_property
    def places(self) -> Tensor:
        """Where the entries of the shard are in the whole weight, both flat."""
        return self.shard(torch.arange(self.shape.numel(), device=self.mesh.device_type).view(self.shape)).reshape(-1)

    @property
    def pieces(self) -> int:
        """How many ranks share the weight between them; those beyond hold copies."""
        sizes = zip(self.mesh.shape, self.placements, strict=True)
        return math.prod(size for size, placement in sizes if not placement.is_replicate())

    @cached_property
    def _axis(self) -> int | None:
        """The axis of the mesh over which its rows are shared evenly; ``None`` if it is sharded in any other way."""
        from torch.distributed.tensor import Shard

        axes = [axis for axis, placement in enumerate(self.placements) if not placement.is_replicate()]
        if len(axes) != 1 or type(self.placements[axes[0]]) is not Shard or self.placements[axes[0]].dim:
            return None
        return None if self.shape[0] % self.mesh.size(axes[0]) else axes[0]


def _ranks_of(mesh: Any) -> list[int]:
    found: list[int] = mesh.mesh.flatten().tolist()
    return found


def _copied(mesh: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate

    return (Replicate(),) * mesh.ndim


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model are sharded.

    Attributes:
        weights: each of them, by name.
        ranks: those over which losses are averaged.
        is_one_batch: whether all ranks compute one loss together, as under tensor parallel alone.
    """

    weights: dict[str, ShardedWeight]
    ranks: Ranks
    is_one_batch: bool

    @classmethod
    def of(cls, model: nn.Module, live: Tensors, ranks: Ranks) -> Sharding:
        """That of a model's live weights.

        Raises:
            RuntimeError: torch is older than 2.13.
            TypeError: a weight is kept on another device than it is used on.
            ValueError: the losses are not averaged over all ranks that hold shards.
        """
        if torch.__version__ < RIGHT_FROM:
            raise RuntimeError(
                f"the weights are sharded, and this is torch {torch.__version__}: with torch 2.8 hypergradients of sharded "
                f"models were wrong. Take torch {RIGHT_FROM} or newer, or DistributedDataParallel"
            )
        sharded = {name: p for name, p in live.items() if hasattr(p, "device_mesh")}
        widest = max((p.device_mesh for p in sharded.values()), key=lambda mesh: mesh.size())
        members = {dist.get_rank()} if ranks.group is None else {*dist.get_process_group_ranks(ranks.group)}
        for name, p in sharded.items():
            if (kept := local(p).device.type) != p.device_mesh.device_type:
                raise TypeError(
                    f"the shards of weight {name!r} are kept on {kept}, and used on {p.device_mesh.device_type}: take "
                    "fully_shard without an offload_policy"
                )
            if not members.issuperset(holders := _ranks_of(p.device_mesh)):
                raise ValueError(
                    f"the weight {name!r} is sharded over the ranks {holders}, and losses are averaged over "
                    f"{sorted(members)}: leave process_group as it is, 'auto', or give a group with all ranks"
                )
        weights = {name: ShardedWeight.of(p, widest) for name, p in live.items()}
        return cls(weights, ranks, is_one_batch=not any(_is_fsdp(part) for part in model.modules()))

    def vectors(self, layout: Layout) -> ShardedVectors:
        """The flat vectors of the weights in this layout, which may be one of shards."""
        return ShardedVectors(replace(layout, shapes=tuple(self.weights[name].shape for name in layout.names)), self)

    def tensors(self, shards: Tensors) -> Tensors:
        """These shards, each as a ``DTensor`` like the model's own weight of that name."""
        return {name: self.weights[name].tensor(shard) for name, shard in shards.items()}

    def whole(self, shards: Tensors) -> Tensors:
        """The whole tensors, by one collective for each large one, and one for all others. Every rank has to call this."""
        return {**self.whole_small(shards), **{name: self.weights[name].whole(shards[name]) for name in self.large(shards)}}

    def mean(self, own: Tensors) -> Tensors:
        """The shards of the mean of the whole tensors of all ranks, likewise."""
        return {**self.mean_small(own), **{name: self.weights[name].mean(own[name]) for name in self.large(own)}}

    def large(self, names: Iterable[str]) -> list[str]:
        """Those of the weights that have collectives of their own."""
        return [name for name in names if self.weights[name].shape.numel() >= LARGE]

    def whole_small(self, shards: Mapping[str, Tensor]) -> Tensors:
        """The whole tensors of the weights that are not large, by one all-reduce."""
        layout = self._small(shards)
        if not layout.names:  # an empty tensor has no device, and NCCL sends none from a CPU
            return {}
        total = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
        for name, t in layout.views(total).items():
            weight = self.weights[name]
            t.view(-1)[weight.places] = shards[name].reshape(-1).to(t) * (weight.pieces / self.ranks.size)
        if self.ranks.size > 1:
            dist.all_reduce(total, group=self.ranks.group)
        return layout.unflatten(total)

    def mean_small(self, own: Mapping[str, Tensor]) -> Tensors:
        """The shards of the mean of the whole tensors that are not large, by one all-reduce."""
        layout = self._small(own)
        if not layout.names:
            return {}
        mean = layout.unflatten(self.ranks.mean_vector(layout.flatten(own)))
        return {name: t.reshape(-1)[self.weights[name].places].view(self.weights[name].own) for name, t in mean.items()}

    def _small(self, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of the whole weights that are not large, with the types and devices of these tensors."""
        large = set(self.large(tensors))
        rows = [(name, self.weights[name].shape, t.dtype, t.device) for name, t in tensors.items() if name not in large]
        names, shapes, dtypes, devices = zip(*rows, strict=True) if rows else ((), (), (), ())
        return Layout(names, shapes, dtypes, devices)

    def check_losses(self, loss: Tensor) -> None:
        """Raise ``ValueError`` on all ranks if those that hold parts of the same layer do not have the same loss.

        FSDP2 averages over the ranks of a mesh. If these are not all ranks, as within tensor parallel, the mean loss of each
        mesh has to be that of all ranks; without FSDP2 all ranks have to have one loss.
        """
        meshes = {id(weight.mesh): weight.mesh for weight in self.weights.values()}.values()
        groups = [_ranks_of(mesh) for mesh in meshes if mesh.size() < self.ranks.size]
        if self.is_one_batch:
            groups = [[dist.get_rank()]]
        if not groups:
            return
        own = loss.detach().double().reshape(-1)
        found = [torch.empty_like(own) for _ in range(self.ranks.size)]
        dist.all_gather(found, own, group=self.ranks.group)
        losses = torch.stack(found)
        if not losses.isfinite().all():
            return  # which the status of the result says
        place = {number: n for n, number in enumerate(dist.get_process_group_ranks(self.ranks.group))}
        means = [losses[[place[number] for number in group]].mean(0) for group in groups]
        differs = losses.new_tensor(float(any(not torch.allclose(mean, losses.mean(0), rtol=ALIKE) for mean in means)))
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=self.ranks.group)  # others may have found no difference
        if differs:
            raise ValueError(
                f"the losses of the ranks are {losses.mean(1).tolist()}: give ranks that hold parts of the same layer, as "
                "in tensor parallel, the same batches and the same random seed"
            )


@dataclass(frozen=True)
class ShardedVectors:
    """Flat vectors of shards, of shape (n,) with another n on each rank, and of whole weights; or R of them.

    Attributes:
        whole: the layout of a vector of whole weights.
        sharding: how the weights are sharded.
    """

    whole: Layout
    sharding: Sharding

    @cached_property
    def shards(self) -> Layout:
        """The layout of a vector of shards."""
        shapes = tuple(self.sharding.weights[name].own for name in self.whole.names)
        return Layout(self.whole.names, shapes, self.whole.dtypes, self.whole.devices)

    def gathered(self, v: Tensor) -> Tensor:
        """The whole vector; every rank has to call this."""
        if v.ndim > 1:
            return torch.stack([self.gathered(row) for row in v])
        return self.whole.flatten(self.sharding.whole(self.shards.views(v)))

    def mean(self, v: Tensor) -> Tensor:
        """The shards of the mean of the whole vectors of all ranks; every rank has to call this."""
        if v.ndim > 1:
            return torch.stack([self.mean(row) for row in v])
        return self.shards.flatten(self.sharding.mean(self.whole.views(v)))

    @cached_property
    def share(self) -> Tensor | None:
        """1 / the number of ranks that hold an entry, for each entry; ``None`` if no entry is held twice."""
        copies = [self.sharding.ranks.size // self.sharding.weights[name].pieces for name in self.whole.names]
        if set(copies) <= {1}:
            return None
        rows = zip(self.shards.sizes, copies, strict=True)
        return torch.cat([torch.full((size,), 1 / k, dtype=self.whole.dtype, device=self.whole.device) for size, k in rows])

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, v⟩ of vectors of shards."""
        return self._sum(vectors.dot(u if self.share is None else u * self.share, v))

    def norm(self, v: Tensor) -> Tensor:
        """‖v‖ of a vector of shards."""
        return self.dot(v, v).sqrt()

    def gram(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u_i, v_j⟩ for all pairs of rows, in float64."""
        return self._sum(vectors.gram(u if self.share is None else u * self.share, v))

    def _sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.sharding.ranks.group)
        return x

    def largest(self, v: Tensor) -> Tensor:
        """The largest entry on any rank."""
        found = v.amax() if v.numel() else v.new_full((), -torch.inf)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.sharding.ranks.group)
        return found

    def gaussian(self, *lead: int, seed: int) -> Tensor:
        """The shards of the standard normal vectors that one process would draw; no rank waits for another."""
        rows, found = math.prod(lead), []
        draws = NormalNumbers(rows * self.whole.size, seed, self.whole.dtype, self.whole.device)
        for _ in range(rows):
            weights = (self.sharding.weights[name] for name in self.whole.names)
            found += [weight.shard(draws.take(weight.shape.numel()).view(weight.shape)).reshape(-1) for weight in weights]
        return torch.cat(found).view(*lead, self.shards.size)


class OverShards(Wrapped):
    """An operator on vectors of shards, with the inner product over all ranks, where an entry with copies counts once."""

    def __init__(self, base: Operator, space: ShardedVectors) -> None:
        super().__init__(base)
        self.space = space

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.base @ v

    def product_onto_(self, y: Tensor, a: Tensor | float, v: Tensor) -> Tensor:
        """y ← A v + a·y in place; returns y."""
        return self.base.product_onto_(y, a, v)

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
        """The largest entry on any rank."""
        return self.space.largest(v)

    def gaussian(self, *lead: int, seed: int = 0) -> Tensor:
        """Standard normal vectors, spread as the weights are."""
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
