"""The types of the options in conf/train.yaml: what is of another type is named before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class TrainConfig:
    """conf/train.yaml says what each is, and has its default."""

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
    threads: int = MISSING
    plots: bool = MISSING
    baselines: dict[str, Any] = field(default_factory=dict)
    root: str = MISSING


def register() -> None:
    """Make the types known to Hydra as the config ``schema``."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
