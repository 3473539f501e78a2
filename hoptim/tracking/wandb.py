"""A tracker that logs to Weights & Biases."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hoptim.tracking.board import Array, Board, Files, Images, edges


@dataclass(kw_only=True, eq=False)
class WandB(Board):
    """Weights & Biases: the figures of each hyperstep, the hyperparameters, and histograms of large ones.

    It logs to the open run, or opens one: offline unless ``mode`` or ``WANDB_MODE`` says otherwise. Without an account or a
    network the run is written offline, and a warning says how to send it later. Each figure is logged once, as
    ``metrics/…``, ``hypergradient/…``, ``cost/…`` or ``hyperparameters/…``. The run says whether a chart has inner or outer
    steps on its axis; each chart lets you choose the other.

    Args:
        project: the W&B project, default ``hoptim``.
        name: the run's name; ``None`` lets W&B choose.
        group: the group of the run, such as a sweep.
        job_type: the kind of run within its group, such as its settings without the seed.
        tags: words by which W&B finds the run; default: none.
        id: the id of a run to continue; ``None`` for a new one.
        directory: where W&B keeps its files; ``None`` for W&B's own default.
        mode: ``online``, ``offline``, ``disabled`` or ``shared``; ``None``: ``WANDB_MODE``, else ``offline``.
        histograms: log a histogram of every hyperparameter tensor of more than twelve numbers, default true.
    """

    package: ClassVar[str] = "wandb"
    project: str = "hoptim"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] | None = None
    id: str | None = None
    directory: str | os.PathLike[str] | None = None
    mode: str | None = None

    def _open(self, config: dict[str, Any]) -> Any:
        import wandb

        run = wandb.run or self._begin(config, self.mode or os.environ.get("WANDB_MODE") or "offline")
        for section in ("metrics", "hypergradient", "cost", "hyperparameters", "histograms"):
            axis = "inner_step" if section == "metrics" else "outer_step"
            run.define_metric(axis, hidden=True)
            run.define_metric(f"{section}/*", step_metric=axis)
        return run

    def _begin(self, config: dict[str, Any], mode: Any) -> Any:
        """A new run in this mode. Without an account or a network it is offline."""
        import wandb

        given: Any = {key: getattr(self, key) for key in ("project", "name", "group", "job_type", "id")}
        given |= {"dir": self.directory, "config": config, "settings": wandb.Settings(silent=True, console="off")}
        given |= {"resume": "allow" if self.id else None, "tags": [tag[:64] for tag in self.tags or () if tag]}
        try:
            return wandb.init(**given, mode=mode)
        except (wandb.errors.Error, OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            run, reason = wandb.init(**given, mode="offline"), str(error).partition("\n")[0]
            warnings.warn(
                f"W&B did not start in mode {mode!r}: {reason} The run is written offline. To send it later, log in by "
                f"`wandb login` if you have not, and then: wandb sync {run.settings.sync_dir}",
                stacklevel=2,
            )
            return run

    def _log(self, run: Any, row: Mapping[str, Any], large: Mapping[str, Array]) -> None:
        import wandb

        counts = {name: np.histogram(numbers, edges(numbers)) for name, numbers in large.items()}
        run.log({**row, **{name: wandb.Histogram(np_histogram=each) for name, each in counts.items()}})

    def _end(self, run: Any, summary: Mapping[str, Any], images: Images, artifacts: Files) -> None:
        import wandb

        run.summary.update(dict(summary))
        if images:
            run.log({name: wandb.Image(str(path)) for name, path in images.items()})
        for kind, paths in artifacts.items():
            artifact, folder = wandb.Artifact(f"{kind}-{run.id}", type=kind), Path(run.dir).parent / "artifacts" / kind
            folder.mkdir(parents=True, exist_ok=True)
            for path in paths:  # copies in the run's folder, since W&B would make its own in the home folder
                artifact.add_file(str(shutil.copy2(path, folder)), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

    def _close(self, run: Any, failed: bool) -> None:
        run.finish(exit_code=int(failed))  # so that no later training logs into it
        with suppress(OSError, AttributeError):  # only W&B's log file says that records could not be written
            log = Path(run.settings.log_internal)
            if lost := log.read_text(errors="replace").count("failed to save record"):
                warnings.warn(f"W&B could not write {lost} records, a full disk perhaps: see {log}", stacklevel=2)
