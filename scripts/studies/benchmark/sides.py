"""A section on several right-hand sides at once."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import PROBLEMS, make
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from torch import Tensor

import hoptim


@dataclass(frozen=True, kw_only=True)
class Capture(hoptim.Solver):
    """Not a real solver: it keeps the operator and the right-hand side that ``hoptim.Implicit`` has built."""

    box: list[Any]

    def solve(self, A: Any, g: Tensor, state: Any = None) -> hoptim.Solution:
        self.box[:] = [A, g]
        return hoptim.Identity().solve(A, g)


def sides(rounds: int) -> list[Row]:
    """Eight Hessian products at once over eight one by one: in chunks of 1 to 8 by vmap, and by hoptim's operator."""
    rows = []
    for name in PROBLEMS:
        case = make(name, dropout=0.0)
        box: list[Any] = []
        case.implicit(hoptim.Implicit(Capture(box=box), curvature=hoptim.Exact()))
        A, g = box
        many, weights = torch.randn(8, len(g)), list(case.problem.model.parameters())
        with case.unfused():
            gradient = torch.autograd.grad(case.problem.loss(case.batch), weights, create_graph=True)

        pieces = many.split([p.numel() for p in weights], dim=1)
        by_weight = [piece.view(8, *p.shape) for piece, p in zip(pieces, weights, strict=True)]

        def chunked(size: int, many: Any = by_weight, weights: Any = weights, gradient: Any = gradient) -> list[Any]:
            found = []
            for part in zip(*(value.split(size) for value in many), strict=True):
                vectors, batched = (part, True) if size > 1 else ([value[0] for value in part], False)
                found.append(torch.autograd.grad(gradient, weights, vectors, retain_graph=True, is_grads_batched=batched))
            return found

        calls: Calls = {f"by {size}": lambda c=chunked, s=size: c(s) for size in (1, 2, 4, 8)}
        calls["hoptim"] = lambda A=A, v=many: A @ v
        times = in_turn(calls, rounds)
        figures: dict[str, float | str] = {"one by one, ms": 1e3 * median(times["by 1"])}
        figures |= {by: ratio(times, by, "by 1") for by in list(calls)[1:]}
        rows.append(Row(case.name, {}, figures, {"hoptim": 1.0}))
    return rows
