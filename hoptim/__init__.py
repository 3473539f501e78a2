"""How hoptim is built: the folders, the way of one hypergradient, and how to add something.

The README explains how to use hoptim. This page is for those who want to read the code or extend it.

# The mathematics

The weights w are trained until F(w, λ) = 0, and the hyperparameters λ are to minimize the validation loss L_V(λ, w). By
the implicit function theorem, with A = ∂F/∂w, B = ∂F/∂λ and g = ∂L_V/∂w,

    dL_V/dλ = ∂L_V/∂λ − Bᵀx,    Aᵀx = g.

Everything is a choice of one of three things: the *condition* F, the *curvature* A, and the *solver* of Aᵀx = g.

# The folders

Each folder is one concept. Imports run downward only; a test enforces it. Each folder's page explains how to use what is
in it.

| folder | what it holds |
|---|---|
| `hoptim.diagnostics`, `hoptim.tracking` | the audit; trackers for W&B, TensorBoard, MLflow, the terminal and files |
| `hoptim.recipes` | hyperparameters with their part of the loss, such as `WeightDecay` and `ExampleWeights` |
| `hoptim.training` | the only code that changes anything: `BilevelOptimizer`, `CrossValidated`, `retrain`, checkpoints |
| `hoptim.methods` | ways to compute dL_V/dλ: implicit, unrolled, replay; conditions, one inner step as a function |
| `hoptim.curvature` | F at a point, A and Bᵀ: exact, Gauss-Newton, differences, several batches, compiled |
| `hoptim.solvers` | Aᵀx = g; a solver sees an operator and a vector, never a model |
| `hoptim.problem` | a model and two losses as pure functions of weights, hyperparameters and a batch; several processes |
| `hoptim.linalg` | vectors, operators, Lanczos; it imports torch and nothing else |

`hoptim.validation` holds checks of arguments. `hoptim.config` finds the YAML files of `conf/`, one for each choice.

# The way of one hypergradient

1. `hoptim.training.optimizer`: a hyperstep is due. It draws a training and a validation batch and calls the method.
2. `hoptim.methods.implicit` asks `hoptim.problem` for L_V and g, which takes one backward pass, and for F with its graph.
3. `hoptim.curvature` makes A and Bᵀ from that graph: an operator. Damping, averages over batches and processes, and
   preconditioners are operators around it.
4. `hoptim.solvers` solves Aᵀx = g and returns a `Solution` with its `Status`.
5. `hoptim.methods.implicit` adds −Bᵀx to the direct term and returns a `Hypergradient`.
6. `hoptim.training.optimizer`: if the status is ok, the outer optimizer moves the hyperparameters. The `Record` goes to
   the hooks.

# What holds everywhere

- A strategy (method, condition, curvature, solver, preconditioner, tracker) is a frozen dataclass that owns its options
  and checks them when it is made. It keeps no state: what a solver carries from one hyperstep to the next is in
  `Solution.state`.
- A loss becomes a pure function with `torch.func.functional_call`, in one place. A hypergradient leaves weights, buffers,
  gradients, modes and random generators of the model as it found them.
- Tensors stay on the device. The host reads them once for each 16 products, and twice more in a hypergradient.
- An error names the value and the remedy. A solve that fails says so in its status.

# How to add something

**A solver.** Derive from `Solver`, a frozen dataclass with the options, and write `solve(A, g, state=None)`. It gets an
operator A, with `A @ v` for products, `A.T` for the transpose, `A.dot(u, v)` and `A.norm(v)`, and a right-hand side g:
one vector of shape (n,), or R of them, (R, n). It returns a `Solution` with the answer, the status, the relative
residuals and the number of products. Put into `state` what the solver needs at the next hyperstep. Any such object works
at once as `Implicit(MySolver())`. To ship it with hoptim, add a file to `hoptim/solvers/`, its name here and
in the README, a YAML file in `conf/hoptim/solver/`, and a line in the table of `tests/solvers/test_solver_table.py`,
which runs each solver on every problem. For example, two steps of Richardson's iteration:

>>> from dataclasses import dataclass
>>> import torch
>>> from hoptim import Solution, Solver, Status
>>> @dataclass(frozen=True, kw_only=True)
... class Richardson(Solver):
...     step: float
...     def solve(self, A, g, state=None):
...         x = self.step * g
...         x = x + self.step * (g - A.T @ x)
...         residual = A.norm(g - A.T @ x) / A.norm(g)
...         return Solution(value=x, status=Status.FINISHED, residuals=residual[None], products=2, state={})
>>> from hoptim.linalg.operators import Symmetric
>>> Richardson(step=0.25).solve(Symmetric(lambda v: 2 * v, like=torch.ones(1)), torch.ones(1)).value
tensor([0.3750])

**A curvature.** Derive from `hoptim.curvature.linearization.Curvature` and write `linearize`. It gets a point with the
problem, weights, leaves and a batch, and gives a `Linearization` as a context manager: the loss, F, the operator A and
the map x ↦ Bᵀx, for use inside.
`hoptim.curvature.finite_difference` is the shortest example. Tests compare it with dense matrices in float64.

**A recipe** is a `HyperParameters` with its terms of the losses, as in `hoptim.recipes`, or ordinary code on top of
`Problem` and `BilevelOptimizer`, such as a search over starting points. It may import everything up to `hoptim.training`,
and nothing there may import it.
"""

from hoptim import recipes
from hoptim.curvature.exact import Exact
from hoptim.curvature.finite_difference import FiniteDifference
from hoptim.curvature.gauss_newton import GaussNewton
from hoptim.curvature.minibatch import Averaged, Sampled
from hoptim.diagnostics.audit import audit
from hoptim.diagnostics.report import Audit
from hoptim.methods.compute import hypergradient
from hoptim.methods.conditions import Gradient, Update
from hoptim.methods.implicit import Implicit
from hoptim.methods.preconditioners import Jacobi, SecondMoments
from hoptim.methods.replay import Replay
from hoptim.methods.result import Hypergradient
from hoptim.methods.unrolled import Unrolled
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.outer_adam import outer_adam
from hoptim.problem.problem import Problem
from hoptim.solvers.base import Solver
from hoptim.solvers.cg import CG
from hoptim.solvers.chebyshev import Chebyshev
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.identity import Identity
from hoptim.solvers.minres import MINRES
from hoptim.solvers.neumann import Neumann
from hoptim.solvers.nystrom import Nystrom
from hoptim.solvers.solution import Solution, Status
from hoptim.solvers.warm_start import SOBA, WarmStart
from hoptim.training.cross_validated import CrossValidated
from hoptim.training.optimizer import BilevelOptimizer, outer_step
from hoptim.training.record import Record
from hoptim.training.retrain import retrain

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "SOBA",
    "Audit",
    "Averaged",
    "BilevelOptimizer",
    "Chebyshev",
    "CompositeLoss",
    "CrossValidated",
    "Exact",
    "FiniteDifference",
    "GaussNewton",
    "Gradient",
    "HyperParameters",
    "Hypergradient",
    "Identity",
    "Implicit",
    "Jacobi",
    "Neumann",
    "Nystrom",
    "Problem",
    "Record",
    "Replay",
    "Sampled",
    "SecondMoments",
    "Solution",
    "Solver",
    "Status",
    "Unrolled",
    "Update",
    "WarmStart",
    "audit",
    "hypergradient",
    "outer_adam",
    "outer_step",
    "recipes",
    "retrain",
]
