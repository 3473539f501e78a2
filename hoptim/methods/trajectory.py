"""The last inner steps before a hyperstep, kept so that they can be repeated: start, batches, random states, options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.optim import Optimizer

from hoptim.curvature.linearization import check_dense
from hoptim.curvature.second_derivatives import check_twice_differentiable
from hoptim.linalg import trees
from hoptim.linalg.vectors import Tree
from hoptim.methods.bound_options import Bound
from hoptim.methods.inner_step import Group, InnerState, InnerStep
from hoptim.methods.learned_options import LearnedOption
from hoptim.problem.functional import DifferentiableStatistics
from hoptim.problem.hyperparameters import transforms_of
from hoptim.problem.kept import Kept, noted
from hoptim.problem.problem import ModuleState, Problem
from hoptim.problem.random_stream import set_generators


@dataclass(frozen=True, kw_only=True)
class RecordedLoss:
    """One training loss: its batch, and the random states before it by device, ``None`` for those after the loss before.

    ``share`` is the gradient that its backward pass started with: 1, or less if losses are scaled before they are added.
    """

    batch: Any
    generators: dict[str, Tensor] | None = None
    share: float | Tensor = 1.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One inner step: the losses whose gradients were added up, and the optimizer's step with its options at the time.

    ``options``, if given, returns options that replace these, computed from the present hyperparameters.
    """

    losses: tuple[RecordedLoss, ...]
    dynamics: InnerStep
    options: Callable[[], Mapping[str, Any]] | None = None

    def present_dynamics(self) -> InnerStep:
        """The dynamics, with ``options`` applied."""
        return self.dynamics if self.options is None else self.dynamics.with_options(self.options())


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights, the inner optimizer's state, what else forward passes change, and random states, between two steps."""

    weights: Tree
    state: InnerState
    modules: ModuleState
    generators: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Inner steps, and snapshots from before some of them with the number of the step; the first is from before step 0."""

    begins: tuple[tuple[int, Snapshot], ...]
    steps: Sequence[Step]


def look_ahead(
    problem: Problem, inner: Optimizer, draw: Callable[[], Any], steps: int, learned: Sequence[LearnedOption] = ()
) -> Trajectory:
    """The next ``steps`` steps from the present weights, on batches from ``draw``."""
    dynamics = InnerStep.of(inner, problem.weights(), problem.leaves(), learned=learned)
    batches = [noted(draw()) for _ in range(steps)]
    taken = [Step(losses=(RecordedLoss(batch=batch.get()),), dynamics=dynamics) for batch in batches]
    return Trajectory(begins=((0, present(problem, dynamics)),), steps=tuple(taken))


def present(problem: Problem, dynamics: InnerStep) -> Snapshot:
    """A copy of the present weights and random states; the optimizer's state is that of ``dynamics``."""
    weights = trees.map_tree(_copy, problem.weights())
    modules, generators = problem.module_state(), problem.generators()
    return Snapshot(weights=weights, state=dynamics.state, modules=modules, generators=generators)


