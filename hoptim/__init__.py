"""Hyperparameters learned by gradient. These are all public names; hoptim/README.md lists them, and says how it is built."""

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
from hoptim.training.optimizer import BilevelOptimizer
from hoptim.training.outer_step import outer_step
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
