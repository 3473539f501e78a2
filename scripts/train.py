"""Train a task and learn its hyperparameters on the way: ``python scripts/train.py --help``."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from safetensors.torch import save as packed
from tasks import boards as running
from tasks.checkpoint import ResumeError, keep_rows, load_checkpoint, read_rows, save_checkpoint, write_atomically
from tasks.processes import Processes
from torch import Tensor
from torch.nn import functional as F

import hoptim
from hoptim.tracking import Board, JsonLines

log = logging.getLogger("hoptim.train")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one job; a sweep calls this for each of its jobs."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        for label, own in baselines(cfg).items():
            train(own, folder / "baselines" / label)
        return train(cfg, folder)
    except ResumeError:
        raise
    except BaseException as error:
        failure = {"status": "failed", "name": cfg.name, "seed": cfg.seed, "error": f"{type(error).__name__}: {error}"}
        with suppress(OSError):  # the error may be a full disk
            write_atomically(folder / "result.json", json.dumps(failure).encode() + b"\n")
        running.abandon()
        raise


def baselines(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config of each plain training that the picture of the losses shows beside this one."""
    found = {}
    for label, changes in cfg.baselines.items() if cfg.plots else ():
        own = OmegaConf.merge(cfg, changes, {"name": label, "learn": False, "plots": False, "hyperparameters": None})
        with open_dict(own):
            own.hoptim.tracker = None
        found[label] = own
    return found


