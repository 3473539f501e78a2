"""Started once on each rank: trainings of sharded models, saved, resumed and killed; what they end with goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributions import constraints
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import hoptim

SAVED, END, SIZE = 5, 9, 8  # steps, and examples of a batch of all ranks
DRAW = torch.Generator().manual_seed(3)
X, Y = torch.randn(16, SIZE, 5, generator=DRAW, dtype=torch.float64), torch.randint(0, 3, (16, SIZE), generator=DRAW)


class Case(NamedTuple):
    how: Any  # the solver, or the method
    parts: int = 1  # how many validation losses
    is_random: bool = False  # dropout, statistics of the batch, and validation batches that are shuffled
    inner: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    shard: Callable[[nn.Module], Any] = fully_shard


CASES = {
    "neumann": Case(hoptim.Neumann(terms=5)),
    "warm": Case(hoptim.WarmStart(hoptim.CG(terms=3))),
    "two losses": Case(hoptim.WarmStart(hoptim.Neumann(terms=3)), parts=2),
    "random": Case(hoptim.MINRES(terms=5), is_random=True),
    "plain sgd": Case(hoptim.MINRES(terms=5), inner=torch.optim.SGD),
    "copies": Case(hoptim.Unrolled(2), is_random=True, shard=DistributedDataParallel),
}

ON_FOUR = ("neumann", "two losses")  # those that are also resharded


def cases() -> dict[str, Case]:
    return CASES if distributed.get_world_size() == 2 else {name: CASES[name] for name in ON_FOUR}


def whole(model: nn.Module) -> nn.Module:
    """As it is, in one process."""
    return model


def two_axes(model: nn.Module) -> nn.Module:
    """By tensor parallel over two ranks each, and these pairs by fully_shard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return model


