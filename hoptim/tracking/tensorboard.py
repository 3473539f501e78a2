"""A tracker that logs to TensorBoard, by torch's own writer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hoptim.tracking.board import Array, Board, Files, Images, edges, flat


@dataclass(kw_only=True, eq=False)
class TensorBoard(Board):
    """TensorBoard: the figures of each hyperstep, the hyperparameters, and histograms of large ones, against inner steps.

    ``tensorboard --logdir runs`` shows the runs in a folder; its tab HPARAMS compares their configs and last metrics. A run
    that goes on in the same folder hides old rows that it writes again. TensorBoard has no artifacts: it shows the pictures,
    and other files stay where they are.

    Args:
        directory: the run's folder, whose subfolder ``tensorboard`` gets the event files; ``None``: the current folder.
        histograms: log a histogram of every hyperparameter tensor of more than twelve numbers, default true.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    package: ClassVar[str] = "tensorboard"
    directory: str | os.PathLike[str] | None = None

    def _open(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"config": flat(config), "metrics": {}, "step": 0}  # the file is opened at the first row

    def _writer(self, run: dict[str, Any]) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if "writer" not in run:  # it hides the rows from this step on that a killed run has written
            folder = Path(self.directory or ".", "tensorboard").resolve()
            run["writer"] = SummaryWriter(str(folder), purge_step=run["step"])
        return run["writer"]

    def _log(self, run: dict[str, Any], row: Mapping[str, Any], large: Mapping[str, Array]) -> None:
        step = run["step"] = row["inner_step"]
        writer = self._writer(run)
        for tag, value in row.items():
            if "/" in tag and not isinstance(value, str):
                writer.add_scalar(tag, value, step)
        for name, numbers in large.items():
            writer.add_histogram(name, numbers, step, bins=edges(numbers))
        writer.flush()  # so that a killed run has its rows
        run["metrics"] |= {tag: 0.0 for tag in row if tag.startswith("metrics/")}

    def _end(self, run: dict[str, Any], summary: Mapping[str, Any], images: Images, artifacts: Files) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer, step = self._writer(run), run["step"]
        for name, path in images.items():
            from PIL import Image

            with Image.open(path) as image:
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if summary:
            rows = "\n".join(f"| {key} | {value} |" for key, value in summary.items())
            writer.add_text("summary", f"| | |\n|---|---|\n{rows}", step)
        if run["config"] and run["metrics"]:  # for the tab HPARAMS; add_hparams() would log the metrics a second time
            plain = {key: each if isinstance(each, (bool, int, float)) else str(each) for key, each in run["config"].items()}
            for part in hparams(plain, run["metrics"]):
                writer.file_writer.add_summary(part)

    def _close(self, run: dict[str, Any], failed: bool) -> None:
        if "writer" in run:
            run["writer"].close()
