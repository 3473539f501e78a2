"""The hypergradient dL_V/dλ = ∂L_V/∂λ − Bᵀx with Aᵀx = g: formula (1), read top to bottom."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from hoptim.curvature.exact import Exact
from hoptim.curvature.gauss_newton import GaussNewton
from hoptim.curvature.linearization import Curvature, Linearization, Point, over_ranks
from hoptim.linalg import trees
from hoptim.linalg.operators import Scaled, in_float32
from hoptim.linalg.trees import Found, Tree
from hoptim.methods.conditions import Condition, Gradient
from hoptim.methods.method import Hypergradient, Method, TrainingContext, Validation, assembled, validate
from hoptim.methods.preconditioners import Preconditioner
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.problem import Problem
from hoptim.solvers.base import Solver
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.minres import MINRES
from hoptim.solvers.solution import State, Unread
from hoptim.validation import describe_type, is_finite

TERMS = 5  # of the default solver: to stop early is what regularises, see scripts/fidelity.py


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The solver and the curvature of an :class:`Implicit` for one problem."""

    solver: Solver
    curvature: Curvature


@dataclass(frozen=True)
class Implicit(Method):
    """Implicit differentiation of the end of training: dL_V/dλ = ∂L_V/∂λ − Bᵀx, (A + damping·I)ᵀx = g.

    F(w, λ) = 0 is the condition of being trained, A = ∂F/∂w, B = ∂F/∂λ, g = ∂L_V/∂w, all at the model's present weights.

    Args:
        solver: how far to go in solving for x; ``None``, the default, for what came out of the fidelity study:
            ``MINRES(terms=5)``, or ``GMRES(terms=5)`` for ``Update``, whose A is not symmetric.
        condition: which F; default ``Gradient()``: F = ∇_w L_T.
        curvature: which matrix stands for the Hessian in A; ``None``, the default, for ``GaussNewton()`` where the training
            loss is a :class:`CompositeLoss`, else ``Exact()``.
        preconditioner: a diagonal D near A: the solver works on D^(−1/2) A D^(−1/2), and its residuals are in that measure;
            default ``None``.
        damping: added to A's diagonal, ≥ 0, default 0.

    Raises:
        ValueError: ``damping`` is negative or not finite; when called, a training loss that touches no weight.
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

    def chosen(self, problem: Problem) -> Chosen:
        """What was left open, decided for this problem."""
        shown = isinstance(problem.train_loss, CompositeLoss)
        curvature = self.curvature or (GaussNewton() if shown else Exact())
        default = MINRES if isinstance(self.condition, Gradient) else GMRES
        return Chosen(solver=self.solver or default(terms=TERMS), curvature=curvature)

    def __call__(
        self,
        problem: Problem,
        train_batch: Any,
        val_batch: Any,
        state: State | None = None,
        loop: TrainingContext | None = None,
    ) -> Hypergradient:
        """The hypergradient at the model's present weights; ``state`` is that of the last call's solution."""
        loop = loop or TrainingContext()
        chosen = self.chosen(problem)

        def implicit(gradient: Linearization) -> Hypergradient:
            F = self.condition(gradient, point, loop.inner)
            _check_weights(F)
            unread = self._solved(chosen.solver, F, validation, point, loop.inner, state)

            def pulled(x: Tree) -> Found:
                return F.mixed(trees.cast(trees.negative(x), F.A.like))

            return assembled(validation, point.leaves, unread, pulled, F.loss, F.value)

        with problem.untouched():
            point = Point.of(problem, train_batch, loop.draw)
            validation = validate(problem, point.weights, point.leaves, val_batch)
            return chosen.curvature.linearize(point, lambda local: implicit(over_ranks(local, problem.ranks, point)))

    def _solved(
        self, solver: Solver, F: Linearization, at: Validation, point: Point, inner: Optimizer | None, state: State | None
    ) -> Unread:
        """Aᵀx = g by the solver, in the preconditioner's scale if there is one: S A S y = S g, x = S y with S = D^(−1/2)."""
        A = in_float32(F.A) + self.damping
        g = trees.widened({name: at.g[name] for name in F.A.like})
        if self.preconditioner is None:
            return solver.unread(A, g, state)
        scale = trees.map_tree(torch.rsqrt, self.preconditioner(A, point, inner))
        unread = solver.unread(Scaled(A, scale), trees.times(g, scale), state)
        return unread.mapped(lambda y: trees.times(y, scale))


def _check_weights(F: Linearization) -> None:
    names = list(F.untouched)
    if not F.value:
        raise ValueError(f"the training loss touches none of the weights {names}: compute it with the model it is given")
    if names:
        warnings.warn(
            f"the training loss does not touch the weights {names}: they are left out of the hypergradient. Freeze them "
            "with requires_grad_(False), or use them in the training loss",
            stacklevel=4,
        )
    if F.fixed:
        warnings.warn(
            f"the inner optimizer does not hold the weights {list(F.fixed)}: they are taken as fixed. Freeze them with "
            "requires_grad_(False), or add them to the optimizer",
            stacklevel=4,
        )
