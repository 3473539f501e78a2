"""Strategies for the curvature over several training batches: their mean, and a fresh one for each product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from hoptim.curvature.exact import Exact
from hoptim.curvature.linearization import Curvature, Linearization, Point, R
from hoptim.linalg import trees
from hoptim.linalg.operators import Mean, Operator, Symmetric, mean_of
from hoptim.linalg.trees import Found, Tree
from hoptim.validation import is_whole


@dataclass(frozen=True, kw_only=True)
class Averaged(Curvature):
    """F averaged over several batches: A = (A₁ + … + Aₙ) / n and likewise B, for a curvature with less noise.

    The first batch is the hyperstep's own, the others come from ``train_batches``. A product costs n of them, and n graphs
    are held.

    Args:
        batches: n ≥ 1, default 4.
        curvature: how each is linearised, default ``Exact()``.

    Raises:
        ValueError: ``batches`` is no positive whole number; when called, there is no source of more batches.

    >>> Averaged(batches=8)
    Averaged(batches=8, curvature=Exact(compile=False))
    """

    batches: int = 4
    curvature: Curvature = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if not (is_whole(self.batches) and self.batches >= 1):
            raise ValueError(f"batches={self.batches!r}: give a whole number, 1 or more")
        Curvature.check(self.curvature)

    def linearize(self, point: Point, then: Callable[[Linearization], R]) -> R:
        """``then`` of the mean, with the swaps of the batches inside one another."""
        batches = [point.batch, *(point.another("Averaged") for _ in range(self.batches - 1))]

        def gather(found: list[Linearization]) -> R:
            if len(found) == len(batches):
                return then(_mean(found, point.weights))
            at = replace(point, batch=batches[len(found)])
            return self.curvature.linearize(at, lambda one: gather([*found, one]))

        return gather([])


@dataclass(frozen=True, kw_only=True)
class Sampled(Curvature):
    """A fresh training batch for each product, so that the errors of the batches do not add up along one series (stocBiO).

    F and B are of the hyperstep's own batch; each product linearises another one, and costs its graph in addition.

    Args:
        curvature: how each is linearised, default ``Exact()``.

    Raises:
        TypeError: ``curvature`` is none.
        ValueError: when called, there is no source of more batches.

    Source: Ji, Yang and Liang 2021 (arXiv 2010.07962), algorithm 2.

    >>> Sampled()
    Sampled(curvature=Exact(compile=False))
    """

    curvature: Curvature = field(default_factory=Exact)

    def __post_init__(self) -> None:
        Curvature.check(self.curvature)

    def linearize(self, point: Point, then: Callable[[Linearization], R]) -> R:
        """``then`` of F, whose A draws a batch a product."""

        def inside(base: Linearization) -> R:
            def product(v: Tree) -> Tree:  # one batch for all right-hand sides, and none for measuring how to take them
                at = replace(point, batch=point.another("Sampled"))
                return self.curvature.linearize(at, lambda one: mean_of([one.A @ _padded(v, base.A, one.A)], like=v))

            return then(replace(base, A=Symmetric(product, base.A.like)))

        return self.curvature.linearize(point, inside)


def _padded(v: Tree, A: Operator, other: Operator) -> Tree:
    """A vector of A's for another operator: zero where A does not touch a weight, which is held fixed."""
    lead = trees.length(v) if A.is_batched(v) else None
    zeros = {n: w if lead is None else w.expand(lead, *w.shape) for n, w in trees.zeros_like(other.like).items()}
    return {name: v.get(name, zero) for name, zero in zeros.items()}


def _mean(found: list[Linearization], weights: Tree) -> Linearization:
    """The mean of F, A and B; a weight counts where any of the batches touches it."""
    A = Mean([one.A for one in found])
    like = {name: A.like[name] for name in weights if name in A.like}

    def mixed(x: Tree) -> Found:
        parts = [one.mixed({name: x[name] for name in one.A.like}) for one in found]
        total: Found = {}
        for name in parts[0]:
            present = [value for part in parts if (value := part[name]) is not None]
            total[name] = torch.stack(present).sum(0) / len(parts) if present else None
        return total

    return Linearization(
        loss=torch.stack([one.loss for one in found]).mean(),
        value=mean_of([one.value for one in found], like=like),
        A=A,
        mixed=mixed,
        untouched=tuple(name for name in weights if name not in A.like),
    )