def train(cfg: DictConfig, folder: Path) -> float:
    """Run the config, write the files into ``folder``, and return the last validation loss."""
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.plots:
        import tasks.plots  # noqa: F401 (so that a missing matplotlib is reported before the training)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    task, processes = instantiate(cfg.task), Processes.join()
    data, problem = task.data(cfg.seed), processes.wrap(task.problem())
    if processes.rank:
        torch.manual_seed(cfg.seed + 1_000_003 * processes.rank)  # each process has examples and dropout masks of its own
    if cfg.hyperparameters:
        for name, value in load_file(cfg.hyperparameters).items():
            problem.hparams[name] = value
    trackers = [instantiate(options) for options in (cfg.hoptim.get("tracker") or {}).values()]
    optimizer = hoptim.BilevelOptimizer(
        instantiate(cfg.inner)(problem.model.parameters()),
        instantiate(cfg.outer)(problem.hparams.parameters()),
        problem,
        val_batches=[processes.share(data["val"])],
        hypergradient=instantiate(cfg.hoptim.method),
        every=cfg.inner_steps if cfg.learn else None,
        hooks=[tracker for tracker in trackers if not isinstance(tracker, Board)],
    )
    if not cfg.resume and processes.is_main:
        for name in ("checkpoint.pt", "result.json", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
    saved = load_checkpoint(folder / "checkpoint.pt", cfg, problem, optimizer, processes) if cfg.resume else None
    begun = saved["outer_step"] if saved else 0
    metrics, rows, boards = JsonLines(path=folder / "metrics.jsonl"), [], []
    if processes.is_main:
        rows = keep_rows(metrics, begun)
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        boards = running.start(cfg, folder, trackers, saved["boards"] if saved else {})
    train_batch = processes.share(data["train"])

    with progress_bar(visible=processes.is_main) as bar:
        job = bar.add_task(cfg.name, total=cfg.outer_steps, completed=begun, losses="")
        for outer_step in range(begun + 1, cfg.outer_steps + 1):
            seconds = inner_loop(optimizer, train_batch, cfg.inner_steps)
            row = {"outer_step": outer_step, **measure(problem, data), **describe(problem, optimizer, seconds)}
            if not all(torch.isfinite(torch.tensor(row[f"{part}_loss"])) for part in data):
                largest = max(spread["max"] for spread in row["hyperparameters"].values())
                raise FloatingPointError(
                    f"a loss is not finite after outer step {outer_step}, the largest hyperparameter {largest:.3g}: lower "
                    "inner.lr, or outer.lr if the hyperparameters ran away"
                )
            if processes.is_main:
                metrics.log(row)
                rows.append(row)
            for board in boards:
                board.log(row, optimizer.record.hyperparameters if optimizer.record else None)
            if outer_step % cfg.checkpoint_every == 0 or outer_step == cfg.outer_steps:
                save_checkpoint(folder / "checkpoint.pt", cfg, problem, optimizer, outer_step, boards, processes)
            losses = f"train {row['train_loss']:.3f}  val {row['val_loss']:.3f}  {optimizer.hyper_steps} hypersteps"
            bar.update(job, completed=outer_step, losses=losses)
    return finish(cfg, folder, problem, rows, boards) if processes.is_main else measure(problem, data)["val_loss"]


def inner_loop(optimizer: hoptim.BilevelOptimizer, batch: Any, steps: int) -> float:
    """A training loop as a user writes it; returns the seconds it took, hypersteps included."""
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = optimizer.loss(batch)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - begun


@torch.no_grad()
def measure(problem: hoptim.Problem, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Cross-entropy and accuracy on each part of the data, without dropout and penalty."""
    model = problem.model.eval()
    figures = {}
    for part, (x, y) in data.items():
        logits = model(x)
        figures[f"{part}_loss"] = F.cross_entropy(logits, y).item()
        figures[f"{part}_accuracy"] = (logits.argmax(1) == y).double().mean().item()
    model.train()
    return figures


def describe(problem: hoptim.Problem, optimizer: hoptim.BilevelOptimizer, seconds: float) -> dict[str, Any]:
    """The figures of the last hyperstep and the distribution of each hyperparameter."""
    record = optimizer.record
    row = record.row() if record else {"inner_step": optimizer.inner_steps, "hyper_seconds": 0.0}
    row |= {"solve_val_loss": row.pop("val_loss", None), "solve_train_loss": row.pop("train_loss", None)}
    spread = {}
    for name in problem.hparams.keys():  # noqa: SIM118 (a module, not a dict)
        value = problem.hparams[name].detach().double().flatten()
        quantiles = value.sort().values[[round(q * (len(value) - 1)) for q in QUANTILES]].tolist()
        spread[name] = {"mean": value.mean().item(), "min": quantiles[0], "max": quantiles[-1], "quantiles": quantiles}
    return {**row, "inner_seconds": seconds - row["hyper_seconds"], "hyperparameters": spread}


def finish(cfg: DictConfig, folder: Path, problem: hoptim.Problem, rows: list[dict[str, Any]], boards: list[Board]) -> float:
    """Write result, hyperparameters and pictures. The result holds no times, so that a resumed run writes the same."""
    last, hypersteps = rows[-1], [row for row in rows if "status" in row]
    result = {
        "status": "finished",
        "name": cfg.name,
        "seed": cfg.seed,
        "weights": sum(p.numel() for p in problem.weights().values()),
        "hyperparameters": sum(p.numel() for p in problem.leaves().values()),
        "inner_steps": last["inner_step"],
        "hypersteps": len(hypersteps),
        "moved": sum(row["moved"] for row in hypersteps),
        "statuses": dict(Counter(row["status"] for row in hypersteps)),
        "products": sum(row["products"] for row in hypersteps),
        **{
            f"{part}_{figure}": last[f"{part}_{figure}"]
            for part in ("train", "val", "test")
            for figure in ("loss", "accuracy")
        },
    }
    with torch.no_grad():
        values = {name: problem.hparams[name].detach().contiguous().clone() for name in problem.hparams.keys()}  # noqa: SIM118
    write_atomically(folder / "hyperparameters.safetensors", packed(values))
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode() + b"\n")
    images = {}
    if cfg.plots:
        from tasks import plots

        images = {f"plots/{name}": folder / f"{name}.png" for name in ("curves", "hyperparameters")}
        plain = {label: read_rows(folder / "baselines" / label) for label in cfg.baselines}
        plots.curves(rows, cfg.name, folder / "curves.png", plain)
        plots.hyperparameters(rows, QUANTILES, folder / "hyperparameters.png")
    running.finish(boards, result, images, folder / "hyperparameters.safetensors")
    log.info(
        "%s seed %s: train %.4f  val %.4f  test %.4f  (%d hypersteps, %d moved)  -> %s",
        cfg.name, cfg.seed, last["train_loss"], last["val_loss"], last["test_loss"],
        result["hypersteps"], result["moved"], folder,
    )  # fmt: skip
    return float(last["val_loss"])


def progress_bar(visible: bool) -> Progress:
    """A bar with losses, hypersteps and the time left; hidden if the output is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))


if __name__ == "__main__":
    main()
