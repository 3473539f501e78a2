"""What a BilevelOptimizer adds to its ``state_dict()``, and how that is put back: tensors and plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch.optim import Optimizer

from hoptim.problem.data import Batches
from hoptim.problem.problem import Problem
from hoptim.training.progress import Progress
from hoptim.validation import describe_type, is_whole

VERSION = 2  # of what is added under KEY
KEY = "hoptim"
REQUIRED = ("version", "outer", "hparams", "inner_steps", "hyper_steps", "solver_state", "val_batches", "train_batches")
DAMAGED = f"the {KEY!r} entry of this state_dict lacks {{missing}}: it is damaged; load an earlier checkpoint"
SHOWN = 5  # differing weights that an error lists


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
            "weights": _held(self.inner, self.problem),
            "outer": self.outer.state_dict(),
            "hparams": dict(self.problem.hparams.state_dict()),
            **self.progress.state_dict(),
            "val_batches": self.val_batches.state_dict(),
            "train_batches": None if self.train_batches is None else self.train_batches.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put it back."""
        self.problem.hparams.load_state_dict(saved["hparams"])
        self.outer.load_state_dict(saved["outer"])
        self.progress.load_state_dict(saved, self.problem, self.inner)
        self.val_batches.load_state_dict(saved["val_batches"])
        if self.train_batches is not None and saved["train_batches"] is not None:
            self.train_batches.load_state_dict(saved["train_batches"])


def check_loadable(state_dict: dict[str, Any], inner: Optimizer, problem: Problem) -> None:
    """A state is one of a BilevelOptimizer's, of no newer version, whole, and of the same weights."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {describe_type(state_dict)}: give what optimizer.state_dict() returned")
    if KEY not in state_dict:
        raise ValueError(
            f"this state_dict has no {KEY!r} entry: it is a bare optimizer's. Load it with optimizer.inner.load_state_dict()"
            ". Helpers of torch.distributed.checkpoint drop the entry: hand them optimizer.inner, and save the entry beside"
        )
    saved = state_dict[KEY]
    version: Any = saved.get("version") if isinstance(saved, Mapping) else None
    if not is_whole(version):
        raise ValueError(DAMAGED.format(missing=["version"]))
    if version > VERSION:
        raise ValueError(f"this state_dict is of version {version}, newer than {VERSION}: upgrade hoptim")
    if missing := [name for name in REQUIRED if name not in saved]:
        raise ValueError(DAMAGED.format(missing=missing))
    here = _held(inner, problem)
    if differing := [_differing(*pair) for pair in zip_longest(saved.get("weights", here), here) if pair[0] != pair[1]]:
        shown = "; ".join(differing[:SHOWN]) + f"; and {len(differing) - SHOWN} more" * (len(differing) > SHOWN)
        raise ValueError(
            f"this state_dict is another model's: {shown}. Build the model as it was; if its weights were only renamed, "
            f"drop state_dict[{KEY!r}]['weights']"
        )


def _held(inner: Optimizer, problem: Problem) -> list[tuple[str, list[int]]]:
    """The names and shapes of what the inner optimizer holds, in its order, by which torch puts its state back."""
    names = {id(p): name for name, p in problem.model.named_parameters()}
    return [(names.get(id(p), "?"), list(p.shape)) for group in inner.param_groups for p in group["params"]]


def _differing(saved: tuple[str, list[int]] | None, held: tuple[str, list[int]] | None) -> str:
    there, here = (f"{one[0]} {tuple(one[1])}" if one else "nothing" for one in (saved, held))
    return f"{there} there is {here} here"
