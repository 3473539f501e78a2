"""Problem: a model, hyperparameters and two ordinary losses, as pure functions of (weights, hyperparameters, batch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hoptim.checks import describe_type
from hoptim.linalg import dicts, vectors
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.problem.composite_loss import CompositeLoss, LossParts, evaluate_train_loss, mean_loss
from hoptim.problem.data import MicroBatches
from hoptim.problem.detached_view import DetachedView
from hoptim.problem.distributed import Ranks
from hoptim.problem.functional import (
    Attributes,
    Joint,
    renormed_weights,
    restore_attributes,
    swapped,
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
from hoptim.problem.mixed_precision import Lowered, full_precision, losses_precision, lowered
from hoptim.problem.random_stream import restore_generators
from hoptim.problem.sharded_passes import ShardedPasses, are_alike
from hoptim.problem.sharding import Sharding, is_sharded, local, reshard, whole, without_parallel_hooks
from hoptim.problem.wrappers import Facade, check_whole, process_group_of, uncompiled, unwrap, warn_of_compiled_aside

Loss = Callable[[Any, Any, Any], Tensor]
LossName = Literal["train_loss", "val_loss", "losses"]


def as_leaves(live: Tensors) -> Tensors:
    """New leaves that share memory, so that nothing reaches the ``.grad`` or the hooks of the live tensors."""
    return {name: value.detach().requires_grad_() for name, value in live.items()}


class _Live:
    """The modules and live tensors of a problem, looked up once for each hypergradient."""

    def __init__(self, problem: Problem) -> None:
        self.weights: Tensors = dict(problem.named_parameters())
        self.leaves: Tensors = dict(problem.hparams.named_parameters())
        self.lowered = lowered()  # by the user's autocast, which is off in leave_no_trace but for losses
        self.sharding = Sharding.of(problem.model, self.weights, problem.ranks) if is_sharded(problem.model) else None
        self.look_inside(problem)

    def look_inside(self, problem: Problem) -> None:
        """Look up the parts of the model and the hyperparameters, and their buffers, by their names in the joint module."""
        self.parts = list(problem.joint.modules())
        self.buffers = {name: whole(t) for name, t in problem.named_buffers()}

    @cached_property
    def frozen(self) -> Tensors:
        """The whole frozen weights of a sharded model, for losses; of another one, none, since they stay in their places."""
        return {} if self.sharding is None else self.whole({n: p for n, p in self.weights.items() if not p.requires_grad})

    def whole(self, weights: Tensors) -> Tensors:
        """Whole weights, from live ones that may be sharded."""
        sharded = {name: local(p.detach()) for name, p in weights.items() if hasattr(p, "device_mesh")}
        return weights if self.sharding is None else {**weights, **self.sharding.whole(sharded)}


@dataclass(frozen=True, kw_only=True)
class ModuleState:
    """What a forward pass may change in model and hyperparameters besides the learned tensors.

    Attributes:
        tensors: the buffers, by their names in the joint module.
        attributes: the plain attributes.
    """

    tensors: Tensors
    attributes: Attributes


class Evaluated(NamedTuple):
    """A loss, its parts if it is a ``CompositeLoss``, and the buffers and weights that its forward pass writes to.

    ``written`` has these tensors as they are after the forward pass, by their names in the joint module.
    """

    loss: Tensor
    parts: LossParts | None
    written: Tensors


@dataclass(frozen=True, kw_only=True)
class At:
    """A problem at tensors that are in place of the model's own; made by :meth:`Problem.at`, for use inside that context.

    Attributes:
        problem: the problem.
        weights: w; whole weights, also where the model's own are sharded.
        leaves: λ.
        buffers: the buffers from which each loss starts, by their names in the joint module; also weights that a forward
            pass writes to, if it has written to them.
    """

    problem: Problem
    weights: Tensors
    leaves: Tensors
    buffers: Tensors

    @property
    def sharding(self) -> Sharding | None:
        """How the weights are sharded over ranks; ``None`` where they are not."""
        return None if self.problem._live is None else self.problem._live.sharding

    def passes(self, loss: Tensor) -> ShardedPasses | None:
        """How backward passes of this loss save memory where weights are sharded; ``None`` if the ranks' graphs differ."""
        if self._passes is None or not self._passes.large or not are_alike(loss, self._passes.sharding.ranks):
            return None
        return self._passes

    @cached_property
    def _passes(self) -> ShardedPasses | None:
        return None if self.sharding is None else ShardedPasses(self.weights, self.sharding)

    @property
    def shards(self) -> Tensors:
        """The part of each weight that this rank holds: w itself where nothing is sharded."""
        live = self.weights if self.sharding is None else self.problem.weights()
        return {name: local(w) for name, w in live.items()}

    def norm(self, layout: Layout) -> Callable[[Tensor], Tensor]:
        """‖v‖ of flat vectors of these weights."""
        return vectors.norm

    def named(self, layout: Layout, x: Tensor) -> Tensors:
        """The weights of a flat vector by name, as views of it; where weights are sharded, as torch's ``DTensor``."""
        named = layout.views(x)
        return named if self.sharding is None or x.ndim > 1 else self.sharding.tensors(named)

    @contextmanager
    def loss(self, name: LossName, batch: Any) -> Iterator[Evaluated]:
        """The named loss, its parts if it is a ``CompositeLoss``, and what its forward pass has written.

        For several micro-batches it is the mean of their losses. Only losses are computed under the user's autocast. Inside,
        modes and plain attributes are as the loss has set them, and so backward passes through it must be inside.
        """
        problem, joint = self.problem, self.problem.joint
        live = problem._live
        assert live is not None, "for use inside Problem.at"
        first = name not in problem.checked and torch.is_grad_enabled()
        weights, leaves = live.weights | live.frozen | self.weights, live.leaves | self.leaves
        renormed = {id(p) for p in renormed_weights(live.parts)}  # a forward pass writes to these
        written = {f"model.{key}": w.clone() for key, w in weights.items() if id(w) in renormed} if renormed else {}
        written |= _clones(self.buffers)
        with uncompiled(), restore_attributes(live.parts):
            looks = first and name != "train_loss"
            looked_at = warn_of_training_mode(name, problem.model, problem.norms_by_batch) if looks else nullcontext()
            with losses_precision(live.lowered), forbid_writes(name, weights, leaves, values=first), looked_at:
                losses = partial(problem._losses, name, batch)
                loss, parts = functional_call(joint, written, (losses,)) if written else losses()  # updates ``written``
            if first:
                pairs = ((problem.replaced, weights), (live.weights, weights), (live.leaves, leaves))
                replaced = {id(p): key for here, there in pairs for key, p in here.items() if there[key] is not p}
                check_given(name, loss, replaced)
                problem.checked.add(name)
                live.look_inside(problem)  # the first forward pass may have built layers
                self.buffers.update({key: t for key, t in live.buffers.items() if key not in written})
            yield Evaluated(loss, parts, written)


