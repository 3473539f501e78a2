"""hoptim: hyperparameters learned by gradient, inside the training loop that is already there."""

from hoptim.hparams import HyperParameters
from hoptim.hypergradient import Hypergradient, Implicit, hypergradient
from hoptim.operators import Exact, GaussNewton
from hoptim.optimizer import BilevelOptimizer
from hoptim.problem import CompositeLoss, Problem
from hoptim.record import Record
from hoptim.solvers.base import Solution, Solver, Status
from hoptim.solvers.krylov import CG, MINRES
from hoptim.solvers.stationary import Identity, Neumann

__version__ = "0.1.0"

__all__ = [
    "CG",
    "MINRES",
    "BilevelOptimizer",
    "CompositeLoss",
    "Exact",
    "GaussNewton",
    "HyperParameters",
    "Hypergradient",
    "Identity",
    "Implicit",
    "Neumann",
    "Problem",
    "Record",
    "Solution",
    "Solver",
    "Status",
    "hypergradient",
]
