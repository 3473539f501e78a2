"""Started once on each rank, as by torchrun: every case of integration/test_distributed.py; the answers go to a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from tiny import VAL, batch, tiny
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hoptim
from hoptim.problem.distributed import Ranks
from hoptim.tracking import Console, JsonLines

Answer = dict[str, Any]
SIZE = 6  # examples of each rank


def shard(rank: int, step: int = 0, size: int = SIZE) -> tuple[Tensor, Tensor]:
    return batch(100 * step + rank, size)


def val_shard(rank: int) -> tuple[Tensor, Tensor]:
    return batch(500 + rank, 8)


def wrapped(problem: hoptim.Problem, **options: Any) -> hoptim.Problem:
    """The same problem, trained by all ranks."""
    model = DistributedDataParallel(problem.model)
    return hoptim.Problem(model, problem.hparams, problem.train_loss, problem.val_loss, **options)


def sgd(problem: hoptim.Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def adam(problem: hoptim.Problem) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.1)
    for name, p in problem.weights().items():  # a state as after some steps
        size = 1 + len(name) / 10
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.full_like(p, 0.01 * size),
            "exp_avg_sq": torch.full_like(p, 0.02 * size),
        }
    return optimizer


METHODS: dict[str, tuple[hoptim.Implicit | hoptim.Unrolled, Any]] = {
    "default": (hoptim.Implicit(), None),
    "neumann": (hoptim.Implicit(hoptim.Neumann(terms=7, step_size=0.1), curvature=hoptim.Exact()), None),
    "neumann, step chosen": (hoptim.Implicit(hoptim.Neumann(terms=7), curvature=hoptim.Exact()), None),
    "cg, damped": (hoptim.Implicit(hoptim.CG(terms=9), curvature=hoptim.GaussNewton(), damping=0.1), None),
    "chebyshev": (hoptim.Implicit(hoptim.Chebyshev(terms=5), curvature=hoptim.GaussNewton()), None),
    "nystrom": (hoptim.Implicit(hoptim.Nystrom(rank=4, rho=0.1), curvature=hoptim.Exact()), None),
    "minres": (hoptim.Implicit(hoptim.MINRES(terms=4), curvature=hoptim.Exact()), None),
    "compiled": (hoptim.Implicit(hoptim.MINRES(terms=4), curvature=hoptim.Exact(compile=True)), None),
    "differences": (hoptim.Implicit(hoptim.MINRES(terms=4), curvature=hoptim.FiniteDifference()), None),
    "jacobi": (hoptim.Implicit(hoptim.CG(terms=4), preconditioner=hoptim.Jacobi(), damping=0.1), None),
    "update, momentum": (hoptim.Implicit(hoptim.GMRES(terms=6), condition=hoptim.Update()), sgd),
    "update, adam": (hoptim.Implicit(hoptim.GMRES(terms=6), condition=hoptim.Update()), adam),
    "seconds of adam": (hoptim.Implicit(hoptim.CG(terms=4), preconditioner=hoptim.SecondMoments(), damping=0.1), adam),
    "unrolled": (hoptim.Unrolled(steps=3), sgd),
    "unrolled, checkpointed": (hoptim.Unrolled(steps=5, checkpoint=True), adam),
}


def several(model: Any, hparams: Any, b: Any) -> Tensor:
    losses = F.cross_entropy(model(b[0]), b[1], reduction="none").reshape(2, -1).mean(1)
    return losses + 0.3 * hparams["decay"].sin() + 0.2 * hparams["scale"] ** 2


def answer(problem: hoptim.Problem, train: Any, val: Any, method: str = "default") -> Answer:
    how, inner = METHODS[method]
    result = hoptim.hypergradient(problem, train, val, how, inner=None if inner is None else inner(problem))
    fields = {"grads": result.grads, "direct": result.direct, "val": result.val_loss, "train": result.train_loss}
    return {**fields, "norm": result.gradient_norm, "status": result.solution.status.name, "x": result.solution.value}


def bilevel(problem: hoptim.Problem, val: Any, **options: Any) -> hoptim.BilevelOptimizer:
    return hoptim.BilevelOptimizer(
        sgd(problem), torch.optim.Adam(problem.hparams.parameters(), lr=0.02), problem, val_batches=[val], **options
    )


def end(optimizer: hoptim.BilevelOptimizer) -> Answer:
    problem = optimizer.problem
    tensors = {f"weight {n}": p for n, p in problem.weights().items()} | problem.leaves()
    for leaf, state in optimizer.outer.state.items():
        tensors |= {f"outer {tuple(leaf.shape)} {key}": value for key, value in state.items()}
    assert optimizer.record is not None
    kept = {name: value.detach().clone() for name, value in tensors.items()}
    return {"tensors": kept, "status": optimizer.record.status.name, "hypersteps": optimizer.hyper_steps}


# The cases, each given the rank and how many there are


def methods(rank: int, size: int) -> Answer:
    names = [name for name in METHODS if name != "compiled" or size == 2]  # to compile takes longer than all the rest
    return {name: answer(wrapped(tiny()), shard(rank), val_shard(rank), name) for name in names}


def vector(rank: int, size: int) -> Answer:
    return answer(wrapped(tiny(val=several)), shard(rank), val_shard(rank))


TASKS = {
    "maml": hoptim.PerTask(2),
    "in turn": hoptim.PerTask(2, chunk_size=1),
    "implicit": hoptim.PerTask(3, hoptim.Implicit(hoptim.CG(terms=3))),
}


def tasks_of(ranks: Iterable[int], pick: Any) -> tuple[Tensor, Tensor]:
    """Two tasks of each rank, along a leading axis."""
    x, y = zip(*(pick(2 * rank + place) for rank in ranks for place in range(2)), strict=True)
    return torch.stack(x), torch.stack(y)


def task_problem(wrap: Any = lambda model: model) -> hoptim.Problem:
    """Learned weights from which the trainings begin, beside the hyperparameters of the tiny problem."""
    plain = tiny()
    hparams = nn.ModuleDict({"initial": hoptim.recipes.Initialization(plain.model), "rest": plain.hparams})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return plain.train_loss(m, h["rest"], b) + h["initial"].penalty(m, 0.2)

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return plain.val_loss(m, h["rest"], b) + h["rest"]["scale"] * b[0].mean()

    return hoptim.Problem(wrap(plain.model), hparams, train, val)


def task_answer(problem: hoptim.Problem, ranks: Iterable[int], name: str) -> Answer:
    ranks, inner = list(ranks), torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    found = hoptim.hypergradient(problem, tasks_of(ranks, shard), tasks_of(ranks, val_shard), TASKS[name], inner=inner)
    fields = {"grads": found.grads, "direct": found.direct, "val": found.val_loss, "train": found.train_loss}
    return {**fields, "norm": found.gradient_norm, "status": found.solution.status.name}


def tasks(rank: int, size: int) -> Answer:
    """Each rank has two tasks of its own."""
    return {name: task_answer(task_problem(DistributedDataParallel), [rank], name) for name in TASKS}


def uneven_tasks(rank: int, size: int) -> Answer:
    """Rank r has r + 1 tasks."""
    problem = task_problem(DistributedDataParallel)
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    batches = (tuple(t[: 2 if rank else 1] for t in tasks_of([rank], pick)) for pick in (shard, val_shard))
    found = hoptim.hypergradient(problem, *batches, hoptim.PerTask(2), inner=inner)
    return {"grads": found.grads, "val": found.val_loss, "train": found.train_loss}


def task_that_fails(rank: int, size: int) -> Answer:
    """The solve of one rank alone fails."""
    problem, step = task_problem(DistributedDataParallel), 1.0 if rank == 1 else 0.1
    method = hoptim.PerTask(1, hoptim.Implicit(hoptim.Neumann(terms=30, step_size=step)))
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    found = hoptim.hypergradient(problem, tasks_of([rank], shard), tasks_of([rank], val_shard), method, inner=inner)
    return {"status": found.solution.status.name, "detail": found.solution.detail, "grads": found.grads}


def of_examples(model: Any, hparams: Any, b: Any) -> Tensor:
    return F.cross_entropy(model(b[0]), b[1], reduction="none")


def influenced(rank: int, size: int) -> Answer:
    """Each rank gives scores to its own examples."""
    problem, batch = wrapped(tiny(val=several)), shard(rank)
    found = hoptim.influence(problem, of_examples, batch, val_shard(rank))
    try:
        hoptim.self_influence(problem, of_examples, batch)
    except TypeError as error:
        words = str(error)
    alike = hoptim.influence(problem, of_examples, batch, val_shard(rank), by_ekfac(problem, shard(0)))
    try:
        hoptim.influence(problem, of_examples, batch, val_shard(rank), by_ekfac(problem, batch))
    except ValueError as error:
        differing = str(error)
    own = {"scores": found.scores, "x": found.solution.value, "by EKFAC": alike.scores}
    return {**own, "refused": words, "differing": differing}


def by_ekfac(problem: hoptim.Problem, batch: tuple[Tensor, Tensor]) -> hoptim.Implicit:
    ekfac = hoptim.EKFAC(model=problem.model, criterion=nn.CrossEntropyLoss(), batches=[batch])
    return hoptim.Implicit(hoptim.MINRES(terms=4), curvature=hoptim.Exact(), preconditioner=ekfac)


def wrapped_hyperparameters(rank: int, size: int) -> Answer:
    """Theirs are wrapped as well: the gradients are averaged in the solve, and the wrapper is only looked through."""
    problem = tiny()
    model, hparams = DistributedDataParallel(problem.model), DistributedDataParallel(problem.hparams)
    return answer(hoptim.Problem(model, hparams, problem.train_loss, problem.val_loss), shard(rank), val_shard(rank))


def uneven(rank: int, size: int) -> Answer:
    return answer(wrapped(tiny()), shard(rank, size=SIZE - 2 * rank), val_shard(rank), "neumann")


def averaged(rank: int, size: int) -> Answer:
    method = hoptim.Implicit(hoptim.CG(terms=9), curvature=hoptim.Averaged(batches=2), damping=0.5)
    more = [shard(rank, 1)]
    result = hoptim.hypergradient(wrapped(tiny()), shard(rank), val_shard(rank), method, train_batches=more)
    return {"grads": result.grads}


class Routed(nn.Module):
    """Each rank goes its own way, so that none touches all weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.ways = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(4)])

    def forward(self, x: Tensor, way: int) -> Tensor:
        return self.ways[way](x)


