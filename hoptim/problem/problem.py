"""Problem: a model, hyperparameters and two ordinary losses, as pure functions of (weights, hyperparameters, batch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hoptim.linalg import trees
from hoptim.linalg.vectors import Tree
from hoptim.problem.composite_loss import CompositeLoss, LossParts, mean_loss
from hoptim.problem.data import MicroBatches
from hoptim.problem.detached_view import DetachedView
from hoptim.problem.distributed import Ranks
from hoptim.problem.functional import (
    Attributes,
    DifferentiableStatistics,
    Joint,
    renormed_weights,
    restore_attributes,
    twice_differentiable,
)
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.loss_checks import (
    annotate_errors,
    check_apart,
    check_beside,
    check_given,
    check_real,
    check_takes,
    forbid_writes,
    losses,
    scalar,
    split_aux,
    warn_of_training_mode,
)
from hoptim.problem.mixed_precision import full_precision, losses_precision
from hoptim.problem.random_stream import python_and_numpy_untouched
from hoptim.problem.wrappers import Facade, check_whole, process_group_of, uncompiled, unwrap, warn_of_compiled_aside
from hoptim.validation import describe_type

Loss = Callable[[Any, Any, Any], Tensor]
LossName = Literal["train_loss", "val_loss"]
R = TypeVar("R")


@dataclass
class _Live:
    """The modules and live tensors of a problem, looked up once for each hypergradient."""

    parts: list[nn.Module]
    weights: Tree
    leaves: Tree
    buffers: Tree  # by their names in the joint module

    @classmethod
    def of(cls, problem: Problem) -> _Live:
        weights: Tree = dict(problem.model.named_parameters())
        leaves: Tree = dict(problem.hparams.named_parameters())
        return cls(list(problem.joint.modules()), weights, leaves, dict(problem.joint.named_buffers()))


def _clones(buffers: Tree) -> Tree:
    """Clones of buffers, for a forward pass to write into."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


class Evaluated(NamedTuple):
    """A loss, its parts if it is a ``CompositeLoss``, and the buffers and weights that its forward pass writes to.

    ``written`` has these tensors as they are after the forward pass, by their names in the joint module. A buffer that was
    written to without a graph, as under ``no_grad``, is a constant.
    """

    loss: Tensor
    parts: LossParts | None
    written: Tree


@dataclass(frozen=True)
class ModuleState:
    """What a forward pass may change in model and hyperparameters besides the learned tensors.

    Attributes:
        tensors: the buffers, by their names in the joint module.
        attributes: the plain attributes.
    """

    tensors: Tree
    attributes: Attributes


