"""The last inner steps: the batches behind the gradient, and if a method asks for it what is needed to repeat the steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import Transform, identity_transform
from torch.optim import Optimizer

from hoptim.linalg import dicts
from hoptim.linalg.vectors import Tensors
from hoptim.methods.inner_step import Group, InnerStep
from hoptim.methods.learned_options import Bound, LearnedOption, Pull, each
from hoptim.methods.trajectory import RecordedLoss, Snapshot, Step, Trajectory
from hoptim.problem.data import MicroBatches
from hoptim.problem.held_batch import HeldBatch, hold, hold_copy
from hoptim.problem.hyperparameters import transforms_of
from hoptim.problem.problem import Problem

_ONE = torch.ones(())


class StepStart(NamedTuple):
    """Where an inner step starts: the optimizer's options, and at some of the steps a snapshot."""

    dynamics: InnerStep
    snapshot: Snapshot | None


class SeenLoss(NamedTuple):
    """A training loss that was asked for.

    Attributes:
        number: losses are counted.
        batch: its batch.
        generators: the random states before it, by device; ``None`` if it will not be computed again.
        start: the start of its step, if the step may be repeated.
        share: the gradient with which its backward pass began: 1, or less if losses are scaled before they are added.
    """

    number: int
    batch: HeldBatch
    generators: dict[str, Tensor] | None = None
    start: StepStart | None = None
    share: Tensor = _ONE


