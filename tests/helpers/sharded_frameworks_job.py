"""Started once on each rank, as by torchrun: one training under several frameworks, whose answers go to a file."""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hoptim
from hoptim.problem.sharding import local, whole

Answer = dict[str, Any]
RANKS, SIZE, STEPS, EVERY, CLIP = 2, 4, 5, 2, 0.5
SAVED = 3  # the step of a checkpoint
DRAW = torch.Generator().manual_seed(3)
X = torch.randn(STEPS * RANKS * SIZE, 4, generator=DRAW, dtype=torch.float64)
Y = torch.randint(0, 3, (len(X),), generator=DRAW)
VAL = torch.randn(12, 4, generator=DRAW, dtype=torch.float64), torch.randint(0, 3, (12,), generator=DRAW)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))

    def init_weights(self, draw: torch.Generator) -> None:
        """The same weights on any number of ranks; ``nn.init`` does that too where a DTensor is filled by it."""
        for p in self.parameters():
            fill(p, draw)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def init_weights(self) -> None:
        draw = torch.Generator().manual_seed(1)
        for p in (*self.stem.parameters(), *self.head.parameters()):
            fill(p, draw)
        for block in self.blocks:
            block.init_weights(draw)


def fill(p: Any, draw: torch.Generator) -> None:
    """Fill a weight, or the shards of one."""
    values = torch.randn(p.shape, generator=draw) / math.sqrt(p.shape[-1])
    if hasattr(p, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        p.copy_(distribute_tensor(values, p.device_mesh, p.placements))
    else:
        p.copy_(values)


def net() -> Net:
    model = Net()
    model.init_weights()
    return model


def shard(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def cosine(step: int, steps: int = STEPS) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01)


def val_batch() -> tuple[Tensor, Tensor]:
    """The part of this rank; all of it in one process."""
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    return VAL[0][rank::size], VAL[1][rank::size]


# What a user adds, the same everywhere


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + hparams.penalty(model)


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def problem_of(model: nn.Module, loss: Callable[..., Tensor] = train_loss) -> hoptim.Problem:
    hparams = hoptim.recipes.WeightDecay(model, per="channel", start=0.02)
    return hoptim.Problem(model, hparams, loss, val_loss)


def bilevel_of(inner: Any, problem: hoptim.Problem, **options: Any) -> hoptim.BilevelOptimizer:
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=10.0)  # a step of Adam would hide the size of a hypergradient
    method = hoptim.Implicit(hoptim.CG(terms=3, tolerance=0.0), curvature=hoptim.Exact(), damping=2.0)
    return hoptim.BilevelOptimizer(
        inner, outer, problem, **{"val_batches": [val_batch()], "hypergradient": method, "every": EVERY, **options}
    )


def answer(optimizer: hoptim.BilevelOptimizer, **more: Any) -> Answer:
    problem = optimizer.problem
    assert optimizer.record is not None
    assert optimizer.record.moved, optimizer.record.failure
    return {
        "weights": {name: whole(w.detach()).clone() for name, w in problem.weights().items()},
        "leaves": {name: leaf.detach().clone() for name, leaf in problem.leaves().items()},
        "hypergradients": optimizer.record.result.grads,
        "steps": (optimizer.inner_steps, optimizer.hyper_steps),
        "is sharded": problem.is_sharded,
        **more,
    }


# Loops


def own_rows(step: int) -> tuple[Tensor, Tensor]:
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    begin, count = step * RANKS * SIZE, RANKS * SIZE // size
    rows = slice(begin + rank * count, begin + (rank + 1) * count)
    return X[rows], Y[rows]


