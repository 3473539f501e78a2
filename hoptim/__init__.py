"""hoptim: hyperparameters learned by gradient, inside the training loop that is already there."""

from hoptim.audit import audit
from hoptim.conditions import Gradient, Update
from hoptim.curvature import Exact, GaussNewton
from hoptim.differences import FiniteDifference
from hoptim.hparams import HyperParameters
from hoptim.hypergradient import Implicit, hypergradient
from hoptim.method import Hypergradient
from hoptim.optimizer import BilevelOptimizer
from hoptim.preconditioners import Jacobi, SecondMoments
from hoptim.problem import CompositeLoss, Problem
from hoptim.record import Record
from hoptim.report import Audit
from hoptim.sampling import Averaged, Sampled
from hoptim.solvers.base import Solution, Solver, Status
from hoptim.solvers.chebyshev import Chebyshev
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.krylov import CG, MINRES
from hoptim.solvers.nystrom import Nystrom
from hoptim.solvers.stationary import Identity, Neumann
from hoptim.solvers.warm import SOBA, WarmStart
from hoptim.unrolled import Unrolled

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
]
