"""Started once on each rank, as by torchrun: every case of integration/test_sharded.py; the answers go to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import hoptim
from hoptim import recipes
from hoptim.methods.method import TrainingContext
from hoptim.problem import sharding
from hoptim.problem.sharding import whole

Answer = dict[str, Any]
Batch = tuple[Tensor, Tensor, int]
WORDS, WIDTH, HIDDEN = 7, 5, 8  # 7 and 5 rows can't be shared evenly by 2 or 4 ranks


# The model and its losses, with nothing of torch.distributed in them


def draw(seed: int, n: int = 6) -> Batch:
    """Three words and a class for each example, and a seed for dropout."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (n, 3), generator=generator)
    return words, torch.randint(0, WORDS, (n,), generator=generator), seed


def shard(rank: int, step: int = 0, n: int = 6) -> Batch:
    return draw(100 * step + rank, n)


def val_shard(rank: int) -> Batch:
    return draw(5000 + rank, 8)


def joined(batches: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, *_ in batches]), torch.cat([y for _, y, _ in batches]), 0


class Adapter(nn.Module):
    """A frozen layer with two thin matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 2)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(torch.tanh(self.first(self.norm(x)))))


class Net(nn.Module):
    """A net of 181 weights; its gain is one number, so that all ranks but one hold nothing of it."""

    def __init__(self, *, tied: bool = False, dropout: float = 0.0, counts: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.block = Block(dropout)
        self.gain = nn.Parameter(torch.full((1,), 1.1))
        self.batch_norm = nn.BatchNorm1d(WIDTH) if normed else nn.Identity()
        self.counts = counts
        self.register_buffer("calls", torch.zeros(()))
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        h = self.words(x).mean(1)
        h = self.block(h)
        return self.head(self.gain * self.batch_norm(h)) * (1 + self.calls / 10)


def build(
    dtype: torch.dtype = torch.float64,
    *,
    freeze: bool = False,
    adapters: bool = False,
    few: bool = False,
    **options: Any,
) -> Net:
    torch.manual_seed(4)
    net = Net(**options)
    if few:
        net.requires_grad_(False)
        net.gain.requires_grad_()
        net.head.bias.requires_grad_()
    if freeze:
        net.block.requires_grad_(False)
    if adapters:
        net.requires_grad_(False)
        net.block.first, net.block.second = Adapter(net.block.first), Adapter(net.block.second)
    if isinstance(net.batch_norm, nn.BatchNorm1d):
        net.batch_norm.running_mean.copy_(torch.linspace(-0.5, 0.5, WIDTH))
        net.batch_norm.running_var.copy_(torch.linspace(0.5, 2, WIDTH))
        net.batch_norm.eval()
    return net.to(dtype)


def predict(m: Any, h: Any, b: Batch) -> Tensor:
    with torch.random.fork_rng():  # one mask for each batch, whatever else was drawn before
        torch.manual_seed(b[2])
        return m(b[0])


def criterion(z: Tensor, h: Any, b: Batch) -> Tensor:
    return F.cross_entropy(h["scale"].exp() * z, b[1])


def penalty(m: Any, h: Any) -> Tensor:
    total = torch.zeros(())
    for p in m.parameters():
        p = whole(p)  # in a training step FSDP's weights are sharded until the forward pass
        total = total + h["decay"][int(p.ndim == 1)].exp() * (p.square() / 2 + p**4 / 4).sum()
    return total.to(h["decay"].dtype)


def val_loss(m: Any, h: Any, b: Batch) -> Tensor:
    m.eval()
    return F.cross_entropy(m(b[0]), b[1]) + 0.3 * h["decay"].sin().sum() + 0.2 * h["scale"] ** 2


def several(m: Any, h: Any, b: Batch) -> Tensor:
    losses = F.cross_entropy(m(b[0]), b[1], reduction="none").reshape(2, -1).mean(1)
    return losses + 0.3 * h["decay"].sin() + 0.2 * h["scale"] ** 2


COMPOSITE = hoptim.CompositeLoss(predict, criterion, penalty)


def problem_of(model: nn.Module, *, val: Any = val_loss, train: Any = COMPOSITE, **options: Any) -> hoptim.Problem:
    dtype = next(model.parameters()).dtype
    values = {"decay": torch.tensor([-2.0, -1.0]), "scale": torch.tensor(0.4)}
    hparams = nn.ParameterDict({name: nn.Parameter(value.to(dtype)) for name, value in values.items()})
    return hoptim.Problem(model, hparams, train, val, **options)


# How it may be sharded


@dataclass(frozen=True)
class Sharded:
    """One way to shard the model.

    Attributes:
        shard: does it, given the model and the number of ranks.
        options: of the model.
        copies: how many ranks have the same batch: all under tensor parallel.
    """

    shard: Callable[[Any, int], None]
    options: dict[str, Any]
    copies: Callable[[int], int] = lambda size: 1

    def batches(self, size: int) -> range:
        """The numbers of the batches that the ranks have."""
        return range(size // self.copies(size))

    def own(self, rank: int, size: int) -> int:
        """The number of this rank's batch."""
        return rank // self.copies(size)


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def one_unit(model: Any, size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh(size))


