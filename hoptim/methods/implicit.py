"""Implicit: the hypergradient dL_V/dλ = ∂L_V/∂λ − Bᵀx with Aᵀx = g, by the implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from hoptim.checks import describe_type, is_finite, listed
from hoptim.curvature.exact import Exact
from hoptim.curvature.gauss_newton import GaussNewton
from hoptim.curvature.linearization import Curvature, Linearization, over_ranks
from hoptim.curvature.minibatch import Sampled
from hoptim.linalg.operators import Root
from hoptim.linalg.vectors import Tensors
from hoptim.methods.conditions import Condition, Gradient, Update
from hoptim.methods.decay import doubt_of_decay, doubt_of_momentum
from hoptim.methods.learned_options import LearnedOption
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.preconditioners import Preconditioner
from hoptim.methods.result import Terms
from hoptim.methods.validation_loss import validate
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.live import at_live
from hoptim.problem.problem import At, Problem
from hoptim.solvers.base import Solver, solve_scaled
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.minres import MINRES
from hoptim.solvers.neumann import Neumann
from hoptim.solvers.solution import Solution, State

Solve = Callable[..., Solution]  # of a right-hand side g, and of the state of the last solution
TERMS = 5  # of the default solver: stopping early regularises, see scripts/studies/fidelity


@dataclass(frozen=True)
class Implicit(Method):
    """Implicit differentiation at the end of training: dL_V/dλ = ∂L_V/∂λ − Bᵀx, (A + damping·I)ᵀx = g.

    F(w, λ) = 0 is the condition of being trained, A = ∂F/∂w, B = ∂F/∂λ, g = ∂L_V/∂w, all at the model's present weights.

    Args:
        solver: how to solve for x; ``None``, the default, for what did well in the fidelity study: ``MINRES(terms=5)``,
            or ``GMRES(terms=5)`` for ``Update``, whose A is not symmetric, or ``Neumann()`` for ``Sampled``, whose A changes
            from product to product.
        condition: which F; default ``Gradient()``: F = ∇_w L_T.
        curvature: which matrix stands for the Hessian in A; ``None``, the default, for ``GaussNewton()`` if the training
            loss is a :class:`CompositeLoss`, else ``Exact()``.
        preconditioner: a diagonal D near A: the solver works on D^(−1/2) A D^(−1/2), and its residuals are measured in that
            scale; default ``None``.
        damping: added to A's diagonal, ≥ 0, default 0.

    Raises:
        ValueError: ``damping`` is negative or not finite; when called, a training loss that depends on no weight.
        TypeError: a strategy of the wrong kind.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), theorem 1 and algorithm 2.

    >>> from hoptim import CG, GaussNewton
    >>> Implicit(CG(terms=10), curvature=GaussNewton(), damping=1e-3).solver
    CG(terms=10, tolerance=1e-05)
    """

    solver: Solver | None = None
    _: KW_ONLY
    condition: Condition = field(default_factory=Gradient)
    curvature: Curvature | None = None
    preconditioner: Preconditioner | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        kinds = {"solver": (Solver, "Neumann(terms=20)"), "condition": (Condition, "Gradient()")}
        kinds |= {"curvature": (Curvature, "Exact()"), "preconditioner": (Preconditioner, "Jacobi()")}
        for name, (strategy, example) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, strategy) and not (value is None and name != "condition"):
                raise TypeError(f"{name} is {describe_type(value)}: give a {name}, such as hoptim.{example}")
        if not (is_finite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping={self.damping!r}: give a finite number, 0 or more")

    @property
    def sees_options(self) -> bool:  # type: ignore[override]
        """Whether options of the inner optimizer have a derivative: not if F is the gradient of the training loss."""
        return not isinstance(self.condition, Gradient)

    def cut_short(self) -> Implicit:
        """Without a preconditioner, since an optimizer has no second moments before its first step."""
        return replace(self, preconditioner=None)

    def _check_sharded(self, loop: TrainingContext) -> None:
        if not isinstance(self.condition, Gradient):
            raise TypeError(
                f"the condition {self.condition} takes a step of the inner optimizer, whose state is sharded as the weights "
                "are: take hoptim.Gradient(), or DistributedDataParallel"
            )
        if others := [option for option in loop.learned if not option.is_decay]:
            raise TypeError(
                f"hyperparameter {others[0].name!r} is the inner optimizer's {others[0].key}, which can't be learned where "
                "weights are sharded over ranks: give a decay by weight, as hoptim.recipes.WeightDecay, or train with "
                "DistributedDataParallel"
            )

    def completed(self, problem: Problem) -> Implicit:
        """The same with the solver and the curvature of this problem in place of ``None``."""
        shows_parts = isinstance(problem.train_loss, CompositeLoss)
        curvature = self.curvature or (GaussNewton() if shows_parts else Exact())
        if isinstance(curvature, Sampled):
            default: Solver = Neumann()
        else:
            default = (MINRES if isinstance(self.condition, Gradient) else GMRES)(terms=TERMS)
        return replace(self, solver=self.solver or default, curvature=curvature)

    def _compute(
        self, problem: Problem, train_batch: Any, val_batch: Any, state: State | None, loop: TrainingContext
    ) -> Terms:
        whole = self.completed(problem)
        assert whole.curvature is not None
        with at_live(problem) if problem.is_sharded and whole.curvature.is_first_order else problem.at() as at:
            validation = validate(at, val_batch)
            with whole.linearize(at, train_batch, loop) as F:
                F, length = replace(F, value=F.value.new_empty(0)), F.A.norm(F.value)  # its memory is needed
                check_weights(F, loop)
                g = F.layout.flatten(validation.g, validation.loss.shape)
                validation = replace(validation, g={})  # its memory is needed
                solution = whole.solver_of(F, problem, loop)(g, state)
                indirect = F.mixed(-solution.value)
                named = replace(solution, value=at.named(F.layout, solution.value))
                return Terms(validation, indirect, named, F.loss, length)

    @contextmanager
    def linearize(self, at: At, train_batch: Any, loop: TrainingContext) -> Iterator[Linearization]:
        """The condition F of a :meth:`completed` method with its derivatives, for use inside the context."""
        assert self.curvature is not None
        with ExitStack() as stack:  # no name, which would hold its value
            local = stack.enter_context
            yield self.condition(over_ranks(local(self.curvature.linearize(at, train_batch, loop.draw)), at), at, loop)

    def solver_of(self, F: Linearization, problem: Problem, loop: TrainingContext) -> Solve:
        """(g, state) ↦ x with (A + damping·I)ᵀx = g by a :meth:`completed` method, in the scale of its preconditioner.

        A preconditioner is made once, for any number of right-hand sides.
        """
        assert self.solver is not None
        A, solver = F.A + self.damping, problem.solver_of(self.solver, F.layout)
        if self.preconditioner is None:
            return _on_free(partial(solver.solve, A), F.free)
        live = problem.weights()
        D = self.preconditioner(A, {name: live[name] for name in F.layout.names}, loop.inner)
        scale = D.rsqrt() if isinstance(D, Tensor) else D
        if isinstance(scale, Root) and problem.ranks.size > 1:
            remedy = "give it the same batches on all ranks"
            problem.ranks.check_same(
                {"": scale @ A.gaussian()}, f"preconditioners {type(self.preconditioner).__name__}", remedy
            )
        return _on_free(lambda g, state=None: solve_scaled(solver, A, g, scale, state), F.free)


def _on_free(solve: Solve, free: Tensor | None) -> Solve:
    """The solve for g of the weights that may move: x is zero for the others."""
    return solve if free is None else lambda g, state=None: solve(g * free, state)


def doubts(method: Method, loop: TrainingContext, weights: Tensors, solution: Solution) -> dict[str, str]:
    """Why a hypergradient may be wrong though its solve went well, by kind of the reason; empty without one."""
    on_gradient = isinstance(method, Implicit) and isinstance(method.condition, Gradient)
    used = {name: w for name, w in weights.items() if name in solution.value}
    on_update = isinstance(method, Implicit) and isinstance(method.condition, Update)
    found = {
        "sign": _doubt_of_sign(method, loop.learned, solution),
        "decay": doubt_of_decay(loop, used) if on_gradient else doubt_of_momentum(loop) if on_update else None,
    }
    return {kind: doubt for kind, doubt in found.items() if doubt}


def _doubt_of_sign(method: Method, learned: Sequence[LearnedOption], solution: Solution) -> str | None:
    is_update = isinstance(method, Implicit) and isinstance(method.condition, Update)
    if not (is_update and learned and solution.negative_curvature and solution.status.ok):
        return None
    option = learned[0]
    return (
        f"hyperparameter {option.name!r} is the inner optimizer's {option.key}, and with the condition Update() the solve "
        f"met negative curvature ({solution.detail}): the model is not trained, and the hypergradient may have the wrong "
        "sign. Take hoptim.Unrolled(20), which has the right one from the start, or a longer warmup"
    )


def check_weights(F: Linearization, loop: TrainingContext) -> None:
    """Raise if the training loss touches no weight, and warn of those that it does not touch."""
    if not F.layout.names:
        weights = listed(F.untouched)
        raise ValueError(f"the training loss touches none of the weights {weights}: compute it with the model it is given")
    if names := [name for name in F.untouched if ("inner", name) not in loop.unheld]:
        warnings.warn(
            f"the training loss does not touch the weights {listed(names)}: they are left out of the hypergradient. Freeze "
            "them with requires_grad_(False), or use them in the training loss",
            stacklevel=4,
        )
    if F.fixed:
        warnings.warn(
            f"the inner optimizer does not hold the weights {listed(F.fixed)}: they are taken as fixed. Freeze them with "
            "requires_grad_(False), or add them to the optimizer",
            stacklevel=4,
        )
