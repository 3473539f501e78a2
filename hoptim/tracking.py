"""Trackers: hooks on the hyperstep that write to Weights & Biases, to the terminal or to a file of JSON lines.

A tracker is a function of the :class:`Record`: ``BilevelOptimizer(..., hooks=[WandB(project="mine")])``. W&B and rich are
imported when a tracker is first used. Of several processes that train together, rank 0 alone logs.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from hoptim.linalg.trees import Tree
from hoptim.problem.distributed import is_first
from hoptim.training.record import Record


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    r"""One JSON object a hyperstep, appended to a file: the figures of ``Record.row()``.

    Args:
        path: the file; its folder is made if need be.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> JsonLines(path=path).log({"hyper_step": 1, "val_loss": 0.5})
    >>> path.read_text()
    '{"hyper_step": 1, "val_loss": 0.5}\n'
    """

    path: str | os.PathLike[str]

    def __call__(self, record: Record) -> None:
        """Append the record's row; a disk that fails stops no training, and the file holds whole rows only."""
        if not is_first():
            return
        try:
            self.log(record.row())
        except OSError as error:
            warnings.warn(f"a row was not written: {error}; training goes on without it", stacklevel=2)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row, or raise OSError and leave the file as it was."""
        path, line = Path(self.path), json.dumps(dict(row)) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass(frozen=True, kw_only=True)
class Console:
    """One line a hyperstep on the terminal: losses, status, residual; failed ones in red, with what to do."""

    def __call__(self, record: Record) -> None:
        """Print the record's line."""
        if not is_first():
            return
        from rich.console import Console as RichConsole
        from rich.markup import escape

        row = record.row()
        residual = "" if row["residual"] is None else f"residual {row['residual']:.2g}  "
        val_loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        line = f"step {row['inner_step']}  val {val_loss}  {residual}{row['products']} products  {row['status']}"
        colour = {"ok": "green", "remark": "yellow", "failed": "red"}[record.status.kind]
        advice = "" if record.moved else f": {record.status.message} ({row['detail']})"
        RichConsole().print(f"[{colour}]{escape(line + advice)}[/]", highlight=False)