def routed_problem(model: nn.Module | None = None, **options: Any) -> hoptim.Problem:
    """Rank r sees way r, and its own hyperparameter; the last way is seen by none."""
    hparams = hoptim.HyperParameters({f"decay{way}": torch.tensor(0.5 + way).double() for way in range(3)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        x, way = b
        weight = m.ways[way].weight
        return (m(x, way) - 1).square().mean() + h[f"decay{way}"] * weight.square().sum()

    def val(m: Any, h: Any, b: Any) -> Tensor:
        x, way = b
        return (m(x, way) + 1).square().mean()

    return hoptim.Problem(Routed().double() if model is None else model, hparams, train, val, **options)


def routed(rank: int, size: int) -> Answer:
    batches = (shard(rank)[0], rank), (val_shard(rank)[0], rank)
    model = DistributedDataParallel(Routed().double(), find_unused_parameters=True)
    problem = routed_problem(model)
    method = hoptim.Implicit(hoptim.CG(terms=20))
    result = method(problem, *batches)
    return {"grads": result.grads, "untouched": result.untouched}


def nan_on_one(rank: int, size: int) -> Answer:
    problem = wrapped(tiny())
    optimizer = bilevel(problem, VAL, every=1)
    before = {name: leaf.detach().clone() for name, leaf in problem.leaves().items()}
    found = {}
    for place in ("train", "val"):
        bad = (shard(rank)[0] * (torch.nan if rank == size - 1 else 1.0), shard(rank)[1])
        batches = {"train_batch": shard(rank), "val_batch": VAL, f"{place}_batch": bad}
        record = optimizer.hyperstep(**batches)
        found[place] = (record.status.name, record.moved)
    still = all(torch.equal(leaf, before[name]) for name, leaf in problem.leaves().items())
    return {"statuses": found, "still": still}


def training(rank: int, size: int, hypersteps: int = 20) -> Answer:
    """So many hypersteps, on batches of its own."""
    problem = wrapped(tiny())
    optimizer = bilevel(problem, val_shard(rank), every=2, warmup=10)
    for step in range(9 + 2 * hypersteps):
        optimizer.zero_grad()
        optimizer.loss(shard(rank, step % 7)).backward()
        optimizer.step()
    return end(optimizer)


def long_training(rank: int, size: int) -> Answer:
    return training(rank, size, hypersteps=200)


def unrolled(rank: int, size: int) -> Answer:
    """The real steps, kept and taken again."""
    optimizer = bilevel(wrapped(tiny()), val_shard(rank), every=4, hypergradient=hoptim.Unrolled(steps=3))
    for step in range(12):
        optimizer.zero_grad()
        optimizer.loss(shard(rank, step)).backward()
        optimizer.step()
    return end(optimizer)


OWN_DECAY: dict[str, Any] = {"every": 2, "options": {"weight_decay": {"0.weight": "own", "3.weight": "own"}}}


def decays_in_steps(rank: int, size: int) -> Answer:
    """A learned decay of two weights, which the inner optimizer's step applies."""
    optimizer = bilevel(wrapped(tiny(own=0.1)), val_shard(rank), **OWN_DECAY)
    for step in range(12):
        optimizer.zero_grad()
        optimizer.loss(shard(rank, step)).backward()
        optimizer.step()
    return end(optimizer)


def accumulated(rank: int, size: int) -> Answer:
    """Two micro-batches a step, the ranks speaking at the second alone; the model is wrapped after the problem is made."""
    problem = tiny()
    problem.wrapper = model = DistributedDataParallel(problem.model)
    optimizer = bilevel(problem, val_shard(rank), every=5)
    for step in range(20):
        optimizer.zero_grad()
        with model.no_sync():
            (optimizer.loss(shard(rank, 2 * step)) / 2).backward()
        (optimizer.loss(shard(rank, 2 * step + 1)) / 2).backward()
        optimizer.step()
    return end(optimizer)


def outputs(rank: int, size: int) -> Answer:
    """Runs with the logits beside the loss, and without: of a loss in parts, and of one that is a plain function.

    Two micro-batches of unequal shares make a step.
    """

    def run(composite: bool, has_aux: bool) -> Answer:
        plain = tiny()

        def loss(m: Any, h: Any, b: Any) -> Any:
            value = plain.train_loss(m, h, b)
            return (value, m(b[0])) if has_aux else value

        model, train = DistributedDataParallel(plain.model), plain.train_loss if composite else loss
        problem = hoptim.Problem(model, plain.hparams, train, plain.val_loss, has_aux=has_aux)
        optimizer = bilevel(problem, val_shard(rank), every=3)
        for step in range(12):
            found, expected = optimizer.loss(shard(rank, step)), plain.model(shard(rank, step)[0])
            if has_aux:
                found, z = found
                assert torch.equal(z, expected)
            (found * (0.2 if step % 2 else 0.8)).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        return end(optimizer)

    return {f"{kind}, {aux}": run(kind, aux) for kind in (False, True) for aux in (False, True)}


def communication(rank: int, size: int) -> Answer:
    """How many numbers go into each all-reduce of a hypergradient with five products, of one loss and of two."""
    return {"one": counted(wrapped(tiny()), rank), "two": counted(wrapped(tiny(val=several)), rank)}


def counted(problem: hoptim.Problem, rank: int) -> list[int]:
    sizes: list[int] = []
    original = distributed.all_reduce

    def noting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **options)

    distributed.all_reduce = noting
    try:
        method = hoptim.Implicit(hoptim.Neumann(terms=5, step_size=0.1))
        method(problem, shard(rank), val_shard(rank))
    finally:
        distributed.all_reduce = original
    return sizes


def logging(rank: int, size: int) -> Answer:
    """Three hypersteps, written down by trackers that all ranks have."""
    path = Path(sys.argv[1]) / "rows.jsonl"
    optimizer = bilevel(wrapped(tiny()), VAL, every=1, hooks=[JsonLines(path=path), Console()])
    for _ in range(3):
        optimizer.loss(shard(rank)).backward()
        optimizer.step()
    return {"hypersteps": optimizer.hyper_steps}


def normed() -> hoptim.Problem:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def loss(m: Any, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1]) + h["decay"] * sum(p.square().sum() for p in m.parameters())

    return hoptim.Problem(model, nn.ParameterDict({"decay": torch.tensor(0.1)}), loss, loss)


