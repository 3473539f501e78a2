"""Hyperparameters learned by gradient. These are all public names; hoptim/README.md lists them, and says how it is built."""

from hoptim import recipes
from hoptim.curvature.exact import Exact
from hoptim.curvature.finite_difference import FiniteDifference
from hoptim.curvature.gauss_newton import GaussNewton
from hoptim.curvature.minibatch import Averaged, Sampled
from hoptim.data.mixture import Mixture
from hoptim.diagnostics.audit import audit
from hoptim.diagnostics.report import Audit
from hoptim.methods.conditions import Gradient, Update
from hoptim.methods.hypergradient import hypergradient
from hoptim.methods.implicit import Implicit
from hoptim.methods.influence import Influence, influence, self_influence
from hoptim.methods.kronecker import EKFAC
from hoptim.methods.per_task import PerTask
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
from hoptim.solvers.minres import MINRES
from hoptim.solvers.neumann import Identity, Neumann
from hoptim.solvers.nystrom import Nystrom
from hoptim.solvers.solution import Solution, Status
from hoptim.solvers.warm_start import SOBA, WarmStart
from hoptim.training.cross_validated import CrossValidated
from hoptim.training.optimizer import BilevelOptimizer, outer_step
from hoptim.training.record import Record
from hoptim.training.retrain import retrain
from hoptim.training.sharded_checkpoint import load_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "CG", "EKFAC", "GMRES", "MINRES", "SOBA", "Audit", "Averaged", "BilevelOptimizer", "Chebyshev", "CompositeLoss",
    "CrossValidated", "Exact", "FiniteDifference", "GaussNewton", "Gradient", "HyperParameters", "Hypergradient",
    "Identity", "Implicit", "Influence", "Jacobi", "Mixture", "Neumann", "Nystrom", "PerTask", "Problem", "Record",
    "Replay", "Sampled", "SecondMoments", "Solution", "Solver", "Status", "Unrolled", "Update", "WarmStart", "audit",
    "hypergradient", "influence", "load_checkpoint", "outer_adam", "outer_step", "recipes", "retrain",
    "save_checkpoint", "self_influence"
]  # fmt: skip