class Recorder:
    """Keeps the inner steps from the first recorded loss to the next restart.

    A loss belongs to the step before which its backward pass runs, unless gradients are cleared in between.
    """

    def __init__(self) -> None:
        self._begins: list[tuple[int, Snapshot]] = []
        self._steps: list[Step] = []
        self._added: list[RecordedLoss] = []
        self._kept: list[Kept] = []  # the batches of the losses
        self._before: Snapshot | None = None  # before the step whose losses are being computed
        self._dynamics: InnerStep | None = None

    def cleared(self) -> None:
        """Forget the backward passes since the last step, whose gradients were cleared."""
        self._added = []

    def record_loss(
        self, problem: Problem, inner: Optimizer, batch: Kept, learned: Sequence[LearnedOption] = (), every: int = 1
    ) -> Callable[[Tensor], None]:
        """Call this before a training loss is computed; the function it returns is a hook for the loss's backward pass.

        A snapshot is kept before the first step and before every ``every``-th step after it. If layers were frozen,
        unfrozen or replaced since the last loss, the steps before are forgotten.
        """
        weights = problem.weights()
        self._forget_unlike(weights)
        if not self._added:  # options may change between steps, but not between the losses of one
            is_due, leaves = len(self._steps) % every == 0, problem.leaves()
            dynamics = InnerStep.of(inner, weights, leaves, learned=learned, with_state=is_due)
            if is_due and (not self._steps or dynamics.has_live_state(leaves)):
                modules = problem.module_state(self._begins[-1][1].modules if self._begins else None)
                self._before = Snapshot(weights=trees.map_tree(_copy, weights), state=dynamics.state, modules=modules)
            else:
                self._before = None
            self._dynamics = replace(dynamics, state={})
        self._kept.append(batch)
        loss = RecordedLoss(batch=batch.batch, generators=problem.generators())
        return lambda share: self._added.append(replace(loss, share=share.detach()))

    def stepped(self) -> None:
        """Add the step that was just taken."""
        if self._added and self._dynamics is not None:
            if self._before is not None:
                self._begins.append((len(self._steps), self._before))
            self._steps.append(Step(losses=tuple(self._added), dynamics=self._dynamics))
        self._added, self._before = [], None

    def check(self, steps: int, weights: Tree) -> None:
        """Raise ``ValueError`` if no step of these weights is known, though ``steps`` are to be unrolled."""
        self._forget_unlike(weights)
        if steps and not self._steps:
            raise ValueError(
                f"none of the last {steps} inner steps, which are to be unrolled, is known: compute the training loss by "
                "optimizer.loss(batch), and call backward() on it; freeze or unfreeze layers before that"
            )

    def trajectory(self, weights: Tree) -> Trajectory | None:
        """The steps kept so far, if any, of these weights.

        Raises:
            ValueError: something was written to one of their batches.
        """
        self._forget_unlike(weights)
        for batch in self._kept:
            batch.get()
        return Trajectory(begins=tuple(self._begins), steps=tuple(self._steps)) if self._steps else None

    def restart(self) -> None:
        """Forget all steps."""
        self._begins, self._steps, self._added, self._kept, self._before = [], [], [], [], None

    def _forget_unlike(self, weights: Tree) -> None:
        """Forget all steps if other weights were trained in them."""
        first = self._begins[0][1] if self._begins else self._before
        if first is not None and _shapes(first.weights) != _shapes(weights):
            self.restart()

    def state_dict(self) -> dict[str, Any] | None:
        """The steps kept so far, for a checkpoint, with their batches as they are."""
        if not self._steps:
            return None
        return {
            "begins": [(number, at.weights, at.state, at.modules.tensors) for number, at in self._begins],
            "steps": [
                {
                    "seen": [(one.batch, one.generators, float(one.share)) for one in step.losses],
                    "groups": _plain(step.dynamics),
                }
                for step in self._steps
            ],
        }

    def load_state_dict(self, saved: dict[str, Any] | None, problem: Problem, inner: Optimizer) -> None:
        """Restore the steps, for an inner optimizer of the same class, unless other weights were trained in them.

        Plain attributes of modules are those of now.
        """
        live = problem.weights()
        self.restart()
        if saved is None or any(weights.keys() != live.keys() for _, weights, *_ in saved["begins"]):
            return
        now, transforms = problem.module_state(), transforms_of(problem.hparams)
        for number, weights, state, *buffers in saved["begins"]:  # there were no buffers in early versions
            pairs = [(name, value) for one in buffers for name, value in one.items() if name in now.tensors]
            tensors = {name: value.to(now.tensors[name].device) for name, value in pairs}
            at = Snapshot(
                weights={name: value.to(live[name].device) for name, value in weights.items()},
                state={name: _moved(entries, live[name].device) for name, entries in state.items()},
                modules=replace(now, tensors={**now.tensors, **tensors}),
            )
            self._begins.append((number, at))
        dynamics = InnerStep.of(inner, {}, {})
        for step in saved["steps"]:
            losses = tuple(
                RecordedLoss(batch=batch, generators=states and trees.map_tree(Tensor.cpu, states), share=share)
                for batch, states, share in step["seen"]
            )
            self._steps.append(Step(losses=losses, dynamics=replace(dynamics, groups=_groups(step["groups"], transforms))))


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one step, evaluated one after the other.

    Attributes:
        gradient: ∇_w of their sum, at the weights of ``at``.
        loss: the sum.
        weights: the weights from which the optimizer steps, with what the forward passes have written to them.
        buffers: the buffers afterwards.
        statistics: how running statistics got their graphs; ``None`` if these were not asked for.
    """

    gradient: Tree
    loss: Tensor
    weights: Tree
    buffers: Tree
    statistics: DifferentiableStatistics | None


@contextmanager
def evaluated_losses(
    step: Step,
    problem: Problem,
    weights: Tree,
    leaves: Tree,
    modules: ModuleState,
    *,
    graph: bool,
    with_statistics: bool = True,
) -> Iterator[Losses]:
    """The losses of a step times their shares, at tensors that are in place of the model's.

    With ``graph`` the gradient has a graph, which works inside the context. Buffers have one; running statistics do only
    ``with_statistics``.

    Raises:
        ValueError: a forward pass registers or fills a buffer.
    """
    slope: Tree = {}
    total = next(iter(weights.values())).new_zeros(())
    with ExitStack() as stack:
        at = stack.enter_context(problem.at(weights, leaves, modules.tensors, modules.attributes))
        around = DifferentiableStatistics().around(problem.joint) if with_statistics else nullcontext()
        statistics, now, buffers = stack.enter_context(around), weights, at.buffers
        for one in step.losses:
            set_generators(one.generators or {})
            found = stack.enter_context(replace(at, buffers=buffers).loss("train_loss", one.batch))
            _check_buffers(problem, found.written)
            if graph:
                check_twice_differentiable(at, found.loss, one.batch)
            loss = found.loss * one.share
            buffers = {name: t if statistics is None else statistics.graph_of(t) for name, t in found.written.items()}
            now = {name: found.written.get(f"model.{name}", w) for name, w in now.items()}
            parts = torch.autograd.grad(loss, list(weights.values()), create_graph=graph, allow_unused=True)
            touched = trees.present(dict(zip(weights, parts, strict=True)))
            check_dense(touched)
            slope |= {name: slope[name] + part if name in slope else part for name, part in touched.items()}
            total = total + loss.detach()
        total, means = problem.ranks.mean_with_loss(total, slope, weights)
        yield Losses(gradient=trees.present(means), loss=total, weights=now, buffers=buffers, statistics=statistics)


def _check_buffers(problem: Problem, before: Tree) -> None:
    """Raise ``ValueError`` if a forward pass has registered or filled a buffer."""
    if new := sorted(name for name, _ in problem.joint.named_buffers() if name not in before):
        raise ValueError(
            f"the forward pass registers or fills the buffer {new[0].partition('.')[2]!r}, so that the first step "
            "can't be repeated as the others: run the model on one batch before"
        )


def _moved(entries: Tree, device: torch.device) -> Tree:
    return {key: value if key == "step" else value.to(device) for key, value in entries.items()}


def _shapes(weights: Tree) -> dict[str, torch.Size]:
    return {name: w.shape for name, w in weights.items()}


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone()


def _plain(dynamics: InnerStep) -> list[tuple[list[str], dict[str, Any]]]:
    """The groups as plain values; a bound option is a dict of the name of its leaf and, if it is computed, its scale."""

    def plain(option: Any) -> Any:
        if isinstance(option, tuple):
            return tuple(plain(member) for member in option)
        if not isinstance(option, Bound):
            return option
        return {"leaf": option.name} | ({"number": option.number, "start": option.start} if option.transform else {})

    return [(list(group.names), {key: plain(option) for key, option in group.options.items()}) for group in dynamics.groups]


def _groups(saved: list[tuple[list[str], dict[str, Any]]], transforms: Mapping[str, Transform]) -> tuple[Group, ...]:
    def whole(option: Any) -> Any:
        if isinstance(option, (tuple, list)):
            return tuple(whole(member) for member in option)
        if not isinstance(option, dict):
            return option
        name, number = option["leaf"], option.get("number", option.get("factor"))  # a factor, in checkpoints of before
        if number is None:
            return Bound(name=name)
        return Bound(name=name, transform=transforms[name], number=number, start=option.get("start", 1.0))

    return tuple(
        Group(names=tuple(names), options={key: whole(option) for key, option in options.items()})
        for names, options in saved
    )
