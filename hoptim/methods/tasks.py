"""The trainings of many tasks: from which weights each begins, on which batches, and K of them at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from hoptim.checks import describe_type, listed
from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.methods.inner_step import InnerStep
from hoptim.methods.method import TrainingContext, held
from hoptim.methods.side_by_side import SideBySide, stand_in
from hoptim.methods.trajectory import RecordedLoss, Snapshot, Step, Trajectory, present
from hoptim.problem.functional import Attributes, restore_attributes
from hoptim.problem.problem import Problem

R = TypeVar("R")
WIDE = 32  # channels: from here on four tasks take about as long in turn as side by side, in a sixth of the memory


def initial_weights(hparams: Any) -> Tensors:
    """The weights, by name, that modules of ``hparams`` with a method of this name have for the start of a training.

    Raises:
        ValueError: two of them have the same weight.
    """
    found: Tensors = {}
    for module in hparams.modules():
        own = module.initial_weights() if hasattr(module, "initial_weights") else {}
        if twice := found.keys() & own.keys():
            raise ValueError(f"two modules of hparams have initial weights for {listed(sorted(twice))}: keep one of them")
        found |= own
    return found


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where each training begins, as a function of the hyperparameters.

    Attributes:
        weights: the weights that are trained, by name.
        learned: those of them that are functions of the hyperparameters, with their graph.
        live: the leaves.
    """

    weights: Tensors
    learned: Tensors
    live: Tensors

    @classmethod
    def of(cls, problem: Problem, loop: TrainingContext) -> Start:
        """The weights that the inner optimizer holds, as they begin.

        Raises:
            ValueError: an initial weight does not fit the model; a weight is neither trained nor learned.
        """
        assert loop.inner is not None
        live, known, found = dict(problem.named_parameters()), held(loop.inner), initial_weights(problem.hparams)
        for name, t in found.items():
            if name not in live or live[name].shape != t.shape:
                there = f"of shape {tuple(live[name].shape)}" if name in live else "not there"
                raise ValueError(
                    f"hparams has the initial weight {name!r} of shape {tuple(t.shape)}, and in the model it is {there}: "
                    "make it from this model, or name its weights as the model does"
                )
        trained = {name: p for name, p in problem.weights().items() if id(p) in known}
        if idle := [name for name in problem.weights() if name not in trained and name not in found]:
            raise ValueError(
                f"the inner optimizer does not hold the weights {listed(idle)}, and no hyperparameter stands for them: "
                "freeze them with requires_grad_(False), give them to the optimizer, or learn them by recipes.Initialization"
            )
        weights = {name: found.get(name, p).detach() for name, p in trained.items()}
        return cls(
            weights=weights,
            learned={n: t for n, t in found.items() if n in trained and t.requires_grad},
            live=problem.leaves(),
        )

    @property
    def leaves(self) -> list[str]:
        """The leaves on which it depends."""
        nothing = {name: torch.zeros_like(t)[None] for name, t in self.learned.items()}
        return [name for name, t in self.back([nothing]).items() if t is not None]

    def back(self, gradients: Sequence[Tensors]) -> OptionalTensors:
        """dL/dλ through the start, from ∂L/∂w there, with leading axes of tasks."""
        total = {n: torch.cat([g[n] for g in gradients]).sum(0) for n, t in self.learned.items()}
        if not total:
            return dict.fromkeys(self.live)
        found = torch.autograd.grad(
            list(self.learned.values()), list(self.live.values()), list(total.values()), retain_graph=True, allow_unused=True
        )
        return dict(zip(self.live, found, strict=True))


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """K tasks.

    Attributes:
        problem: the problem of one task.
        loop: the user's inner optimizer, and what is learned of it.
        start: where each training begins.
        batches: the training batch of each step; its tensors have a leading axis of K.
        val_batch: likewise.
        count: K.
    """

    problem: Problem
    loop: TrainingContext
    start: Start
    batches: Sequence[Any]
    val_batch: Any
    count: int

    @classmethod
    def of(cls, problem: Problem, loop: TrainingContext, batches: Sequence[Any], val_batch: Any) -> Tasks:
        """The tasks of these batches.

        Raises:
            ValueError: the batches have no tasks, or different numbers of them.
        """
        given = {"the training batch": batches, "the validation batch": val_batch}
        counts: dict[str, int] = {}
        for name, batch in given.items():
            tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
            if batch is not None and not all(t.ndim for t in tensors):
                raise ValueError(
                    f"{name} has a tensor of a single number: PerTask takes tensors with a leading axis of tasks"
                )
            if batch is not None and not tensors:
                raise ValueError(
                    f"{name} is {describe_type(batches[0] if batch is batches else batch)}, with no tensor: PerTask takes "
                    "tensors with a leading axis of tasks, in tuples, lists or dicts"
                )
            counts |= {f"{len(t)} in {name}": len(t) for t in tensors}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(
                "the leading axes of the batches, which PerTask takes for the tasks, have lengths of "
                f"{' and '.join(counts)}: give each tensor one entry for each task, 1 or more"
            )
        start = Start.of(problem, loop)
        return cls(
            problem=problem, loop=loop, start=start, batches=batches, val_batch=val_batch, count=next(iter(counts.values()))
        )

    @property
    def is_faster_in_turn(self) -> bool:
        """Whether it is, as for wide convolutions on a CPU: those of several models at once are grouped ones."""
        on_cpu = all(t.device.type == "cpu" for t in self.start.weights.values())
        convolutions = [part for part in self.problem.model.modules() if isinstance(part, _ConvNd)]
        return on_cpu and any(part.out_channels >= WIDE for part in convolutions)

    def run(self, function: Callable[[Part], R], at_once: int) -> list[R]:
        """What the function returns for each ``at_once`` of the tasks, inside a context in which their trainings can run."""
        return [self._run(function, low, min(low + at_once, self.count)) for low in range(0, self.count, at_once)]

    def _run(self, function: Callable[[Part], R], low: int, high: int) -> R:
        problem, loop, is_one = self.problem, self.loop, high - low == 1
        trained, count, place = self.start.weights, None if is_one else high - low, low if is_one else slice(low, high)
        assert loop.inner is not None

        def fixed(hparams: Any) -> Tensors:
            return {name: t for name, t in initial_weights(hparams).items() if name not in trained}

        def cut(batch: Any) -> Any:
            return pytree.tree_map(lambda t: t[place] if isinstance(t, Tensor) else t, batch)

        own = SideBySide(problem, trained, fixed, count, share=1 / self.count)
        leaves = problem.leaves()
        dynamics = InnerStep.of(loop.inner, problem.weights(), leaves, learned=loop.learned, with_state=False)
        dynamics = dynamics.fresh(own.weights(), leaves)
        steps = [Step(losses=(RecordedLoss(batch=cut(batch)),), dynamics=dynamics) for batch in self.batches]
        with own.looked_up(), restore_attributes(list(problem.joint.modules())):
            trajectory = Trajectory(begins=((0, present(own, dynamics)),), steps=steps)
            return function(Part(of=self, problem=own, count=count, trajectory=trajectory, val_batch=cut(self.val_batch)))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the tasks, as the problem of a model that holds the weights of all of them.

    Attributes:
        of: all tasks.
        problem: the problem, with weights of its own.
        count: how many tasks; ``None`` for one, whose tensors have no leading axis.
        trajectory: the steps that are to be taken.
        val_batch: the validation batch.
    """

    of: Tasks
    problem: SideBySide
    count: int | None
    trajectory: Trajectory
    val_batch: Any

    @torch.no_grad()
    def at_end(self, end: Snapshot) -> TrainingContext:
        """Put the problem's model where its trainings have ended; returns its inner optimizer there."""
        loop, weights = self.of.loop, self.problem.weights()
        for name, p in weights.items():
            p.copy_(end.weights[name])
        for name, b in self.problem.own_buffers.items():
            b.copy_(end.modules.tensors[f"model.{name}"])
        end.modules.attributes.put()
        assert loop.inner is not None
        return replace(loop, inner=stand_in(loop.inner, self.of.problem.weights(), weights, end.state), draw=None)

    @torch.no_grad()
    def models(self, end: Snapshot) -> list[nn.Module]:
        """A model of its own for each task, as its training has ended."""
        problem, learned = self.of.problem, initial_weights(self.of.problem.hparams)

        def of_task(task: int | None) -> nn.Module:
            def row(t: Tensor) -> Tensor:
                return (t if task is None else t[task]).detach().clone()

            memo: dict[int, Any] = {**Attributes(list(problem.model.modules())).copies()}
            memo |= {id(b): row(end.modules.tensors[f"model.{name}"]) for name, b in problem.model.named_buffers()}
            for name, p in problem.model.named_parameters():
                own = row(end.weights[name]) if name in end.weights else learned.get(name)
                memo[id(p)] = p if own is None else nn.Parameter(own.detach().clone(), requires_grad=p.requires_grad)
            return copy.deepcopy(problem.model, memo)

        return [of_task(None)] if self.count is None else [of_task(task) for task in range(self.count)]
