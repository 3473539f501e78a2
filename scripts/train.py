"""Train a task and learn its hyperparameters meanwhile: ``python scripts/train.py --help``."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tasks import boards as running
from tasks import schema
from tasks.checkpoint import ResumeError, keep_rows, load_checkpoint, save_checkpoint, write_atomically, written_config
from tasks.figures import check_finite, figures_of, result_of
from tasks.folds import cross_validate
from tasks.run import Run
from tasks.task import measure

from hoptim.tracking import Board, JsonLines

log = logging.getLogger("hoptim.train")
VALUES = "hyperparameters.safetensors"
schema.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one job. A sweep calls this for each of its jobs, and goes on after a job that fails, with an infinite loss."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume and (finished := finished_result(cfg, folder)):
        log.info("%s is finished: nothing is run again", folder)
        return float(finished["val_loss"])
    try:
        schema.check(cfg)
        if cfg.plots:
            import tasks.plots  # noqa: F401 (reports a missing matplotlib before any training)
        for label, own in baselines(cfg).items():
            train(own, folder / "baselines" / label)
        loss = cross_validate(cfg, folder) if cfg.folds else train(cfg, folder)
    except BaseException as error:
        if isinstance(error, ResumeError):
            raise  # the folder keeps the result of the run that is in it
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        failure = {"status": "failed", "name": cfg.name, "seed": cfg.seed, "error": f"{type(cause).__name__}: {cause}"}
        with suppress(OSError):  # the error may be a full disk
            write_atomically(folder / "result.json", json.dumps(failure).encode() + b"\n")
        running.abandon()
        if HydraConfig.get().mode == RunMode.MULTIRUN and isinstance(error, Exception):
            log.exception("%s failed: the sweep goes on, and is compared without it", folder)
            return math.inf
        raise
    if cfg.plots and HydraConfig.get().mode != RunMode.MULTIRUN and os.environ.get("RANK", "0") == "0":
        say_where(folder)
    return loss


def say_where(folder: Path) -> None:
    """Make the page of the finished run, and say where it and the pictures are."""
    if pictures := sorted(map(str, folder.glob("*.png"))):
        log.info("pictures: %s", "  ".join(pictures))
    try:
        from tasks.dashboards import page
        from tasks.dashboards.read import read_run

        (folder / "dashboard.html").write_text(page.of_run(read_run(folder)))
        log.info("page: %s", folder / "dashboard.html")
    except ImportError as error:
        log.info("no page: %s. After pip install '.[dashboard]', scripts/dashboard %s makes it", error, folder)
    except OSError as error:
        log.warning("no page: %s", error)


def baselines(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config of each plain training that the picture of the losses shows beside this run."""
    found = {}
    for label, changes in cfg.baselines.items() if cfg.plots else ():
        own = cfg.copy()
        with open_dict(own):  # a baseline may have recipes that the experiment does not have
            own.merge_with(
                {"learn": False, "retrain": False}, changes, {"name": label, "plots": False, "hyperparameters": None}
            )
            own.hoptim.tracker, own.baselines = None, {}
        found[label] = own
    return found


