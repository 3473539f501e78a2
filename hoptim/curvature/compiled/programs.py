"""The compiled programs of a problem: one for each shape, checked by value, and compiled again when they are out of date."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from hoptim.curvature.compiled.derivatives import Inputs, by_dual_numbers, by_second_pass
from hoptim.curvature.compiled.program import Function, Program
from hoptim.curvature.compiled.splitting import UntraceableError
from hoptim.curvature.exact import DoubleBackward, Exact
from hoptim.curvature.linearization import GradientGraph, Linearization
from hoptim.linalg import dicts, vectors
from hoptim.linalg.random import gaussian_like
from hoptim.linalg.vectors import Layout
from hoptim.problem.problem import At, Problem
from hoptim.problem.random_stream import set_generators

MOST_PROGRAMS = 8  # made for one problem
CHECK_EVERY = 32  # points
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def compiled_linearization(at: At, batch: Any, curvature: DoubleBackward) -> Linearization | None:
    """F and its derivatives at a point, by graphs that are compiled once for all values.

    Weights, hyperparameters, buffers and the batch's tensors are inputs of the graphs, so other values of them need no new
    compilation; other shapes, modes or plain values in the batch do. Dropout draws its masks from torch's generators, one
    mask for all products.

    Any other Python value that the loss reads is built into a graph and may change later. So a program is compared with
    plain PyTorch, under the same masks: L_T at each point, to half of its digits, at the price of a forward pass; F, A v and
    Bᵀv for a random v at points 1, 2, 4, 8, 16 and each 32nd, to a fifth of their digits, since rounding may move a ReLU's
    input across zero. A program that disagrees is compiled again. A change that leaves L_T at the point as it is, such as
    that of a factor of the gradient alone, can stay unnoticed for up to 31 points.

    Args:
        at: where.
        batch: the training batch.
        curvature: which A.

    Returns:
        F and its derivatives. ``None`` if plain PyTorch has to compute them, with one warning that says why: the loss can't
        be traced, its graph gives other values, or too many programs were made.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    >>> hparams = torch.nn.ParameterDict({"decay": torch.tensor(3.0)})
    >>> def loss(model, hparams, batch):
    ...     return 0.5 * hparams["decay"] * model.weight.square().sum() + model(batch).sum()
    >>> with Problem(torch.nn.Linear(2, 1, bias=False), hparams, loss, loss).at() as at:
    ...     found = compiled_linearization(at, torch.ones(1, 2), Exact())
    >>> found.A @ torch.tensor([1.0, 2.0])
    tensor([3., 6.])
    """
    problem = at.problem
    cache: Programs = problem.programs or Programs()
    problem.programs = cache
    try:
        inputs = Inputs.of(at, batch)
        key = (curvature, *_key(problem, inputs))
        program = cache.by_key.get(key, "new")
    except Exception as error:  # no key: an unknown class in the batch, or a value without a hash
        cache.give_up(error)
        return None
    if program is None:
        return None
    try:
        if isinstance(program, Program):
            program.uses += 1
            is_due = program.uses & (program.uses - 1) == 0 or program.uses % CHECK_EVERY == 0
            random_state = problem.generators()
            found = program.at(inputs.tensors())
            set_generators(random_state)
            if not _what_is_off(found, at, batch, curvature, is_due):
                return found
            set_generators(random_state)
        if cache.made == MOST_PROGRAMS:
            raise UntraceableError(
                f"it was compiled {MOST_PROGRAMS} times, for as many shapes, modes or Python values. Give batches of one "
                "size, and make a number that changes a tensor of hparams, of the batch or in a buffer"
            )
        cache.made += 1
        cache.by_key[key] = program = _make(at, inputs, curvature)
        return program.at(inputs.tensors())
    except Exception as error:  # tracing any kind of model may raise anything
        cache.by_key[key] = None
        cache.give_up(error)
        return None


@dataclass
class Programs:
    """The programs of one problem by key; ``None`` for one that plain PyTorch has to compute."""

    by_key: dict[Any, Program | None] = field(default_factory=dict)
    made: int = 0
    has_warned: bool = False

    def __reduce__(self) -> Any:
        return Programs, ()  # compiled code can't be copied

    def give_up(self, error: Exception) -> None:
        """Warn once why plain PyTorch takes over."""
        kind = type(error).__name__
        if kind == "GuardOnDataDependentSymNode":
            kind = "aten._local_scalar_dense, by which Python code looks at a tensor's value"
        if not self.has_warned:
            why = f"{kind}: {str(error).strip().partition(chr(10))[0]}"
            text = "hoptim: the training loss can't be compiled, its products are computed by plain PyTorch"
            warnings.warn(f"{text}: {why}", stacklevel=3)
        self.has_warned = True


def _key(problem: Problem, inputs: Inputs) -> tuple[Any, ...]:
    """What a program depends on besides values; any other dependence is found by comparing values."""
    found, tree = tree_flatten(inputs)
    modes = tuple(part.training for part in problem.joint.modules())
    return tree, *map(_describe, found), modes, problem.lowered, torch.get_default_dtype(), id(problem.train_loss)


def _describe(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf
    raise UntraceableError(f"the batch holds a {type(leaf).__name__}: give tensors in dicts, lists and tuples")


def _make(at: At, inputs: Inputs, curvature: DoubleBackward) -> Program:
    """A new program, checked against plain PyTorch."""
    problem, tensors = at.problem, inputs.tensors()
    with problem.leave_no_trace(), at.loss("train_loss", inputs.batch) as (loss, parts, _):
        graph = GradientGraph(loss, at.weights, at.leaves, parts)

    def attempt(function: Function) -> Program:
        with problem.leave_no_trace():
            program = Program(function, tensors, graph.layout, graph.untouched)
        with problem.leave_no_trace():
            found = program.at(tensors)
        with problem.leave_no_trace():
            if off := _what_is_off(found, at, inputs.batch, curvature, True):
                raise UntraceableError(off)
        return program

    if isinstance(curvature, Exact) and any(isinstance(part, nn.modules.conv._ConvNd) for part in problem.model.modules()):
        with suppress(Exception):
            return attempt(partial(by_dual_numbers, problem, inputs, graph.layout))
    return attempt(partial(by_second_pass, problem, inputs, curvature))


def _what_is_off(found: Linearization, at: At, batch: Any, curvature: DoubleBackward, is_due: bool) -> str:
    """Which value of a program differs from plain PyTorch, in words, or ""; unless ``is_due``, only L_T is compared."""
    with at.loss("train_loss", batch) as (loss, parts, _):
        L, epsilon = loss.detach(), at.problem.rounding(found.layout.dtypes)
        half, fifth = epsilon**0.5, epsilon**0.2  # of the digits
        rounding = 100 * torch.finfo(torch.promote_types(L.dtype, torch.float32)).eps  # of a loss or a gradient near zero
        if not _agree(found.loss, L, half, rounding):
            return f"the compiled L_T is {float(found.loss):g}, not {float(L):g}"
        if not is_due:
            return ""
        graph = GradientGraph(loss, at.weights, at.leaves, parts)
        plain = graph.linearization(curvature.of(graph))
        if plain.layout != found.layout:
            return "L_T touches other weights than it did"
        v = gaussian_like(plain.value)
        Bv, Bv2 = found.mixed(v), plain.mixed(v)
        leaves = Layout.of(dicts.present(Bv) | dicts.present(Bv2))
        for what, ours, theirs, absolute in (
            ("F", found.value, plain.value, fifth * float(L.abs()) + rounding),
            ("A v", found.A @ v, plain.A @ v, 0.0),
            ("Bᵀv", leaves.flatten(Bv), leaves.flatten(Bv2), 0.0),
        ):
            if not _agree(ours, theirs, fifth, absolute):
                return f"the compiled {what} is off by more than {fifth:.0e} of it"
    return ""


def _agree(ours: Tensor, theirs: Tensor, relative: float, absolute: float) -> bool:
    """Whether two vectors are the same up to rounding, or plain PyTorch's (``theirs``) is not finite."""
    error, size = torch.stack([vectors.norm(x.reshape(-1)) for x in (ours - theirs, theirs)]).tolist()
    return not math.isfinite(size) or error <= relative * size + absolute
