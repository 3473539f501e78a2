"""Wrong losses, batches, hyperparameters and optimizers, one a row; and what only looks wrong, and must work."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import same, snapshot
from test_arguments import hparams, loss, once, optimizer, problem
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import LBFGS, SGD, Adam, SparseAdam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import hoptim
from hoptim import (
    CG,
    BilevelOptimizer,
    Chebyshev,
    CompositeLoss,
    Exact,
    FiniteDifference,
    GaussNewton,
    HyperParameters,
    Identity,
    Implicit,
    Neumann,
    Problem,
    SecondMoments,
    Unrolled,
    Update,
    WarmStart,
    audit,
    hypergradient,
)
from hoptim.solvers.solution import Status
from hoptim.tracking import Console

T, ONE = torch.tensor, torch.ones((), dtype=torch.float64)
X = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(3, 2)
META = X.to("meta")


def val(m: Any, h: Any, b: Any) -> Tensor:
    return (m(b) - 1).square().mean()


def predict(m: Any, h: Any, b: Any) -> Tensor:
    return m(b)


def criterion(z: Tensor, h: Any, b: Any) -> Tensor:
    return z.square().mean()


def penalty(m: Any, h: Any) -> Tensor:
    return h["a"] * m.weight.square().sum()


def parts(predict: Any = predict, criterion: Any = criterion, penalty: Any = penalty, method: Any = None) -> Any:
    return once(CompositeLoss(predict, criterion, penalty), val, method)


def before(do: Callable[..., Any]) -> Callable[..., Tensor]:
    """The loss, and something else first."""

    def changed(m: Any, h: Any, b: Any) -> Tensor:
        do(m, h)
        return loss(m, h, b)

    return changed


def within(context: Callable[[], Any], build: Callable[[], Any]) -> Any:
    with context():
        return build()


def run(o: BilevelOptimizer, steps: int = 1, batch: Any = X) -> Any:
    for _ in range(steps):
        o.zero_grad()
        o.loss(batch).backward()
        o.step()
    return o.record


def replaced(part: str) -> Any:
    """A run in whose middle all weights, or all hyperparameters, give way to new ones."""
    o = optimizer(of=problem(model=nn.Sequential(nn.Linear(2, 1)), train=sequence_loss, hparams=table(a=1.0)), every=1)
    if part == "model":
        o.problem.model[0] = nn.Linear(2, 1)
    else:
        o.problem.hparams["a"] = nn.Parameter(torch.tensor(1.0))
    return run(o)


def sequence_loss(m: Any, h: Any, b: Any) -> Tensor:
    return m(b).square().mean() + h["a"] * m[0].weight.square().sum()


def table(**values: Any) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.as_tensor(value)) for name, value in values.items()})


def frozen_later(which: str) -> Any:
    o = optimizer(every=1)
    getattr(o.problem, which).requires_grad_(False)
    return o.hyperstep(X)


def of_frozen(which: str) -> Any:
    """An optimizer that holds just what does not learn."""
    model, values = nn.Linear(2, 1), table(a=1.0, b=1.0)
    model.bias.requires_grad_(False)
    values["b"].requires_grad_(False)
    held = {which: (lambda p, sgd: sgd([model.bias])) if which == "inner" else (lambda p, sgd: sgd([values["b"]]))}
    return optimizer(of=problem(model=model, hparams=values), **held)


def viewed() -> Problem:
    model = nn.Linear(2, 1)
    return problem(model=model, hparams=nn.ParameterDict({"a": nn.Parameter(model.weight.detach())}))


def stepped_inside() -> Any:
    model = nn.Linear(2, 1)
    inner = SGD(model.parameters(), lr=0.1)
    model(X).mean().backward()
    return hypergradient(problem(before(lambda m, h: inner.step()), val, model), X, X)


def by(method: Any, inner: Callable[[Any], Any], problem: Problem | None = None) -> Any:
    problem = problem or once_problem()
    return hypergradient(problem, X, X, method, inner=inner(problem.model.parameters()))


def once_problem() -> Problem:
    return problem(loss, val)


def stranger(_: Any) -> Any:
    return SGD(nn.Linear(2, 1).parameters(), lr=0.1)


def state(change: Callable[[dict[str, Any]], Any]) -> Any:
    o = optimizer()
    saved = o.state_dict()
    change(saved)
    return o.load_state_dict(saved)


NO_GRADIENT = ["without a gradient", "no_grad()"]
other = nn.Linear(2, 1, dtype=torch.float64)
Row = tuple[Callable[[], Any], type[Exception], list[str]]
ROWS: dict[str, Row] = {
    # in the place of something else
    "hparams before model": (
        lambda: problem(model=hparams(ONE), hparams=nn.Linear(2, 1)),
        TypeError,
        ["HyperParameters", "Problem(model, hparams, train_loss, val_loss)"],
    ),
    "losses first": (lambda: Problem(loss, val, nn.Linear(2, 1), hparams(ONE)), TypeError, ["model is a function"]),
    "problem first": (
        lambda: BilevelOptimizer(problem(), SGD([ONE]), SGD([ONE]), val_batches=[X]),
        TypeError,
        ["inner is a Problem", "torch.optim.Optimizer"],
    ),
    "outer before inner": (
        lambda: optimizer(lambda p, sgd: sgd(p.hparams.parameters()), lambda p, sgd: sgd(p.model.parameters())),
        ValueError,
        ["the inner optimizer holds 'a'", "model.parameters()"],
    ),
    "one optimizer for both": (
        lambda: (p := problem()) and (s := SGD(p.model.parameters())) and BilevelOptimizer(s, s, p, val_batches=[X]),
        ValueError,
        ["the outer optimizer holds 'weight'", "hparams.parameters()"],
    ),
    "optimizer inside an optimizer": (
        lambda: (o := optimizer()) and BilevelOptimizer(o, o.outer, o.problem, val_batches=[X]),
        TypeError,
        ["inner is a BilevelOptimizer already", ".inner"],
    ),
    "scheduler as inner": (
        lambda: optimizer(inner=lambda p, sgd: StepLR(sgd(p.model.parameters()), 1)),
        TypeError,
        ["inner is a StepLR"],
    ),
    "optimizer as problem": (lambda: hypergradient(optimizer(), X, X), TypeError, ["problem is a BilevelOptimizer"]),
    "method is a word": (lambda: once(method="implicit"), TypeError, ["method is a str", "hoptim.Implicit"]),
    "method is a list": (lambda: once(method=[Implicit()]), TypeError, ["method is a list"]),
    "method is a function": (
        lambda: optimizer(hypergradient=hypergradient),
        TypeError,
        ["hypergradient is a function", "hoptim.Implicit()"],
    ),
    # a class for an instance
    "class Implicit": (lambda: once(method=Implicit), TypeError, ["the class Implicit", "hoptim.Implicit("]),
    "class Neumann": (lambda: Implicit(Neumann), TypeError, ["solver is the class Neumann", "hoptim.Neumann(terms=20)"]),
    "class Exact": (lambda: Implicit(curvature=Exact), TypeError, ["the class Exact", "hoptim.Exact()"]),
    "class to warm": (lambda: WarmStart(CG), TypeError, ["the class CG", "hoptim.CG(terms=5)"]),
    "class of a hook": (lambda: optimizer(hooks=[Console]), TypeError, ["hook Console is a class", "instance"]),
    "class of a model": (lambda: problem(model=nn.Linear), TypeError, ["model is the class Linear", "nn.Module"]),
    "class of hparams": (lambda: problem(hparams=HyperParameters), TypeError, ["hparams is the class HyperParameters"]),
    "class of an optimizer": (lambda: optimizer(inner=lambda p, sgd: sgd), TypeError, ["inner is the class SGD"]),
    "class of a loss": (lambda: problem(train=CompositeLoss), TypeError, ["train_loss is the class CompositeLoss"]),
    "class of a loader": (lambda: optimizer(val_batches=DataLoader), TypeError, ["val_batches is the class DataLoader"]),
    # what a loss takes
    "loss of two": (
        lambda: problem(train=lambda m, b: m(b).mean()),
        TypeError,
        ["train_loss takes (m, b)", "train_loss(model, hparams, batch)"],
    ),
    "loss of four": (lambda: problem(val=lambda m, h, x, y: m(x).mean()), TypeError, ["val_loss takes (m, h, x, y)", "'y'"]),
    "loss is a criterion": (lambda: problem(train=nn.MSELoss()), TypeError, ["train_loss takes (input", "hparams"]),
    "loss is a word": (lambda: problem(train="mse"), TypeError, ["train_loss is a str", "(model, hparams, batch)"]),
    "predict of two": (
        lambda: parts(lambda m, b: m(b)),
        TypeError,
        ["predict takes (m, b)", "predict(model, hparams, batch)"],
    ),
    "criterion of two": (
        lambda: parts(criterion=lambda z, b: z.mean()),
        TypeError,
        ["criterion takes (z, b)", "criterion(z, hparams, batch)"],
    ),
    "penalty of three": (
        lambda: parts(penalty=lambda m, h, b: ONE),
        TypeError,
        ["penalty takes", "penalty(model, hparams)"],
    ),
    "penalty is a number": (lambda: CompositeLoss(predict, criterion, 0.1), TypeError, ["penalty is a float", "function"]),
    # what a loss returns
    "a float": (lambda: once(val=lambda m, h, b: 1.0), TypeError, ["val_loss returned a float", "scalar tensor"]),
    "None": (lambda: once(lambda m, h, b: None), TypeError, ["train_loss returned a NoneType"]),
    "a tuple": (
        lambda: once(lambda m, h, b: (loss(m, h, b), 1)),
        TypeError,
        ["train_loss returned a tuple", "the loss alone"],
    ),
    "a dict": (lambda: once(lambda m, h, b: {"loss": loss(m, h, b)}), TypeError, ["train_loss returned a dict", "alone"]),
    "a model's output": (
        lambda: once(lambda m, h, b: SimpleNamespace(loss=loss(m, h, b))),
        TypeError,
        ["train_loss returned a SimpleNamespace", "the loss alone"],
    ),
    "a list of losses": (
        lambda: once(val=lambda m, h, b: [val(m, h, b)] * 2),
        TypeError,
        ["val_loss returned a list", "scalar tensor"],
    ),
    "an array": (
        lambda: once(lambda m, h, b: loss(m, h, b).detach().numpy()),
        TypeError,
        ["train_loss returned a", "scalar tensor"],
    ),
    "complex": (lambda: once(lambda m, h, b: loss(m, h, b) * 1j), TypeError, ["train_loss", "torch.complex128", "real"]),
    "complex losses": (
        lambda: once(val=lambda m, h, b: torch.stack([val(m, h, b) * 1j] * 2)),
        TypeError,
        ["an entry of val_loss", "torch.complex128"],
    ),
    "a whole number": (lambda: once(lambda m, h, b: loss(m, h, b).long()), TypeError, ["torch.int64", "floating-point"]),
    "a truth": (lambda: once(val=lambda m, h, b: val(m, h, b) > 0), TypeError, ["val_loss", "torch.bool"]),
    "under no_grad": (lambda: once(torch.no_grad()(loss)), ValueError, ["train_loss", *NO_GRADIENT]),
    "val under no_grad": (lambda: once(val=torch.no_grad()(val)), ValueError, ["val_loss", *NO_GRADIENT]),
    "by way of item()": (lambda: once(lambda m, h, b: T(loss(m, h, b).item())), ValueError, ["train_loss", *NO_GRADIENT]),
    "by way of an array": (
        lambda: once(lambda m, h, b: torch.from_numpy(m(b).detach().numpy()).mean()),
        ValueError,
        ["train_loss", *NO_GRADIENT],
    ),
    "an array from a tensor with a gradient": (
        lambda: once(lambda m, h, b: T(m(b).numpy())),
        RuntimeError,
        ["detach().numpy()", "hoptim: train_loss", "a Tensor"],
    ),
    "a prediction in a tuple": (lambda: parts(lambda m, h, b: (m(b),)), TypeError, ["predict returned a tuple", "one"]),
    "a prediction of classes": (lambda: parts(lambda m, h, b: m(b).argmax(1)), TypeError, ["torch.int64", "logits"]),
    "a criterion of a float": (lambda: parts(criterion=lambda z, h, b: 1.0), TypeError, ["criterion returned a float"]),
    "a criterion of None": (lambda: parts(criterion=lambda z, h, b: None), TypeError, ["criterion returned a NoneType"]),
    "a criterion of a vector": (
        lambda: parts(criterion=lambda z, h, b: z.square(), method=Implicit(curvature=GaussNewton())),
        ValueError,
        ["train_loss", "(3, 1)", "mean()"],
    ),
    "a penalty of a vector": (lambda: parts(penalty=lambda m, h: h["a"] * m.weight), ValueError, ["penalty", "(1, 2)"]),
    "a penalty of a float": (lambda: parts(penalty=lambda m, h: 0.0), TypeError, ["penalty returned a float"]),
    # what a loss touches
    "another model's weights": (
        lambda: once(lambda m, h, b: loss(other, h, b)),
        ValueError,
        ["none of the weights", "model"],
    ),
    "hyperparameters alone": (lambda: once(lambda m, h, b: h["a"] ** 2), ValueError, ["training loss touches none"]),
    "validation of another model": (
        lambda: once(val=lambda m, h, b: val(other, h, b)),
        ValueError,
        ["validation loss touches none", "the model it is given"],
    ),
    "a hyperparameter that nobody touches": (
        lambda: once(lambda m, h, b: m(b).square().mean(), val),
        ValueError,
        ["['a']", "neither loss", "drop them"],
    ),
    "a hyperparameter that is detached": (
        lambda: once(lambda m, h, b: m(b).square().mean() + h["a"].detach() * m.weight.square().sum(), val),
        ValueError,
        ["['a']", "detach()"],
    ),
    # what a loss writes
    "in place on a hyperparameter": (
        lambda: once(before(lambda m, h: h["a"].add_(1))),
        ValueError,
        ["train_loss writes into a weight or a hyperparameter", "only reads"],
    ),
    "in place on a weight": (
        lambda: once(val=before(lambda m, h: m.weight.mul_(2))),
        ValueError,
        ["val_loss writes into a weight or a hyperparameter", "only reads"],
    ),
    "in place on a constant hyperparameter": (
        lambda: optimizer(of=problem(before(lambda m, h: h["a"].add_(1)))).loss(X),
        ValueError,
        ["train_loss writes into a weight or a hyperparameter", "optimizer.step()"],
    ),
    "under no_grad on a weight": (
        lambda: once(before(lambda m, h: torch.no_grad()(m.weight.mul_)(2))),
        ValueError,
        ["train_loss writes into weight 'weight'", "optimizer.step()"],
    ),
    "through .data on a weight": (
        lambda: once(val=before(lambda m, h: m.weight.data.mul_(2))),
        ValueError,
        ["val_loss writes into weight 'weight'"],
    ),
    "through .data on a hyperparameter": (
        lambda: once(before(lambda m, h: h["a"].data.mul_(2))),
        ValueError,
        ["train_loss writes into hyperparameter 'a'"],
    ),
    "load_state_dict": (
        lambda: once(before(lambda m, h: m.load_state_dict(other.state_dict()))),
        ValueError,
        ["train_loss writes into weight"],
    ),
    "a step of the optimizer": (stepped_inside, ValueError, ["train_loss writes into weight 'weight'", "only reads"]),
    "backward()": (
        lambda: once(lambda m, h, b: (found := loss(m, h, b)) is not found.backward() and found),
        ValueError,
        ["train_loss calls backward()", "returns its value"],
    ),
    "backward() with the graph kept": (
        lambda: once(val=lambda m, h, b: (found := loss(m, h, b)) is not found.backward(retain_graph=True) and found),
        ValueError,
        ["val_loss calls backward()"],
    ),
    "requires_grad_": (
        lambda: once(before(lambda m, h: m.requires_grad_(False))),
        ValueError,
        ["requires_grad of weight 'weight'", "before the training"],
    ),
    "another precision": (
        lambda: once(lambda m, h, b: h["a"] * m.float().weight.square().sum()),
        ValueError,
        ["train_loss changes the dtype", "before the training"],
    ),
    # devices, shapes and precisions
    "batch on another device": (
        lambda: hypergradient(once_problem(), META, X),
        RuntimeError,
        ["device", "hoptim: train_loss was called with a batch that is a Tensor"],
    ),
    "val batch on another device": (
        lambda: hypergradient(once_problem(), X, META),
        RuntimeError,
        ["device", "hoptim: val_loss"],
    ),
    "in a hyperstep": (
        lambda: optimizer(of=once_problem(), val_batches=[META]).hyperstep(X),
        RuntimeError,
        ["device", "hoptim: val_loss", "in hyperstep 1, after 0 inner steps"],
    ),
    "leaves on the meta device": (
        lambda: problem(hparams=table(a=torch.ones((), device="meta"))),
        ValueError,
        ["hyperparameter 'a'", "meta device"],
    ),
    "model on the meta device": (lambda: problem(model=nn.Linear(2, 1, device="meta")), ValueError, ["'weight'", "meta"]),
    "lazy model": (lambda: problem(model=nn.LazyLinear(1)), ValueError, ["'weight'", "not initialised", "one batch"]),
    "complex model": (
        lambda: problem(model=nn.Linear(2, 1, dtype=torch.complex64)),
        TypeError,
        ["weight 'weight'", "torch.complex64", "view_as_real"],
    ),
    "complex leaves": (lambda: problem(hparams=table(a=1j)), TypeError, ["hyperparameter 'a'", "complex", "view_as_real"]),
    "model of inference": (
        lambda: problem(model=within(torch.inference_mode, lambda: nn.Linear(2, 1))),
        ValueError,
        ["weight 'weight'", "inference_mode"],
    ),
    "asked under inference": (
        lambda: (p := once_problem()) and within(torch.inference_mode, lambda: hypergradient(p, X, X)),
        RuntimeError,
        ["torch.inference_mode()", "outside"],
    ),
    "batch of inference": (
        lambda: hypergradient(once_problem(), within(torch.inference_mode, lambda: X * 1.0), X),
        RuntimeError,
        ["Inference tensors", "hoptim: train_loss"],
    ),
    "hyperparameter of another shape": (
        lambda: once(lambda m, h, b: (h["a"] * torch.ones(3) * m.weight).sum()),
        RuntimeError,
        ["must match", "hoptim: train_loss"],
    ),
    "hyperparameter of another precision": (
        lambda: once(lambda m, h, b: h["a"].float() * torch.ones(2).float() @ m.weight[0]),
        RuntimeError,
        ["dtype", "hoptim: train_loss"],
    ),
    "whole numbers in": (lambda: hypergradient(once_problem(), X.long(), X), RuntimeError, ["dtype", "hoptim: train_loss"]),
    "a batch of another shape": (
        lambda: hypergradient(once_problem(), X.T, X),
        RuntimeError,
        ["shapes", "hoptim: train_loss"],
    ),
    "a batch of another kind": (
        lambda: hypergradient(once_problem(), {"x": X}, X),
        TypeError,
        ["dict", "hoptim: train_loss"],
    ),
    "no batch": (lambda: audit(once_problem(), None, X), TypeError, ["hoptim: train_loss", "a NoneType"]),
    # hyperparameters
    "value None": (lambda: hparams(None), TypeError, ["'a'", "NoneType", "torch.tensor(0.1)"]),
    "value is a list": (lambda: hparams([1.0]), TypeError, ["'a'", "list", "torch.tensor(0.1)"]),
    "value is an array": (lambda: hparams(np.ones(2)), TypeError, ["'a'", "ndarray"]),
    "value is complex": (lambda: hparams(T(1j)), TypeError, ["'a'", "complex128", "floating-point"]),
    "NaN within bounds": (lambda: hparams(T(math.nan), constraints.unit_interval), ValueError, ["'a'", "nan"]),
    "inf within bounds": (lambda: hparams(T(math.inf), constraints.positive), ValueError, ["'a'", "edge"]),
    "unknown name": (lambda: hparams(ONE)["b"], KeyError, ["'b'", "the names are", "'a'"]),
    "unknown name to write": (lambda: hparams(ONE).__setitem__("b", ONE), KeyError, ["'b'", "'a'"]),
    "write another shape": (lambda: hparams(ONE).__setitem__("a", torch.ones(2)), ValueError, ["'a'", "()", "(2,)"]),
    "write what broadcasts": (lambda: hparams(torch.ones(2)).__setitem__("a", ONE), ValueError, ["'a'", "(2,)", "()"]),
    "write a number": (lambda: hparams(ONE).__setitem__("a", 1.0), TypeError, ["'a'", "float"]),
    "write NaN": (lambda: hparams(ONE).__setitem__("a", T(math.nan)), ValueError, ["'a'", "nan"]),
    "write out of bounds": (lambda: hparams(ONE, constraints.positive).__setitem__("a", -ONE), ValueError, ["'a'", "-1.0"]),
    "load another name": (lambda: hparams(ONE).load_state_dict({"b": ONE}), RuntimeError, ['"a"', '"b"']),
    "load another shape": (
        lambda: hparams(ONE).load_state_dict({"a": torch.ones(3, 1)}),  # of (3,) older versions of torch take the first
        RuntimeError,
        ["size mismatch for a"],
    ),
    "frozen hyperparameters": (
        lambda: problem(hparams=hparams(ONE).requires_grad_(False)),
        ValueError,
        ["no parameter of hparams", "nothing to learn"],
    ),
    "one module as both": (lambda: (m := nn.Linear(2, 1)) and problem(model=m, hparams=m), ValueError, ["the same tensor"]),
    "shared memory": (viewed, ValueError, ["weight 'weight'", "hyperparameter 'a'", "share memory", "clone()"]),
    # optimizers
    "inner of another model": (
        lambda: optimizer(inner=lambda p, sgd: stranger(p)),
        ValueError,
        ["inner optimizer holds no weight", "model.parameters()"],
    ),
    "inner of frozen weights": (lambda: of_frozen("inner"), ValueError, ["inner", "no weight of the model that requires"]),
    "outer of frozen leaves": (lambda: of_frozen("outer"), ValueError, ["outer", "no hyperparameter that requires"]),
    "outer is LBFGS": (lambda: optimizer(outer=lambda p, sgd: LBFGS(p.hparams.parameters())), ValueError, ["LBFGS", "SGD"]),
    "outer is SparseAdam": (
        lambda: optimizer(of=once_problem(), outer=lambda p, sgd: SparseAdam(p.hparams.parameters())).hyperstep(X, X),
        RuntimeError,
        ["SparseAdam", "Adam instead"],
    ),
    "weights replaced since": (lambda: replaced("model"), ValueError, ["inner optimizer holds no weight"]),
    "leaves replaced since": (lambda: replaced("hparams"), ValueError, ["outer optimizer holds no hyperparameter"]),
    "weights frozen since": (lambda: frozen_later("model"), ValueError, ["no weight of the model"]),
    "leaves frozen since": (lambda: frozen_later("hparams"), ValueError, ["no parameter of hparams", "nothing to learn"]),
    "unrolled with another model's": (lambda: by(Unrolled(2), stranger), ValueError, ["inner holds no weight", "trains it"]),
    "audited with another model's": (
        lambda: audit(once_problem(), X, X, inner=stranger(None)),
        ValueError,
        ["inner holds no weight", "trains it"],
    ),
    "update with another model's": (
        lambda: by(Implicit(condition=Update()), stranger),
        ValueError,
        ["inner holds no weight"],
    ),
    "update of LBFGS": (
        lambda: by(Implicit(condition=Update()), LBFGS),
        TypeError,
        ["LBFGS", "no differentiable form", "SGD"],
    ),
    "unrolled LBFGS": (lambda: by(Unrolled(2), LBFGS), TypeError, ["LBFGS", "no differentiable form"]),
    "update by CG": (lambda: by(Implicit(CG(), condition=Update()), SGD), TypeError, ["CG", "symmetric", "hoptim.GMRES"]),
    "moments of SGD": (
        lambda: by(Implicit(Identity(), preconditioner=SecondMoments()), SGD),
        ValueError,
        ["SGD holds no second moments", "Adam"],
    ),
    "moments before the first step": (
        lambda: by(Implicit(Identity(), preconditioner=SecondMoments()), Adam),
        ValueError,
        ["Adam holds no second moments", "after its first step"],
    ),
    "Gauss-Newton of a whole loss": (
        lambda: once(method=Implicit(curvature=GaussNewton())),
        ValueError,
        ["GaussNewton", "hoptim.CompositeLoss", "hoptim.Exact()"],
    ),
    # batches
    "a word": (lambda: optimizer(val_batches="val"), TypeError, ["val_batches is a str", "DataLoader"]),
    "bytes": (lambda: optimizer(val_batches=b"val"), TypeError, ["val_batches is a bytes", "[batch]"]),
    "a number": (lambda: optimizer(val_batches=3), TypeError, ["val_batches is an int"]),
    "a path": (lambda: optimizer(val_batches=Path("val")), TypeError, ["val_batches", "DataLoader"]),
    "an array of rows": (lambda: optimizer(val_batches=np.ones((3, 2))), TypeError, ["val_batches is a ndarray", "[batch]"]),
    "one batch in a mapping": (
        lambda: optimizer(val_batches=UserDict(x=X)),
        TypeError,
        ["val_batches is a UserDict", "[batch]"],
    ),
    "a data set": (lambda: optimizer(val_batches=TensorDataset(X)), TypeError, ["TensorDataset", "DataLoader"]),
    "an iterator of a loader": (lambda: optimizer(val_batches=iter(DataLoader([1]))), TypeError, ["one-shot", "DataLoader"]),
    "a zip": (lambda: optimizer(val_batches=zip([X], [X], strict=True)), TypeError, ["one-shot", "list"]),
    "a class of batches": (lambda: optimizer(val_batches=list), TypeError, ["is the class list", "or a function"]),
    "a tensor to train on": (
        lambda: hypergradient(problem(), X, X, train_batches=X),
        TypeError,
        ["train_batches is a Tensor", "[batch]"],
    ),
    "a hyperstep with no loss before": (lambda: optimizer().hyperstep(), ValueError, ["optimizer.loss(batch)"]),
    # options
    "every is a truth": (lambda: optimizer(every=True), ValueError, ["every=True", "whole number"]),
    "every is NaN": (lambda: optimizer(every=math.nan), ValueError, ["every=nan", "whole number"]),
    "every is a word": (lambda: optimizer(every="10"), ValueError, ["every='10'", "whole number"]),
    "every is a float of NumPy's": (lambda: optimizer(every=np.float64(3)), ValueError, ["every=", "whole number"]),
    "warmup is None": (lambda: optimizer(warmup=None), ValueError, ["warmup=None", "0 or more"]),
    "terms is a word": (lambda: Neumann(terms="20"), ValueError, ["terms='20'", "whole number"]),
    "terms is a truth": (lambda: Neumann(terms=True), ValueError, ["terms=True", "whole number"]),
    "step is a tensor": (lambda: Neumann(step_size=T(0.1)), ValueError, ["step_size=tensor", "positive"]),
    "damping is a word": (lambda: Implicit(damping="0.1"), ValueError, ["damping='0.1'", "finite"]),
    "damping is a truth": (lambda: Implicit(damping=True), ValueError, ["damping=True", "finite"]),
    "tolerance is NaN": (lambda: CG(tolerance=math.nan), ValueError, ["tolerance=nan", "0 or more"]),
    "interval is a number": (lambda: Chebyshev(interval=T(3.0)), ValueError, ["interval=", "(a, b)"]),
    "interval is a word": (lambda: Chebyshev(interval="ab"), ValueError, ["interval='ab'", "(a, b)"]),
    "compile is a word": (lambda: Exact(compile="no"), TypeError, ["compile='no'", "True or False"]),
    "checkpoint is a word": (lambda: Unrolled(2, checkpoint="no"), TypeError, ["checkpoint='no'", "True or False"]),
    "weights of losses in words": (lambda: optimizer(val_weights=["a"]), ValueError, ["val_weights=['a']", "finite number"]),
    "weights of losses with a gap": (lambda: optimizer(val_weights=[1.0, None]), ValueError, ["None", "finite number"]),
    "weights of losses nested": (lambda: optimizer(val_weights=torch.ones(2, 2)), ValueError, ["val_weights=[[", "finite"]),
    "weights of losses as a number": (lambda: optimizer(val_weights=ONE), ValueError, ["val_weights=1.0", "finite number"]),
    "weights for one loss": (
        lambda: optimizer(of=once_problem(), val_weights=[1.0]).hyperstep(X, X),
        ValueError,
        ["val_weights", "a vector of losses"],
    ),
    "too few weights": (
        lambda: optimizer(of=problem(val=lambda m, h, b: m(b).flatten()), val_weights=[1.0, 2.0]).hyperstep(X, X),
        ValueError,
        ["2 val_weights", "3 validation losses"],
    ),
    "hooks None": (lambda: optimizer(hooks=None), TypeError, ["hooks is a NoneType", "list"]),
    "hooks of a generator": (lambda: optimizer(hooks=(h for h in [print])), TypeError, ["hooks is a generator", "list"]),
    "audit of a solver": (lambda: audit(problem(), X, X, CG()), TypeError, ["method is a CG", "hoptim.Implicit"]),
    "audit with a model": (lambda: audit(problem(), X, X, inner=nn.Linear(2, 1)), TypeError, ["inner is a Linear"]),
    "audit of half a step": (lambda: audit(problem(), X, X, steps=1.5), ValueError, ["steps=1.5", "whole number"]),
    "audit of True directions": (lambda: audit(problem(), X, X, directions=True), ValueError, ["directions=True"]),
    "audit of one chunk": (lambda: audit(problem(), X, X, chunks=1), ValueError, ["chunks=1", "2 or more"]),
    "audit of no product": (lambda: audit(problem(), X, X, longer=0), ValueError, ["longer=0", "1 or more"]),
    # checkpoints
    "a state with a part lost": (lambda: state(lambda s: s["hoptim"].pop("outer")), ValueError, ["'outer'"]),
    "a state of other hyperparameters": (
        lambda: optimizer().load_state_dict(optimizer(of=problem(hparams=HyperParameters({"b": ONE}))).state_dict()),
        RuntimeError,
        ['"a"', '"b"'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_wrong_input_says_what_is_wrong_and_what_to_do(name: str) -> None:
    call, error, words = ROWS[name]
    with pytest.raises(error) as caught:
        call()
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert [word for word in words if word not in said] == [], said


# What a loss may raise or do, and what comes of it


class OwnError(Exception):
    pass


def test_an_error_of_the_users_own_stays_what_it_is_and_says_where_it_was_raised() -> None:
    error = OwnError("mine")

    def fails(m: Any, h: Any, b: Any) -> Tensor:
        if o.inner_steps:  # not yet in the dry run
            raise error
        return loss(m, h, b)

    o = optimizer(of=problem(loss, fails), every=2)
    with pytest.raises(OwnError) as caught:
        run(o, steps=2)
    assert caught.value is error
    assert caught.value.__cause__ is None
    where = ["hoptim: val_loss was called with a batch that is a Tensor", "hoptim: in hyperstep 1, after 2 inner steps"]
    assert caught.value.__notes__ == where


WRITES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "weight.data": (lambda m, h: m.weight.data.mul_(2), "writes into weight 'weight'"),
    "weight under no_grad": (lambda m, h: torch.no_grad()(m.weight.mul_)(2), "writes into weight 'weight'"),
    "hyperparameter.data": (lambda m, h: h["a"].data.mul_(2), "writes into hyperparameter 'a'"),
    "load_state_dict": (lambda m, h: m.load_state_dict(other.state_dict()), "writes into weight 'weight'"),
    "float": (lambda m, h: m.float(), "changes the dtype or requires_grad of weight 'weight'"),
    "backward": (lambda m, h: m.weight.sum().backward(), r"calls backward\(\)"),
}


@pytest.mark.parametrize("which", ["train_loss", "val_loss"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "differences"])
def test_a_loss_that_writes_is_refused_and_what_it_wrote_is_put_back(write: str, which: str, curvature: Any) -> None:
    does, said = WRITES[write]

    def writes(m: Any, h: Any, b: Any) -> Tensor:
        does(m, h)
        return h["a"] * m.weight.square().sum()

    p = problem(*((writes, val) if which == "train_loss" else (loss, writes)))
    untouched = snapshot(p)
    with pytest.raises(ValueError, match=f"{which} {said}"):
        hypergradient(p, X, X, Implicit(CG(), curvature=curvature))
    assert same(snapshot(p), untouched)


def test_a_frozen_weight_that_the_loss_moves_is_found_too() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1).requires_grad_(False))

    def moving_average(m: Any, h: Any, b: Any) -> Tensor:
        with torch.no_grad():
            m[1].weight.mul_(0.9)
        return sequence_loss(m, h, b)

    with pytest.raises(ValueError, match=r"writes into weight '1\.weight'"):
        hypergradient(problem(moving_average, val, model), X, X)


def test_weights_that_are_not_numbers_are_no_write() -> None:
    p = once_problem()
    p.model.weight.data[0, 0] = math.nan
    assert hypergradient(p, X, X).solution.status is Status.NON_FINITE_LOSS


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_leaf_that_is_no_number_ends_in_a_status_and_nothing_moves(value: float) -> None:
    o = optimizer(of=problem(loss, val, hparams=table(a=value)), every=None)
    with pytest.warns(UserWarning, match="hyperstep 1 failed and moved nothing: NON_FINITE_LOSS"):
        record = o.hyperstep(X, X)
    assert not record.moved
    assert record.result.grads["a"].isnan()
    torch.testing.assert_close(o.problem.hparams["a"].detach(), T(value), equal_nan=True)


def one(train: Any, p: Problem, validation: Any = val) -> Tensor:
    """The hypergradient of a, with another training loss on the same model and hyperparameters."""
    result = hypergradient(Problem(p.model, p.hparams, train, validation), X, X, Implicit(CG(terms=10, tolerance=1e-12)))
    assert result.solution.status.ok
    return result.grads["a"]


@functools.wraps(lambda m, h, b, scale: None)
def decorated(*given: Any) -> Tensor:
    return loss(*given)


class Loss(nn.Module):
    def forward(self, m: Any, h: Any, b: Any) -> Tensor:
        return loss(m, h, b)


ALLOWED: dict[str, Callable[[Problem], Any]] = {
    "closing over the model": lambda p: lambda m, h, b: loss(p.model, h, b),
    "closing over the hyperparameters": lambda p: lambda m, h, b: loss(m, p.hparams, b),
    "zero_grad inside": lambda p: before(lambda m, h: m.zero_grad()),
    "a gradient inside": lambda p: before(lambda m, h: torch.autograd.grad(m(X).sum(), m.weight)),
    "eval inside": lambda p: before(lambda m, h: m.eval()),
    "decorated": lambda p: decorated,
    "a module": lambda p: Loss(),
    "partial": lambda p: functools.partial(lambda scale, m, h, b: scale * loss(m, h, b), 1.0),
    "options with defaults": lambda p: lambda m, h, b, scale=1.0: scale * loss(m, h, b),
    "a CompositeLoss": lambda p: CompositeLoss(predict, criterion, penalty),
}


@pytest.mark.parametrize("way", ALLOWED)
def test_what_only_looks_wrong_has_the_same_hypergradient_and_no_trace(way: str) -> None:
    p = once_problem()
    p.model(X).sum().backward()
    untouched = snapshot(p)
    torch.testing.assert_close(one(ALLOWED[way](p), p), one(loss, p))
    assert same(snapshot(p), untouched)


def test_a_tied_hyperparameter_has_the_sum_of_both_gradients() -> None:
    def two(m: Any, h: Any, b: Any) -> Tensor:
        return m(b).square().mean() + h["a"] * m.weight.square().sum() + h["b"] * m.bias.square().sum()

    apart, tied = once_problem(), nn.ParameterDict()
    tied["a"] = tied["b"] = nn.Parameter(torch.tensor(0.7))
    results = [
        hypergradient(Problem(apart.model, values, two, val), X, X, Implicit(CG(tolerance=1e-12))).grads
        for values in (tied, table(a=0.7, b=0.7))
    ]
    assert list(results[0]) == ["a"]
    torch.testing.assert_close(results[0]["a"], results[1]["a"] + results[1]["b"])


def test_a_validation_loss_of_hyperparameters_alone_warns_and_has_its_direct_term() -> None:
    with pytest.warns(
        UserWarning, match="validation loss touches none of the weights: the hypergradient is its direct term"
    ):
        result = once(loss, lambda m, h, b: 3 * h["a"] ** 2)
    torch.testing.assert_close(result.grads["a"], T(6.0))
    assert result.indirect["a"] == 0


@pytest.mark.parametrize("detached", [False, True])
def test_a_criterion_without_the_prediction_leaves_the_penaltys_curvature(detached: bool) -> None:
    def flat_criterion(z: Tensor, h: Any, b: Any) -> Tensor:
        return z.detach().square().mean() if detached else h["a"] * 2

    model = nn.Linear(2, 1, bias=False)
    composite = problem(CompositeLoss(predict, flat_criterion, penalty), val, model)
    methods = [Implicit(CG(terms=4), curvature=curvature) for curvature in (Exact(), GaussNewton())]
    exact, gauss_newton = (hypergradient(composite, X, X, method).grads["a"] for method in methods)
    expected = 2 / 3 * ((model(X) - 1) * X).sum(0)  # g of the validation loss
    torch.testing.assert_close(gauss_newton, -(expected @ model.weight[0]) / 1.0)
    torch.testing.assert_close(gauss_newton, exact)


def test_gauss_newton_of_complex_outputs_is_that_of_their_real_and_imaginary_parts() -> None:
    turn = torch.polar(torch.ones(2), torch.tensor([0.3, 1.1]))

    def as_complex(m: Any, h: Any, b: Any) -> Tensor:
        return torch.tanh(m(b)) * turn

    def size(z: Tensor, h: Any, b: Any) -> Tensor:
        return (z - 1).abs().pow(4).mean()

    model = nn.Linear(2, 1)
    found = []
    for way, square in (
        (as_complex, size),
        (lambda m, h, b: torch.view_as_real(as_complex(m, h, b)), lambda z, h, b: size(torch.view_as_complex(z), h, b)),
    ):
        p = problem(CompositeLoss(way, square, penalty), val, model)
        found.append(hypergradient(p, X, X, Implicit(CG(terms=9), curvature=GaussNewton())).grads["a"])
    torch.testing.assert_close(*found)


def test_a_layer_that_was_replaced_since_is_told() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    o = optimizer(of=problem(sequence_loss, val, model), every=1)
    model[1] = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match=r"the inner optimizer does not hold \['1\.weight', '1\.bias'\]"):
        run(o)


def test_hyperparameters_of_two_precisions_are_audited_as_of_one() -> None:
    def two(m: Any, h: Any, b: Any) -> Tensor:
        return m(b).square().mean() + h["a"] * m.weight.square().sum() + h["b"] * m.bias.square().sum()

    p = once_problem()
    a, b = torch.tensor(0.3).float(), torch.tensor(0.4)
    found = [
        hoptim.audit(Problem(p.model, table(a=values, b=b), two, val), X, X, steps=3, directions=1)
        for values in (a, a.double())
    ]
    mixed, whole = ([line.predicted for line in one.directions][:1] for one in found)
    assert mixed == pytest.approx(whole, rel=1e-5)
    assert [line.measured for line in found[0].directions][:1] == pytest.approx(
        [line.measured for line in found[1].directions][:1], rel=1e-3
    )


def test_what_an_optimizer_does_not_hold_is_said_once() -> None:
    model = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match=r"the inner optimizer does not hold \['bias'\]"):
        o = optimizer(of=problem(loss, val, model), inner=lambda p, sgd: sgd([model.weight]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            o.hyperstep(X, X)


class Net(nn.Module):
    """A net that may get an average of itself as a part, as by timm's ``setup_ema``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def test_an_average_of_the_weights_that_is_put_into_the_model_is_told_in_one_line(recwarn: pytest.WarningsRecorder) -> None:
    def train(m: Any, h: Any, b: Any) -> Tensor:
        return m(b).square().mean() + h["a"] * m.first.weight.square().sum()

    def found(put: Callable[[Net], None]) -> Any:
        o = optimizer(of=problem(train, val, net := Net()), every=None)
        put(net)
        return [o.hyperstep(X, X).result.grads["a"] for _ in range(2)]

    expected = found(lambda net: None)
    assert not recwarn.list
    assert found(lambda net: net.add_module("ema", copy.deepcopy(net))) == expected
    [message] = [str(one.message) for one in recwarn.list]
    assert "hold ['ema.first.weight', 'ema.first.bias', 'ema.second.weight', 'ema.second.bias'] and 2 more" in message
    assert "freeze them with requires_grad_(False), also an average of the weights that is a part of the model" in message
    recwarn.clear()
    assert found(lambda net: net.add_module("ema", copy.deepcopy(net).requires_grad_(False))) == expected
    assert not recwarn.list