def synchronised_norm(rank: int, size: int) -> Answer:
    """SyncBatchNorm, which torch has for GPUs alone: in training its own error, in evaluation that of BatchNorm."""
    problem = normed()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(problem.model)
    problem = hoptim.Problem(model, problem.hparams, problem.train_loss, problem.val_loss)
    try:
        hoptim.hypergradient(problem, shard(rank), val_shard(rank))
        message = ""
    except (ValueError, RuntimeError) as error:
        message = str(error)
    model.eval()
    return {"message": message, "grads": hoptim.hypergradient(problem, shard(rank), val_shard(rank)).grads}


def start(rank: int, size: int) -> Answer:
    """Hyperparameters that start apart are made alike; weights that are not alike are an error."""
    problem = wrapped(tiny())
    with torch.no_grad():
        problem.hparams["scale"].add_(rank)
    bilevel(problem, VAL)
    leaf = problem.leaves()["scale"].detach().clone()
    alone = tiny()
    with torch.no_grad():
        next(alone.model.parameters()).mul_(1 + rank)
    try:
        hoptim.hypergradient(alone, shard(rank), VAL)
        message = ""
    except ValueError as error:
        message = str(error)
    try:
        bilevel(alone, VAL, warmup=100).loss(shard(rank))
        first_loss, notes = "", []
    except ValueError as error:
        first_loss, notes = str(error), error.__notes__
    unshared = hoptim.Problem(alone.model, alone.hparams, alone.train_loss, alone.val_loss, process_group=None)
    own = hoptim.hypergradient(unshared, shard(rank), VAL).grads
    try:
        hoptim.audit(problem, shard(rank), VAL)
        audit = ""
    except ValueError as error:
        audit = str(error)
    messages = {"message": message, "first_loss": first_loss, "notes": notes, "audit": audit}
    return {"leaf": leaf, "own": own, **messages}


