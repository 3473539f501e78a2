"""The files that let a run go on after a kill: the checkpoint, and the rows of figures up to it."""

from __future__ import annotations

import io
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common.records import read_json_lines
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_map

from hoptim.problem.sharding import ShardedWeight, local
from hoptim.tracking import Board, JsonLines
from hoptim.training import files
from tasks.boards import ids
from tasks.run import Run

log = logging.getLogger("hoptim.train")
SHARD = {"shard", "shape", "axes"}  # what is kept of a sharded tensor
MUST_AGREE = (
    "name", "seed", "task", "inner", "outer", "scheduler", "inner_steps", "batch_size", "val_batch_size", "every", "warmup",
    "options", "folds", "learn", "hyperparameters", "threads", "sharded",
)  # fmt: skip


class ResumeError(ValueError):
    """The run in the folder cannot be resumed. Nothing in the folder was changed."""


def fingerprint(cfg: DictConfig, processes: int) -> str:
    """All options that have to be the same when a run is resumed, as text."""
    chosen = {
        key: OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in MUST_AGREE
    }
    for part in ("method", "recipe"):
        chosen[part] = OmegaConf.to_container(cfg.hoptim[part], resolve=True) if part in cfg.hoptim else None
    return json.dumps({**chosen, "processes": processes}, sort_keys=True)


def save_checkpoint(path: Path, run: Run, outer_step: int, boards: list[Board]) -> None:
    """Write all that the rest of the run depends on, as tensors and plain values.

    Each process has its own state: besides its training batches and random numbers, the optimizer's has where it is in its
    validation batches and in what order these come, and the model's has buffers, such as the statistics of its own batches.
    If the model is sharded, each has its shards of the weights and of the inner optimizer's state.
    """
    own = {**run.state_dict(), "rng": torch.get_rng_state()}
    ranks = run.processes.gathered(without_meshes(own) if run.processes.sharded else own)
    if not run.processes.is_main:
        return
    state = {
        "fingerprint": fingerprint(run.cfg, run.processes.size),
        "outer_step": outer_step,
        "ranks": ranks,
        "boards": ids(boards),
    }
    with open(path.with_name("metrics.jsonl"), "rb") as rows:
        os.fsync(rows.fileno())  # a resumed run needs the rows up to its checkpoint
    file = io.BytesIO()
    torch.save(state, file)
    write_atomically(path, file.getvalue())


def load_checkpoint(path: Path, run: Run) -> Any:
    """Restore the state of the run and return the checkpoint, or ``None`` if there is none yet."""
    if not path.exists():
        log.info("no checkpoint in %s yet: the run starts from its beginning", path.parent)
        return None
    saved = read_checkpoint(path)
    if saved["fingerprint"] != (here := fingerprint(run.cfg, run.processes.size)):
        raise ResumeError(f"{path} is of another run: {differences(saved['fingerprint'], here)}; use resume=false")
    if saved["outer_step"] > run.outer_steps:
        raise ResumeError(
            f"{path} is at outer step {saved['outer_step']}, past outer_steps={run.outer_steps}; use resume=false"
        )
    own = saved["ranks"][run.processes.rank]
    if run.processes.sharded:
        own = on_mesh(own, next(run.problem.model.parameters()).device_mesh)
    run.load_state_dict(own)
    torch.set_rng_state(own["rng"])
    return saved


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; raise ``ResumeError`` if it is damaged or not one of scripts/train.py."""
    try:
        saved = files.read_whole(path)
        if not {"fingerprint", "ranks"} <= saved.keys():
            raise ValueError("it was not written by this scripts/train.py")
        return saved
    except Exception as error:
        reason, remedy = str(error).partition(". ")[0], "put a copy in its place, or start over: resume=false"
        raise ResumeError(f"{path} is damaged or can't be read: {reason}; {remedy}") from error


def differences(there: str, here: str) -> str:
    """What differs between two fingerprints, for an error."""
    saved, own = json.loads(there), json.loads(here)
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    return "; ".join(f"{name} is {json.dumps(saved.get(name))} there and {json.dumps(own.get(name))} here" for name in names)


def without_meshes(state: Any) -> Any:
    """The state with this process's shard in place of each sharded tensor: a file can't hold the processes that share it."""

    def plain(t: Any) -> Any:
        if not hasattr(t, "device_mesh"):
            return t
        axes = [None if placement.is_replicate() else placement.dim for placement in t.placements]
        return {"shard": local(t), "shape": list(t.shape), "axes": axes}

    return tree_map(plain, state)


def on_mesh(state: Any, mesh: Any) -> Any:
    """The state of which :func:`without_meshes` was taken, with its tensors sharded over these processes."""
    from torch.distributed.tensor import Replicate, Shard  # takes long to import, and few runs need it

    def is_shard(part: Any) -> bool:
        return isinstance(part, dict) and part.keys() == SHARD

    def sharded(part: Any) -> Any:
        if not is_shard(part):
            return part
        placements = tuple(Replicate() if axis is None else Shard(axis) for axis in part["axes"])
        own = part["shard"]
        return ShardedWeight(mesh, placements, torch.Size(part["shape"]), own.shape).tensor(own)

    return tree_map(sharded, state, is_leaf=is_shard)


def keep_rows(metrics: JsonLines, last: int) -> list[dict[str, Any]]:
    """Keep the rows up to outer step ``last``. A killed run may have written more of them, the last one perhaps in part."""
    path, rows = Path(metrics.path), []
    if last and path.exists():
        lines = path.read_text().splitlines()[:last]
        with suppress(json.JSONDecodeError):
            rows = [json.loads(line) for line in lines]
    if [row["outer_step"] for row in rows] != list(range(1, last + 1)):
        raise ResumeError(f"{path} does not hold the {last} rows up to the checkpoint's outer step; use resume=false")
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of figures of the run in a folder."""
    return read_json_lines(folder / "metrics.jsonl")


def written_config(cfg: DictConfig) -> str:
    """The config as text for config.yaml, the same whether or not the run was resumed."""
    return OmegaConf.to_yaml(OmegaConf.merge(cfg, {"resume": False}), resolve=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write the whole file or leave the old one."""
    files.write_atomically(path, data, "make room, or choose another root; resume=true continues from the last checkpoint")