def nested(model: Any, size: int, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in (model.block, model):
        fully_shard(part, mesh=mesh(size), **options)


def plain_gain(model: Any, size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh(size), ignored_params={model.gain})


def hybrid(model: Any, size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    pairs = mesh(2, size // 2, names=("copies", "shards"))
    for part in (model.block, model):
        fully_shard(part, mesh=pairs)


def tensor_parallel(model: Any, size: int, over: Any = None) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model.block, mesh(size) if over is None else over, plan)


def both(model: Any, size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    pairs = mesh(size // 2, 2, names=("data", "tensor"))
    tensor_parallel(model, size, pairs["tensor"])
    for part in (model.block, model):
        fully_shard(part, mesh=pairs["data"])


LAYOUTS = {
    "one unit": Sharded(one_unit, {}),
    "nested": Sharded(nested, {}),
    "tied": Sharded(nested, {"tied": True}),
    "frozen": Sharded(nested, {"freeze": True}),
    "adapters": Sharded(nested, {"adapters": True}),
    "a plain weight": Sharded(plain_gain, {}),
    "counting": Sharded(nested, {"counts": True}),
    "batch norm": Sharded(nested, {"normed": True}),
    "tensor parallel": Sharded(tensor_parallel, {}, lambda size: size),
    "tensor parallel, dropout": Sharded(tensor_parallel, {"dropout": 0.3}, lambda size: size),
    "hybrid": Sharded(hybrid, {}),
    "both": Sharded(both, {}, lambda size: 2),
}
ON_BOTH = ("nested", "adapters", "a plain weight", "tensor parallel")  # on two ranks and on four
FOR_FOUR = ("hybrid", "both")
FOR_TWO = tuple(name for name in LAYOUTS if name not in (*ON_BOTH, *FOR_FOUR))


def sharded(layout: str, size: int, dtype: torch.dtype = torch.float64, **more: Any) -> Net:
    model = build(dtype, **{**LAYOUTS[layout].options, **more})
    LAYOUTS[layout].shard(model, size)
    return model


# The methods


def sgd(problem: hoptim.Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def adam(problem: hoptim.Problem) -> torch.optim.Optimizer:
    return torch.optim.AdamW(problem.model.parameters(), lr=0.02, weight_decay=0.1)


@dataclass(frozen=True)
class How:
    """A method, the inner optimizer that it knows, and how often it is called, the state being carried over."""

    method: hoptim.Implicit
    inner: Callable[[hoptim.Problem], torch.optim.Optimizer] | None = None
    calls: int = 1
    few: bool = False  # for a model of 8 weights, so that one rank holds fewer than the method has vectors


def implicit(solver: Any, curvature: Any = None, **options: Any) -> hoptim.Implicit:
    return hoptim.Implicit(solver, curvature=curvature, **options)


EXACT, DAMPED = hoptim.Exact(), {"damping": 0.5}
METHODS = {
    "default": How(hoptim.Implicit()),
    "identity": How(implicit(hoptim.Identity(), EXACT)),
    "neumann": How(implicit(hoptim.Neumann(terms=7, step_size=0.1), EXACT)),
    "neumann, step chosen": How(implicit(hoptim.Neumann(terms=7), EXACT, **DAMPED)),
    "chebyshev": How(implicit(hoptim.Chebyshev(terms=5), hoptim.GaussNewton())),
    "cg": How(implicit(hoptim.CG(terms=9), hoptim.GaussNewton(), damping=0.1)),
    "compiled": How(implicit(hoptim.MINRES(terms=7), hoptim.Exact(compile=True))),
    "minres": How(implicit(hoptim.MINRES(terms=7), EXACT)),
    "gmres": How(implicit(hoptim.GMRES(terms=7), EXACT)),
    "nystrom": How(implicit(hoptim.Nystrom(rank=4, rho=0.1), EXACT)),
    "nystrom of all weights": How(implicit(hoptim.Nystrom(rank=100, rho=0.1), hoptim.GaussNewton()), few=True),
    "differences": How(implicit(hoptim.MINRES(terms=4), hoptim.FiniteDifference())),
    "averaged": How(implicit(hoptim.CG(terms=7), hoptim.Averaged(batches=2), **DAMPED)),
    "sampled": How(implicit(hoptim.Neumann(terms=3, step_size=0.1), hoptim.Sampled())),
    "warm": How(implicit(hoptim.WarmStart(hoptim.CG(terms=3)), EXACT, **DAMPED), calls=3),
    "soba": How(implicit(hoptim.SOBA(step_size=0.2), EXACT, **DAMPED), calls=3),
    "jacobi": How(implicit(hoptim.CG(terms=4), preconditioner=hoptim.Jacobi(), **DAMPED)),
    "jacobi above the floor": How(implicit(hoptim.CG(terms=4), preconditioner=hoptim.Jacobi(floor=0.7), **DAMPED)),
    "second moments": How(implicit(hoptim.CG(terms=4), preconditioner=hoptim.SecondMoments(), **DAMPED), adam),
    "sama": How(implicit(hoptim.Identity(), preconditioner=hoptim.SecondMoments()), adam),
    "decay of sgd": How(implicit(hoptim.MINRES(terms=5)), sgd),
    "decay of adam": How(implicit(hoptim.MINRES(terms=5)), adam),
}


def gathered(x: Any) -> Any:
    return {name: whole(t).detach().clone() for name, t in x.items()}


def answer(problem: hoptim.Problem, train: Any, val: Any, how: How, after: Sequence[Any] = ()) -> Answer:
    """The hypergradient, after training steps on these batches."""
    inner = None if how.inner is None else how.inner(problem)
    for batch in after if inner else ():
        inner.zero_grad()
        problem.loss(batch).backward()
        inner.step()
    more = iter([*after[:1]] * 10)
    state = None
    for _ in range(how.calls):
        loop = TrainingContext(inner=inner, draw=lambda: next(more))
        problem.check_ranks()
        result = how.method(problem, train, val, state, loop)
        state = result.solution.state
    fields = {"grads": result.grads, "direct": result.direct, "val": result.val_loss, "train": result.train_loss}
    solution = {"residuals": result.solution.residuals, "products": result.solution.products}
    fields |= {"norm": result.gradient_norm, "status": result.solution.status.name, **solution}
    return fields if result.val_loss.ndim else {**fields, "x": gathered(result.solution.value)}


def bilevel(problem: hoptim.Problem, val: Any, inner: Any = adam, **options: Any) -> hoptim.BilevelOptimizer:
    outer = torch.optim.Adam(problem.hparams.parameters(), lr=0.02)
    return hoptim.BilevelOptimizer(inner(problem), outer, problem, val_batches=[val], **options)


def end(optimizer: hoptim.BilevelOptimizer) -> Answer:
    problem = optimizer.problem
    tensors = {f"weight {n}": p for n, p in problem.named_parameters()} | problem.leaves()
    for leaf, state in optimizer.outer.state.items():
        tensors |= {f"outer {tuple(leaf.shape)} {key}": value for key, value in state.items()}
    assert optimizer.record is not None
    return {
        "tensors": gathered(tensors),
        "status": optimizer.record.status.name,
        "hypersteps": optimizer.hyper_steps,
        "norm": optimizer.record.result.gradient_norm,
    }


def train_on(optimizer: hoptim.BilevelOptimizer, batches: Sequence[Any]) -> Answer:
    for batch in batches:
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()
    return end(optimizer)


# The cases, each given the rank and how many there are


def layouts(rank: int, size: int) -> Answer:
    found = {}
    for name in (*ON_BOTH, *(FOR_FOUR if size == 4 else FOR_TWO)):
        own = LAYOUTS[name].own(rank, size)
        for dtype in (torch.float64, torch.float32):
            model = sharded(name, size, dtype)
            found[f"{name}, {dtype}"] = answer(problem_of(model), shard(own), val_shard(own), METHODS["default"])
        found[f"{name}, large"] = with_large(1 if name == "nested" else 36, name, rank, size)
        held = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        found[name] = {"held": [t.numel() for t in held]}
    return found


def with_large(least: int, layout: str, rank: int, size: int) -> Answer:
    """Weights of so many entries have collectives of their own."""
    own, before = LAYOUTS[layout].own(rank, size), sharding.LARGE
    sharding.LARGE = least
    try:
        return answer(problem_of(sharded(layout, size)), shard(own), val_shard(own), METHODS["default"])
    finally:
        sharding.LARGE = before


def layout_of(size: int) -> str:
    """That of the methods: on four ranks one whose weights are on different meshes, with copies."""
    return "both" if size == 4 else "nested"


def methods(rank: int, size: int) -> Answer:
    layout, found = layout_of(size), {}
    own = LAYOUTS[layout].own(rank, size)
    for name, how in METHODS.items():
        after = [shard(own, step) for step in (1, 2, 3)]
        found[name] = answer(problem_of(sharded(layout, size, few=how.few)), shard(own), val_shard(own), how, after)
    return found


def vector(rank: int, size: int) -> Answer:
    layout = layout_of(size)
    own = LAYOUTS[layout].own(rank, size)
    problem = problem_of(sharded(layout, size), val=several)
    names = ("default", "nystrom", "differences")
    return {name: answer(problem, shard(own), val_shard(own), METHODS[name], [shard(own)]) for name in names}


def random(rank: int, size: int) -> Answer:
    """Dropout with another mask on each rank, and batches of unequal size."""
    problem = problem_of(sharded("nested", size, dropout=0.4))
    return answer(problem, shard(rank, n=6 - rank), val_shard(rank), METHODS["minres"])


class Ways(nn.Module):
    """Each rank goes its own way, so that none touches all weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.ways = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(5)])

    def forward(self, x: Tensor, way: int) -> Tensor:
        return self.ways[way](x)


def routed(rank: int, size: int) -> Answer:
    """Rank r sees way r, and its own hyperparameter; the last ways are seen by none."""
    from torch.distributed.fsdp import fully_shard

    model = Ways().double()
    fully_shard(model)
    hparams = hoptim.HyperParameters({f"decay{way}": torch.tensor(0.5 + way).double() for way in range(5)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return (m(*b) - 1).square().mean() + h[f"decay{b[1]}"] * m.ways[b[1]].weight.square().sum()

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return (m(*b) + 1).square().mean()

    problem = hoptim.Problem(model, hparams, train, val)
    result = hoptim.Implicit(hoptim.CG(terms=20))(problem, ways_batch(rank), ways_batch(rank + 10))
    return {"grads": result.grads, "untouched": result.untouched}


def ways_batch(seed: int) -> tuple[Tensor, int]:
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), seed % 10


def training(rank: int, size: int, hypersteps: int = 20, layout: str = "") -> Answer:
    """A hyperstep after each step from the sixth on."""
    layout = layout or layout_of(size)
    own = LAYOUTS[layout].own(rank, size)
    optimizer = bilevel(problem_of(sharded(layout, size)), val_shard(own), every=1, warmup=6)
    return train_on(optimizer, [shard(own, step % 7) for step in range(5 + hypersteps)])


def short_training(rank: int, size: int) -> Answer:
    return training(rank, size, 3, "hybrid" if size == 4 else "tensor parallel")


def long_training(rank: int, size: int) -> Answer:
    return training(rank, size, 200)


DECAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "coupled": (sgd, {"per": "channel"}),
    "decoupled": (adam, {"per": "weight"}),
    "all alike": (adam, {"per": "global"}),
    "from the start": (sgd, {"towards": "start", "decoupled": True}),
    "lasso": (sgd, {"norm": 1, "per": "weight", "start": 1.0}),
    "by differences": (adam, {"per": "channel", "start": 0.5}),
}


def with_decays(model: nn.Module, kind: str, train: Sequence[Any], val: Any) -> Answer:
    """A training whose inner optimizer has learned decays of single weights."""
    inner, options = DECAYS[kind]
    decays = recipes.WeightDecay(model, **options).double()

    def plain(m: Any, h: Any, b: Batch) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    problem = hoptim.Problem(model, decays, plain, plain)
    method = METHODS["differences"].method if kind == "by differences" else hoptim.Implicit()
    own = {"options": {"weight_decay": decays}, "hypergradient": method}
    optimizer = bilevel(problem, val, inner, every=2, warmup=4, **own)
    return train_on(optimizer, train)


def decays_in_steps(rank: int, size: int) -> Answer:
    found = {}
    for layout in ("hybrid", "both") if size == 4 else ("nested", "tensor parallel"):
        own = LAYOUTS[layout].own(rank, size)
        for kind in DECAYS:
            train = [shard(own, step) for step in range(10)]
            found[f"{layout}, {kind}"] = with_decays(sharded(layout, size), kind, train, val_shard(own))
    return found


def evaluated(rank: int, size: int) -> Answer:
    """A look at the model between the training step and the hyperstep, which leaves the root's weights whole."""
    problem = problem_of(sharded("nested", size))
    optimizer = bilevel(problem, val_shard(rank), every=None)
    kinds = []
    for step in range(3):
        optimizer.zero_grad()
        optimizer.loss(shard(rank, step)).backward()
        optimizer.step()
        with torch.no_grad():
            problem.model(val_shard(rank)[0])
        kinds.append(hasattr(problem.model.head.weight, "device_mesh"))
        optimizer.hyperstep()
    return {**end(optimizer), "kinds": kinds}


def accumulated(rank: int, size: int) -> Answer:
    """Two micro-batches a step, of unequal shares; the gradients are reduced at the second alone."""
    problem = problem_of(sharded("nested", size))
    optimizer = bilevel(problem, val_shard(rank), every=2)
    for step in range(4):
        optimizer.zero_grad()
        for part, share in enumerate((0.75, 0.25)):
            problem.model.set_requires_gradient_sync(part == 1)
            (share * optimizer.loss(shard(rank, 2 * step + part))).backward()
        optimizer.step()
    return end(optimizer)


def state_of(problem: hoptim.Problem) -> Answer:
    """All that a hypergradient must leave alone."""
    model = problem.model
    hooks = [
        (name, kind, list(getattr(part, kind)))
        for name, part in model.named_modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
    ]
    return {
        "types": [type(p).__name__ for p in model.parameters()],
        "ids": [id(p) for p in model.parameters()],
        "weights": [local_of(p) for p in model.parameters()],
        "grads": [None if p.grad is None else local_of(p.grad) for p in model.parameters()],
        "state_dict": {name: local_of(t) for name, t in model.state_dict().items()},
        "leaf grads": [leaf.grad for leaf in problem.hparams.parameters()],
        "hooks": hooks,
        "modes": [part.training for part in model.modules()],
        "random": torch.get_rng_state(),
    }


def local_of(t: Tensor) -> Tensor:
    return (t.to_local() if hasattr(t, "to_local") else t).detach().clone()


def no_trace(rank: int, size: int) -> Answer:
    """Training with hypergradients in all places of the loop, and without any."""
    found = {}
    methods = {"": hoptim.Implicit(), ", by differences": METHODS["differences"].method}

    def run(looks: bool) -> Any:
        problem = problem_of(sharded(layout, size, dropout=0.2, counts=True), train=drawing)
        inner = adam(problem)

        def look(place: str) -> None:
            for how, method in methods.items() if looks else ():
                before = state_of(problem)
                hoptim.hypergradient(problem, shard(own), val_shard(own), method, inner=inner)
                found.setdefault(place + how, []).append((before, state_of(problem)))

        with torch.no_grad():
            problem.model(shard(own)[0])  # at whose first call FSDP2 adds a hook of its own, for state dicts
        problem.weights()  # which puts the shards of the root in their places
        torch.manual_seed(own)
        for step in range(2):
            inner.zero_grad()
            look("before the loss")
            loss = problem.loss(shard(own, step))
            loss.backward()
            look("after the backward pass")
            inner.step()
            look("after the step")
        return state_of(problem)

    layout = layout_of(size)
    own = LAYOUTS[layout].own(rank, size)
    ends = [run(True), run(False)]
    for one in ends:
        del one["ids"], one["hooks"]  # those of two models
    return {**found, "at the end": [tuple(ends)]}


def drawing(m: Any, h: Any, b: Batch) -> Tensor:
    """The training loss whose dropout draws from torch's own generator."""
    return criterion(m(b[0]), h, b) + penalty(m, h)


def words_of(call: Callable[[], Any]) -> str:
    """The kind and the words of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int, size: int) -> Answer:
    problem = problem_of(sharded("nested", size))
    train, val, inner = shard(rank), val_shard(rank), sgd(problem)
    ekfac = hoptim.EKFAC(model=problem.model, criterion=nn.CrossEntropyLoss(), batches=[train])

    def of(method: Any, **options: Any) -> str:
        return words_of(lambda: hoptim.hypergradient(problem, train, val, method, inner=inner, **options))

    def alone() -> None:
        hoptim.hypergradient(problem_of(sharded("nested", size), process_group=None), train, val)

    def learned() -> None:
        decay = hoptim.HyperParameters({"weight_decay": torch.tensor(0.1)})
        one = hoptim.Problem(problem.model, decay, lambda m, h, b: criterion(m(b[0]), problem.hparams, b), val_plain)
        optimizer = bilevel(one, val, sgd, options={"weight_decay": "weight_decay"}, hypergradient=hoptim.Implicit())
        optimizer.loss(train)

    def stepping() -> None:
        net = sharded("nested", size)
        net.gain.register_post_accumulate_grad_hook(lambda p: None)
        hoptim.hypergradient(problem_of(net), train, val, METHODS["differences"].method)

    def rounded(what: str) -> str:
        lowered = problem_of(in_bfloat16(size, what))
        return words_of(lambda: hoptim.hypergradient(lowered, train, val, METHODS["differences"].method))

    return {
        **{f"rounded {what}": rounded(what) for what in ("param_dtype", "reduce_dtype")},
        "stepping": words_of(stepping),
        "update": of(hoptim.Implicit(condition=hoptim.Update())),
        "ekfac": of(hoptim.Implicit(preconditioner=ekfac)),
        "unrolled": of(hoptim.Unrolled(3)),
        "replay": of(hoptim.Replay([train])),
        "audit": words_of(lambda: hoptim.audit(problem, train, val)),
        "alone": words_of(alone),
        "learned": words_of(learned),
    }


def trainings(rank: int, size: int) -> Answer:
    """A retraining, and a fit of two folds, in which each rank has a part of each batch."""
    return {"retrained": retrained(lambda: sharded("nested", size), rank), "crossed": crossed("nested", rank, size)}


def retrained(make: Callable[[], nn.Module], *ranks: int) -> Answer:
    """The weights of a model that is trained again."""

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        for step in range(3):
            optimizer.zero_grad()
            optimizer.loss(joined([shard(rank, step) for rank in ranks])).backward()
            optimizer.step()

    def inner(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    return gathered(dict(hoptim.retrain(problem_of(make()), make, loop, [0], inner=inner).named_parameters()))


EXAMPLES = 16


def crossed(layout: str | None, rank: int, size: int) -> Answer:
    """A fit of two folds; without a layout, in one process."""

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in range(6):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    def loss(m: Any, h: Any, i: Tensor) -> Tensor:
        x, y, _ = draw(7, EXAMPLES)
        own = i[rank::size]
        return criterion(m(x[own]), h, (x[own], y[own], 0))

    def train(m: Any, h: Any, i: Tensor) -> Tensor:
        return loss(m, h, i) + penalty(m, h)

    hparams = problem_of(build()).hparams
    torch.manual_seed(0)
    fit = hoptim.CrossValidated(
        lambda: build() if layout is None else sharded(layout, size),
        hparams,
        train,
        loss,
        inner=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        examples=EXAMPLES,
        steps=6,
        folds=2,
        hypersteps=3,
    ).fit(loop)
    return {**gathered(dict(fit.model.named_parameters())), **gathered(dict(hparams.named_parameters()))}


def apart(rank: int, size: int) -> Answer:
    """A plain weight beside sharded ones, which a training has moved apart, since nobody averages its gradients."""
    problem = problem_of(sharded("a plain weight", size))
    with torch.no_grad():
        problem.model.gain.add_(rank)
    return {"words": words_of(lambda: hoptim.hypergradient(problem, shard(rank), val_shard(rank)))}


def mixed(rank: int, size: int) -> Answer:
    """A model that trains in bfloat16 by a policy: how far its loss is from that in float32, and its hypergradient."""
    problem = problem_of(in_bfloat16(size, "param_dtype"))
    in_float32 = problem_of(sharded("nested", size, torch.float32)).loss(shard(rank))
    away = problem.loss(shard(rank)) / in_float32 - 1
    return {"away": float(away.detach()), "answer": answer(problem, shard(rank), val_shard(rank), METHODS["default"])}


def in_bfloat16(size: int, what: str) -> Net:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = build(torch.float32)
    nested(model, size, mp_policy=MixedPrecisionPolicy(**{what: torch.bfloat16}))
    return model


class Heads(nn.Module):
    """A layer whose forward pass knows how many of its four heads each rank of tensor parallel has."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first, self.second = 4, nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(len(x), self.heads, -1)
        return self.second((h * h.softmax(-1)).flatten(1))


def heads(rank: int, size: int) -> Answer:
    """Differences of a model that divides its heads by the size of tensor parallel; ``size`` = 1 for one process."""
    torch.manual_seed(2)
    model, x, y = Heads(), torch.randn(6, 3), torch.arange(6) % 2
    if size > 1:
        model.heads //= size
        tensor_parallel(SimpleNamespace(block=model), size)
    hparams = nn.ParameterDict({"decay": torch.tensor(0.1), "scale": torch.tensor(0.3)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        total = sum(whole(p.square().sum()) for p in m.parameters())
        return F.cross_entropy(h["scale"].exp() * m(x), y) + h["decay"] * total

    problem = hoptim.Problem(model, hparams, train, lambda m, h, b: F.cross_entropy(m(x).flip(1), y))
    result = hoptim.hypergradient(problem, None, None, METHODS["differences"].method)
    return {"grads": gathered(result.grads), "x": gathered(result.solution.value), "norm": result.gradient_norm}


def val_plain(m: Any, h: Any, b: Batch) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def other_batches(rank: int, size: int) -> Answer:
    """Ranks that hold parts of the same layers, with batches of their own."""
    found = {}
    for layout in ("tensor parallel", *(["both"] if size == 4 else [])):
        problem, own = problem_of(sharded(layout, size)), LAYOUTS[layout].own(rank, size)
        for place, batches in (
            ("train", (shard(rank), val_shard(own))),
            ("val", (shard(own), val_shard(rank))),
        ):
            found[f"{layout}, {place}"] = words_of(lambda: hoptim.hypergradient(problem, *batches))  # noqa: B023
    return found


def nan_on_one(rank: int, size: int) -> Answer:
    """The last rank's own loss is NaN, also in the layout in which only some ranks share a layer."""
    found = {}
    for layout in ("nested", *(["both"] if size == 4 else [])):
        own = LAYOUTS[layout].own(rank, size)

        def poisoned(m: Any, h: Any, b: Any) -> Tensor:
            loss = COMPOSITE(m, h, b[:3])
            return loss * torch.nan if b[3:] else loss

        def val(m: Any, h: Any, b: Any) -> Tensor:
            loss = val_loss(m, h, b)
            return loss * torch.nan if b[3:] else loss

        problem = problem_of(sharded(layout, size), train=poisoned, val=val)
        optimizer = bilevel(problem, val_shard(own), every=None)
        before = {name: leaf.detach().clone() for name, leaf in problem.leaves().items()}
        for place in ("train", "val"):
            batches: Any = {"train_batch": shard(own), "val_batch": val_shard(own)}
            if rank == size - 1:
                batches[f"{place}_batch"] += ("nan",)
            record = optimizer.hyperstep(**batches)
            found[f"{layout}, {place}"] = (record.status.name, record.moved)
        found[f"{layout}, still"] = all(torch.equal(leaf, before[name]) for name, leaf in problem.leaves().items())
    return found


CASES = [
    layouts,
    methods,
    vector,
    random,
    routed,
    training,
    short_training,
    decays_in_steps,
    evaluated,
    accumulated,
    no_trace,
    trainings,
    refusals,
    mixed,
    heads,
    other_batches,
    apart,
    nan_on_one,
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
    with suppress(RuntimeError):
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
