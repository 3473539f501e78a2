"""Train a task while its hyperparameters move down the validation loss: ``python scripts/train.py --help``."""

from __future__ import annotations

import io
import json
import logging
import os
import time
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from safetensors.torch import save as packed
from together import Together
from torch import Tensor
from torch.nn import functional as F

import hoptim
from hoptim.tracking import JsonLines, WandB

log = logging.getLogger("hoptim.train")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
IDENTITY = (
    "name",
    "seed",
    "task",
    "inner",
    "outer",
    "inner_steps",
    "learn",
    "hyperparameters",
    "threads",
)  # what a resumed run must share


class ResumeError(ValueError):
    """The run in the folder can't be gone on with: nothing there is touched."""


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one job; a sweep calls this once for each."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return train(cfg, folder)
    except ResumeError:
        raise
    except BaseException as error:
        failure = {"status": "failed", "name": cfg.name, "seed": cfg.seed, "error": f"{type(error).__name__}: {error}"}
        with suppress(OSError):  # the disk may be what failed
            write_whole(folder / "result.json", json.dumps(failure).encode() + b"\n")
        WandB().abandon()
        raise


def train(cfg: DictConfig, folder: Path) -> float:
    """One run, from its config to the files in ``folder``; returns the last validation loss."""
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.plots:
        import plots  # noqa: F401 (a missing matplotlib is said before the training, not after it)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    task, together = instantiate(cfg.task), Together.met()
    data, problem = task.data(cfg.seed), together.wrapped(task.problem())
    if together.rank:
        torch.manual_seed(cfg.seed + 1_000_003 * together.rank)  # other dropout masks for other examples
    if cfg.hyperparameters:
        for name, value in load_file(cfg.hyperparameters).items():
            problem.hparams[name] = value
    trackers = [instantiate(options) for options in (cfg.hoptim.get("tracker") or {}).values()]
    optimizer = hoptim.BilevelOptimizer(
        instantiate(cfg.inner)(problem.model.parameters()),
        instantiate(cfg.outer)(problem.hparams.parameters()),
        problem,
        val_batches=[together.share(data["val"])],
        hypergradient=instantiate(cfg.hoptim.method),
        every=cfg.inner_steps if cfg.learn else None,
        hooks=[tracker for tracker in trackers if not isinstance(tracker, WandB)],
    )
    if not cfg.resume and together.writes:
        for name in ("checkpoint.pt", "result.json", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
    saved = load_checkpoint(folder / "checkpoint.pt", cfg, problem, optimizer, together) if cfg.resume else None
    begun = saved["outer_step"] if saved else 0
    metrics, rows, boards = JsonLines(path=folder / "metrics.jsonl"), [], []
    if together.writes:
        rows = keep_rows(metrics, begun)
        write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        boards = start_wandb(cfg, folder, trackers, saved["wandb_id"] if saved else None)
    train_batch = together.share(data["train"])

    with progress_bar(visible=together.writes) as bar:
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
            if together.writes:
                metrics.log(row)
                rows.append(row)
            for board in boards:
                board.log(row, optimizer.record.hyperparameters if optimizer.record else None)
            if outer_step % cfg.checkpoint_every == 0 or outer_step == cfg.outer_steps:
                save_checkpoint(folder / "checkpoint.pt", cfg, problem, optimizer, outer_step, boards, together)
            losses = f"train {row['train_loss']:.3f}  val {row['val_loss']:.3f}  {optimizer.hyper_steps} hypersteps"
            bar.update(job, completed=outer_step, losses=losses)
    return finish(cfg, folder, problem, rows, boards) if together.writes else measure(problem, data)["val_loss"]


def inner_loop(optimizer: hoptim.BilevelOptimizer, batch: Any, steps: int) -> float:
    """The loop that a user has; returns the seconds it took, hypersteps included."""
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = optimizer.loss(batch)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - begun


@torch.no_grad()
def measure(problem: hoptim.Problem, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Cross-entropy and accuracy on each part, without dropout and penalty."""
    model = problem.model.eval()
    figures = {}
    for part, (x, y) in data.items():
        logits = model(x)
        figures[f"{part}_loss"] = F.cross_entropy(logits, y).item()
        figures[f"{part}_accuracy"] = (logits.argmax(1) == y).double().mean().item()
    model.train()
    return figures


def describe(problem: hoptim.Problem, optimizer: hoptim.BilevelOptimizer, seconds: float) -> dict[str, Any]:
    """The last hyperstep's figures and the distribution of each hyperparameter."""
    record = optimizer.record
    row = record.row() if record else {"inner_step": optimizer.inner_steps, "hyper_seconds": 0.0}
    row |= {"solve_val_loss": row.pop("val_loss", None), "solve_train_loss": row.pop("train_loss", None)}
    spread = {}
    for name in problem.hparams.keys():  # noqa: SIM118 (a module, no dict)
        value = problem.hparams[name].detach().double().flatten()
        quantiles = value.sort().values[[round(q * (len(value) - 1)) for q in QUANTILES]].tolist()
        spread[name] = {"mean": value.mean().item(), "min": quantiles[0], "max": quantiles[-1], "quantiles": quantiles}
    return {**row, "inner_seconds": seconds - row["hyper_seconds"], "hyperparameters": spread}


def finish(cfg: DictConfig, folder: Path, problem: hoptim.Problem, rows: list[dict[str, Any]], boards: list[WandB]) -> float:
    """Write the result, the hyperparameters and the pictures. The result holds no times: a resumed run has the same."""
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
    write_whole(folder / "hyperparameters.safetensors", packed(values))
    write_whole(folder / "result.json", json.dumps(result, indent=2).encode() + b"\n")
    images = {}
    if cfg.plots:
        import plots

        images = {f"plots/{name}": folder / f"{name}.png" for name in ("curves", "hyperparameters")}
        plots.curves(rows, cfg.name, folder / "curves.png")
        plots.hyperparameters(rows, QUANTILES, folder / "hyperparameters.png")
    for board in boards:
        board.finish(result, images)
    log.info(
        "%s seed %s: train %.4f  val %.4f  test %.4f  (%d hypersteps, %d moved)  -> %s",
        cfg.name, cfg.seed, last["train_loss"], last["val_loss"], last["test_loss"],
        result["hypersteps"], result["moved"], folder,
    )  # fmt: skip
    return float(last["val_loss"])


def start_wandb(cfg: DictConfig, folder: Path, trackers: list[Any], run_id: str | None) -> list[WandB]:
    """Open W&B's run, named and filed after this one where the config says nothing else."""
    defaults = {"name": f"{cfg.name}/seed={cfg.seed}", "group": cfg.name, "directory": folder, "id": run_id}
    boards = []
    for tracker in trackers:
        if isinstance(tracker, WandB):
            blank = {key: value for key, value in defaults.items() if getattr(tracker, key) is None}
            boards.append(replace(tracker, **blank))
            boards[-1].start(OmegaConf.to_container(cfg, resolve=True))
    return boards


def fingerprint(cfg: DictConfig, processes: int) -> str:
    """What a run and its resumption must share, as text."""
    chosen = {
        key: OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in IDENTITY
    }
    method = OmegaConf.to_container(cfg.hoptim.method, resolve=True)
    return json.dumps({**chosen, "processes": processes, "method": method}, sort_keys=True)


def save_checkpoint(
    path: Path,
    cfg: DictConfig,
    problem: hoptim.Problem,
    optimizer: hoptim.BilevelOptimizer,
    outer_step: int,
    boards: list[WandB],
    together: Together,
) -> None:
    """All that the rest of the run depends on, in tensors and plain values; whole or not at all."""
    generators = together.gathered(torch.get_rng_state())
    if not together.writes:
        return
    state = {
        "fingerprint": fingerprint(cfg, together.size),
        "outer_step": outer_step,
        "model": problem.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": generators,
        "wandb_id": boards[0].start().id if boards else None,
    }
    with open(path.with_name("metrics.jsonl"), "rb") as rows:
        os.fsync(rows.fileno())  # the checkpoint counts on them
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(path, file.getvalue())


def load_checkpoint(
    path: Path, cfg: DictConfig, problem: hoptim.Problem, optimizer: hoptim.BilevelOptimizer, together: Together
) -> Any:
    """Put everything back as it was; ``None`` where there is no checkpoint yet."""
    if not path.exists():
        log.info("no checkpoint in %s yet: the run starts from its beginning", path.parent)
        return None
    saved = read_checkpoint(path)
    if saved["fingerprint"] != (own := fingerprint(cfg, together.size)):
        raise ResumeError(f"{path} is of another run: {saved['fingerprint']} is not {own}; use resume=false")
    if saved["outer_step"] > cfg.outer_steps:
        raise ResumeError(
            f"{path} is at outer step {saved['outer_step']}, past outer_steps={cfg.outer_steps}; use resume=false"
        )
    problem.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"][together.rank])
    return saved


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint, if it is whole: ``torch.load`` looks at no checksum, so that a wrong bit would go unseen."""
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
        saved = torch.load(path, weights_only=True)
        if "fingerprint" not in saved:
            raise ValueError("it is not of this script")
        return saved
    except Exception as error:
        reason, remedy = str(error).partition(". ")[0], "put a copy in its place, or start over: resume=false"
        raise ResumeError(f"{path} is damaged or can't be read: {reason}; {remedy}") from error


def keep_rows(metrics: JsonLines, last: int) -> list[dict[str, Any]]:
    """Keep the rows up to outer step ``last``: a killed run may have written more, the last of them in part."""
    path, rows = Path(metrics.path), []
    if last and path.exists():
        lines = path.read_text().splitlines()[:last]
        with suppress(json.JSONDecodeError):
            rows = [json.loads(line) for line in lines]
    if [row["outer_step"] for row in rows] != list(range(1, last + 1)):
        raise ResumeError(f"{path} does not hold the {last} rows up to the checkpoint's outer step; use resume=false")
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def write_whole(path: Path, data: bytes) -> None:
    """All of the file, once it is on the disk; after a failure what was there before."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()  # it may fill the disk
        remedy = "make room, or choose another root; resume=true goes on from the last checkpoint"
        raise OSError(error.errno, f"{error.strerror}: {remedy}", str(path)) from error


def progress_bar(visible: bool) -> Progress:
    """A bar with losses, hypersteps and the time left; silent where the output is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))


if __name__ == "__main__":
    main()
