"""What W&B, TensorBoard and MLflow have in common: the life of a run, and the names of the figures in its rows."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from hoptim.linalg.vectors import Tensors
from hoptim.problem.distributed import is_first
from hoptim.solvers.solution import Status
from hoptim.training.record import FEW, Record

LEVELS = {"ok": 0, "remark": 1, "failed": 2}
HYPERGRADIENT = {"moved", "failed", "status", "detail", "residual", "step_size", "cosine_to_last", "standard_error"}
F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]
Images = Mapping[str, Path]
Files = Mapping[str, Sequence[Path]]


def never_raises(method: F) -> F:
    """The method of a tracker, whose errors become warnings: whatever fails in a tracker, the training goes on."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except Exception as error:
            words = f"{type(self).__name__} failed: {type(error).__name__}: {error}; training goes on without it"
            warnings.warn(words, stacklevel=2)

    return guarded  # type: ignore[return-value]


@dataclass(kw_only=True, eq=False)
class Board:
    """A tracker that shows its runs in a service or a program. A run is started, gets rows, and is finished.

    As a hook it starts the run at the first record. Nothing of this raises: what fails makes a warning. A board
    says in ``_open``, ``_log``, ``_end`` and ``_close`` how its service does these; it logs what :func:`figures` gives.

    Args:
        histograms: log a histogram of every hyperparameter tensor of more than twelve numbers, default true.

    Raises:
        ImportError: the package of the service is missing.
    """

    package: ClassVar[str]
    histograms: bool = True
    _run: Any = field(default=None, init=False, repr=False)
    _is_started: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise ImportError(f"{self.package} is not installed: in a checkout of hoptim, pip install '.[{self.package}]'")

    @never_raises
    def __call__(self, record: Record) -> None:
        """Log the record's row, and a histogram of each large hyperparameter."""
        if is_first():
            self.log(record.row(), record.hyperparameters)

    @property
    def run_id(self) -> str | None:
        """The id by which the run can be continued, or ``None``."""
        return getattr(self.start(), "id", None)

    @never_raises
    def start(self, config: Mapping[str, Any] | None = None) -> Any:
        """Open the run, or continue it, with ``config``. Returns the run; ``None`` if it could not be opened."""
        if not self._is_started:
            self._is_started = True
            self._run = self._open(dict(config or {}))
        return self._run

    @never_raises
    def log(self, row: Mapping[str, Any], hyperparameters: Tensors | None = None) -> None:
        """Log a row, and a histogram of each of these hyperparameters that is large."""
        if (run := self.start()) is not None:
            shown = hyperparameters if self.histograms and hyperparameters else {}
            large = {name: value.detach().flatten() for name, value in shown.items() if value.numel() > FEW}
            finite = {f"histograms/{name}": value[value.isfinite()].cpu().double().numpy() for name, value in large.items()}
            self._log(run, figures(row), {name: numbers for name, numbers in finite.items() if len(numbers)})

    @never_raises
    def finish(
        self, summary: Mapping[str, Any] | None = None, images: Images | None = None, artifacts: Files | None = None
    ) -> None:
        """Log pictures, artifacts (files by the artifact's name) and a summary; close the run."""
        run = self.start()
        self._run, self._is_started = None, False
        if run is not None:
            try:
                self._end(run, summary or {}, images or {}, artifacts or {})
            finally:
                self._close(run, False)

    @never_raises
    def abandon(self) -> None:
        """Close the run as failed, if it is open."""
        run, self._run, self._is_started = self._run, None, False
        if run is not None:
            self._close(run, True)

    _open: ClassVar[Callable[..., Any]]
    _log: ClassVar[Callable[..., None]]
    _end: ClassVar[Callable[..., None]]
    _close: ClassVar[Callable[..., None]]


def figures(row: Mapping[str, Any]) -> dict[str, float | str]:
    """The flat row that every board logs: the figures of a row, each under its section of a dashboard, and the steps last.

    The sections are ``hypergradient`` (how its solve went), ``cost`` (seconds and products), ``hyperparameters`` (their
    values) and ``metrics`` (losses and all others). ``hypergradient/status_level`` is 0 for ok, 1 for a remark, 2 for
    failed, so that a chart can show it: the worst of a row's hypersteps. Rows of hypersteps count these as outer steps.

    Args:
        row: as ``Record.row()`` gives it, perhaps with further figures.

    >>> found = figures({"inner_step": 10, "hyper_step": 1, "val_loss": 0.5, "status": "CONVERGED", "step_size": None})
    >>> for name, value in found.items(): print(name, value)
    metrics/val_loss 0.5
    hypergradient/status CONVERGED
    hypergradient/status_level 0
    outer_step 1
    inner_step 10
    """
    steps = {"outer_step": row.get("outer_step", row.get("hyper_step")), "inner_step": row["inner_step"]}
    found = {key if "/" in key else f"{section(key)}/{key}": value for key, value in row.items() if key not in steps}
    found.pop("metrics/hyper_step", None)
    ends = [Status[name] for name in row.get("statuses") or [row.get("status")] if name in Status.__members__]
    found |= {"hypergradient/status_level": max(LEVELS[status.kind] for status in ends)} if ends else {}
    return {key: value for key, value in (found | steps).items() if isinstance(value, (int, float, str))}


def section(key: str) -> str:
    """The section of a dashboard that a figure belongs to."""
    if key.endswith("_seconds") or key in ("products", "hypersteps"):
        return "cost"
    return "hypergradient" if key in HYPERGRADIENT or key.endswith("_norm") or key.startswith("solve_") else "metrics"


def edges(numbers: Array) -> Array:
    """The edges of 64 bins around the numbers, which may all be the same: NumPy refuses bins narrower than the rounding.

    >>> counts, _ = np.histogram([1.0, 1.0 + 2**-23], edges(np.array([1.0, 1.0 + 2**-23])))
    >>> int(counts[0]), int(counts[-1]), len(counts)
    (1, 1, 64)
    """
    beside = 1e-12 * np.abs(numbers).max() or 1.0
    return np.linspace(numbers.min() - beside, numbers.max() + beside, 65)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of dotted names, such as Hydra's.

    >>> flat({"task": {"hidden": 16}, "seed": 0})
    {'task.hidden': 16, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
