"""The configs of scripts/train.py, composed without the script: its types of options are not among them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from jobs import ROOT
from omegaconf import DictConfig


def composed(*overrides: str) -> DictConfig:
    """The config of a run with these overrides."""
    ConfigStore.instance().store(name="schema", node={})
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*overrides])
