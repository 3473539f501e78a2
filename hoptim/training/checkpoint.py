"""Checks of a state before an optimizer loads it: it has to be complete, and of the same model. Or it is a bare one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch.optim import Optimizer

from hoptim.problem.problem import Problem
from hoptim.problem.sharding import local

KEY = "hoptim"  # the entry that is added to the inner optimizer's own state
VERSION = 1  # of this entry
REQUIRED = ("version", "hparams", "inner_steps")
REQUIRED_OUTER = (
    *REQUIRED, "outer", "hyper_steps", "solver_state", "last_gradient", "trajectory", "val_batches", "train_batches"
)  # fmt: skip
DAMAGED = f"the {KEY!r} entry of this state_dict lacks {{missing}}: it is damaged; load an earlier checkpoint"
BARE = (
    f"this state_dict has no {KEY!r} entry: it is a bare optimizer's. It was loaded into the inner optimizer, while "
    "hyperparameters, the outer optimizer and counters stay as they are. If it was a BilevelOptimizer's, something has "
    "dropped the entry, as helpers of torch.distributed.checkpoint do: take hoptim.save_checkpoint and load_checkpoint"
)
SHOWN = 5  # an error lists so many differing weights

Shapes = list[tuple[str, list[int]]]


def held_weights(inner: Optimizer, problem: Problem) -> Shapes:
    """Names and shapes of the inner optimizer's tensors, in its order, by which torch assigns a loaded state."""
    names = {id(p): name for name, p in problem.named_parameters()}
    return [(names.get(id(p), "?"), list(p.shape)) for group in inner.param_groups for p in group["params"]]


def held_shards(problem: Problem) -> dict[str, Any]:
    """How this rank's shards are cut, as an entry ``"shards"`` of plain values; none where nothing is sharded."""
    if not problem.is_sharded:
        return {}
    sharded: dict[str, Any] = {name: p for name, p in problem.named_parameters() if hasattr(p, "device_mesh")}
    cuts = {name: [str(p.placements), list(p.device_mesh.shape), list(local(p).shape)] for name, p in sharded.items()}
    return {"shards": {"rank": problem.ranks.rank, "ranks": problem.ranks.size, "weights": cuts}}


def check_loadable(
    state_dict: Mapping[str, Any], weights: Shapes, required: Sequence[str], shards: Mapping[str, Any] | None = None
) -> None:
    """Check that a state is that of a BilevelOptimizer, of no newer version, complete, and of these weights; or a bare one.

    ``shards`` is what :func:`held_shards` returns here.

    Raises:
        ValueError: it is damaged, of a newer version, of another model, or of other shards.
    """
    if KEY not in state_dict:
        return
    saved = state_dict[KEY]
    if missing := [name for name in required if name not in saved]:
        raise ValueError(DAMAGED.format(missing=missing))
    if saved["version"] > VERSION:
        raise ValueError(f"this state_dict is of version {saved['version']}, newer than {VERSION}: upgrade hoptim")
    _check_shards(saved.get("shards"), (shards or {}).get("shards"))
    pairs = zip_longest(saved.get("weights", weights), weights)  # users drop the entry if weights were renamed
    if differing := [f"{_shown(there)} there is {_shown(here)} here" for there, here in pairs if there != here]:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ValueError(
            f"this state_dict is another model's: {'; '.join(differing[:SHOWN])}{more}. Build the model as it was; if its "
            f"weights were only renamed, drop state_dict[{KEY!r}]['weights']"
        )


def _shown(weight: tuple[str, list[int]] | None) -> str:
    return f"{weight[0]} {tuple(weight[1])}" if weight else "nothing"


def _check_shards(there: Any, here: Any) -> None:
    """Raise ``ValueError`` unless the shards are of the same rank of as many, and are cut alike."""
    if there == here:
        return
    raise ValueError(
        f"this state_dict is {_described(there)}, and here it is {_described(here)}. A rank can load only what the same "
        "rank of as many has saved of weights that are cut alike: take hoptim.save_checkpoint and hoptim.load_checkpoint, "
        "for any number of ranks"
    )


def _described(shards: Any) -> str:
    return f"of shards of rank {shards['rank']} of {shards['ranks']}" if shards else "of whole weights"
