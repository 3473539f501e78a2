"""Trackers: hooks that write each hyperstep to a dashboard, the terminal or a file. See hoptim/tracking/README.md."""

from hoptim.tracking.board import Board
from hoptim.tracking.lines import Console, JsonLines
from hoptim.tracking.mlflow import MLflow
from hoptim.tracking.tensorboard import TensorBoard
from hoptim.tracking.wandb import WandB

__all__ = ["Board", "Console", "JsonLines", "MLflow", "TensorBoard", "WandB"]
