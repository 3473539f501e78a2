"""What W&B, TensorBoard and MLflow have in common: the interface of a board, and the names of the figures on it."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from hoptim.linalg.vectors import Tree
from hoptim.problem.distributed import is_first
from hoptim.solvers.solution import Status
from hoptim.training.record import Record

AXES = {
    "metrics/*": "inner_step",
    "hypergradient/*": "outer_step",
    "cost/*": "outer_step",
    "hyperparameters/*": "outer_step",
}
LEVELS = {"ok": 0, "remark": 1, "failed": 2}
HYPERGRADIENT = {"moved", "status", "detail", "residual", "step_size", "cosine_to_last", "standard_error"}
QUANTILES = {"min": 0.0, "quantile_0.05": 0.05, "median": 0.5, "quantile_0.95": 0.95, "max": 1.0}
STEPS = {"inner_step", "outer_step", "hyper_step"}
B = TypeVar("B", bound="Board")


class Board(ABC):
    """A tracker that shows its runs in a service or a program. A run is started, gets rows, and is finished.

    A board is a frozen dataclass with the options of its run. As a hook it starts the run at the first record.
    """

    def __call__(self, record: Record) -> None:
        """Log the record's figures, and a histogram of each hyperparameter."""
        if is_first():
            self.log(record.row(), record.hyperparameters)

    def filled(self: B, **defaults: Any) -> B:
        """This board, with the given options in place of its options that are ``None``.

        >>> from hoptim.tracking import WandB
        >>> WandB(name="mine").filled(name="iris/seed=0", group="iris", unknown=1)
        WandB(project='hoptim', name='mine', group='iris', ...)
        """
        names = {field.name for field in fields(self)}  # type: ignore[arg-type]
        blank = {key: value for key, value in defaults.items() if key in names and getattr(self, key) is None}
        return replace(self, **blank)  # type: ignore[type-var]

    @property
    def run_id(self) -> str | None:
        """The id by which the run can be continued, or ``None``."""
        return None

    @abstractmethod
    def start(self, config: Mapping[str, Any] | None = None) -> Any:
        """Open the run, or continue it, with ``config``."""

    @abstractmethod
    def log(self, row: Mapping[str, Any], hyperparameters: Tree | None = None) -> None:
        """Log a row's figures, and a histogram of each of these hyperparameters."""

    @abstractmethod
    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        images: Mapping[str, Path] | None = None,
        artifacts: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """Log pictures, artifacts (files by the artifact's name) and a summary; close the run."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the run as failed, if it is open."""


def figures(row: Mapping[str, Any]) -> dict[str, float | str]:
    """The figures of a row, each under its section of a dashboard.

    The sections are ``hypergradient`` (how its solve went), ``cost`` (seconds and products) and ``metrics`` (losses and all
    others). ``hypergradient/status_level`` is 0 for ok, 1 for a remark, 2 for failed, so that a chart can show it.

    Args:
        row: as ``Record.row()`` gives it, perhaps with further figures.

    >>> figures({"inner_step": 10, "val_loss": 0.5, "status": "CONVERGED", "products": 4, "step_size": None})
    {'metrics/val_loss': 0.5, 'hypergradient/status': 'CONVERGED', 'hypergradient/status_level': 0, 'cost/products': 4}
    """
    found: dict[str, float | str] = {}
    for key, value in row.items():
        if key in STEPS or not isinstance(value, (int, float, str)):
            continue
        found[f"{section(key)}/{key}"] = value
        if key == "status" and value in Status.__members__:
            found["hypergradient/status_level"] = LEVELS[Status[str(value)].kind]
    return found


def section(key: str) -> str:
    """The section of a dashboard that a figure belongs to."""
    if key.endswith("_seconds") or key in ("products", "hypersteps"):
        return "cost"
    return "hypergradient" if key in HYPERGRADIENT or key.endswith("_norm") or key.startswith("solve_") else "metrics"


def steps(row: Mapping[str, Any]) -> dict[str, int]:
    """The inner and the outer step of a row. Rows of hypersteps count these as outer steps."""
    found = {"outer_step": row.get("outer_step", row.get("hyper_step")), "inner_step": row["inner_step"]}
    return {name: step for name, step in found.items() if step is not None}


def finite_values(value: Tensor) -> np.ndarray[Any, Any]:
    """The finite entries of a tensor, for a histogram."""
    flat = value.detach().float().cpu().flatten()
    return flat[flat.isfinite()].numpy()


def quantiles(name: str, value: Tensor) -> dict[str, float]:
    """Five quantiles of a hyperparameter's entries, as figures. Unlike histograms, they let runs be compared.

    >>> import torch
    >>> quantiles("decay", torch.tensor([1.0, 2.0, 3.0]))["hyperparameters/decay/median"]
    2.0
    """
    values = finite_values(value)
    found = np.quantile(values, list(QUANTILES.values())).tolist() if len(values) else []
    return {f"hyperparameters/{name}/{key}": each for key, each in zip(QUANTILES, found, strict=False)}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted names, such as Hydra's.

    >>> flat({"task": {"hidden": 16}, "seed": 0})
    {'task.hidden': 16, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def require(package: str, extra: str) -> None:
    """Raise ImportError with the remedy if a package is missing, before any work is done."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed: pip install '.[{extra}]' in a checkout of hoptim")


@contextmanager
def warn_of_failures(name: str, errors: type[BaseException] | tuple[type[BaseException], ...] = Exception) -> Iterator[None]:
    """Turn an error of a board, whose server or disk may fail, into a warning: the training goes on without it."""
    try:
        yield
    except errors as error:
        warnings.warn(f"{name} failed: {type(error).__name__}: {error}; training goes on without it", stacklevel=3)
