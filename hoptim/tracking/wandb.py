"""A tracker that logs to Weights & Biases."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from hoptim.linalg.vectors import Tree
from hoptim.tracking.board import AXES, Board, figures, finite_values, quantiles, steps, warn_of_failures

MODES = ("online", "offline", "disabled", "shared")
TAG_LENGTH = 64  # W&B's own limit


@dataclass(frozen=True, kw_only=True)
class WandB(Board):
    """Weights & Biases: the figures of each hyperstep, a histogram and quantiles of each hyperparameter.

    It logs to the open run, or opens one: offline unless ``mode`` or ``WANDB_MODE`` says otherwise. Without an account or a
    network it warns and goes on offline; it never stops a training. Each figure is logged once, as ``metrics/…``,
    ``hypergradient/…`` or ``cost/…``. The run says whether a chart has inner or outer steps on its axis; each chart lets you
    choose the other.

    Args:
        project: the W&B project, default ``hoptim``.
        name: the run's name; ``None`` lets W&B choose.
        group: the group of the run, such as a sweep.
        job_type: the kind of run within its group, such as its settings without the seed.
        tags: words by which W&B finds the run; default: none.
        id: the id of a run to continue; ``None`` for a new one.
        directory: where W&B keeps its files; ``None`` for W&B's own default.
        mode: ``online``, ``offline``, ``disabled`` or ``shared``; ``None``: ``WANDB_MODE``, else ``offline``.
        histograms: log a histogram and five quantiles of every hyperparameter tensor, default true.

    Raises:
        ValueError: ``mode`` is none of these.
    """

    project: str = "hoptim"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] | None = None
    id: str | None = None
    directory: str | os.PathLike[str] | None = None
    mode: str | None = None
    histograms: bool = True

    def __post_init__(self) -> None:
        if self.mode not in (None, *MODES):
            raise ValueError(f"mode={self.mode!r}: give {', '.join(MODES)}, or None for WANDB_MODE, else offline")
        object.__setattr__(self, "tags", tuple(self.tags or ()) or None)

    @property
    def run_id(self) -> str:
        """The id of the open run."""
        return str(self.start().id)

    def start(self, config: Mapping[str, Any] | None = None) -> Any:
        """The open run, or a new one with ``config``."""
        import wandb

        if wandb.run is not None:
            return _with_axes(wandb.run)
        settings = {key: getattr(self, key) for key in ("project", "name", "group", "job_type", "id")}
        settings |= {"dir": self.directory, "resume": "allow" if self.id else None, "config": dict(config or {})}
        settings["tags"] = [tag[:TAG_LENGTH] for tag in self.tags or () if tag]
        return _with_axes(_open_run(settings, self.mode or os.environ.get("WANDB_MODE") or "offline"))

    def log(self, row: Mapping[str, Any], hyperparameters: Tree | None = None) -> None:
        """Log a row's figures, and histograms."""
        import wandb

        values: dict[str, Any] = {**steps(row), **figures(row)}
        if self.histograms:
            for name, value in (hyperparameters or {}).items():
                counts = np.histogram(finite_values(value), bins=64)
                values |= {f"hyperparameters/{name}": wandb.Histogram(np_histogram=counts), **quantiles(name, value)}
        run = self.start()
        with _warn_of_failures():
            run.log(values)

    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        images: Mapping[str, Path] | None = None,
        artifacts: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """Log the last pictures and the artifacts, write the summary and close the run."""
        import wandb

        run = self.start()
        with _warn_of_failures():
            if images:
                run.log({name: wandb.Image(str(path)) for name, path in images.items()})
            for kind, paths in (artifacts or {}).items():
                run.log_artifact(_artifact(run, kind, paths))
            run.summary.update(dict(summary or {}))
            run.finish()
        with suppress(OSError, AttributeError):  # only W&B's log file says that records could not be written
            path = Path(run.settings.log_internal)
            if lost := path.read_text(errors="replace").count("failed to save record"):
                warnings.warn(f"W&B could not write {lost} records, a full disk perhaps: see {path}", stacklevel=2)

    def abandon(self) -> None:
        """Close the open run as failed, if there is one, so that no later training logs into it."""
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            with _warn_of_failures():
                wandb.run.finish(exit_code=1)


def _artifact(run: Any, kind: str, paths: Sequence[Path]) -> Any:
    """An artifact of copies in the run's folder; without them W&B would make its copies in the home folder."""
    import wandb

    folder = Path(run.dir).parent / "artifacts" / kind
    folder.mkdir(parents=True, exist_ok=True)
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for path in paths:
        copied = shutil.copy2(path, folder)
        artifact.add_file(str(copied), policy="immutable", skip_cache=True)
    return artifact


def _warn_of_failures() -> Any:
    import wandb

    return warn_of_failures("W&B", (wandb.errors.Error, OSError))


_runs_with_axes: WeakSet[Any] = WeakSet()


def _with_axes(run: Any) -> Any:
    """The run with its axes, which are defined once, whoever opened the run."""
    if run not in _runs_with_axes:
        _runs_with_axes.add(run)
        for axis in ("inner_step", "outer_step"):
            run.define_metric(axis, hidden=True)
        for figures, axis in AXES.items():
            run.define_metric(figures, step_metric=axis)
    return run


def _open_run(settings: dict[str, Any], mode: Any) -> Any:
    """A new run; offline if it cannot start in this mode, and disabled if even that fails."""
    import wandb

    for attempt in dict.fromkeys((mode, "offline", "disabled")):
        try:
            return wandb.init(**settings, mode=attempt, settings=wandb.Settings(silent=True, console="off"))
        except (wandb.errors.Error, OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            warnings.warn(f"W&B could not start in mode {attempt!r}: {error}; training goes on without it", stacklevel=3)
    raise RuntimeError("W&B failed to start even in mode 'disabled'")