class Problem:
    """A bilevel problem: min over λ of L_V(λ, w*(λ)), where w*(λ) minimises L_T(w, λ).

    Args:
        model: any ``nn.Module``; its weights w are those with ``requires_grad``. Tied weights count once. A wrapper
            (``DistributedDataParallel``, ``torch.compile``) is called by ``loss``; names are those of the model inside.
        hparams: the hyperparameters λ: a :class:`HyperParameters`, or any other ``nn.Module``.
        train_loss: L_T as ``train_loss(model, hparams, batch) -> scalar``: ordinary PyTorch, ``model(x)``,
            ``model.named_parameters()``, ``hparams["weight_decay"]``.
        val_loss: L_V, likewise. It may call ``model.eval()``: the mode is restored after each call. It may return a vector
            of R losses (tasks, groups, folds): each then gets its own hypergradient.
        has_aux: whether ``train_loss`` returns ``(loss, aux)``, as in ``torch.func``; default ``False``. If so, ``loss``
            returns the pair: ``aux`` is an accuracy, a hidden state, or whatever else the loop needs. ``val_loss`` may
            return a pair too. The ``aux`` of a ``CompositeLoss`` is z, what ``predict`` returned.
        process_group: the ranks that train together, over which L_T and L_V are averaged. ``"auto"``, the default: those of
            the ``DistributedDataParallel``, else all if ``torch.distributed`` is initialised; ``None``: this process alone.

    Raises:
        TypeError: ``model`` or ``hparams`` is no module, a loss can't be called with (model, hparams, batch), or a weight is
            complex or sharded.
        ValueError: there is no weight or no hyperparameter to learn, one has no values yet, a tensor is both, or ``hparams``
            is a part of ``model``. When called, a loss returns no real scalar, writes into weights or hyperparameters
            instead of only reading them, or uses others than those in its arguments.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(0.1)})
    >>> def train_loss(model, hparams, batch):
    ...     return (model(batch) ** 2).mean() + hparams["decay"] * (model.weight**2).sum()
    >>> problem = Problem(model, hparams, train_loss, lambda model, hparams, batch: (model(batch) ** 2).mean())
    >>> list(problem.weights()), list(problem.leaves())
    (['weight'], ['decay'])
    """

    _live: _Live | None = None  # inside untouched and call, where other tensors may be in place of the live ones
    _given: dict[str, Tree] | None = None  # inside call: the weights, leaves and buffers that are in place of the live ones

    def __init__(
        self,
        model: nn.Module,
        hparams: nn.Module,
        train_loss: Loss,
        val_loss: Loss,
        *,
        has_aux: bool = False,
        process_group: Any = "auto",
    ) -> None:
        for name, module in (("model", model), ("hparams", hparams)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {describe_type(module)}: give an nn.Module")
        if isinstance(model, HyperParameters):
            raise TypeError("model is a HyperParameters: the order is Problem(model, hparams, train_loss, val_loss)")
        for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
            check_takes(name, loss, "model, hparams, batch")
        if not isinstance(has_aux, bool):
            raise TypeError(f"has_aux={has_aux!r}: give True where train_loss returns (loss, aux), else False")
        self.model, self.train_loss, self.val_loss = unwrap(model), train_loss, val_loss
        # A HyperParameters is not unwrapped, since its names may begin with _orig_mod.
        self.hparams = hparams if isinstance(hparams, HyperParameters) else unwrap(hparams)
        self.wrapper, self.process_group, self.has_aux = model, process_group, has_aux
        check_whole(self.model)
        check_beside(self.model, self.hparams)
        self.joint = Joint(self.model, self.hparams)
        check_real("weight", self.model.named_parameters())
        check_real("hyperparameter", self.hparams.named_parameters())
        self.check_learned()
        check_apart(self.model.named_parameters(), self.hparams.named_parameters())
        self._constants = DetachedView(self.hparams, beside=self.model)
        self._checked: set[LossName] = set()  # the losses that were checked, at their first evaluation
        self.has_trained = False
        self.options: Any = None  # what was learned as options of the inner optimizer, for a retraining
        self.starts = {name: leaf.detach().clone() for name, leaf in self.leaves().items()}

    def check_learned(self) -> None:
        """Raise ``ValueError`` if all weights or all hyperparameters are frozen."""
        if not self.weights():
            raise ValueError("no weight of the model requires a gradient: nothing is trained")
        if not self.leaves():
            raise ValueError("no parameter of hparams requires a gradient: there is nothing to learn")

    def weights(self) -> Tree:
        """The weights w that require a gradient, by the model's names; inside :meth:`call`, those that it was given."""
        return {name: p for name, p in self._named("weights", self.model).items() if p.requires_grad}

    def leaves(self) -> Tree:
        """The unconstrained hyperparameters that require a gradient, by the names of ``hparams``; likewise."""
        return {name: p for name, p in self._named("leaves", self.hparams).items() if p.requires_grad}

    def _named(self, kind: Literal["weights", "leaves"], module: nn.Module) -> Tree:
        if self._given is not None:
            return self._given[kind]
        return dict(module.named_parameters()) if self._live is None else getattr(self._live, kind)

    def loss(self, batch: Any) -> Any:
        """L_T on the live model, for the inner step; hyperparameters are constants here and cost nothing.

        Returns:
            The loss, a scalar; with ``has_aux`` the pair ``(loss, aux)``.
        """
        torch.clear_autocast_cache()  # under one autocast around the whole loop it would keep the first step's weights
        if not self.has_trained:
            self.has_trained = True
            warn_of_compiled_aside(self.wrapper)
        model = self.model if self.wrapper is self.model else Facade(self.wrapper, self.model)
        note = annotate_errors("train_loss was called with a batch that is", batch, self.hparams)
        with self._constants as constants, note:
            value, _, aux = self.call_loss("train_loss", model, constants, batch)
            loss = scalar("train_loss", value)
            self._constants.check_detached(loss)
            return (loss, aux) if self.has_aux else loss

    def call(self, weights: Tree, leaves: Tree, function: Callable[[], R], buffers: Tree | None = None) -> R:
        """``function()`` with these tensors in place of weights and hyperparameters, and with clones of the buffers.

        These are the present buffers, or those of ``buffers``, by their names in the joint module.

        This is ``torch.func.functional_call`` on model and hyperparameters as one module. Inside, :meth:`evaluated` gives
        losses as functions of the tensors. Backward passes must also be inside: activation checkpointing runs the model
        again during them, and needs the same tensors.
        """
        with self._looked_up() as live:
            given = {"model." + name: t for name, t in weights.items()}
            given |= {"hparams." + name: t for name, t in leaves.items()}
            outside = self._given
            present: Tree = dict(self.joint.named_buffers()) if live.buffers else {}  # perhaps replaced by others already
            here = present | (buffers or {})
            self._given = {"weights": live.weights | weights, "leaves": live.leaves | leaves, "buffers": here}
            try:
                return functional_call(self.joint, given | _clones(here), (function,))
            finally:
                self._given = outside

    @contextmanager
    def evaluated(self, name: LossName, batch: Any, start: Tree | None = None) -> Iterator[Evaluated]:
        """The named loss at the tensors of :meth:`call`, its parts if it is a ``CompositeLoss``, and what was written.

        For several micro-batches it is the mean of their losses. Only losses are computed under the user's autocast. Modes
        and plain attributes are restored on exit, so backward passes through a loss must be inside. ``start`` has buffers,
        and weights that the forward pass writes to, from which it starts instead of the present ones.
        """
        assert self._live is not None, "evaluated is for use inside call"
        assert self._given is not None
        live, weights, leaves = self._live, self._given["weights"], self._given["leaves"]
        first = name not in self._checked and torch.is_grad_enabled()
        renormed = {id(p) for p in renormed_weights(live.parts)}  # a forward pass writes to these
        given = {f"model.{key}": w.clone() for key, w in weights.items() if id(w) in renormed} if renormed else {}
        given |= _clones({**self._given["buffers"], **(start or {})})
        before = {key: t.grad_fn for key, t in given.items()}
        with uncompiled(), restore_attributes(live.parts):
            looked_at = warn_of_training_mode(self.model) if first and name == "val_loss" else nullcontext()
            with losses_precision(), forbid_writes(name, weights, leaves, values=first), looked_at:
                losses = partial(self._losses_and_buffers, name, batch, start is not None)
                (loss, parts), buffers = functional_call(self.joint, given, (losses,)) if given else losses()
            if first:
                pairs = ((live.weights, weights), (live.leaves, leaves))
                replaced = {id(p): key for here, there in pairs for key, p in here.items() if there[key] is not p}
                check_given(name, loss, replaced)
                self._checked.add(name)
                # The first forward pass may have built layers.
                live.parts, live.buffers = list(self.joint.modules()), dict(self.joint.named_buffers())
                self._given["buffers"] = live.buffers
            if start is not None and (new := sorted(buffers.keys() - given.keys())):
                raise ValueError(
                    f"the forward pass registers or fills the buffer {new[0].partition('.')[2]!r}, so that the first step "
                    "can't be repeated as the others: run the model on one batch before"
                )
            written = given | buffers
            for key, t in (
                start or {}
            ).items():  # a buffer that was written to in place, but not in a graph, has its old one
                if t.requires_grad and written[key].grad_fn is before[key] and not trees.is_same(written[key], t):
                    written[key] = written[key].detach()
            yield Evaluated(loss, parts, written)

    def pure(
        self, name: LossName, weights: Tree, leaves: Tree, batch: Any, use: Callable[[Tensor, LossParts | None], R]
    ) -> R:
        """``use(loss, parts)`` of the named loss as a pure function of these tensors: ``evaluated`` inside ``call``."""

        def inside() -> R:
            with self.evaluated(name, batch) as at:
                return use(at.loss, at.parts)

        with self._looked_up() as live, twice_differentiable(live.parts):
            return self.call(weights, leaves, inside)

    def _losses_and_buffers(self, name: LossName, batch: Any, are_needed: bool) -> tuple[tuple[Tensor, Any], Tree]:
        """The loss and its parts, and if they are needed the buffers after it, which may be other tensors than before."""
        return self._losses(name, batch), dict(self.joint.named_buffers()) if are_needed else {}

    def _losses(self, name: LossName, batch: Any) -> tuple[Tensor, LossParts | None]:
        """The loss and its parts, checked."""
        if isinstance(batch, MicroBatches):
            return mean_loss([self._losses(name, one) for one in batch.batches], batch.shares)
        with annotate_errors(f"{name} was called with a batch that is", batch, self.hparams):
            value, parts, _ = self.call_loss(name, self.model, self.hparams, batch)
            return (losses if name == "val_loss" else scalar)(name, value), parts

    def module_state(self, before: ModuleState | None = None) -> ModuleState:
        """Copies of the present buffers, and the plain attributes. Copies that ``before`` has already are shared with it."""
        with self._looked_up() as live:
            now = trees.shared(live.buffers, {} if before is None else before.tensors)
            copies = {name: t.detach().clone() if t is live.buffers[name] else t for name, t in now.items()}
            return ModuleState(copies, Attributes(live.parts))

    @contextmanager
    def differentiable_statistics(self) -> Iterator[DifferentiableStatistics]:
        """Inside, running statistics have a derivative."""
        with self._looked_up() as live:
            statistics = DifferentiableStatistics()
            with statistics.around(live.parts):
                yield statistics

    @contextmanager
    def with_attributes(self, attributes: Attributes) -> Iterator[Callable[[], Attributes]]:
        """Inside, modules have these modes and plain attributes. Yields a function for those of the time of its call."""
        with self._looked_up() as live, restore_attributes(live.parts):
            attributes.put()
            yield lambda: Attributes(live.parts)

    def call_loss(self, name: LossName, model: Any, hparams: Any, batch: Any) -> tuple[Any, LossParts | None, Any]:
        """What the named loss returned, not yet checked; its parts, if it is a ``CompositeLoss``; and its ``aux``."""
        loss = getattr(self, name)
        if isinstance(loss, CompositeLoss):
            parts = loss.parts(model, hparams, batch)
            return CompositeLoss.total(parts), parts, parts.z
        returned = loss(model, hparams, batch)
        value, aux = split_aux(name, returned) if self.has_aux else (returned, None)
        return value, None, aux

    @property
    def ranks(self) -> Ranks:
        """The processes over which losses are averaged, looked up now."""
        if self.process_group != "auto":
            return Ranks(self.process_group)
        group = process_group_of(self.wrapper)
        return Ranks.all() if group is None else Ranks(group)

    def check_ranks(self) -> None:
        """Raise ``ValueError`` if the ranks do not have the same weights and hyperparameters."""
        if self.ranks.size == 1:
            return
        remedy = "wrap the model in DistributedDataParallel and give that to Problem"
        self.ranks.check_same(self.weights(), "weights", remedy)
        self.ranks.check_same(self.leaves(), "hyperparameters", "start them from the same values, and move them alike")

    def generators(self) -> dict[str, Tensor]:
        """The states of the random generators that a loss may draw from, by device."""
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            devices = {str(t.device) for t in (*self.joint.parameters(), *self.joint.buffers()) if t.is_cuda}
            states |= {device: torch.cuda.get_rng_state(device) for device in sorted(devices)}
        return states

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore all random generators afterwards; inside, gradients are enabled and second derivatives exist.

        So the dropout masks of a hyperstep's training loss are those of the next training step.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inside torch.inference_mode() nothing has a gradient: ask for a hypergradient outside")
        states = self.generators()
        try:
            with (
                python_and_numpy_untouched(),
                self._looked_up() as live,
                torch.enable_grad(),
                twice_differentiable(live.parts),
                full_precision(),
            ):
                yield
        finally:
            set_generators(states)

    @contextmanager
    def _looked_up(self) -> Iterator[_Live]:
        """The live modules and tensors, looked up in the outermost of nested calls."""
        outside = self._live
        self._live = outside or _Live.of(self)
        try:
            yield self._live
        finally:
            self._live = outside


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Set the random generators to these states, which are on the host."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
