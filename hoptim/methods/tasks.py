"""The trainings of many tasks: from which weights each begins, on which batches, and K of them at once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from hoptim.checks import describe_type, listed
from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.linalg.vjp import ends_of
from hoptim.methods.inner_step import InnerStep
from hoptim.methods.method import TrainingContext, held
from hoptim.methods.side_by_side import SideBySide, stand_in
from hoptim.methods.trajectory import RecordedLoss, Snapshot, Step, Trajectory, present
from hoptim.problem.functional import Attributes, restore_attributes, restore_tensors
from hoptim.problem.problem import Problem, as_leaves
from hoptim.problem.random_stream import restore_generators

R = TypeVar("R")
PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)  # parts of a batch that tasks may share
REPEATS = "tasks draw the same random numbers"  # in Problem.checked, once it was told
WIDE = 64  # channels: from here on it takes as long in turn, or less, in a sixth of the memory for four tasks


def initial_weights(hparams: Any) -> Tensors:
    """The weights, by name, that modules of ``hparams`` with a method of this name have for the start of a training.

    Raises:
        ValueError: two of them have the same weight.
    """
    found: Tensors = {}
    for module in hparams.modules():
        own = module.initial_weights() if callable(getattr(module, "initial_weights", None)) else {}
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
        fixed: other weights that hyperparameters stand for.
        leaves: the leaves to which that graph leads.
    """

    weights: Tensors
    learned: Tensors
    fixed: Tensors
    leaves: Tensors

    @classmethod
    def of(cls, problem: Problem, loop: TrainingContext) -> Start:
        """The weights that the inner optimizer holds, as they begin.

        Raises:
            ValueError: an initial weight does not fit the model; a weight is neither trained nor learned.
        """
        assert loop.inner is not None
        live, known, leaves = dict(problem.named_parameters()), held(loop.inner), as_leaves(problem.leaves())
        own = leaves | {name: b.clone() for name, b in problem.hparams.named_buffers()}
        parts = list(problem.hparams.modules())
        with restore_attributes(parts), restore_tensors(parts):
            called = partial(initial_weights, problem.hparams)
            found = functional_call(problem.joint, {f"hparams.{name}": t for name, t in own.items()}, (called,))
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
        return cls(
            weights={name: found.get(name, p).detach().to(p) for name, p in trained.items()},
            learned={name: t.to(trained[name]) for name, t in found.items() if name in trained and t.requires_grad},
            fixed={name: t.detach() for name, t in found.items() if name not in trained},
            leaves=leaves,
        )

    @property
    def begins_at(self) -> set[str]:
        """The names of the leaves on which it depends."""
        ends = set().union(*map(ends_of, self.learned.values()))
        return {name for name, leaf in self.leaves.items() if id(leaf) in ends}

    def back(self, gradients: Sequence[Tensors]) -> OptionalTensors:
        """dL/dλ through the start, from ∂L/∂w there, with leading axes of tasks."""
        total = {n: torch.cat([g[n] for g in gradients]).sum(0) for n, t in self.learned.items()}
        if not total:
            return dict.fromkeys(self.leaves)
        found = torch.autograd.grad(
            list(self.learned.values()), list(self.leaves.values()), list(total.values()), allow_unused=True
        )
        return dict(zip(self.leaves, found, strict=True))


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
        share: of each validation loss in the mean over the tasks, times the number of ranks.
    """

    problem: Problem
    loop: TrainingContext
    start: Start
    batches: Sequence[Any]
    val_batch: Any
    count: int
    share: float

    @classmethod
    def of(cls, problem: Problem, loop: TrainingContext, batches: Sequence[Any], val_batch: Any) -> Tasks:
        """The tasks of these batches.

        Raises:
            ValueError: the batches have no tasks, or different numbers of them.
        """
        counts: dict[str, int] = {}
        for name, batch in {"the training batch": batches, "the validation batch": val_batch}.items():
            parts = pytree.tree_leaves(batch)
            tensors = [t for t in parts if isinstance(t, Tensor)]
            if opaque := [part for part in parts if not isinstance(part, Tensor) and not isinstance(part, PLAIN)]:
                raise TypeError(
                    f"{name} has {describe_type(opaque[0])}, of which PerTask can't take the part of a task: give tensors "
                    "with a leading axis of tasks, in tuples, lists or dicts"
                )
            if not all(t.ndim for t in tensors) or (batch is not None and not tensors):
                raise ValueError(
                    f"{name} has {'a tensor of a single number' if tensors else 'no tensor'}: PerTask takes tensors with a "
                    "leading axis of tasks, in tuples, lists or dicts"
                )
            counts |= {f"{len(t)} in {name}": len(t) for t in tensors}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(
                "the leading axes of the batches, which PerTask takes for the tasks, have lengths of "
                f"{' and '.join(counts)}: give each tensor one entry for each task, 1 or more"
            )
        count, ranks = next(iter(counts.values())), problem.ranks
        return cls(
            problem=problem,
            loop=loop,
            start=Start.of(problem, loop),
            batches=batches,
            val_batch=val_batch,
            count=count,
            share=ranks.size / sum(ranks.gathered(count)),
        )

    @property
    def is_faster_in_turn(self) -> bool:
        """Whether it is, as for wide convolutions on a CPU: those of several models at once are grouped ones."""
        on_cpu = all(t.device.type == "cpu" for t in self.start.weights.values())
        known = {id(p) for name, p in self.problem.named_parameters() if name in self.start.weights}
        convolutions = [part for part in self.problem.model.modules() if isinstance(part, _ConvNd)]
        return on_cpu and any(part.out_channels >= WIDE and id(part.weight) in known for part in convolutions)

    @property
    def needs_turns(self) -> str:
        """Why they have to train in turn, though ``torch.func.vmap`` would not say so; empty if they need not."""
        padded = [part for part in self.problem.model.modules() if isinstance(part, nn.Embedding)]
        if any(part.padding_idx is not None for part in padded):
            return "in torch.func.vmap the row of an Embedding's padding_idx has a gradient"
        return ""

    def run(self, function: Callable[[Part], R], at_once: int) -> list[R]:
        """What the function returns for each ``at_once`` of the tasks, inside a context in which their trainings can run."""
        lows, own = range(0, self.count, at_once), torch.Generator().set_state(torch.get_rng_state())
        seeds, found = torch.randint(2**62, (len(lows),), generator=own).tolist(), []
        begun = self.problem.generators()
        for low, seed in zip(lows, seeds, strict=True):
            if low:  # so that tasks have random numbers of their own, whatever those before them have drawn
                torch.manual_seed(seed)
            found.append(self._run(function, low, min(low + at_once, self.count)))
            if low == 0:
                _warn_of_repeated_draws(self.problem, begun)
        return found

    def first(self, function: Callable[[Part], R]) -> R:
        """What the function returns for the first task."""
        with restore_generators():
            return self._run(function, 0, 1)

    def _run(self, function: Callable[[Part], R], low: int, high: int) -> R:
        problem, loop, is_one = self.problem, self.loop, high - low == 1
        trained, count, place = self.start.weights, None if is_one else high - low, low if is_one else slice(low, high)
        live = dict(problem.named_parameters())
        assert loop.inner is not None

        def fixed(hparams: Any) -> Tensors:
            if not self.start.fixed:  # a network need not compute in each loss what is there already
                return {}
            return {name: t.to(live[name]) for name, t in initial_weights(hparams).items() if name not in trained}

        def cut(batch: Any) -> Any:
            return pytree.tree_map(lambda t: t[place] if isinstance(t, Tensor) else t, batch)

        own = SideBySide(problem, trained, fixed, count, share=self.share)
        leaves = problem.leaves()
        dynamics = InnerStep.of(loop.inner, problem.weights(), leaves, learned=loop.learned, with_state=False)
        dynamics = dynamics.fresh(own.weights(), leaves)
        steps = [Step(losses=(RecordedLoss(batch=cut(batch)),), dynamics=dynamics) for batch in self.batches]
        with own.looked_up(), restore_attributes(list(problem.joint.modules())):
            trajectory = Trajectory(begins=((0, present(own, dynamics)),), steps=steps)
            draw = loop.draw
            loop = replace(loop, draw=None if draw is None else lambda: cut(draw()))
            val = cut(self.val_batch)
            return function(Part(of=self, problem=own, count=count, loop=loop, trajectory=trajectory, val_batch=val))


def _warn_of_repeated_draws(problem: Problem, begun: Tensors) -> None:
    """Warn if tasks have drawn random numbers from where the last ones did, since a hypergradient restores the generator."""
    if _are_same(begun, problem.generators()):
        return
    if _are_same(begun, problem.drew_from) and REPEATS not in problem.checked:
        problem.checked.add(REPEATS)
        warnings.warn(
            "the trainings of these tasks draw the same random numbers, such as dropout masks, as those of the last call, "
            "since a hypergradient restores torch's generator and nothing else has drawn from it. Sample tasks by it, or "
            "call torch.rand(1) in the loop",
            stacklevel=8,
        )
    problem.drew_from = begun


def _are_same(states: Tensors, others: Tensors) -> bool:
    return states.keys() == others.keys() and all(torch.equal(state, others[key]) for key, state in states.items())


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the tasks, as the problem of a model that holds the weights of all of them.

    Attributes:
        of: all tasks.
        problem: the problem, with weights of its own.
        count: how many tasks; ``None`` for one, whose tensors have no leading axis.
        loop: the user's inner optimizer, and batches of these tasks.
        trajectory: the steps that are to be taken.
        val_batch: the validation batch.
    """

    of: Tasks
    problem: SideBySide
    count: int | None
    loop: TrainingContext
    trajectory: Trajectory
    val_batch: Any

    @torch.no_grad()
    def at_end(self, end: Snapshot) -> TrainingContext:
        """Put the problem's model where its trainings have ended; returns its inner optimizer there."""
        loop, weights = self.loop, self.problem.weights()
        for name, p in weights.items():
            p.copy_(end.weights[name])
        for name, b in self.problem.own_buffers.items():
            b.copy_(end.modules.tensors[f"model.{name}"])
        end.modules.attributes.put()
        assert loop.inner is not None
        return replace(loop, inner=stand_in(loop.inner, self.of.problem.weights(), weights, end.state))

    @torch.no_grad()
    def models(self, end: Snapshot) -> list[nn.Module]:
        """A model of its own for each task, as its training has ended."""
        problem, fixed = self.of.problem, self.of.start.fixed
        modes = [part.training for part in problem.model.modules()]
        end.modules.attributes.put()  # for the time of this part

        def of_task(task: int | None) -> nn.Module:
            def row(t: Tensor) -> Tensor:
                return (t if task is None else t[task]).detach().clone()

            memo: dict[int, Any] = {**Attributes(list(problem.model.modules())).copies()}
            memo |= {id(b): row(end.modules.tensors[f"model.{name}"]) for name, b in problem.model.named_buffers()}
            for name, p in problem.model.named_parameters():
                own = row(end.weights[name]) if name in end.weights else fixed.get(name)
                memo[id(p)] = p if own is None else nn.Parameter(own.detach().to(p).clone(), requires_grad=p.requires_grad)
            model = copy.deepcopy(problem.model, memo)
            for part, mode in zip(model.modules(), modes, strict=True):
                part.training = mode
            return model

        return [of_task(None)] if self.count is None else [of_task(task) for task in range(self.count)]
