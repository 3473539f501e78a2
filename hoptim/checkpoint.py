"""What a BilevelOptimizer adds to its ``state_dict()``, and how that is put back: tensors and plain values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from hoptim.batches import Batches
from hoptim.problem import Problem
from hoptim.progress import Progress

VERSION = 2  # of what is added under KEY
KEY = "hoptim"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that the inner optimizer's ``state_dict()`` does not hold."""

    inner: Optimizer
    outer: Optimizer
    problem: Problem
    progress: Progress
    val_batches: Batches
    train_batches: Batches | None

    def state_dict(self) -> dict[str, Any]:
        """It, as it is now."""
        return {
            "version": VERSION,
            "outer": self.outer.state_dict(),
            "hparams": dict(self.problem.hparams.state_dict()),
            **self.progress.state_dict(),
            "val_batches": self.val_batches.state_dict(),
            "train_batches": None if self.train_batches is None else self.train_batches.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put it back."""
        self.outer.load_state_dict(saved["outer"])
        self.problem.hparams.load_state_dict(saved["hparams"])
        self.progress.load_state_dict(saved, self.problem, self.inner)
        self.val_batches.load_state_dict(saved["val_batches"])
        if self.train_batches is not None and saved["train_batches"] is not None:
            self.train_batches.load_state_dict(saved["train_batches"])


def check_loadable(state_dict: dict[str, Any]) -> None:
    """A state is one of a BilevelOptimizer's, and of no newer version."""
    if KEY not in state_dict:
        raise ValueError(
            f"this state_dict has no {KEY!r} entry: it is a bare optimizer's. Load it with optimizer.inner.load_state_dict()"
        )
    if state_dict[KEY]["version"] > VERSION:
        raise ValueError(f"this state_dict is of version {state_dict[KEY]['version']}, newer than {VERSION}: upgrade hoptim")