class RecentSteps:
    """Follows the losses, backward passes and steps of a training.

    A loss belongs to the step before which its backward pass runs, unless gradients are cleared in between. The batches of
    a step are kept until the next backward pass, since a hyperstep comes after the step, at once or later by hand.

    Attributes:
        is_cleared: whether no loss has counted since the gradients were cleared or used.
        is_between_steps: whether no loss has counted since the last step, so that no gradient waits for a step.
        computed: how many losses were computed.
    """

    def __init__(self) -> None:
        self.is_cleared = self.is_between_steps = True
        self.computed = 0
        self._losses: list[SeenLoss] = []  # whose backward passes made the gradient
        self._last: SeenLoss | None = None  # the last loss, until the next step
        self._in_hooks: list[list[SeenLoss]] = []  # what hooks hold: a loss kept for a log must not keep its batch
        self._copy: HeldBatch | None = None  # of the last batch, with which the next copy shares what has not changed
        self.forget_steps()

    def forget_steps(self) -> None:
        """Forget the steps that were kept to be repeated."""
        self._start: StepStart | None = None
        self._snapshots: list[tuple[int, Snapshot]] = []
        self._steps: list[Step] = []
        self._batches: list[HeldBatch] = []

    # The events of a training

    def count(self, batch: Any) -> None:
        """Count a loss at once, where no hyperstep follows: this takes a third of the time of the two calls below."""
        self.computed += 1
        if self.is_between_steps:
            self._losses = []
        if not (self._losses and self._losses[-1].batch.batch is batch):  # as in repeated calls of a closure
            self._losses.append(SeenLoss(self.computed, hold(batch)))
        self.is_cleared = self.is_between_steps = False

    def before_loss(
        self,
        batch: Any,
        *,
        is_copied: bool = False,
        generators: dict[str, Tensor] | None = None,
        start: StepStart | None = None,
    ) -> SeenLoss:
        """Call this before a loss is computed; the batch is kept as a copy, or by reference."""
        self._copy = hold_copy(batch, self._copy) if is_copied else None
        kept = hold(batch) if self._copy is None else self._copy._replace(leaves=())  # without the original
        self.computed += 1
        self._last = SeenLoss(self.computed, kept, generators, start)
        return self._last

    def after_loss(self, seen: SeenLoss, loss: Tensor) -> None:
        """Call this after the loss was computed: it counts once its backward pass begins."""
        held = [seen]

        def backward_begins(share: Tensor) -> None:
            if held:
                if self.is_cleared:
                    self._losses = []
                self._losses.append(held[0]._replace(share=share.detach()))
                self._in_hooks.append(held)
                self.is_cleared = self.is_between_steps = False

        loss.register_hook(backward_begins)

    def cleared(self) -> None:
        """Call this when gradients are cleared."""
        self.is_cleared = True
        for held in self._in_hooks:
            held.clear()
        self._in_hooks = []

    def stepped(self) -> None:
        """Call this after a step, which has used the gradient."""
        losses = self.losses()
        if not self.is_cleared and losses[0].start is not None:
            start = losses[0].start
            if start.snapshot is not None:
                self._snapshots.append((len(self._steps), start.snapshot))
            recorded = [RecordedLoss(batch=one.batch.batch, generators=one.generators, share=one.share) for one in losses]
            self._steps.append(Step(losses=tuple(recorded), dynamics=start.dynamics))
            self._batches += [one.batch for one in losses]
        self._losses, self._last, self._start, self.is_between_steps = losses, None, None, True
        self.cleared()

    # What they leave behind

    @property
    def has_seen_backward(self) -> bool:
        """Whether any loss has gone backward."""
        return bool(self._losses)

    def losses(self) -> list[SeenLoss]:
        """The losses that made the gradient of the present step, or between steps that of the last one, in their order."""
        if self.is_cleared and self._last is not None:  # the gradient came in another way than by a backward pass
            return [self._last]
        return self._losses if len(self._losses) < 2 else sorted(self._losses, key=lambda one: one.number)

    def batch(self) -> Any:
        """Their batch, or several batches as one, weighted by their shares in the gradient.

        Raises:
            ValueError: there is none, or it has changed.
        """
        losses = self.losses()
        if not losses:
            raise ValueError(
                "a hyperstep needs a training batch and none has been seen: compute the loss with optimizer.loss(batch), "
                "or give train_batches"
            )
        batches = tuple(one.batch.get() for one in losses)
        if len(batches) == 1:
            return batches[0]
        shares = torch.stack([one.share.to(torch.promote_types(one.share.dtype, torch.float32)) for one in losses])
        total = shares.abs().sum()
        return MicroBatches(batches, shares / torch.where(total > 0, total, 1.0))

    # Steps that can be repeated

    def step_start(
        self, problem: Problem, inner: Optimizer, learned: Sequence[LearnedOption] = (), every: int = 1
    ) -> StepStart:
        """Call this before a loss of a step that shall be kept, and hand the result to :meth:`before_loss`.

        There is a snapshot before the first step and before every ``every``-th step after it. If layers were frozen,
        unfrozen or replaced since the last loss, the steps before are forgotten.
        """
        weights = problem.weights()
        self._forget_unlike(weights)
        if self._start is None or self.is_cleared:  # options may change between steps, but not between the losses of one
            is_due, leaves, snapshot = len(self._steps) % every == 0, problem.leaves(), None
            dynamics = InnerStep.of(inner, weights, leaves, learned=learned, with_state=is_due)
            if is_due and (not self._steps or dynamics.has_live_state(leaves)):
                modules = problem.module_state(self._snapshots[-1][1].modules if self._snapshots else None)
                copies = {name: w.detach().clone() for name, w in weights.items()}
                snapshot = Snapshot(weights=copies, state=dynamics.state, modules=modules)
            self._start = StepStart(replace(dynamics, state={}), snapshot)
        return self._start

    def trajectory(self, weights: Tensors) -> Trajectory | None:
        """The steps kept so far, if any, of these weights.

        Raises:
            ValueError: something was written to one of their batches.
        """
        self._forget_unlike(weights)
        for batch in self._batches:
            batch.get()
        return Trajectory(begins=tuple(self._snapshots), steps=tuple(self._steps)) if self._steps else None

    def check_known(self, steps: int, weights: Tensors) -> None:
        """Raise ``ValueError`` if no step of these weights is known, though ``steps`` are to be unrolled."""
        self._forget_unlike(weights)
        if steps and not self._steps:
            raise ValueError(
                f"none of the last {steps} inner steps, which are to be unrolled, is known: compute the training loss by "
                "optimizer.loss(batch), and call backward() on it; freeze or unfreeze layers before that"
            )

    def _forget_unlike(self, weights: Tensors) -> None:
        """Forget all steps if other weights were trained in them."""
        first = self._snapshots[0][1] if self._snapshots else self._start and self._start.snapshot
        if first is not None and {n: w.shape for n, w in first.weights.items()} != {n: w.shape for n, w in weights.items()}:
            self.forget_steps()

    def state_dict(self) -> dict[str, Any] | None:
        """The steps kept so far, for a checkpoint, with their batches as they are."""
        if not self._steps:
            return None
        return {
            "begins": [(number, at.weights, at.state, at.modules.tensors) for number, at in self._snapshots],
            "steps": [
                {
                    "seen": [(one.batch, one.generators, float(one.share)) for one in step.losses],
                    "groups": [
                        (
                            list(group.names),
                            {key: each(_plain, option) for key, option in group.options.items()},
                            {name: _plain(decay) for name, decay in group.decays.items()},
                        )
                        for group in step.dynamics.groups
                    ],
                }
                for step in self._steps
            ],
        }

    def load_state_dict(self, saved: dict[str, Any] | None, problem: Problem, inner: Optimizer) -> None:
        """Restore the steps, for an inner optimizer of the same class, unless other weights were trained in them.

        Plain attributes of modules are those of now.
        """
        live = problem.weights()
        self.forget_steps()
        if saved is None or any(weights.keys() != live.keys() for _, weights, *_ in saved["begins"]):
            return
        now, whole = problem.module_state(), functools.partial(_whole, transforms_of(problem.hparams))
        for number, weights, state, buffers in saved["begins"]:
            tensors = {name: t.to(now.tensors[name].device) for name, t in buffers.items() if name in now.tensors}
            at = Snapshot(
                weights={name: value.to(live[name].device) for name, value in weights.items()},
                state={name: _moved(entries, live[name].device) for name, entries in state.items()},
                modules=replace(now, tensors={**now.tensors, **tensors}),
            )
            self._snapshots.append((number, at))
        dynamics = InnerStep.of(inner, {}, {})
        for step in saved["steps"]:
            losses = tuple(
                RecordedLoss(batch=batch, generators=states and dicts.map_tensors(Tensor.cpu, states), share=share)
                for batch, states, share in step["seen"]
            )
            groups = tuple(
                Group(
                    names=tuple(names),
                    options={key: each(whole, option) for key, option in options.items()},
                    decays={name: whole(decay) for name, decay in decays.items()},
                )
                for names, options, decays in step["groups"]
            )
            self._steps.append(Step(losses=losses, dynamics=replace(dynamics, groups=groups)))


def _moved(entries: Tensors, device: torch.device) -> Tensors:
    return {key: value if key == "step" else value.to(device) for key, value in entries.items()}


def _plain(option: Any) -> Any:
    """An option as plain values; a bound one is a dict of the name of its leaf, its number, its start and its pull."""
    if not isinstance(option, Bound):
        return option
    return {"leaf": option.name, "number": option.number, "start": option.start, "pull": tuple(option.pull)}


def _whole(transforms: Mapping[str, Transform], option: Any) -> Any:
    """An option from plain values."""
    if not isinstance(option, dict):
        return option
    transform = transforms.get(option["leaf"], identity_transform)
    pull = Pull(*option["pull"])
    return Bound(name=option["leaf"], transform=transform, number=option["number"], start=option["start"], pull=pull)
