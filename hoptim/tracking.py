"""Trackers: hooks that write each hyperstep to Weights & Biases, to the terminal or to a file of JSON lines.

A tracker is a function of the :class:`Record`: ``BilevelOptimizer(..., hooks=[WandB(project="mine")])``. W&B and rich are
imported when a tracker is first used. Where several processes train together, rank 0 alone writes.
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

from hoptim.linalg.vectors import Tree
from hoptim.problem.distributed import is_first
from hoptim.training.record import Record

MODES = ("online", "offline", "disabled", "shared")
AXES = {"inner/*": "inner_step", "outer/*": "outer_step", "hyperparameters/*": "outer_step"}


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
        """Append the record's row; a disk that fails warns and does not stop the training."""
        try:
            if is_first():
                self.log(record.row())
        except OSError as error:
            warnings.warn(f"a row was not written: {error}; training goes on without it", stacklevel=2)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row, or raise OSError and leave the file as it was: whole rows only."""
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
    """One line on the terminal for each hyperstep: loss, residual and status; a failed one in red, with what to do."""

    def __call__(self, record: Record) -> None:
        """Print the record's line."""
        if not is_first():
            return
        from rich.console import Console as RichConsole
        from rich.markup import escape

        row = record.row()
        val_loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        residual = "" if row["residual"] is None else f"residual {row['residual']:.2g}  "
        advice = "" if record.moved else f": {record.status.message} ({row['detail']})"
        line = f"step {row['inner_step']}  val {val_loss}  {residual}{row['products']} products  {row['status']}{advice}"
        colour = {"ok": "green", "remark": "yellow", "failed": "red"}[record.status.kind]
        RichConsole().print(f"[{colour}]{escape(line)}[/]", highlight=False)


@dataclass(frozen=True, kw_only=True)
class WandB:
    """Weights & Biases: the figures of each hyperstep, and a histogram of each hyperparameter.

    It logs to the open run, or opens one: offline unless ``mode`` or ``WANDB_MODE`` says otherwise. Without an account or a
    network it warns and goes on offline; it never stops a training. Each figure is there twice, as ``inner/…`` and
    ``outer/…``: against inner and against outer steps.

    Args:
        project: the W&B project, default ``hoptim``.
        name: the run's name; ``None`` lets W&B choose.
        group: the group of runs that it belongs to, such as a sweep.
        id: the id of a run to continue; ``None`` for a new one.
        directory: where W&B keeps its files; ``None`` for its own default.
        mode: ``online``, ``offline``, ``disabled`` or ``shared``; ``None``: ``WANDB_MODE``, else ``offline``.
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
        if self.mode not in (None, *MODES):
            raise ValueError(f"mode={self.mode!r}: give {', '.join(MODES)}, or None for WANDB_MODE, else offline")

    def __call__(self, record: Record) -> None:
        """Log the record's figures and histograms."""
        if is_first():
            self.log(record.row(), record.hyperparameters)

    def start(self, config: Mapping[str, Any] | None = None) -> Any:
        """The open run, or a new one with ``config``."""
        import wandb

        if wandb.run is not None:
            return _with_axes(wandb.run)
        settings = {key: getattr(self, key) for key in ("project", "name", "group", "id")}
        settings |= {"dir": self.directory, "resume": "allow" if self.id else None, "config": dict(config or {})}
        return _with_axes(_open_run(settings, self.mode or os.environ.get("WANDB_MODE") or "offline"))

    def log(self, row: Mapping[str, Any], hyperparameters: Tree | None = None) -> None:
        """Log a row's figures, and histograms."""
        import wandb

        values: dict[str, Any] = {"inner_step": row["inner_step"]}
        values["outer_step"] = row.get("outer_step", row.get("hyper_step"))
        for key, value in row.items():
            if isinstance(value, (int, float, str)) and (key == "step_size" or "step" not in key):
                values |= {f"inner/{key}": value, f"outer/{key}": value}
        if self.histograms:
            for name, value in (hyperparameters or {}).items():
                flat = value.detach().float().cpu().flatten()
                counts = np.histogram(flat[flat.isfinite()].numpy(), bins=64)
                values[f"hyperparameters/{name}"] = wandb.Histogram(np_histogram=counts)
        run = self.start()
        with _warn_of_failures():
            run.log(values)

    def finish(self, summary: Mapping[str, Any] | None = None, images: Mapping[str, Path] | None = None) -> None:
        """Log the last pictures, write the summary and close the run."""
        import wandb

        run = self.start()
        with _warn_of_failures():
            if images:
                run.log({name: wandb.Image(str(path)) for name, path in images.items()})
            run.summary.update(dict(summary or {}))
            run.finish()
        with suppress(OSError, AttributeError):  # W&B's own log alone tells of records that could not be written
            path = Path(run.settings.log_internal)
            if lost := path.read_text(errors="replace").count("failed to save record"):
                warnings.warn(f"W&B could not write {lost} records, a full disk perhaps: see {path}", stacklevel=2)

    def abandon(self) -> None:
        """Close the open run, if any, as failed: after an error, so that no later training logs into it."""
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            with _warn_of_failures():
                wandb.run.finish(exit_code=1)


@contextmanager
def _warn_of_failures() -> Iterator[None]:
    """W&B's process or its disk may fail in mid-run: the training goes on, and has its figures in its own files."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, OSError) as error:
        warnings.warn(f"W&B failed: {type(error).__name__}: {error}; training goes on without it", stacklevel=3)


_runs_with_axes: WeakSet[Any] = WeakSet()


def _with_axes(run: Any) -> Any:
    """The run, whoever opened it, with its axes defined once."""
    if run not in _runs_with_axes:
        _runs_with_axes.add(run)
        for axis in ("inner_step", "outer_step"):
            run.define_metric(axis, hidden=True)
        for figures, axis in AXES.items():
            run.define_metric(figures, step_metric=axis)
    return run


def _open_run(settings: dict[str, Any], mode: Any) -> Any:
    """A new run; offline where it can't be had in this mode, and disabled where even that fails."""
    import wandb

    for attempt in dict.fromkeys((mode, "offline", "disabled")):
        try:
            return wandb.init(**settings, mode=attempt, settings=wandb.Settings(silent=True, console="off"))
        except (wandb.errors.Error, OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            warnings.warn(f"W&B could not start in mode {attempt!r}: {error}; training goes on without it", stacklevel=3)
    raise RuntimeError("W&B failed to start even in mode 'disabled'")
