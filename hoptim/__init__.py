"""Hyperparameters learned by gradient. These are all public names; hoptim/README.md lists them, and says how it is built."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hoptim import recipes as recipes
    from hoptim.curvature.exact import Exact as Exact
    from hoptim.curvature.finite_difference import FiniteDifference as FiniteDifference
    from hoptim.curvature.gauss_newton import GaussNewton as GaussNewton
    from hoptim.curvature.minibatch import Averaged as Averaged
    from hoptim.curvature.minibatch import Sampled as Sampled
    from hoptim.data.mixture import Mixture as Mixture
    from hoptim.diagnostics.audit import audit as audit
    from hoptim.diagnostics.report import Audit as Audit
    from hoptim.methods.conditions import Gradient as Gradient
    from hoptim.methods.conditions import Update as Update
    from hoptim.methods.hypergradient import hypergradient as hypergradient
    from hoptim.methods.implicit import Implicit as Implicit
    from hoptim.methods.influence import Influence as Influence
    from hoptim.methods.influence import influence as influence
    from hoptim.methods.influence import self_influence as self_influence
    from hoptim.methods.kronecker import EKFAC as EKFAC
    from hoptim.methods.per_task import PerTask as PerTask
    from hoptim.methods.preconditioners import Jacobi as Jacobi
    from hoptim.methods.preconditioners import SecondMoments as SecondMoments
    from hoptim.methods.replay import Replay as Replay
    from hoptim.methods.result import Hypergradient as Hypergradient
    from hoptim.methods.unrolled import Unrolled as Unrolled
    from hoptim.problem.composite_loss import CompositeLoss as CompositeLoss
    from hoptim.problem.hyperparameters import HyperParameters as HyperParameters
    from hoptim.problem.outer_adam import outer_adam as outer_adam
    from hoptim.problem.problem import Problem as Problem
    from hoptim.solvers.base import Solver as Solver
    from hoptim.solvers.cg import CG as CG
    from hoptim.solvers.chebyshev import Chebyshev as Chebyshev
    from hoptim.solvers.gmres import GMRES as GMRES
    from hoptim.solvers.minres import MINRES as MINRES
    from hoptim.solvers.neumann import Identity as Identity
    from hoptim.solvers.neumann import Neumann as Neumann
    from hoptim.solvers.nystrom import Nystrom as Nystrom
    from hoptim.solvers.solution import Solution as Solution
    from hoptim.solvers.solution import Status as Status
    from hoptim.solvers.warm_start import SOBA as SOBA
    from hoptim.solvers.warm_start import WarmStart as WarmStart
    from hoptim.training.cross_validated import CrossValidated as CrossValidated
    from hoptim.training.optimizer import BilevelOptimizer as BilevelOptimizer
    from hoptim.training.optimizer import outer_step as outer_step
    from hoptim.training.record import Record as Record
    from hoptim.training.retrain import retrain as retrain
    from hoptim.training.sharded_checkpoint import load_checkpoint as load_checkpoint
    from hoptim.training.sharded_checkpoint import save_checkpoint as save_checkpoint

__version__ = "0.1.0"

# Each public name and the file that it comes from, which is imported when the name is first used.
_FILES = {
    "CG": "solvers.cg",
    "EKFAC": "methods.kronecker",
    "GMRES": "solvers.gmres",
    "MINRES": "solvers.minres",
    "SOBA": "solvers.warm_start",
    "Audit": "diagnostics.report",
    "Averaged": "curvature.minibatch",
    "BilevelOptimizer": "training.optimizer",
    "Chebyshev": "solvers.chebyshev",
    "CompositeLoss": "problem.composite_loss",
    "CrossValidated": "training.cross_validated",
    "Exact": "curvature.exact",
    "FiniteDifference": "curvature.finite_difference",
    "GaussNewton": "curvature.gauss_newton",
    "Gradient": "methods.conditions",
    "HyperParameters": "problem.hyperparameters",
    "Hypergradient": "methods.result",
    "Identity": "solvers.neumann",
    "Implicit": "methods.implicit",
    "Influence": "methods.influence",
    "Jacobi": "methods.preconditioners",
    "Mixture": "data.mixture",
    "Neumann": "solvers.neumann",
    "Nystrom": "solvers.nystrom",
    "PerTask": "methods.per_task",
    "Problem": "problem.problem",
    "Record": "training.record",
    "Replay": "methods.replay",
    "Sampled": "curvature.minibatch",
    "SecondMoments": "methods.preconditioners",
    "Solution": "solvers.solution",
    "Solver": "solvers.base",
    "Status": "solvers.solution",
    "Unrolled": "methods.unrolled",
    "Update": "methods.conditions",
    "WarmStart": "solvers.warm_start",
    "audit": "diagnostics.audit",
    "hypergradient": "methods.hypergradient",
    "influence": "methods.influence",
    "load_checkpoint": "training.sharded_checkpoint",
    "outer_adam": "problem.outer_adam",
    "outer_step": "training.optimizer",
    "retrain": "training.retrain",
    "save_checkpoint": "training.sharded_checkpoint",
    "self_influence": "methods.influence",
}
_ROOMS = (
    "curvature", "data", "diagnostics", "linalg", "methods", "problem", "recipes", "solvers", "tracking", "training"
)  # fmt: skip
__all__ = [*_FILES, "recipes"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"hoptim.{name}")
    if name not in _FILES:
        raise AttributeError(f"module 'hoptim' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"hoptim.{_FILES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILES, *_ROOMS})