@dataclass(frozen=True, kw_only=True)
class WandB:
    """Weights & Biases: figures against inner and outer steps, and a histogram of each hyperparameter, each hyperstep.

    It logs to the run that is open, or opens one: offline unless ``mode`` or ``WANDB_MODE`` says otherwise. Where W&B has
    no account or no network it warns, and goes on offline; it never stops a training.

    Args:
        project: the W&B project, default ``hoptim``.
        name: the run's name; ``None`` lets W&B choose.
        group: the group of runs that it belongs to, such as a sweep.
        id: the id of a run to continue; ``None`` for a new one.
        directory: where W&B keeps its files; ``None`` for its own default.
        mode: ``online``, ``offline`` or ``disabled``; ``None``: ``WANDB_MODE``, else ``offline``.
        histograms: log a histogram of every hyperparameter tensor, default true.

    Raises:
        ValueError: ``mode`` is none of these.
    """

    project: str = "hoptim"
    name: str | None = None
    group: str | None = None
    id: str | None = None
    directory: str | os.PathLike[str] | None = None
    mode: str | None = None
    histograms: bool = True

    def __post_init__(self) -> None:
        if self.mode not in (None, "online", "offline", "disabled", "shared"):
            raise ValueError(f"mode={self.mode!r}: give online, offline, disabled, or None for WANDB_MODE, else offline")

    def __call__(self, record: Record) -> None:
        """Log the record's figures and histograms."""
        if is_first():
            self.log(record.row(), record.hyperparameters)

    def start(self, config: Mapping[str, Any] | None = None) -> Any:
        """The open run, or a new one with ``config``; axes for inner and outer steps are defined."""
        import wandb

        if wandb.run is not None:
            return _with_axes(wandb.run)
        mode = self.mode or os.environ.get("WANDB_MODE") or "offline"
        settings = {
            "project": self.project, "name": self.name, "group": self.group, "id": self.id,
            "dir": self.directory, "resume": "allow" if self.id else None, "config": dict(config or {}),
        }  # fmt: skip
        return _with_axes(_init(settings, mode))

    def log(self, row: Mapping[str, Any], hyperparameters: Tree | None = None) -> None:
        """Log a row's numbers twice, as ``inner/…`` and ``outer/…``: once against each axis of steps."""
        import wandb

        outer_step = row.get("outer_step", row.get("hyper_step"))
        figures = {key: value for key, value in row.items() if isinstance(value, (int, float, str)) and "step" not in key}
        figures |= {key: row[key] for key in ("step_size",) if row.get(key) is not None}
        values: dict[str, Any] = {"inner_step": row["inner_step"], "outer_step": outer_step}
        values |= {f"{axis}/{key}": value for key, value in figures.items() for axis in ("inner", "outer")}
        if self.histograms and hyperparameters:
            for name, value in hyperparameters.items():
                flat = value.detach().float().cpu().flatten()
                counts = np.histogram(flat[flat.isfinite()].numpy(), bins=64)
                values[f"hyperparameters/{name}"] = wandb.Histogram(np_histogram=counts)
        run = self.start()
        with _never_stopped():
            run.log(values)

    def finish(self, summary: Mapping[str, Any] | None = None, images: Mapping[str, Path] | None = None) -> None:
        """Log the last pictures, write the summary and close the run."""
        import wandb

        run = self.start()
        with _never_stopped():
            if images:
                run.log({name: wandb.Image(str(path)) for name, path in images.items()})
            run.summary.update(dict(summary or {}))
            run.finish()
        _check_written(run)

    def abandon(self) -> None:
        """Close the run that is open, if any, as failed: after an error, so that no later training logs into it."""
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            with _never_stopped():
                wandb.run.finish(exit_code=1)


@contextmanager
def _never_stopped() -> Iterator[None]:
    """W&B's process or its disk may fail in mid-run: the training goes on, and the figures are in its own files."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, OSError) as error:
        warnings.warn(f"W&B failed: {type(error).__name__}: {error}; training goes on without it", stacklevel=3)


def _check_written(run: Any) -> None:
    """Warn where W&B's own log, which alone knows, tells of records that could not be written."""
    with suppress(OSError, AttributeError):
        path = Path(run.settings.log_internal)
        if lost := path.read_text(errors="replace").count("failed to save record"):
            warnings.warn(f"W&B could not write {lost} records, a full disk perhaps: see {path}", stacklevel=3)


_runs_with_axes: WeakSet[Any] = WeakSet()


def _with_axes(run: Any) -> Any:
    """The run, its axes defined once: figures against inner and outer steps, whoever opened it."""
    if run not in _runs_with_axes:
        _runs_with_axes.add(run)
        run.define_metric("inner_step", hidden=True)
        run.define_metric("outer_step", hidden=True)
        for figures, axis in (("inner/*", "inner_step"), ("outer/*", "outer_step"), ("hyperparameters/*", "outer_step")):
            run.define_metric(figures, step_metric=axis)
    return run


def _init(settings: dict[str, Any], mode: str) -> Any:
    """Open a run; offline where it can't be had online, and disabled where even that fails: W&B never stops a training."""
    import wandb

    attempts: dict[Any, None] = dict.fromkeys((mode, "offline", "disabled"))
    for attempt in attempts:
        try:
            return wandb.init(**settings, mode=attempt, settings=wandb.Settings(silent=True, console="off"))
        except (wandb.errors.Error, OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            warnings.warn(f"W&B could not start in mode {attempt!r}: {error}; training goes on without it", stacklevel=3)
    raise RuntimeError("W&B failed to start even in mode 'disabled'")
