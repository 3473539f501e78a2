"""Wrong calls, one a row: the call, the error, and words that its message must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hoptim import (
    Averaged,
    BilevelOptimizer,
    FiniteDifference,
    HyperParameters,
    Identity,
    Implicit,
    Jacobi,
    Neumann,
    Problem,
    Sampled,
    SecondMoments,
    Unrolled,
    Update,
    hypergradient,
)

NAN, INF = math.nan, math.inf


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class EmptyPass:
    def __iter__(self) -> Any:
        return iter([])


def loss(m: Any, h: Any, b: Any) -> Tensor:
    return m(b).square().mean() + h["a"] * m.weight.square().sum()


def problem(train: Any = loss, val: Any = loss, model: Any = None, hparams: Any = None) -> Problem:
    model = nn.Linear(2, 1) if model is None else model
    return Problem(model, HyperParameters({"a": torch.tensor(1.0)}) if hparams is None else hparams, train, val)


def frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


def optimizer(inner: Any = None, outer: Any = None, of: Any = None, **options: Any) -> BilevelOptimizer:
    """A right call of BilevelOptimizer, but for what the row changes."""
    p = problem() if of is None else of
    sgd = torch.optim.SGD
    return BilevelOptimizer(
        inner(p, sgd) if inner else sgd(p.model.parameters(), lr=0.1),
        outer(p, sgd) if outer else sgd(p.hparams.parameters(), lr=0.1),
        options.pop("problem", p),
        **{"val_batches": [torch.ones(3, 2)], **options},
    )


def hparams(value: Any, constraint: Any = None) -> HyperParameters:
    return HyperParameters({"a": value}, None if constraint is None else {"a": constraint})


def shared() -> Problem:
    model, table = nn.Linear(2, 1), nn.ParameterDict()
    table["decay"] = model.weight
    return problem(model=model, hparams=table)


def once(train: Any = loss, val: Any = loss, method: Any = None, **options: Any) -> Any:
    return hypergradient(problem(train, val), torch.ones(3, 2), torch.ones(3, 2), method, **options)


T, ONE = torch.tensor, torch.ones(1)
ROWS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # solvers and methods
    "negative terms": (lambda: Neumann(terms=-1), ValueError, ["terms=-1", "0 or more"]),
    "half a term": (lambda: Neumann(terms=2.5), ValueError, ["terms=2.5", "whole number"]),
    "step 0": (lambda: Neumann(step_size=0), ValueError, ["step_size=0", "positive"]),
    "step negative": (lambda: Neumann(step_size=-0.1), ValueError, ["step_size=-0.1", "positive", "None"]),
    "step NaN": (lambda: Neumann(step_size=NAN), ValueError, ["step_size=nan", "positive"]),
    "step inf": (lambda: Neumann(step_size=INF), ValueError, ["step_size=inf", "positive"]),
    "damping negative": (lambda: Implicit(damping=-1.0), ValueError, ["damping=-1.0", "0 or more"]),
    "damping NaN": (lambda: Implicit(damping=NAN), ValueError, ["damping=nan", "finite"]),
    "damping inf": (lambda: Implicit(damping=INF), ValueError, ["damping=inf", "finite"]),
    "solver is a word": (lambda: Implicit("neumann"), TypeError, ["solver", "str", "hoptim.Neumann"]),
    "solver is a class": (lambda: Implicit(Neumann), TypeError, ["solver", "hoptim.Neumann"]),
    "curvature is a word": (lambda: Implicit(curvature="exact"), TypeError, ["curvature", "str", "Exact"]),
    "method is a solver": (
        lambda: hypergradient(problem(), ONE, ONE, Neumann()),
        TypeError,
        ["method", "Neumann", "hoptim.Implicit"],
    ),
    "hypergradient of a model": (
        lambda: hypergradient(nn.Linear(2, 1), ONE, ONE),
        TypeError,
        ["problem", "Linear", "hoptim.Problem"],
    ),
    # curvatures, conditions, preconditioners, unrolling
    "difference of step 0": (lambda: FiniteDifference(step=0), ValueError, ["step=0", "positive", "None"]),
    "difference of negative step": (lambda: FiniteDifference(step=-1e-3), ValueError, ["step=-0.001", "positive"]),
    "difference of step NaN": (lambda: FiniteDifference(step=NAN), ValueError, ["step=nan", "positive"]),
    "average of 0 batches": (lambda: Averaged(batches=0), ValueError, ["batches=0", "1 or more"]),
    "average of half a batch": (lambda: Averaged(batches=1.5), ValueError, ["batches=1.5", "whole number"]),
    "average of True batches": (lambda: Averaged(batches=True), ValueError, ["batches=True", "whole number"]),
    "average without batches": (
        lambda: once(method=Implicit(curvature=Averaged())),
        ValueError,
        ["Averaged", "more training batches", "train_batches"],
    ),
    "train batches that come once": (
        lambda: once(method=Implicit(curvature=Sampled()), train_batches=(b for b in [ONE])),
        TypeError,
        ["train_batches", "one-shot"],
    ),
    "condition is a word": (lambda: Implicit(condition="update"), TypeError, ["condition", "str", "hoptim.Gradient()"]),
    "condition is a class": (lambda: Implicit(condition=Update), TypeError, ["condition", "hoptim.Gradient()"]),
    "update of no optimizer": (
        lambda: once(method=Implicit(condition=Update())),
        ValueError,
        ["Update", "inner=optimizer"],
    ),
    "update of a model": (
        lambda: once(method=Implicit(condition=Update()), inner=nn.Linear(1, 1)),
        TypeError,
        ["inner", "Linear", "torch.optim"],
    ),
    "preconditioner is a word": (lambda: Implicit(preconditioner="jacobi"), TypeError, ["preconditioner", "str", "Jacobi"]),
    "no probes": (lambda: Jacobi(probes=0), ValueError, ["probes=0", "1 or more"]),
    "half a probe": (lambda: Jacobi(probes=2.5), ValueError, ["probes=2.5", "whole number"]),
    "floor 0": (lambda: Jacobi(floor=0), ValueError, ["floor=0", "above 0"]),
    "floor above 1": (lambda: Jacobi(floor=1.5), ValueError, ["floor=1.5", "at most 1"]),
    "floor NaN": (lambda: Jacobi(floor=NAN), ValueError, ["floor=nan", "above 0"]),
    "second moments of a model": (
        lambda: once(method=Implicit(Identity(), preconditioner=SecondMoments()), inner=nn.Linear(1, 1)),
        TypeError,
        ["inner", "Linear", "torch.optim"],
    ),
    "unrolled 0": (lambda: Unrolled(0), ValueError, ["steps=0", "1 or more"]),
    "unrolled half a step": (lambda: Unrolled(2.5), ValueError, ["steps=2.5", "whole number"]),
    "unrolled further than every": (
        lambda: optimizer(hypergradient=Unrolled(3), every=2),
        ValueError,
        ["Unrolled(steps=3", "every 2", "at most 2"],
    ),
    "unrolled without an optimizer": (lambda: once(method=Unrolled(1)), ValueError, ["Unrolled", "inner=optimizer"]),
    "weight of a loss is NaN": (lambda: optimizer(val_weights=[1.0, NAN]), ValueError, ["val_weights", "nan", "finite"]),
    "weights of losses are one number": (lambda: optimizer(val_weights=0.5), TypeError, ["val_weights", "float", "list"]),
    "weights of losses are none": (lambda: optimizer(val_weights=[]), ValueError, ["val_weights", "one"]),
    # schedule
    "every 0": (lambda: optimizer(every=0), ValueError, ["every=0", "1 or more", "None"]),
    "every -1": (lambda: optimizer(every=-1), ValueError, ["every=-1", "1 or more"]),
    "every 1.5": (lambda: optimizer(every=1.5), ValueError, ["every=1.5", "whole number"]),
    "warmup -1": (lambda: optimizer(warmup=-1), ValueError, ["warmup=-1", "0 or more"]),
    "warmup 0.5": (lambda: optimizer(warmup=0.5), ValueError, ["warmup=0.5", "whole number"]),
    # optimizers
    "outer holds nothing of ours": (
        lambda: optimizer(outer=lambda p, sgd: sgd([nn.Parameter(torch.ones(1))])),
        ValueError,
        ["outer", "no hyperparameter", "hparams.parameters()"],
    ),
    "outer holds a weight": (
        lambda: optimizer(outer=lambda p, sgd: sgd([*p.hparams.parameters(), p.model.bias])),
        ValueError,
        ["outer", "'bias'", "weight of the model", "hparams.parameters()"],
    ),
    "inner holds a hyperparameter": (
        lambda: optimizer(inner=lambda p, sgd: sgd([*p.model.parameters(), *p.hparams.parameters()])),
        ValueError,
        ["inner", "'a'", "hyperparameter", "model.parameters()"],
    ),
    "inner holds nothing of ours": (
        lambda: optimizer(inner=lambda p, sgd: sgd([nn.Parameter(torch.ones(1))])),
        ValueError,
        ["inner", "no weight", "model.parameters()"],
    ),
    "added group holds a hyperparameter": (
        lambda: (o := optimizer()).add_param_group({"params": list(o.problem.hparams.parameters())}),
        ValueError,
        ["'a'", "hyperparameter"],
    ),
    "inner is a model": (
        lambda: optimizer(inner=lambda p, sgd: p.model),
        TypeError,
        ["inner", "Linear", "torch.optim.Optimizer"],
    ),
    "outer is a list": (lambda: optimizer(outer=lambda p, sgd: []), TypeError, ["outer", "list", "torch.optim.Optimizer"]),
    "problem is a model": (
        lambda: optimizer(problem=nn.Linear(2, 1)),
        TypeError,
        ["problem", "Linear", "hoptim.Problem"],
    ),
    "hypergradient is a solver": (
        lambda: optimizer(hypergradient=Neumann()),
        TypeError,
        ["hypergradient", "Neumann", "hoptim.Implicit()"],
    ),
    "hook is a word": (lambda: optimizer(hooks=["wandb"]), TypeError, ["'wandb'", "functions of the record"]),
    "hook outside a list": (lambda: optimizer(hooks=print), TypeError, ["hooks", "list"]),
    # batches
    "no batches": (lambda: optimizer(val_batches=[]), ValueError, ["val_batches is empty", "at least one"]),
    "empty loader": (
        lambda: optimizer(val_batches=DataLoader(TensorDataset(torch.ones(0, 2)))),
        ValueError,
        ["val_batches is empty"],
    ),
    "empty stream": (
        lambda: optimizer(val_batches=DataLoader(Empty())).hyperstep(ONE),
        ValueError,
        ["val_batches is empty"],
    ),
    "empty pass": (lambda: optimizer(val_batches=EmptyPass()).hyperstep(ONE), ValueError, ["val_batches is empty"]),
    "generator of batches": (
        lambda: optimizer(val_batches=(batch for batch in [ONE])),
        TypeError,
        ["val_batches", "one-shot", "list"],
    ),
    "tensor as batches": (lambda: optimizer(val_batches=ONE), TypeError, ["val_batches", "Tensor", "[batch]"]),
    "one dict as batches": (lambda: optimizer(val_batches={"x": ONE}), TypeError, ["val_batches", "dict", "[batch]"]),
    "one pair as batches": (
        lambda: optimizer(val_batches=(torch.ones(3, 2), torch.ones(3, dtype=torch.long))),
        ValueError,
        ["val_batches", "one batch of inputs and targets", "3 examples", "give a list of batches, val_batches=[(x, y)]"],
    ),
    "one pair with targets in a column": (
        lambda: optimizer(train_batches=(torch.ones(3, 2), torch.ones(3, 1))),
        ValueError,
        ["train_batches=[(x, y)]"],
    ),
    "one pair in a list": (
        lambda: optimizer(val_batches=[np.ones((3, 2)), np.ones(3)]),
        ValueError,
        ["val_batches=[(x, y)]"],
    ),
    "no batches at all": (lambda: optimizer(val_batches=None), TypeError, ["val_batches", "NoneType", "DataLoader"]),
    "empty train batches": (lambda: optimizer(train_batches=[]), ValueError, ["train_batches is empty"]),
    "hyperstep before any batch": (
        lambda: optimizer().hyperstep(),
        ValueError,
        ["training batch", "optimizer.loss(batch)", "train_batches"],
    ),
    "state of another model's bare optimizer": (
        lambda: optimizer().load_state_dict(torch.optim.SGD(nn.GRUCell(1, 1).parameters()).state_dict()),
        ValueError,
        ["doesn't match the size"],
    ),
    # problems
    "model is a function": (lambda: problem(model=lambda x: x), TypeError, ["model", "function", "nn.Module"]),
    "hparams is a dict": (lambda: problem(hparams={"a": T(1.0)}), TypeError, ["hparams", "dict", "nn.Module"]),
    "train loss is a number": (lambda: problem(train=1.0), TypeError, ["train_loss", "float", "(model, hparams, batch)"]),
    "val loss is a list": (lambda: Problem(nn.Linear(1, 1), hparams(T(1.0)), loss, []), TypeError, ["val_loss", "list"]),
    "nothing to train": (lambda: problem(model=frozen()), ValueError, ["no weight", "requires a gradient"]),
    "nothing to learn": (lambda: problem(hparams=nn.Identity()), ValueError, ["hparams", "nothing to learn"]),
    "one tensor in both": (shared, ValueError, ["'weight'", "'decay'", "same tensor"]),
    "loss is a vector": (lambda: once(train=lambda m, h, b: m(b).flatten()), ValueError, ["train_loss", "(3,)", "mean()"]),
    "val loss is a matrix": (lambda: once(val=lambda m, h, b: m(b)), ValueError, ["val_loss", "(3, 1)", "vector of losses"]),
    "val loss is empty": (lambda: once(val=lambda m, h, b: m(b)[:0, 0]), ValueError, ["val_loss", "(0,)", "vector"]),
    "loss of shape (1,)": (lambda: once(train=lambda m, h, b: loss(m, h, b)[None]), ValueError, ["train_loss", "(1,)"]),
    "loss is a float": (lambda: once(train=lambda m, h, b: loss(m, h, b).item()), TypeError, ["train_loss", "float"]),
    "loss is detached": (lambda: once(val=lambda m, h, b: loss(m, h, b).detach()), ValueError, ["val_loss", "detach()"]),
    "inner loss is a vector": (
        lambda: optimizer(of=problem(train=lambda m, h, b: m(b).flatten())).loss(torch.ones(3, 2)),
        ValueError,
        ["train_loss", "(3,)", "mean()"],
    ),
    # hyperparameters
    "below its constraint": (lambda: hparams(T([-2.0]), constraints.positive), ValueError, ["'a'", "Greater", "-2.0"]),
    "above its constraint": (lambda: hparams(T(1.5), constraints.unit_interval), ValueError, ["'a'", "outside", "1.5"]),
    "below nonnegative": (lambda: hparams(T(-1.0), constraints.nonnegative), ValueError, ["'a'", "outside", "-1.0"]),
    "no simplex": (lambda: hparams(T([0.5, 0.6]), constraints.simplex), ValueError, ["'a'", "outside", "Simplex"]),
    "NaN": (lambda: hparams(T(NAN)), ValueError, ["'a'", "nan"]),
    "inf": (lambda: hparams(T(INF)), ValueError, ["'a'"]),
    "on the edge of positive": (lambda: hparams(T(0.0), constraints.positive), ValueError, ["'a'", "0.0"]),
    "on the lower edge of greater_than_eq": (
        lambda: hparams(T(1.0), constraints.greater_than_eq(1.0)),
        ValueError,
        ["'a'", "edge", "start inside"],
    ),
    "on the lower edge": (lambda: hparams(T(0.0), constraints.unit_interval), ValueError, ["'a'", "edge", "start inside"]),
    "on the upper edge": (lambda: hparams(T(1.0), constraints.unit_interval), ValueError, ["'a'", "edge", "start inside"]),
    "on the edge of a simplex": (
        lambda: hparams(T([0.0, 1.0]), constraints.simplex),
        ValueError,
        ["'a'", "edge", "start inside"],
    ),
    "whole numbers": (lambda: hparams(T([1, 2])), TypeError, ["'a'", "int64", "floating-point"]),
    "a Python float": (lambda: hparams(0.1), TypeError, ["'a'", "float", "torch.tensor(0.1)"]),
    "constraint of no value": (
        lambda: HyperParameters({"a": T(1.0)}, {"b": constraints.positive}),
        ValueError,
        ["'b'", "'a'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_wrong_call_says_what_is_wrong_and_what_to_do(name: str) -> None:
    call, error, words = ROWS[name]
    with pytest.raises(error) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
