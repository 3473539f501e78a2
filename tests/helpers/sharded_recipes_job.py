"""Started once on each rank, as by torchrun: the cases of integration/test_sharded_recipes.py; the answers go to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import hoptim
from hoptim import recipes
from hoptim.problem.sharding import whole
from hoptim.training.first_steps import vanished_weights, weight_norms

Answer = dict[str, Any]
Batch = tuple[int, Tensor, Tensor, Tensor]  # a seed, inputs, classes, and the numbers of the examples
SIZE = 4  # examples of each rank
EXAMPLES = 24


class Block(nn.Module):
    """A residual layer; an odd hidden width is one that two ranks cannot halve."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """For images of 3×3, of three classes."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(9, 5), nn.Linear(5, 3)
        self.blocks = nn.ModuleList(Block(5, hidden) for _ in range(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(hidden: int = 7) -> Net:
    torch.manual_seed(1)
    return Net(hidden)


def nested(model: Net) -> None:
    """Each block by itself, and the rest: after a forward pass the rest is whole weights, and the blocks are shards."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def resharded(model: Net) -> None:
    fully_shard(model, reshard_after_forward=True)


def tensor_parallel(model: Net) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def batch(rank: int, step: int) -> Batch:
    draw = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(SIZE, 1, 3, 3, generator=draw), torch.randint(0, 3, (SIZE,), generator=draw)
    return 100 * step + rank, x, y, torch.randint(0, EXAMPLES, (SIZE,), generator=draw)


def val_batch(rank: int) -> Batch:
    return batch(rank + 50, 1)


# The recipes: how each is made, and its training loss


def cross_entropy(model: Any, h: Any, b: Batch) -> Tensor:
    return F.cross_entropy(model(b[1]), b[2])


def each(model: Any, b: Batch) -> Tensor:
    return F.cross_entropy(model(b[1]), b[2], reduction="none")


def decayed(model: Any, h: Any, b: Batch) -> Tensor:
    """After the forward pass, when weights of the root are whole."""
    return cross_entropy(model, h, b) + h.penalty(model)


def decayed_first(model: Any, h: Any, b: Batch) -> Tensor:
    """Before the forward pass, when all weights are shards."""
    penalty = h.penalty(model)
    return penalty + cross_entropy(model, h, b)


def changed_layers(model: Any, h: Any, b: Batch) -> Tensor:
    return F.cross_entropy(h.call(model, b[1]), b[2])


def distilled(model: Any, h: Any, b: Batch) -> Tensor:
    x, y = h.examples()
    return F.cross_entropy(model(x), y) + cross_entropy(model, h, b)


def combined(model: Any, h: Any, b: Batch) -> Tensor:
    return F.cross_entropy(h["noise"].call(model, b[1]), b[2]) + h["decay"].penalty(model)


def by_hand(model: Any, h: Any, b: Batch) -> Tensor:
    """A user's own penalties: one of scalars, and one of whole weights."""
    weights = dict(model.named_parameters())
    size = sum(whole(w.square().sum()) for w in weights.values())
    up = whole(weights["blocks.0.up.weight"])
    return cross_entropy(model, h, b) + h["decay"].exp() * size + (h["unit"].exp() * up.abs()).sum()


def own(model: Any) -> hoptim.HyperParameters:
    shape = model.get_parameter("blocks.0.up.weight").shape
    return hoptim.HyperParameters({"decay": torch.tensor(-3.0), "unit": torch.full(shape, -4.0)})


LABELS = torch.arange(EXAMPLES) % 3
Make = Callable[[Any], Any]
RECIPES: dict[str, tuple[Make, Any]] = {
    **{
        f"decay a {per}, norm {norm}": (partial(recipes.WeightDecay, per=per, start=0.02, norm=norm), decayed)
        for per in ("global", "tensor", "channel", "weight")
        for norm in (1, 2)
    },
    "decay of all": (lambda m: recipes.WeightDecay(m, per="channel", start=0.02, include=lambda *_: True), decayed),
    "decay first": (lambda m: recipes.WeightDecay(m, per="channel", start=0.02), decayed_first),
    "prior": (lambda m: recipes.PriorScale(m, 30, per="tensor"), decayed),
    "noise": (lambda m: recipes.NoiseWidth(m, start=0.3), changed_layers),
    "noise in blocks": (lambda m: recipes.NoiseWidth(m, ["blocks.0", "head"], start=0.3), changed_layers),
    "dropout": (lambda m: recipes.Dropout(m, start=0.3), changed_layers),
    "dropout a unit": (lambda m: recipes.Dropout(m, per="unit", start=0.3), changed_layers),
    "smoothing": (lambda m: recipes.LabelSmoothing(0.1), lambda m, h, b: h.cross_entropy(m(b[1]), b[2])),
    "temperature": (lambda m: recipes.Temperature(1.3), lambda m, h, b: h.cross_entropy(m(b[1]), b[2])),
    "labels": (lambda m: recipes.SoftLabels(LABELS), lambda m, h, b: h.cross_entropy(m(b[1]), b[3])),
    "examples": (lambda m: recipes.ExampleWeights(EXAMPLES, groups=LABELS), lambda m, h, b: h.mean(each(m, b), b[3])),
    "rater": (lambda m: recipes.Rater(nn.Linear(3, 1)), lambda m, h, b: h.mean(each(m, b), b[1][:, 0, 0])),
    "domains": (lambda m: recipes.DomainWeights({"a": 2, "b": 1, "c": 1}), lambda m, h, b: h.mean(each(m, b), b[2])),
    "losses": (
        lambda m: recipes.LossWeights(["class", "size"]),
        lambda m, h, b: h.sum({"class": cross_entropy(m, h, b), "size": m(b[1]).square().mean()}),
    ),
    "images": (
        lambda m: recipes.Augmentation(start=0.2),
        lambda m, h, b: F.cross_entropy(m(h.augment(b[1])), b[2]),
    ),
    "network": (lambda m: recipes.AugmentationNet(1, hidden=2), lambda m, h, b: F.cross_entropy(m(h(b[1])), b[2])),
    "distilled": (lambda m: recipes.DistilledData(3, (1, 3, 3)), distilled),
    "choice": (
        lambda m: recipes.Categorical(["plain", "squashed"], relaxation="gumbel"),
        lambda m, h, b: F.cross_entropy(h.mix({"plain": m(b[1]), "squashed": m(b[1]).tanh()}), b[2]),
    ),
    "gate": (
        lambda m: recipes.Gate(9),
        lambda m, h, b: F.cross_entropy(m(b[1].flatten(1) * h.values()), b[2]) + 0.01 * h.count(),
    ),
    "decay and noise": (
        lambda m: nn.ModuleDict({"decay": recipes.WeightDecay(m, per="channel"), "noise": recipes.NoiseWidth(m, start=0.3)}),
        combined,
    ),
    "by hand": (own, by_hand),
}
LAYOUTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "nested": (nested, tuple(RECIPES)),
    "resharded": (resharded, ("decay a channel, norm 2", "decay and noise", "by hand")),
    "tensor parallel": (
        tensor_parallel,
        (
            "decay a global, norm 1", "decay a channel, norm 2", "decay a weight, norm 2", "decay of all", "noise",
            "noise in blocks", "dropout", "dropout a unit", "decay and noise", "by hand",
        ),
    ),
}  # fmt: skip
MADE_AFTER = ("decay a global, norm 1", "decay a channel, norm 2", "decay a weight, norm 2", "prior", "dropout a unit")
HIDDEN = {"nested": 7, "resharded": 7, "tensor parallel": 8}
STEPS, EVERY = 3, 2


def problem_of(model: Any, hparams: Any, loss: Any, **options: Any) -> hoptim.Problem:
    """A problem whose batches may be lists of those of several ranks, each with random numbers of its own."""

    def train(m: Any, h: Any, b: Any) -> Tensor:
        if isinstance(b, list):
            return torch.stack([train(m, h, one) for one in b]).mean()
        torch.manual_seed(b[0])
        return loss(m, h, b)

    def val(m: Any, h: Any, b: Any) -> Tensor:
        if isinstance(b, list):
            return torch.stack([val(m, h, one) for one in b]).mean()
        return cross_entropy(m.eval(), h, b)

    return hoptim.Problem(model, hparams, train, val, **options)


def trained(model: Any, hparams: Any, loss: Any, of_step: Callable[[int], Any], val: Any, **options: Any) -> Answer:
    """Two steps, a hyperstep, and another step: the first gradients, hypergradients, and all that is learned, at the end."""
    problem = problem_of(model, hparams, loss, **options)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.SGD(hparams.parameters(), lr=10.0)  # a step of Adam would hardly show the size of a hypergradient
    method = hoptim.Implicit(hoptim.CG(terms=2, tolerance=0.0), curvature=hoptim.Exact(), damping=2.0)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[val], hypergradient=method, every=EVERY)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        value = optimizer.loss(of_step(step))
        value.backward()
        losses.append(value.item())
        if not step:
            gradients = {name: whole(w.grad).clone() for name, w in problem.weights().items() if w.grad is not None}
        optimizer.step()
        if optimizer.record is not None:
            assert optimizer.record.moved, optimizer.record.failure
    weights = {name: whole(w.detach()).clone() for name, w in problem.weights().items()}
    leaves = {name: leaf.detach().clone() for name, leaf in problem.leaves().items()}
    assert optimizer.record is not None
    assert optimizer.hyper_steps == STEPS // EVERY
    return {
        "losses": torch.tensor(losses),
        "hypergradients": optimizer.record.result.grads,
        "gradients": gradients,
        "weights": weights,
        "leaves": leaves,
        "norms": weight_norms(problem),
        "vanished": vanished_weights(problem, dict.fromkeys(weights, 1e6)),
    }