def train(
    optimizer: hoptim.BilevelOptimizer,
    scheduler: Any,
    begin: int = 0,
    end: int = STEPS,
    batch_of: Callable[[int], Any] = own_rows,
) -> None:
    for step in range(begin, end):
        optimizer.zero_grad()
        optimizer.loss(batch_of(step)).backward()
        nn.utils.clip_grad_norm_(optimizer.problem.model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()


def plain(inner: Callable[[nn.Module], Optimizer] = adamw) -> Answer:
    """One process on all examples."""
    model = net()
    optimizer = bilevel_of(inner(model), problem_of(model))
    train(optimizer, LambdaLR(optimizer, cosine))
    return answer(optimizer)


def empty() -> Net:
    with torch.device("meta"):
        return shard(Net())


def titan() -> Answer:
    """torchtitan's loop: an empty model, shards of it, their values, and then all that holds them."""
    model = empty()
    told = refusal(lambda: problem_of(model))
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = bilevel_of(adamw(model), problem_of(model))
    train(optimizer, LambdaLR(optimizer, cosine))
    return answer(optimizer, meta=told)


def some_tokens(step: int) -> tuple[Tensor, Tensor, int]:
    """A batch of which some labels do not count, not as many on each rank; and how many do on all ranks."""
    x, y = own_rows(step)
    y = torch.where((x[:, 0] > 0.5) | (x[:, 1] < -1), -100, y)
    total = (y >= 0).sum()
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return x, y, int(total)


def summed(model: Any, hparams: Any, batch: Any) -> Tensor:
    """torchtitan's loss, the rank's sum by the count of all, times the ranks: their mean is that of all tokens."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    return ranks * loss / batch[2] + hparams.penalty(model)


def titan_tokens() -> Answer:
    model = empty() if distributed.is_initialized() else net()
    if distributed.is_initialized():
        model.to_empty(device="cpu")
        model.init_weights()
    optimizer = bilevel_of(adamw(model), problem_of(model, summed))
    train(optimizer, LambdaLR(optimizer, cosine), batch_of=some_tokens)
    return answer(optimizer, counts=torch.tensor([(some_tokens(step)[1] >= 0).sum() for step in range(STEPS)]))


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return "nothing"


# Accelerate


def accelerator(accumulation: int = 1, **options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"], **options
    )
    found = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=accumulation)
    found.micro_batch = SIZE // accumulation
    # Accelerate takes the plugin on accelerators alone, and the rest of it works on the CPU too.
    found.state.distributed_type, found.state.fsdp_plugin = DistributedType.FSDP, plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert found.is_fsdp2
    return found


def loader(size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), size)


def accelerate_loop(here: Any, model: Any, bilevel: Any, optimizer: Any, batches: Any, scheduler: Any) -> None:
    for batch in batches:
        with here.accumulate(model):
            here.backward(bilevel.loss(batch))
            if here.sync_gradients:
                here.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def at_once(here: Any) -> tuple[Any, ...]:
    """All before prepare(), which gets the BilevelOptimizer as the optimizer that it is."""
    model = net()
    bilevel = bilevel_of(adamw(model), problem_of(model))
    scheduler = LambdaLR(bilevel, partial(cosine, steps=RANKS * STEPS))  # Accelerate's takes a step a rank
    model, optimizer, batches, scheduler = here.prepare(model, bilevel, loader(here.micro_batch), scheduler)
    return model, bilevel, optimizer, batches, scheduler


def afterwards(here: Any) -> tuple[Any, ...]:
    """All after prepare(), around the optimizer inside the one that it returns."""
    model = net()
    model, inner, batches = here.prepare(model, adamw(model), loader(here.micro_batch))
    bilevel = bilevel_of(inner.optimizer, problem_of(model))
    return model, bilevel, bilevel, batches, LambdaLR(bilevel, cosine)


def problem_before(here: Any) -> tuple[Any, ...]:
    """The problem before prepare(), the BilevelOptimizer after it."""
    model = net()
    problem = problem_of(model)
    model, inner, batches = here.prepare(model, adamw(model), loader(here.micro_batch))
    bilevel = bilevel_of(inner.optimizer, problem)
    return model, bilevel, bilevel, batches, LambdaLR(bilevel, cosine)


def as_returned(here: Any) -> None:
    model = net()
    model, inner = here.prepare(model, adamw(model))
    bilevel_of(inner, problem_of(model))


def another_prepared(here: Any) -> None:
    """prepare() gets another optimizer of the same weights."""
    model = net()
    bilevel = bilevel_of(adamw(model), problem_of(model))
    here.prepare(model, adamw(model))
    bilevel.loss(own_rows(0))


def inner_of_before(here: Any) -> None:
    """An optimizer of the weights that prepare() has replaced."""
    model = net()
    inner = adamw(model)
    here.prepare(model, adamw(model))
    bilevel_of(inner, problem_of(model))


def inner_stepped(here: Any) -> None:
    """prepare() gets the inner optimizer, whose step has no hypersteps."""
    model = net()
    inner = adamw(model)
    bilevel = bilevel_of(inner, problem_of(model))
    model, optimizer = here.prepare(model, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            here.backward(bilevel.loss(own_rows(step)))
            optimizer.step()
            optimizer.zero_grad()


ORDERS = (at_once, afterwards, problem_before)
MISTAKES = (as_returned, another_prepared, inner_of_before, inner_stepped)


def accelerated(order: Callable[[Any], tuple[Any, ...]], accumulation: int = 1, **options: Any) -> Answer:
    here = accelerator(accumulation, **options)
    model, bilevel, *rest = order(here)
    accelerate_loop(here, model, bilevel, *rest)
    return answer(bilevel)


def accelerate() -> Answer:
    """A checkpointed activation puts its layer into another one, so that names change."""
    return {
        **{order.__name__: accelerated(order) for order in ORDERS},
        **{
            f"activations again, {order.__name__}": accelerated(order, activation_checkpointing=True) for order in ORDERS[:2]
        },
        "accumulated": accelerated(at_once, accumulation=2),
        **{mistake.__name__: refusal(partial(lambda made: made(accelerator()), mistake)) for mistake in MISTAKES},
    }


def accelerate_checkpoints(folder: Path) -> Answer:
    """hoptim's own goes on to the bit; Accelerate's drops what it does not know, which is told when it is read."""
    here = accelerator()
    model, bilevel, optimizer, batches, scheduler = at_once(here)
    rows = list(batches)
    accelerate_loop(here, model, bilevel, optimizer, rows[:SAVED], scheduler)
    hoptim.save_checkpoint(folder / "accelerate", bilevel, scheduler)
    here.save_state(folder / "own")
    accelerate_loop(here, model, bilevel, optimizer, rows[SAVED:], scheduler)
    whole_run, here = answer(bilevel), accelerator()
    model, bilevel, optimizer, _, scheduler = at_once(here)
    hoptim.load_checkpoint(folder / "accelerate", bilevel, scheduler)
    accelerate_loop(here, model, bilevel, optimizer, rows[SAVED:], scheduler)
    resumed, here = answer(bilevel), accelerator()
    model, bilevel, *_ = at_once(here)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        here.load_state(folder / "own")
    return {"whole": whole_run, "resumed": resumed, "told": [str(one.message) for one in told]}


# Lightning


def lightning() -> Answer:
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def configure_model(self) -> None:
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            optimizer = bilevel_of(adamw(self.net), problem_of(self.net))
            return [optimizer], [{"scheduler": LambdaLR(optimizer, cosine), "interval": "step"}]

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.optimizers().loss(batch)
            return loss

    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, max_epochs=1, gradient_clip_val=CLIP,
        use_distributed_sampler=False,  # Lightning's own shuffles
        enable_progress_bar=False, enable_model_summary=False, logger=False, enable_checkpointing=False,
    )  # fmt: skip
    sampler = DistributedSampler(range(len(X)), shuffle=False)
    trainer.fit(Module(), DataLoader(TensorDataset(X, Y), SIZE, sampler=sampler))
    return answer(trainer.optimizers[0])


# 8-bit states


class RowScaled(Optimizer):
    """RMSprop that keeps one byte of each second moment, and the largest of a row, as plain tensors of this rank."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                w, g, state = local(p), local(p.grad), self.state[p]
                rows = g.reshape(len(g), -1).square()
                if not state:
                    state["step"], state["exp_avg_sq"] = 0, torch.zeros(rows.shape, dtype=torch.uint8)
                    state["largest"] = torch.zeros(len(rows), 1)
                before = state["exp_avg_sq"] * (state["largest"] / 255)
                moments = group["beta"] * before + (1 - group["beta"]) * rows
                state["step"] += 1
                state["peak"] = max(state.get("peak", 0.0), rows.max().item())
                state["largest"] = moments.amax(1, keepdim=True)
                state["exp_avg_sq"] = (255 * moments / state["largest"].clamp(min=1e-30)).round().to(torch.uint8)
                w.sub_(group["lr"] * g / (moments.sqrt().view_as(g) + 1e-3))

    @staticmethod
    def _process_value_according_to_param_policy(param: Any, value: Any, *_: Any, **__: Any) -> Any:
        return value  # torch would make floats of bytes


def eight_bit_of(model: nn.Module) -> tuple[hoptim.BilevelOptimizer, Any]:
    optimizer = bilevel_of(RowScaled(model.parameters()), problem_of(model))
    return optimizer, LambdaLR(optimizer, cosine)


def eight_bits(folder: Path) -> Answer:
    both, fresh, own = (eight_bit_of(shard(net())) for _ in range(3))
    train(*both, end=SAVED)
    hoptim.save_checkpoint(folder / "eight bits", *both)
    state = copy.deepcopy([part.state_dict() for part in (both[0].problem.model, *both)])
    train(*both, begin=SAVED)
    hoptim.load_checkpoint(folder / "eight bits", *fresh)
    for part, one in zip((own[0].problem.model, *own), state, strict=True):
        part.load_state_dict(one)
    for each in (fresh, own):
        train(*each, begin=SAVED)
    method = hoptim.Implicit(hoptim.CG(terms=2), preconditioner=hoptim.SecondMoments())
    told = refusal(lambda: hoptim.hypergradient(both[0].problem, own_rows(0), val_batch(), method, inner=both[0]))
    kinds = sorted({f"{key} {type(t).__name__}" for entries in both[0].state.values() for key, t in entries.items()})
    return {
        "end": answer(both[0]),
        "resumed": answer(fresh[0]),
        "resumed from own": answer(own[0]),
        "second moments": told,
        "kinds": kinds,
        "states": [state["exp_avg_sq"] for state in both[0].state.values()],
        "peaks": [state["peak"] for state in both[0].state.values()],
        "peaks resumed": [state["peak"] for state in fresh[0].state.values()],
        "states resumed": [state["exp_avg_sq"] for state in fresh[0].state.values()],
    }


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    for name in names:
        case = globals()[name]
        found[name] = case(Path(folder)) if name in ("accelerate_checkpoints", "eight_bits") else case()
    torch.save(found, Path(folder) / f"{'-'.join(names)} {rank}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
