"""The hypergradient once more, by plain autograd on a copy of the model, and all that it must leave alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from cases import Tensors, same, snapshot, unflat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hoptim
from hoptim import Exact, FiniteDifference, Implicit, Neumann, Problem
from hoptim.curvature.linearization import Curvature

STEP, TERMS = 0.05, 3
ERRORS: dict[type[Curvature], float] = {Exact: 1e-10, FiniteDifference: 1e-7}
Predict = Callable[[Any, Any], Tensor]


def called(model: Any, batch: Any) -> Tensor:
    return model(batch)


def first(model: Any, batch: Any) -> Tensor:
    return model(batch)[0]


def problem_of(model: nn.Module, predict: Predict = called, *, evaluated: bool = True, losses: int | None = None) -> Problem:
    """Least squares with two decays, for the even and the odd parameters; validated in eval mode or not, on R losses."""
    hparams = hoptim.HyperParameters({"decay": torch.tensor([0.1, 0.2])})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        z = predict(m, b)
        sizes = [h["decay"][i % 2] * p.double().square().sum() for i, p in enumerate(m.parameters())]
        return (z - 0.3).square().mean() + torch.stack(sizes).sum()

    def val(m: Any, h: Any, b: Any) -> Tensor:
        z = predict(m.eval() if evaluated else m, b)
        found = [(z - 0.1 - k).square().mean() + h["decay"].sin().sum() for k in range(losses or 1)]
        return torch.stack(found) if losses else found[0]

    return Problem(model, hparams, train, val)


def few(curvature: Curvature | None = None) -> Implicit:
    """The method that ``plain`` writes out."""
    return Implicit(Neumann(terms=TERMS, step_size=STEP), curvature=curvature or Exact())


def plain(problem: Problem, train_batch: Any, val_batch: Any, *, dense: bool = True) -> tuple[Tensors, Tensors]:
    """dL_V/dλ and x of ``few``: no pure function, a copy of the whole model; the Hessian as a matrix if ``dense``."""
    weights, leaves, loss = _copied(problem, problem.val_loss, val_batch)
    g, direct = _gradients(loss, weights), _gradients(loss, leaves)
    weights, leaves, loss = _copied(problem, problem.train_loss, train_batch)
    F = _flat(torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True), weights)

    def pulled(v: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        return _gradients(F @ v, inputs)

    H = torch.stack([pulled(e, weights) for e in torch.eye(len(F), dtype=F.dtype)]) if dense else None
    v, x = g, g.clone()
    for _ in range(TERMS):
        v = v - STEP * (pulled(v, weights) if H is None else H @ v)
        x = x + v
    x = STEP * x
    return unflat(direct - pulled(x, leaves), problem.leaves()), unflat(x, problem.weights())


def _copied(problem: Problem, loss: Any, batch: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The weights, the leaves and the loss of a fresh copy; what the loss draws comes from the generator as it stands."""
    model, hparams = copy.deepcopy((problem.model, problem.hparams))
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(torch, "_weight_norm", weight_norm):
        value = loss(model, hparams, batch)
    return *([p for p in m.parameters() if p.requires_grad] for m in (model, hparams)), value


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """That of torch has a wrong second derivative."""
    return g * v / torch.linalg.vector_norm(v, dim=[d for d in range(v.ndim) if d != dim], keepdim=True)


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    return _flat(torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True), inputs).detach()


def _flat(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    whole = [torch.zeros_like(t) if part is None else part for part, t in zip(parts, like, strict=True)]
    return torch.cat([part.flatten().double() for part in whole])


# No trace


def flags() -> list[Any]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    kernels = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()]
    return [*kernels, cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.is_grad_enabled()]


def trace(problem: Problem) -> dict[str, Any]:
    """All that a hypergradient must leave alone: the tensors and what they are called, modes, attributes, flags, RNG."""
    parts = [part for module in (problem.model, problem.hparams) for part in module.modules()]
    attributes = [{k: id(v) for k, v in vars(part).items()} for part in parts]
    contents = [{k: [id(one) for one in v] for k, v in vars(part).items() if isinstance(v, list)} for part in parts]
    named = [
        [(name, id(t)) for name, t in m.named_parameters(remove_duplicate=False)] for m in (problem.model, problem.hparams)
    ]
    buffers = [[(name, id(t)) for name, t in m.named_buffers()] for m in (problem.model, problem.hparams)]
    found = snapshot(problem) | {"attributes": attributes, "contents": contents, "named": named, "buffer names": buffers}
    return found | {"flags": flags(), "versions": [p._version for p in problem.model.parameters()]}


@contextmanager
def no_trace(problem: Problem) -> Iterator[None]:
    for p in (*problem.model.parameters(), *problem.hparams.parameters()):
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = trace(problem)
    yield
    after = trace(problem)
    assert [key for key in before if not same(before[key], after[key])] == []


def assert_as_plain(
    problem: Problem,
    train_batch: Any,
    val_batch: Any,
    curvature: Curvature | None = None,
    *,
    dense: bool = True,
    error: float | None = None,
) -> None:
    """The hypergradient is that of plain autograd, from the same random state, and leaves no trace."""
    curvature = curvature or Exact()
    error = ERRORS[type(curvature)] if error is None else error
    torch.manual_seed(3)
    grads, x = plain(problem, train_batch, val_batch, dense=dense)
    torch.manual_seed(3)
    with no_trace(problem):
        result = hoptim.hypergradient(problem, train_batch, val_batch, few(curvature))
    assert result.solution.status.ok, result.solution.status
    for found, expected in ((result.grads, grads), (result.solution.value, x)):
        theirs = torch.cat([value.flatten() for value in expected.values()])
        ours = torch.cat([found[k].flatten().double() if k in found else 0 * v.flatten() for k, v in expected.items()])
        assert float((ours - theirs).norm() / theirs.norm()) < error


def own_threads():
    """How many threads of hoptim's run; other libraries may start and end theirs at any time."""
    return sum(thread.name.startswith("hoptim") for thread in threading.enumerate())