def hparams_of(name: str, model: Any) -> Any:
    torch.manual_seed(2)
    return RECIPES[name][0](model).double()


def one_process(name: str, layout: str, size: int) -> Answer:
    """The training of one process on what all ranks have; tensor parallel ranks have the same batch."""
    model = net(HIDDEN[layout])
    ranks = range(1 if layout == "tensor parallel" else size)
    val = [val_batch(rank) for rank in ranks]
    return trained(
        model, hparams_of(name, model), RECIPES[name][1], lambda step: [batch(rank, step) for rank in ranks], val,
        process_group=None,
    )  # fmt: skip


def sharded(name: str, layout: str, rank: int, *, made_after: bool = False) -> Answer:
    model = net(HIDDEN[layout])
    hparams = None if made_after else hparams_of(name, model)
    LAYOUTS[layout][0](model)
    hparams = hparams_of(name, model) if hparams is None else hparams
    own = 0 if layout == "tensor parallel" else rank
    return trained(model, hparams, RECIPES[name][1], lambda step: batch(own, step), val_batch(own))


# The cases


def trainings(rank: int) -> Answer:
    return {layout: {name: sharded(name, layout, rank) for name in names} for layout, (_, names) in LAYOUTS.items()}


def made_after(rank: int) -> Answer:
    return {name: sharded(name, "nested", rank, made_after=True) for name in MADE_AFTER}


