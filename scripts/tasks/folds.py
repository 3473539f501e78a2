"""Learning by cross-validation, ``folds=3``: the same training loop on folds of train and val, then on both together."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

import hoptim
from hoptim.tracking import Board
from tasks import boards as running
from tasks.checkpoint import ResumeError, fingerprint, write_atomically, written_config
from tasks.figures import result_of
from tasks.processes import Processes
from tasks.run import batches_for, outer_of, scheduler_for, steps
from tasks.task import Task, batches_of, measure

log = logging.getLogger("hoptim.train")


def cross_validate(cfg: DictConfig, folder: Path) -> float:
    """Fit, write the result, the hyperparameters and a row for each hyperstep, and return the loss on the held-out folds.

    With ``resume=true`` the fit goes on from fit.pt. Warm-up and hypersteps are those of :class:`hoptim.CrossValidated`;
    the options ``every`` and ``warmup`` are ignored.

    Raises:
        ValueError: an option that a fit by folds cannot have, or several processes.
        ResumeError: fit.pt is of a fit with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task, processes = instantiate(cfg.task), Processes.join(cfg.sharded)
    check_folds(cfg, task, processes)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    parts = task.setup(cfg.seed)
    joined = torch.cat([parts["train"], parts["val"]]).unique()
    hparams = task.hparams(task.model())
    trackers = [instantiate(options) for options in (cfg.hoptim.get("tracker") or {}).values()]
    plain = [tracker for tracker in trackers if not isinstance(tracker, Board)]
    saved = saved_fit(cfg, folder)
    boards = running.start(cfg, folder, trackers, saved.get("boards", {}))
    this = {"fingerprint": fold_fingerprint(cfg), "boards": running.ids(boards)}
    write_atomically(folder / "fit.json", json.dumps(this).encode())

    def train(model: nn.Module, optimizer: hoptim.BilevelOptimizer, examples: Tensor) -> None:
        batches, scheduler = batches_for(cfg, joined[examples], processes), scheduler_for(cfg, optimizer)
        state = [batches] if scheduler is None else [batches, scheduler]
        for _ in optimizer.resumable(range(cfg.outer_steps), *state):
            steps(optimizer, batches, cfg.inner_steps, scheduler)

    found = hoptim.CrossValidated(
        task.model,
        hparams,
        task.train_loss,
        task.val_loss,
        inner=lambda model: instantiate(cfg.inner)(model.parameters()),
        outer=outer_of(cfg, hparams, len(joined)),
        examples=len(joined),
        steps=cfg.outer_steps * cfg.inner_steps,
        folds=cfg.folds,
        options=dict(cfg.options) or None,
        hypergradient=instantiate(cfg.hoptim.method),
        val_batches=lambda held_out: batches_of(joined[held_out], cfg.val_batch_size),
        hooks=[*plain, *boards],
    ).fit(train, checkpoint=folder / "fit.pt")
    rows = [{"outer_step": row["hyper_step"], **row} for row in found.history]
    rows[-1]["trainings"] = found.cost
    measured = {
        "val_loss": rows[-1]["val_loss"],
        **measure(task, found.model, hparams, {"train": joined, "test": parts["test"]}),
    }
    problem = hoptim.Problem(found.model, hparams, task.train_loss, task.val_loss)
    result, values = result_of(cfg, problem, rows, measured)
    write_atomically(folder / "config.yaml", written_config(cfg).encode())
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_atomically(folder / "hyperparameters.safetensors", values)
    pictures = task.draw(problem, folder) if cfg.plots else []
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode() + b"\n")
    images = {f"plots/{path.stem}": path for path in pictures}
    running.finish(boards, result, images, folder / "hyperparameters.safetensors")
    words = f"held out {result['val_loss']:.4f}  test {result['test_loss']:.4f}  ({found.cost:.1f} trainings)"
    log.info("%s seed %s, %d folds: %s  -> %s", cfg.name, cfg.seed, cfg.folds, words, folder)
    return float(result["val_loss"])


def check_folds(cfg: DictConfig, task: Task, processes: Processes) -> None:
    """Raise ValueError if the config or the task asks for something that a fit by folds does not do."""
    if processes.size > 1:
        raise ValueError(f"folds={cfg.folds} in {processes.size} processes: start scripts/train.py without torchrun")
    asked = {"learn=false": not cfg.learn, "epochs": cfg.epochs is not None, "hyperparameters": bool(cfg.hyperparameters)}
    for option, there in asked.items():
        if there:
            raise ValueError(
                f"folds={cfg.folds} with {option}: a fit by folds learns, from the start, in outer_steps · inner_steps"
            )
    if type(task).progress is not Task.progress or type(task).final_model is not Task.final_model:
        raise ValueError(
            f"folds={cfg.folds}: {type(task).__name__} changes its model on the way, which a fit by folds does not"
        )


def fold_fingerprint(cfg: DictConfig) -> str:
    """All options that have to be the same when a fit is resumed, the number of steps included."""
    return json.dumps([fingerprint(cfg, 1), cfg.outer_steps])


def saved_fit(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The content of fit.json for the fit to resume; without ``resume`` the files of an earlier fit are removed."""
    path = folder / "fit.json"
    if not cfg.resume:
        for name in ("fit.pt", "fit.json", "result.json", "metrics.jsonl", "hypersteps.jsonl"):
            (folder / name).unlink(missing_ok=True)
    if not (folder / "fit.pt").exists():
        return {}
    saved = json.loads(path.read_text()) if path.exists() else {}
    if saved.get("fingerprint") != (own := fold_fingerprint(cfg)):
        raise ResumeError(
            f"{folder / 'fit.pt'} is of another fit: {saved.get('fingerprint')} is not {own}; use resume=false"
        )
    return saved
