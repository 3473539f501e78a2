"""Problem: a model, hyperparameters and two ordinary losses, as pure functions of (weights, hyperparameters, batch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hoptim.linalg.trees import Tree
from hoptim.problem.composite_loss import CompositeLoss, LossParts, mean_loss
from hoptim.problem.data import MicroBatches
from hoptim.problem.detached_view import DetachedView
from hoptim.problem.distributed import Ranks
from hoptim.problem.functional import in_place_of, renormed, restore_attributes, submodules, twice_differentiable
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.loss_checks import (
    annotate_errors,
    check_apart,
    check_given,
    check_real,
    check_takes,
    forbid_writes,
    losses,
    scalar,
)
from hoptim.problem.mixed_precision import full_precision, losses_precision
from hoptim.problem.wrappers import Facade, check_whole, process_group_of, uncompiled, unwrap
from hoptim.validation import describe_type

Loss = Callable[[Any, Any, Any], Tensor]
LossName = Literal["train_loss", "val_loss"]
R = TypeVar("R")


@dataclass(frozen=True)
class _Standing:
    """The modules and parameters of a problem as they stand."""

    parts: list[nn.Module]
    weights: dict[str, nn.Parameter]
    leaves: dict[str, nn.Parameter]

    @classmethod
    def of(cls, problem: Problem) -> _Standing:
        model, hparams = problem.model, problem.hparams
        return cls(submodules(model, hparams), dict(model.named_parameters()), dict(hparams.named_parameters()))


class Problem:
    """A bilevel problem: min over λ of L_V(λ, w*(λ)), where w*(λ) minimises L_T(w, λ).

    Args:
        model: any ``nn.Module``; its weights w are those with ``requires_grad``. Tied weights count once. A wrapper
            (``DistributedDataParallel``, ``torch.compile``) is called by ``loss``; names are those of the model inside.
        hparams: the hyperparameters λ: a :class:`HyperParameters`, or any other ``nn.Module``.
        train_loss: L_T as ``train_loss(model, hparams, batch) -> scalar``: ordinary PyTorch, ``model(x)``,
            ``model.named_parameters()``, ``hparams["weight_decay"]``.
        val_loss: L_V, likewise. It may call ``model.eval()``: the mode is restored after each call. It may return a vector
            of R losses (tasks, groups, folds): each then gets a hypergradient of its own.
        process_group: the ranks that train together: L_T and L_V are the means of theirs. ``"auto"``, the default: those of
            the ``DistributedDataParallel``, else all, where ``torch.distributed`` is initialised; ``None``: this one alone.

    Raises:
        TypeError: ``model`` or ``hparams`` is no module, a loss can't be called with (model, hparams, batch), or a weight is
            complex or sharded.
        ValueError: there is no weight or no hyperparameter to learn, one has no values yet, or a tensor is both. When
            called, a loss that returns no real scalar, that writes into weights or hyperparameters instead of only reading
            them, or that uses others than those it is given.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(0.1)})
    >>> def train_loss(model, hparams, batch):
    ...     return (model(batch) ** 2).mean() + hparams["decay"] * (model.weight**2).sum()
    >>> problem = Problem(model, hparams, train_loss, lambda model, hparams, batch: (model(batch) ** 2).mean())
    >>> list(problem.weights()), list(problem.leaves())
    (['weight'], ['decay'])
    """

    _standing: _Standing | None = None  # where it has been looked through, and no others stand in their places

    def __init__(
        self, model: nn.Module, hparams: nn.Module, train_loss: Loss, val_loss: Loss, *, process_group: Any = "auto"
    ) -> None:
        for name, module in (("model", model), ("hparams", hparams)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {describe_type(module)}: give an nn.Module")
        if isinstance(model, HyperParameters):
            raise TypeError("model is a HyperParameters: the order is Problem(model, hparams, train_loss, val_loss)")
        for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
            check_takes(name, loss, "model, hparams, batch")
        self.model, self.hparams, self.train_loss, self.val_loss = unwrap(model), unwrap(hparams), train_loss, val_loss
        self.wrapper, self.process_group = model, process_group
        check_whole(self.model)
        self.joint = nn.ModuleDict({"model": self.model, "hparams": self.hparams})
        check_real("weight", self.model.named_parameters())
        check_real("hyperparameter", self.hparams.named_parameters())
        self.check_learned()
        check_apart(self.model.named_parameters(), self.hparams.named_parameters())
        self._twin = DetachedView(self.hparams, beside=self.model)
        self._looked_at: set[LossName] = set()  # losses that were seen to leave even the values alone

    def check_learned(self) -> None:
        """Raise where everything is frozen."""
        if not self.weights():
            raise ValueError("no weight of the model requires a gradient: nothing is trained")
        if not self.leaves():
            raise ValueError("no parameter of hparams requires a gradient: there is nothing to learn")

    def weights(self) -> Tree:
        """The live weights w that require a gradient, by the model's names."""
        now = self._standing
        live = self.model.named_parameters() if now is None else now.weights.items()
        return {name: p for name, p in live if p.requires_grad}

    def leaves(self) -> Tree:
        """The live unconstrained hyperparameters that require a gradient, by the names of ``hparams``."""
        now = self._standing
        live = self.hparams.named_parameters() if now is None else now.leaves.items()
        return {name: p for name, p in live if p.requires_grad}

    def loss(self, batch: Any) -> Tensor:
        """L_T on the live model, for the inner step: hyperparameters are constants here, and pay nothing."""
        torch.clear_autocast_cache()  # under one autocast around the whole loop it would hold the weights of the first step
        model = self.model if self.wrapper is self.model else Facade(self.wrapper, self.model)
        with self._twin.present() as constants, _noted("train_loss", batch):
            return scalar("train_loss", self.train_loss(model, constants, batch))

    def pure(
        self, name: LossName, weights: Tree, leaves: Tree, batch: Any, then: Callable[[Tensor, LossParts | None], R]
    ) -> R:
        """``then`` of the named loss, and of its parts where it shows them, as a pure function of the tensors given.

        Of several micro-batches it is the mean of the losses. They alone are computed under the user's autocast.
        Buffers are clones; modes and plain attributes are put back. Backward passes belong inside ``then``: activation
        checkpointing runs the model again during one, and has to find the same tensors, buffers and modes.
        """
        first = name not in self._looked_at
        now = self._standing or _Standing.of(self)
        parts, live = now.parts, now.weights
        frozen = {key: p for key, p in live.items() if not p.requires_grad}
        given = {id(live[key]): value for key, value in weights.items()}
        for p in renormed(parts):  # a forward pass writes into these
            given[id(p)] = given.get(id(p), p.detach()).clone()
        given |= {id(now.leaves[key]): value for key, value in leaves.items()}
        given |= {id(buffer): buffer.clone() for part in parts for buffer in part._buffers.values() if buffer is not None}
        twice = twice_differentiable(parts) if self._standing is None else nullcontext()
        with twice, uncompiled(), restore_attributes(parts), in_place_of(parts, given), self._standing_as(None):
            with losses_precision(), forbid_writes(name, frozen | weights, leaves, values=first):
                value, taken_apart = self._taken(name, batch)
            if first:
                past = {key: p for key, p in (live | now.leaves).items() if given.get(id(p), p) is not p}
                check_given(name, value, {id(p): key for key, p in past.items()})
                self._looked_at.add(name)
            result = then(value, taken_apart)
        if first and self._standing is not None:  # a first forward pass may have added a part
            self._standing = _Standing.of(self)
        return result

    def _taken(self, name: LossName, batch: Any) -> tuple[Tensor, LossParts | None]:
        """The loss and its parts, looked at."""
        if isinstance(batch, MicroBatches):
            return mean_loss([self._taken(name, one) for one in batch.batches], batch.shares)
        model, hparams = self.model, self.hparams
        loss, check = getattr(self, name), losses if name == "val_loss" else scalar
        with _noted(name, batch):
            parts = loss.parts(model, hparams, batch) if isinstance(loss, CompositeLoss) else None
            return check(name, loss(model, hparams, batch) if parts is None else CompositeLoss.total(parts)), parts

    @property
    def ranks(self) -> Ranks:
        """The processes whose losses are averaged, as they are now."""
        if self.process_group != "auto":
            return Ranks(self.process_group)
        group = process_group_of(self.wrapper)
        return Ranks.all() if group is None else Ranks(group)

    def check_ranks(self) -> None:
        """Raise where the ranks do not have the same weights and hyperparameters."""
        if self.ranks.size == 1:
            return
        remedy = "wrap the model in DistributedDataParallel and give that to Problem"
        self.ranks.check_same(self.weights(), "weights", remedy)
        self.ranks.check_same(self.leaves(), "hyperparameters", "start them from the same values, and move them alike")

    def generators(self) -> dict[str, Tensor]:
        """The states of the random generators that a loss may draw from, by device."""
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            tensors = (*self.joint.parameters(), *self.joint.buffers())
            states |= {
                device: torch.cuda.get_rng_state(device) for device in sorted({str(p.device) for p in tensors if p.is_cuda})
            }
        return states

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What runs inside draws from a copy of the generators' states, with gradients enabled, twice differentiable.

        So the masks of a hyperstep's training loss are those of the next training step.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inside torch.inference_mode() nothing has a gradient: ask for a hypergradient outside")
        states, now = self.generators(), _Standing.of(self)
        try:
            with (
                torch.enable_grad(),
                twice_differentiable(now.parts),
                full_precision(),
                self._standing_as(now),
            ):
                yield
        finally:
            set_generators(states)

    @contextmanager
    def _standing_as(self, now: _Standing | None) -> Iterator[None]:
        """Inside, it need not be looked through again; ``None``: others stand in the places, and it must."""
        outside, self._standing = self._standing, now
        try:
            yield
        finally:
            self._standing = outside


def _noted(name: str, batch: Any) -> AbstractContextManager[None]:
    return annotate_errors(f"{name} was called with a batch that is {describe_type(batch)}")


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Put the random generators into these states, which are on the host."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
