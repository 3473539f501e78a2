"""The types of the options in conf/train.yaml, so that a wrong one is reported before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

CONF = Path(__file__).parents[2] / "conf"


@dataclass
class TrainConfig:
    """The options of scripts/train.py; conf/train.yaml explains them and has their defaults."""

    task: Any = MISSING
    inner: Any = MISSING
    outer: Any = MISSING
    scheduler: Any = None
    hoptim: Any = MISSING
    name: str = MISSING
    seed: int = MISSING
    outer_steps: int = MISSING
    inner_steps: int = MISSING
    epochs: Optional[float] = None  # noqa: UP045 (OmegaConf knows no other way on Python 3.10)
    batch_size: Optional[int] = None  # noqa: UP045
    val_batch_size: Optional[int] = None  # noqa: UP045
    every: int = MISSING
    warmup: int = MISSING
    options: dict[str, Any] = field(default_factory=dict)
    folds: Optional[int] = None  # noqa: UP045
    retrain: bool = MISSING
    learn: bool = MISSING
    hyperparameters: Optional[str] = None  # noqa: UP045
    resume: bool = MISSING
    checkpoint_every: int = MISSING
    sharded: bool = MISSING
    threads: int = MISSING
    plots: bool = MISSING
    baselines: dict[str, Any] = field(default_factory=dict)
    root: str = MISSING


def check(cfg: DictConfig) -> None:
    """Raise ValueError for a number that no run can have, and for recipes that the task would silently ignore."""
    least = {"batch_size": 1, "val_batch_size": 1, "inner_steps": 1, "outer_steps": 1, "folds": 2, "every": 1}
    for name, bound in least.items():
        if cfg[name] is not None and cfg[name] < bound:
            raise ValueError(f"{name}={cfg[name]}: give {bound} or more")
    if cfg.epochs is not None and cfg.epochs <= 0:
        raise ValueError(f"epochs={cfg.epochs}: give a number above 0")
    if cfg.hoptim.get("recipe") and "recipes" not in cfg.task:
        raise ValueError(
            f"hoptim/recipe={list(cfg.hoptim.recipe)}: {cfg.task._target_} takes no recipes; task=classification does"
        )


def register() -> None:
    """Make the types known to Hydra as the config ``schema``."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


def composed(experiment: str, root: str, seed: int, *overrides: str) -> DictConfig:
    """The config of an experiment, without trackers and plots, for a study that trains it by itself."""
    register()
    words = [f"experiment={experiment}", "hoptim/tracker=[]", "plots=false", f"task.root={root}", f"seed={seed}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*words, *overrides])