def _clones(buffers: Tensors) -> Tensors:
    """Clones of buffers, for a forward pass to write into."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


class Problem:
    """A bilevel problem: min over λ of L_V(λ, w*(λ)), where w*(λ) minimises L_T(w, λ).

    Args:
        model: any ``nn.Module``; its weights w are those with ``requires_grad``. Tied weights count once. A wrapper
            (``DistributedDataParallel``, ``torch.compile``) is called by ``loss``; names are those of the model inside. It
            may be sharded, by ``fully_shard`` or ``parallelize_module``.
        hparams: the hyperparameters λ: a :class:`HyperParameters`, or any other ``nn.Module``; ``None`` if none is to be
            learned, as for :func:`influence`.
        train_loss: L_T as ``train_loss(model, hparams, batch) -> scalar``: ordinary PyTorch, ``model(x)``,
            ``model.named_parameters()``, ``hparams["weight_decay"]``.
        val_loss: L_V, likewise. It may call ``model.eval()``: the mode is restored after each call. It may return a vector
            of R losses (tasks, groups, folds): each then gets its own hypergradient. ``None``, the default: ``train_loss``
            with ``model`` and ``hparams`` in evaluation mode, in which recipes do nothing, without the penalty of a
            ``CompositeLoss``. Add a penalty or noise of your own only ``if hparams.training``.
        has_aux: whether ``train_loss`` returns ``(loss, aux)``, as in ``torch.func``; default ``False``. If so, ``loss``
            returns the pair: ``aux`` is an accuracy, a hidden state, or whatever else the loop needs. ``val_loss`` may
            return a pair too. The ``aux`` of a ``CompositeLoss`` is z, what ``predict`` returned.
        process_group: the ranks that train together, over which L_T and L_V are averaged. ``"auto"``, the default: those of
            the ``DistributedDataParallel``, else all if ``torch.distributed`` is initialised; ``None``: this process alone.

    Raises:
        TypeError: ``model`` or ``hparams`` is no module, a loss can't be called with (model, hparams, batch), a weight is
            complex, or one is sharded by the older ``FullyShardedDataParallel``.
        ValueError: there is no weight or no hyperparameter to learn, one has no values yet, a tensor is both, or ``hparams``
            is a part of ``model``. When called, a loss returns no real scalar, writes into weights or hyperparameters
            instead of only reading them, or uses others than those in its arguments.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(0.1)})
    >>> def val_loss(model, hparams, batch):
    ...     return (model(batch) ** 2).mean()
    >>> def train_loss(model, hparams, batch):
    ...     return val_loss(model, hparams, batch) + hparams["decay"] * (model.weight**2).sum()
    >>> problem = Problem(model, hparams, train_loss, val_loss)
    >>> list(problem.weights()), list(problem.leaves())
    (['weight'], ['decay'])

    The same by one function, as recipes do it:

    >>> def loss(model, hparams, batch):
    ...     fit = (model(batch) ** 2).mean()
    ...     return fit + hparams["decay"] * (model.weight**2).sum() if hparams.training else fit
    >>> one, batch = Problem(model, hparams, loss), torch.ones(3, 2)
    >>> bool(one.val_loss(model, hparams, batch) == val_loss(model, hparams, batch)), hparams.training
    (True, True)
    """

    _live: _Live | None = None  # inside leave_no_trace and at, where other tensors may be in place of the live ones

    def __init__(
        self,
        model: nn.Module,
        hparams: nn.Module | None,
        train_loss: Loss,
        val_loss: Loss | None = None,
        *,
        has_aux: bool = False,
        process_group: Any = "auto",
    ) -> None:
        learns = hparams is not None
        hparams = nn.Module() if hparams is None else hparams
        for name, module in (("model", model), ("hparams", hparams)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} is {describe_type(module)}: give an nn.Module")
        if isinstance(model, HyperParameters):
            raise TypeError("model is a HyperParameters: the order is Problem(model, hparams, train_loss, val_loss)")
        val_loss = partial(evaluate_train_loss, train_loss) if val_loss is None else val_loss
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
        self.check_learned() if learns else self.check_trained()
        check_apart(self.model.named_parameters(), self.hparams.named_parameters())
        self._constants = DetachedView(self.hparams, beside=self.model)
        self.checked: set[str] = set()  # what was checked or told, each once for a problem, such as "train_loss"
        self.programs: Any = None  # compiled products, if there are any
        self.has_trained = False
        self.options: Any = None  # what was learned as options of the inner optimizer, for a retraining
        self.losses: Any = None  # of examples, beside the two, for their influence
        self.unseen: list[str] | None = None  # what trainings of tasks write without a derivative, once it was tried
        self.drew_from: Tensors = {}  # the states of torch's generators at the last trainings of tasks
        self.replaced: Tensors = {}  # weights of the model, by name, which this problem does not have
        self.norms_by_batch = False  # whether batch norm by the statistics of a validation batch is as it should be

    def solver_of(self, solver: Any, layout: Layout) -> Any:
        """The solver for systems of this problem, of vectors of this layout: the one that is given."""
        return solver

    def check_trained(self) -> None:
        """Raise ``ValueError`` if all weights are frozen."""
        if not self.weights():
            raise ValueError("no weight of the model requires a gradient: nothing is trained")

    def check_learned(self) -> None:
        """Raise ``ValueError`` if all weights or all hyperparameters are frozen."""
        self.check_trained()
        if not self.leaves():
            raise ValueError("no parameter of hparams requires a gradient: there is nothing to learn")

    @property
    def is_sharded(self) -> bool:
        """Whether weights are sharded over ranks, as by ``fully_shard`` or ``parallelize_module``."""
        return is_sharded(self.model) if self._live is None else self._live.sharding is not None

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """The live weights of the model, frozen ones too; those that are sharded as torch's ``DTensor``."""
        if self._live is not None:
            return self._live.weights.items()
        if is_sharded(self.model):
            reshard(list(self.model.modules()))
        return self.model.named_parameters()

    def named_buffers(self) -> Iterable[tuple[str, Tensor]]:
        """The live buffers, by their names in the joint module."""
        return self.joint.named_buffers()

    def weights(self) -> Tensors:
        """The live weights w that require a gradient, by the model's names; also where others are in place of them."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def leaves(self) -> Tensors:
        """The live unconstrained hyperparameters that require a gradient, by the names of ``hparams``; likewise."""
        live = self.hparams.named_parameters() if self._live is None else self._live.leaves.items()
        return {name: p for name, p in live if p.requires_grad}

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

    @contextmanager
    def at(
        self,
        weights: Tensors | None = None,
        leaves: Tensors | None = None,
        buffers: Tensors | None = None,
        attributes: Attributes | None = None,
    ) -> Iterator[At]:
        """Inside, these tensors are in place of the model's and the hyperparameters', and losses are functions of them.

        This is ``torch.func.functional_call`` on model and hyperparameters as one module, for the time of a context, since
        backward passes need the same tensors: activation checkpointing runs the model again during them. What is computed
        has second derivatives.

        Args:
            weights: w by name; default: new leaves that share the memory of the live weights, or have the values of whole
                weights where they are sharded.
            leaves: λ by name; likewise.
            buffers: those from which a loss starts, by their names in the joint module; default: the live ones.
            attributes: likewise the modes and plain attributes of the modules.
        """
        with self.looked_up() as live:
            at = At(
                problem=self,
                weights=as_leaves(live.whole(self.weights())) if weights is None else weights,
                leaves=as_leaves(self.leaves()) if leaves is None else leaves,
                buffers=live.buffers | (buffers or {}),
            )
            given = {"model." + name: t for name, t in {**live.frozen, **at.weights}.items()}
            given |= {"hparams." + name: t for name, t in at.leaves.items()}
            restored = nullcontext() if attributes is None else restore_attributes(live.parts)
            parallel = nullcontext() if live.sharding is None else without_parallel_hooks(live.parts)
            with parallel, swapped(self.joint, live.parts, given | _clones(at.buffers)), restored:
                if attributes is not None:
                    attributes.put()
                yield at

    def _losses(self, name: LossName, batch: Any) -> tuple[Tensor, LossParts | None]:
        """The loss and its parts, checked."""
        if isinstance(batch, MicroBatches):
            return mean_loss([self._losses(name, one) for one in batch.batches], batch.shares)
        with annotate_errors(f"{name} was called with a batch that is", batch, self.hparams):
            value, parts, _ = self.call_loss(name, self.model, self.hparams, batch)
            return (scalar if name == "train_loss" else losses)(name, value), parts

    def module_state(self, before: ModuleState | None = None) -> ModuleState:
        """Copies of the present buffers, and the plain attributes. Copies that ``before`` has already are shared with it."""
        live = self._live or _Live(self)
        now = dicts.shared(live.buffers, {} if before is None else before.tensors)
        copies = {name: t.detach().clone() if t is live.buffers[name] else t for name, t in now.items()}
        return ModuleState(tensors=copies, attributes=Attributes(live.parts))

    @property
    def lowered(self) -> Lowered:
        """The devices on which losses are computed in lower precision, by the user's autocast, and their types."""
        return lowered() if self._live is None else self._live.lowered

    def rounding(self, dtypes: Iterable[torch.dtype]) -> float:
        """The relative rounding error of losses of weights of these types, under the user's autocast."""
        return max(torch.finfo(dtype).eps for dtype in (*dtypes, *(dtype for _, dtype in self.lowered)))

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
        if self.is_sharded:
            remedy = "shard all of them, or average the gradients of those that are not sharded over the ranks"
        if plain := {name: w for name, w in self.weights().items() if not hasattr(w, "device_mesh")}:
            self.ranks.check_same(plain, "weights", remedy)
        self.ranks.check_same(self.leaves(), "hyperparameters", "start them from the same values, and move them alike")

    def generators(self) -> dict[str, Tensor]:
        """The states of torch's random generators that a loss may draw from, by device."""
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            devices = {str(t.device) for t in (*self.joint.parameters(), *self.joint.buffers()) if t.is_cuda}
            states |= {device: torch.cuda.get_rng_state(device) for device in sorted(devices)}
        return states

    @contextmanager
    def leave_no_trace(self) -> Iterator[None]:
        """Restore all random generators afterwards; inside, gradients are enabled and second derivatives exist.

        So the dropout masks of a hyperstep's training loss are those of the next training step.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inside torch.inference_mode() nothing has a gradient: ask for a hypergradient outside")
        with (
            restore_generators(),
            self.looked_up(),
            torch.enable_grad(),
            full_precision(),
        ):
            yield

    @contextmanager
    def looked_up(self) -> Iterator[_Live]:
        """The live modules and tensors, looked up in the outermost of nested contexts; inside, second derivatives exist."""
        if self._live is not None:
            yield self._live
            return
        self._live = _Live(self)
        try:
            with twice_differentiable(self._live.parts):
                yield self._live
        finally:
            self._live = None