def groups(rank: int, size: int) -> Answer:
    """A part of the ranks: the first two train together, the others alone."""
    pair = distributed.new_group([0, 1])
    single = [distributed.new_group([other]) for other in range(2, size)]
    group = pair if rank < 2 else single[rank - 2]
    problem = tiny()
    model = DistributedDataParallel(problem.model, process_group=group)
    joined = hoptim.Problem(model, problem.hparams, problem.train_loss, problem.val_loss)
    return {**answer(joined, shard(rank), val_shard(rank)), "size": joined.ranks.size}


def alone(rank: int, size: int) -> Answer:
    return {"ranks": (Ranks.all().size, Ranks().size)}


CASES = [
    methods,
    vector,
    tasks,
    uneven_tasks,
    task_that_fails,
    influenced,
    uneven,
    averaged,
    routed,
    nan_on_one,
    training,
    unrolled,
    decays_in_steps,
    accumulated,
    outputs,
    communication,
    start,
    groups,
    alone,
    wrapped_hyperparameters,
    logging,
    synchronised_norm,
]


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    # The graphs run as they are: that inductor's code is right is seen in tests/curvature/test_compiled.py, in less time.
    torch._inductor.compile = lambda graph, arguments, options: graph
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    cases = [globals()[name] for name in names] or CASES
    answers = {case.__name__: case(rank, size) for case in cases}
    torch.save(answers, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
