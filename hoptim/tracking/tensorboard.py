"""A tracker that logs to TensorBoard, by torch's own writer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hoptim.linalg.vectors import Tree
from hoptim.tracking.board import Board, figures, finite_values, flat, require, warn_of_failures


@dataclass(kw_only=True)
class _Session:
    """An event file that is being written, and what is needed to finish it."""

    config: dict[str, Any] = field(default_factory=dict)
    writer: Any = None
    step: int = 0
    tags: set[str] = field(default_factory=set)


_open: dict[Path, _Session] = {}


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Board):
    """TensorBoard: the figures and histograms of each hyperstep against inner steps, in an event file.

    ``tensorboard --logdir runs`` shows the runs in a folder; its tab HPARAMS compares their configs and last metrics. A run
    that goes on in the same folder hides old rows that it writes again. TensorBoard has no artifacts: it shows the pictures,
    and other files stay where they are.

    Args:
        directory: the run's folder, whose subfolder ``tensorboard`` gets the event files; ``None``: the current folder.
        histograms: log a histogram of every hyperparameter tensor, default true.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    directory: str | os.PathLike[str] | None = None
    histograms: bool = True

    def __post_init__(self) -> None:
        require("tensorboard", "tensorboard")

    @property
    def folder(self) -> Path:
        """The folder of the event files."""
        return Path(self.directory or ".", "tensorboard").resolve()

    def start(self, config: Mapping[str, Any] | None = None) -> _Session:
        """The open session of this folder, or a new one. Its file is opened at the first row."""
        return _open.setdefault(self.folder, _Session(config=dict(config or {})))

    def log(self, row: Mapping[str, Any], hyperparameters: Tree | None = None) -> None:
        """Log a row's figures, and histograms."""
        session = self.start()
        with warn_of_failures("TensorBoard"):
            session.step = row["inner_step"]
            if session.writer is None:
                session.writer = self._writer(session.step)
            for tag, value in figures(row).items():
                if not isinstance(value, str):
                    session.writer.add_scalar(tag, value, session.step)
                    session.tags.add(tag)
                elif tag == "hypergradient/status":
                    session.writer.add_text(tag, value, session.step)
            for name, tensor in (hyperparameters or {}).items() if self.histograms else ():
                if len(values := finite_values(tensor)):
                    session.writer.add_histogram(f"hyperparameters/{name}", values, session.step)
            session.writer.flush()  # so that a killed run has its rows

    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        images: Mapping[str, Path] | None = None,
        artifacts: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """Log pictures, the config, which lets runs be compared, and the summary as text; close the file."""
        session = _open.pop(self.folder, _Session())
        with warn_of_failures("TensorBoard"):
            writer = session.writer or self._writer(session.step)
            for name, path in (images or {}).items():
                writer.add_image(name, _pixels(path), session.step, dataformats="HWC")
            if summary:
                rows = "\n".join(f"| {key} | {value} |" for key, value in summary.items())
                writer.add_text("summary", f"| | |\n|---|---|\n{rows}", session.step)
            _log_config(writer, session)
            writer.close()

    def abandon(self) -> None:
        """Close the file, if it is open."""
        session = _open.pop(self.folder, None)
        if session is not None and session.writer is not None:
            with warn_of_failures("TensorBoard"):
                session.writer.close()

    def _writer(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=step)  # hides the rows from this step on that a killed run wrote


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _log_config(writer: Any, session: _Session) -> None:
    """Write the config and the names of the metrics for the tab HPARAMS; ``add_hparams`` would log the metrics twice."""
    from torch.utils.tensorboard.summary import hparams

    config = {
        key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in flat(session.config).items()
    }
    metrics = {tag: 0.0 for tag in sorted(session.tags) if tag.startswith("metrics/")}
    if config and metrics:
        for part in hparams(config, metrics):
            writer.file_writer.add_summary(part)