def finished_result(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """The result in the folder, if it is finished and of this very config."""
    try:
        result, config = json.loads((folder / "result.json").read_text()), (folder / "config.yaml").read_text()
    except (OSError, json.JSONDecodeError):
        return None
    return result if result["status"] == "finished" and config == written_config(cfg) else None


def train(cfg: DictConfig, folder: Path) -> float:
    """Run the config, write the files into ``folder``, and return the last validation loss."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(cfg.threads)
    run = Run.of(cfg)
    main_process = run.processes.is_main
    if not cfg.resume and main_process:
        for name in ("checkpoint.pt", "result.json", "metrics.jsonl", "hypersteps.jsonl"):
            (folder / name).unlink(missing_ok=True)
    if cfg.learn and max(cfg.every, cfg.warmup) > run.total_steps:
        told = (cfg.every, cfg.warmup, run.total_steps)
        log.warning("every=%d and warmup=%d leave no hyperstep in %d inner steps: nothing will be learned", *told)
    saved = load_checkpoint(folder / "checkpoint.pt", run) if cfg.resume else None
    begun = saved["outer_step"] if saved else 0
    metrics, rows, boards = JsonLines(path=folder / "metrics.jsonl"), [], []
    if main_process:
        rows = keep_rows(metrics, begun)
        write_atomically(folder / "config.yaml", written_config(cfg).encode())
        boards = running.start(cfg, folder, run.trackers, saved["boards"] if saved else {})

    with progress_bar(visible=main_process) as bar:
        said = time.monotonic()
        job = bar.add_task(cfg.name, total=run.outer_steps, completed=begun, losses="")
        for outer_step in range(begun + 1, run.outer_steps + 1):
            seconds = run.advance()
            measured = measure(run.task, run.problem.model, run.problem.hparams, run.parts)
            row = {"outer_step": outer_step, **measured, **figures_of(run, seconds)}
            check_finite(row, measured)
            if main_process:
                metrics.log(row)
                rows.append(row)
            for board in boards:
                board.log(row, run.optimizer.record.hyperparameters if run.optimizer.record else None)
            if outer_step % cfg.checkpoint_every == 0 or outer_step == run.outer_steps:
                save_checkpoint(folder / "checkpoint.pt", run, outer_step, boards)
            losses = f"train {row['train_loss']:.3f}  val {row['val_loss']:.3f}  {run.optimizer.hyper_steps} hypersteps"
            bar.update(job, completed=outer_step, losses=losses)
            is_tenth = 10 * outer_step // run.outer_steps > 10 * (outer_step - 1) // run.outer_steps
            if main_process and bar.disable and outer_step < run.outer_steps and (is_tenth or time.monotonic() > said + 60):
                said = time.monotonic()
                log.info("%s seed %s: %d of %d  %s", cfg.name, cfg.seed, outer_step, run.outer_steps, losses)
    return finish(run, folder, rows, boards)


def finish(run: Run, folder: Path, rows: list[dict[str, Any]], boards: list[Board]) -> float:
    """Write result, hyperparameters and pictures. The result has no times in it, so that a resumed run writes the same."""
    cfg, problem = run.cfg, run.problem
    measured = measure(run.task, problem.model, problem.hparams, run.parts)
    if cfg.retrain:
        again = measure(run.task, run.retrained(), problem.hparams, run.parts)
        measured |= {f"retrained_{name}": value for name, value in again.items()}
    if not run.processes.is_main:
        return measured["val_loss"]
    result, values = result_of(cfg, problem, rows, measured)
    write_atomically(folder / VALUES, values)
    images = {}
    if cfg.plots:
        from tasks import plots

        images = {path.stem: path for path in plots.of_run(run, rows, folder, measured.get("retrained_test_loss"))}
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode() + b"\n")
    running.finish(boards, result, {f"plots/{name}": path for name, path in images.items()}, folder / VALUES)
    figures = "  ".join(f"{name} {measured[f'{name}_loss']:.4f}" for name in run.parts)
    if cfg.retrain:
        figures += f"  retrained: test {measured['retrained_test_loss']:.4f}"
    failed = result["hypersteps"] - result["moved"]
    solves = f"({result['hypersteps']} hypersteps, {result['moved']} moved)"
    log.info("%s seed %s: %s  %s  -> %s", cfg.name, cfg.seed, figures, solves, folder)
    if 2 * failed > result["hypersteps"]:
        why = ", ".join(f"{count} {status}" for status, count in result["statuses"].items())
        log.warning("%d of %d hypersteps failed and moved nothing: %s", failed, result["hypersteps"], why)
    return measured["val_loss"]


def progress_bar(visible: bool) -> Progress:
    """A bar with losses, hypersteps and the time left; hidden if the output is not a terminal, which gets plain lines."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))


if __name__ == "__main__":
    # The jobs of a sweep may be processes that submitit starts; they have to find the modules beside this file.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    main()
