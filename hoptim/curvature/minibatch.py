"""Curvatures of several training batches: their mean, and a fresh batch for each product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hoptim.checks import is_whole
from hoptim.curvature.exact import Exact
from hoptim.curvature.linearization import Curvature, Draw, Linearization, on_shards
from hoptim.linalg import dicts
from hoptim.linalg.operators import Mean, Symmetric
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.problem.held_batch import hold
from hoptim.problem.problem import At


@dataclass(frozen=True, kw_only=True)
class Averaged(Curvature):
    """F averaged over several batches: A = (A₁ + … + Aₙ) / n and likewise B, for a curvature with less noise.

    The first batch is the hyperstep's own, the others come from ``train_batches``. A product costs n times as much, and n
    graphs are held.

    Args:
        batches: n ≥ 1, default 4.
        curvature: the curvature of each batch, default ``Exact()``.

    Raises:
        ValueError: ``batches`` is no positive whole number; when called, there is no source of more batches.

    >>> Averaged(batches=8)
    Averaged(batches=8, curvature=Exact(compile=False))
    """

    batches: int = 4
    curvature: Curvature = field(default_factory=Exact)

    @property
    def is_first_order(self) -> bool:
        """Whether the curvature of each batch is."""
        return self.curvature.is_first_order

    def __post_init__(self) -> None:
        if not (is_whole(self.batches) and self.batches >= 1):
            raise ValueError(f"batches={self.batches!r}: give a whole number, 1 or more")

    @contextmanager
    def linearize(self, at: At, batch: Any, draw: Draw | None = None) -> Iterator[Linearization]:
        """The mean over the batches, whose graphs are all held."""
        kept = [hold(batch), *(hold(_drawn(draw, "Averaged")) for _ in range(self.batches - 1))]
        with ExitStack() as stack:
            found = (  # no list, which would hold their values
                stack.enter_context(self.curvature.linearize(at, one.get())) for one in kept
            )
            yield _mean([on_shards(one, at) for one in found], at.shards)


@dataclass(frozen=True, kw_only=True)
class Sampled(Curvature):
    """A fresh training batch for each product, so that the error of one batch does not add up along a series (stocBiO).

    F and B are those of the hyperstep's own batch; each product linearises another batch, and so also costs a graph.

    Args:
        curvature: the curvature of each batch, default ``Exact()``.

    Raises:
        ValueError: when called, there is no source of more batches.

    Source: Ji, Yang and Liang 2021 (arXiv 2010.07962), algorithm 2.

    >>> Sampled()
    Sampled(curvature=Exact(compile=False))
    """

    curvature: Curvature = field(default_factory=Exact)

    @property
    def is_first_order(self) -> bool:
        """Whether the curvature of each batch is."""
        return self.curvature.is_first_order

    @contextmanager
    def linearize(self, at: At, batch: Any, draw: Draw | None = None) -> Iterator[Linearization]:
        """F and B of the hyperstep's own batch, and an A that draws a batch for each product."""
        kept = hold(batch)

        def product(v: Tensor, layout: Layout) -> Tensor:  # the same batch for all of R vectors
            fresh = _drawn(draw, "Sampled")
            kept.get()
            with self.curvature.linearize(at, fresh) as one:
                return on_shards(one, at).on(layout).A @ v

        def sampled(first: Linearization) -> Linearization:
            layout = first.layout
            return replace(first, A=Symmetric(lambda v: product(v, layout), like=layout, is_fixed=False))

        with ExitStack() as stack:  # no name for the first, which would hold its value
            yield sampled(on_shards(stack.enter_context(self.curvature.linearize(at, batch)), at))


def _drawn(draw: Draw | None, who: str) -> Any:
    if draw is None:
        raise ValueError(f"{who} needs more training batches: give train_batches")
    return draw()


def _mean(found: Sequence[Linearization], weights: Tensors) -> Linearization:
    """The mean of F, A and B; a weight is in if any of the batches touches it."""
    touched = {name for one in found for name in one.layout.names}
    layout = Layout.of({name: w for name, w in weights.items() if name in touched})
    parts = [one.on(layout) for one in found]

    by_part = [part.mixed for part in parts]

    def mixed(x: Tensor) -> OptionalTensors:
        total = reduce(dicts.add, [one(x) for one in by_part])
        return {name: None if t is None else t / len(by_part) for name, t in total.items()}

    return Linearization(
        loss=torch.stack([part.loss for part in parts]).mean(),
        layout=layout,
        value=torch.stack([part.value for part in parts]).mean(0),
        A=Mean([part.A for part in parts]),
        mixed=mixed,
        untouched=tuple(name for name in weights if name not in touched),
        is_on_shards=parts[0].is_on_shards,
    )
