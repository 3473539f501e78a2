"""A compiled program: a traced training loss, split into what runs once for each point and what runs for each product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.compiled.splitting import cut, dependents, draws, is_cheap, is_operation, is_random, traced
from hoptim.curvature.linearization import Linearization
from hoptim.linalg.operators import Symmetric
from hoptim.linalg.vectors import Layout, OptionalTensors

Function = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor, Tensor, OptionalTensors]]


class Program:
    """The compiled pieces of a function (tensors, v) ↦ (L_T, F, A v, Bᵀv); F and v are flat.

    Args:
        function: what is traced.
        tensors: examples of its inputs; others must have the same shapes.
        layout: the weights in F and v.
        untouched: the weights that are not in them.
    """

    uses = 1  # how many points it was used at

    def __init__(self, function: Function, tensors: Sequence[Tensor], layout: Layout, untouched: tuple[str, ...]) -> None:
        self._layout, self._untouched = layout, untouched
        names: dict[str, bool] = {}  # of the hyperparameters, and whether Bᵀv has an entry for them

        def outputs(*tensors: Tensor) -> list[Tensor]:
            L, F, Av, Bv = function(tensors[:-1], tensors[-1])
            names.update({name: t is not None for name, t in Bv.items()})
            return [L, F, Av, *(t for t in Bv.values() if t is not None)]

        graph = traced(outputs, [*tensors, torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)])
        *self._inputs, v = graph.graph.find_nodes(op="placeholder")
        self._constants = {node: attrgetter(node.target)(graph) for node in graph.graph.find_nodes(op="get_attr")}
        results: Any = graph.graph.output_node().args[0]
        self._L, self._F, Av, *mixed = results

        # What runs for each vector. A result that does not depend on v is zero, since all are linear in v.
        of_v = dependents(graph, v)
        Bv = {name: node for name, node in zip(filter(names.get, names), mixed, strict=True) if node in of_v}
        self._product, self._mixed = (
            cut(graph, nodes, lambda node: node in of_v or is_cheap(node))
            for nodes in ([Av] if Av in of_v else [], list(Bv.values()))
        )
        self._leaves, self._names = dict.fromkeys(names), list(Bv)

        # What runs once for each point: the random numbers, then L_T, F and the intermediate results that products need.
        self._draws = draws(graph)
        drawn = self._draws.results
        residuals = filter(is_operation, [*self._product.arguments, *self._mixed.arguments])
        wanted = dict.fromkeys((self._L, self._F, *residuals, *filter(is_random, graph.graph.nodes)))
        self._primal = cut(graph, [n for n in wanted if n not in drawn], lambda n: is_operation(n) and n not in drawn)

    def at(self, tensors: Sequence[Tensor]) -> Linearization:
        """L_T and F, computed now, and the products with A and Bᵀ for later."""
        known = self._constants | dict(zip(self._inputs, tensors, strict=True))
        known |= zip(self._draws.results, self._draws.graph(), strict=True)
        known |= zip(self._primal.results, self._primal(known), strict=True)

        def product(v: Tensor) -> Tensor:
            found = self._product(known, self._given(v))
            return found[0] if found else torch.zeros_like(v)

        def mixed(v: Tensor) -> OptionalTensors:
            return self._leaves | dict(zip(self._names, self._mixed(known, self._given(v)), strict=True))

        return Linearization(
            loss=known[self._L],
            layout=self._layout,
            value=known[self._F],
            A=Symmetric(product, like=known[self._F]),
            mixed=mixed,
            untouched=self._untouched,
        )

    def _given(self, v: Tensor) -> Tensor:
        """The vector in the type and memory layout that the compiled code expects."""
        return v.to(self._layout.dtype).contiguous()