def ranks_now() -> tuple[int, int]:
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def mine(step: int, share: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """The part of a batch that this rank has, the r-th of n."""
    r, n = share or ranks_now()
    rows = slice(r * SIZE // n, (r + 1) * SIZE // n)
    return X[step % 16][rows], Y[step % 16][rows]


def build(
    case: Case, shard: Callable[[nn.Module], Any] | None = None, share: tuple[int, int] | None = None
) -> tuple[hoptim.BilevelOptimizer, Any]:
    """With layers that ranks share unevenly: of the last one, of three rows, the fourth rank of four has nothing."""
    torch.manual_seed(0)
    more = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if case.is_random else []
    model = nn.Sequential(nn.Linear(5, 8), *more, nn.Tanh(), nn.Linear(8, 3)).double()
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    values = {f"decay.{name}": torch.tensor(1e-2, dtype=torch.float64) for name in names}
    hparams = hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive))

    def criterion(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        loss, weights = criterion(model, batch).mean(), dict(model.named_parameters())  # whole ones after the forward pass
        return (
            loss + torch.stack([hparams[f"decay.{name}"] * gathered(weights[name].square().sum()) for name in names]).sum()
        )

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        losses = criterion(model.eval(), batch)
        return losses.mean() if case.parts == 1 else torch.stack([losses.mean(), losses.square().mean()])

    problem = hoptim.Problem((shard or case.shard)(model), hparams, train_loss, val_loss)
    val: Any = [mine(step, share) for step in (14, 15, 13)]
    if case.is_random:
        torch.manual_seed(distributed.get_rank())
        val = DataLoader(TensorDataset(*mine(15)), batch_size=2, shuffle=True)
    optimizer = hoptim.BilevelOptimizer(
        case.inner(model.parameters(), lr=0.02),
        torch.optim.Adam(hparams.parameters(), lr=0.1),
        problem,
        val_batches=val,
        hypergradient=hoptim.Implicit(case.how, damping=1.0) if isinstance(case.how, hoptim.Solver) else case.how,
        every=2,
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, END)


def gathered(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(optimizer: hoptim.BilevelOptimizer, scheduler: Any, to: int = END, share: tuple[int, int] | None = None) -> None:
    while optimizer.inner_steps < to:
        optimizer.zero_grad()
        optimizer.loss(mine(optimizer.inner_steps, share)).backward()
        optimizer.step()
        scheduler.step()


def end(optimizer: hoptim.BilevelOptimizer, scheduler: Any) -> dict[str, Any]:
    """What this rank holds, by its shards, and the whole tensors."""
    state = optimizer.state_dict()
    entry = state["hoptim"]
    tensors = dict(optimizer.problem.model.state_dict())
    for number, entries in state["state"].items():
        tensors |= {f"inner {number} {key}": value for key, value in entries.items()}
    own = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors.items()}
    whole = {name: gathered(t) for name, t in tensors.items()}
    alike = {key: entry[key] for key in ("hparams", "outer", "inner_steps", "hyper_steps", "last_gradient")}
    position = entry["val_batches"]["position"]
    alike |= {"position": position, "rate": state["param_groups"][0]["lr"], "scheduler": scheduler.state_dict()}
    only = {key: entry[key] for key in ("solver_state", "val_batches", "norms", "trajectory")} | {
        "random": torch.get_rng_state()
    }
    kept = {"own": own, "only": only, "whole": whole, "alike": alike}
    return {name: {key: _copied(value) for key, value in values.items()} for name, values in kept.items()}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


# What is done, given a folder


def begin(folder: Path) -> dict[str, Any]:
    """Each case without a break; saved amid it, which must change nothing."""
    size, found = distributed.get_world_size(), {}
    for name, case in cases().items():
        both = build(case)
        train(*both, to=SAVED)
        hoptim.save_checkpoint(folder / f"{name} {size}", *both)
        parts = (both[0].problem.model, *both)
        torch.save([part.state_dict() for part in parts], folder / f"{name} {size} {distributed.get_rank()}.pt")
        train(*both)
        found[name] = end(*both)
    return found


def resume(folder: Path, saved_by: int) -> dict[str, Any]:
    found = {}
    for name, case in cases().items():
        if not (folder / f"{name} {saved_by}").exists():
            continue
        both = build(case)
        torch.manual_seed(77)  # so that random numbers have to come from the checkpoint
        hoptim.load_checkpoint(folder / f"{name} {saved_by}", *both)
        train(*both)
        found[name] = end(*both)
    return found


def resume_in_two_axes(folder: Path, saved_by: int) -> dict[str, Any]:
    share, found = (distributed.get_rank() // 2, 2), {}
    for name in ON_FOUR:
        both = build(CASES[name], two_axes, share)
        hoptim.load_checkpoint(folder / f"{name} {saved_by}", *both)
        train(*both, share=share)
        found[name] = end(*both)
    return found


def resume_from_own_files(folder: Path, saved_by: int) -> dict[str, Any]:
    """By torch.save and load of each rank alone; and what is refused."""
    both, rank, size = build(CASES["neumann"]), distributed.get_rank(), distributed.get_world_size()
    other = torch.load(folder / f"neumann {saved_by} {(rank + 1) % saved_by}.pt", weights_only=True)
    before, message = end(*both), ""
    try:
        both[0].load_state_dict(other[1])
    except ValueError as error:
        message = str(error)
    found: dict[str, Any] = {"message": message, "before": before, "after": end(*both)}
    if saved_by == size:
        for part, state in zip(
            (both[0].problem.model, *both),
            torch.load(folder / f"neumann {saved_by} {rank}.pt", weights_only=True),
            strict=True,
        ):
            part.load_state_dict(state)
        train(*both)
        found["end"] = end(*both)
    return found


def refused(folder: Path) -> dict[str, Any]:
    """The messages of what is refused."""
    both, found = build(CASES["neumann"]), {}
    size = distributed.get_world_size()
    whole = folder / f"neumann {size}"
    attempts: dict[str, Callable[[], None]] = {
        "there already": lambda: hoptim.save_checkpoint(whole, *both),
        "nothing there": lambda: hoptim.load_checkpoint(folder / "nothing", *both),
        "other model": lambda: hoptim.load_checkpoint(folder / f"random {size}", *both),
        "other objects": lambda: hoptim.load_checkpoint(whole, both[0]),
        "sharded object": lambda: hoptim.save_checkpoint(folder / "never", *both, both[0].problem.model),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, OSError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def again_and_again(folder: Path) -> dict[str, Any]:
    """A training that saves every third step, and goes on from where it was killed."""
    optimizer, scheduler = build(CASES["random"])
    steps = [int(path.name[4:]) for path in folder.glob("step*")]
    if steps:
        hoptim.load_checkpoint(folder / f"step{max(steps)}", optimizer, scheduler)
    for step in range(optimizer.inner_steps + 1, 25):
        train(optimizer, scheduler, to=step)
        if step % 3 == 0:
            hoptim.save_checkpoint(folder / f"step{step}", optimizer, scheduler)
            time.sleep(0.05)  # so that a kill may also come between two
    return {**end(optimizer, scheduler), "begun": max(steps, default=0)}


def main(folder: str, *words: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {}
    for word in words:
        what, *numbers = word.split(":")
        found[word] = globals()[what](Path(folder), *map(int, numbers))
    torch.save(found, Path(folder) / f"{words[0]} on {distributed.get_world_size()} rank {distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
