"""Open and close a run of scripts/train.py on W&B, TensorBoard and MLflow, with its name and its place in a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hoptim.tracking import Board

_open: list[Board] = []


def start(cfg: DictConfig, folder: Path, trackers: Sequence[Any], ids: Mapping[str, str | None]) -> list[Board]:
    """Start a run on each board among the trackers; continue the board's run if ``ids`` has an id for it.

    Options of a board that the config leaves open are filled in: the name; the group, which is the folder of the sweep's
    results; the job type, which is the same for runs that differ only in the seed; the tags, which are the experiment, the
    seed and each override; the run's folder.
    """
    if not any(isinstance(tracker, Board) for tracker in trackers):
        return []
    job, sweep = HydraConfig.get().job, HydraConfig.get().mode == RunMode.MULTIRUN
    overrides = [part for part in job.override_dirname.split("/") if part]
    filling = {
        "name": f"{cfg.name}/seed={cfg.seed}",
        "group": Path(cfg.root).name if sweep else cfg.name,
        "job_type": "/".join([cfg.name, *overrides]),
        "tags": [cfg.name, f"seed={cfg.seed}", *overrides],
        "directory": folder,
    }
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    config.pop("baselines", None)  # the settings of other trainings would look like this one's
    for tracker in trackers:
        if isinstance(tracker, Board):
            _open.append(filled(tracker, {**filling, "id": ids.get(type(tracker).__name__)}))
            _open[-1].start(config)
    return list(_open)


def filled(board: Board, defaults: Mapping[str, Any]) -> Board:
    """The board, with these options in place of its options that are ``None``.

    >>> from hoptim.tracking import WandB
    >>> filled(WandB(name="mine"), {"name": "iris/seed=0", "group": "iris", "directory": "runs"})
    WandB(histograms=True, project='hoptim', name='mine', group='iris', ..., directory='runs', mode=None)
    """
    names = {option.name for option in fields(board) if option.init and getattr(board, option.name) is None}
    return replace(board, **{key: value for key, value in defaults.items() if key in names})


def ids(boards: Sequence[Board]) -> dict[str, str | None]:
    """The id of each board's run, for a checkpoint."""
    return {type(board).__name__: board.run_id for board in boards}


def finish(boards: Sequence[Board], result: Mapping[str, Any], images: Mapping[str, Path], hyperparameters: Path) -> None:
    """Log the result, the pictures and the learned hyperparameters, and close the runs."""
    artifacts = {"hyperparameters": [hyperparameters], **({"pictures": list(images.values())} if images else {})}
    for board in boards:
        board.finish(result, images, artifacts)
    _open.clear()


def abandon() -> None:
    """Close the runs as failed after an error, so that no later training logs into them."""
    for board in _open:
        board.abandon()
    _open.clear()