MISTAKES: dict[str, Any] = {
    "shapes": lambda w, h: (h["unit"] * w.square()).sum(),
    "scalar": lambda w, h: h["decay"] * w.square().sum(),
    "flat": lambda w, h: h["decay"] * w.flatten().square().sum(),
    "always": lambda w, h: h["decay"] * w.square().sum().full_tensor(),
}


def mistakes(rank: int) -> Answer:
    """What a user is told whose own penalty takes sharded weights for plain ones, or plain ones for sharded ones."""
    told: Answer = {}
    for kind, penalty in MISTAKES.items():
        model = net()
        nested(model)

        def loss(m: Any, h: Any, b: Batch, penalty: Any = penalty) -> Tensor:
            return penalty(dict(m.named_parameters())["blocks.0.up.weight"], h) + cross_entropy(m, h, b)

        problem = problem_of(model, own(model), loss)
        try:
            if kind == "always":
                hoptim.hypergradient(problem, batch(rank, 0), val_batch(rank))
            else:
                problem.loss(batch(rank, 0))
        except (RuntimeError, TypeError, AttributeError) as error:
            told[kind] = [type(error).__name__, str(error), *getattr(error, "__notes__", ())]
    model = net()
    nested(model)
    try:
        problem_of(model, nn.ParameterDict({"unit": torch.zeros_like(model.head.weight)}), decayed)
    except TypeError as error:
        told["hyperparameter"] = [str(error)]
    return told


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    answers = {case.__name__: case(rank) for case in (trainings, made_after, mistakes)}
    torch.save(answers, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
