"""Graphs of tensor operations: traced, cut into pieces, and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch.func import functionalize, vmap
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
Run = Callable[[list[Tensor]], Sequence[Tensor]]

# Random numbers come from torch's own generators, so that masks are those of plain PyTorch. Convolutions keep the layout of
# their inputs: channels last would copy each at every product (0.98 instead of 0.68 of the eager time on a small CNN).
OPTIONS = {"fallback_random": True, "layout_optimization": False}


class UntraceableError(Exception):
    """The function can't be compiled; the message says why."""


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of ``function`` for tensors like these, without mutations.

    Nothing is computed, so code that reads a tensor's value raises. Plain Python values are built into the graph; tensors
    that the function reads besides its inputs are kept by reference.
    """

    def trace(function: Callable[..., Any], table: dict[Any, Any] | None = None) -> GraphModule:
        graph = make_fx(function, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    with _no_warnings():  # first through autograd; then without mutations, and with empty_like independent of its argument
        return trace(functionalize(trace(function)), get_decompositions([aten.empty_like]))


@dataclass
class Piece:
    """A part of a graph, compiled when first called; arguments and results are nodes of the whole graph."""

    graph: GraphModule
    arguments: list[Node]
    results: list[Node]
    _runs: dict[int | None, Run] = field(default_factory=dict)

    def __call__(self, known: dict[Node, Tensor], v: Tensor | None = None) -> Sequence[Tensor]:
        """The results; ``v`` is the one argument that is not in ``known``, of shape (n,), or (R, n) for R of each result."""
        if not self.results:
            return []
        arguments: list[Any] = [known.get(node, v) for node in self.arguments]
        R = None if v is None or v.ndim == 1 else len(v)
        if R not in self._runs:
            axes = tuple(None if node in known else 0 for node in self.arguments)
            self._runs[R] = compiled(self.graph if R is None else traced(vmap(self.graph, axes), arguments), arguments)
        with torch.no_grad():
            return self._runs[R](arguments)


def cut(graph: GraphModule, results: Sequence[Node], is_inside: Callable[[Node], bool]) -> Piece:
    """The part of a graph that computes ``results``; nodes for which ``is_inside`` is false become arguments."""
    needed: set[Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes if is_inside(node) else []
    order = [node for node in graph.graph.nodes if node in needed]
    arguments = [node for node in order if not is_inside(node)]
    part = Graph()
    copies = {node: part.placeholder(node.name) for node in arguments}
    for node in order:
        if node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in results))
    return Piece(GraphModule(torch.nn.Module(), part), arguments, list(results))


def dependents(graph: GraphModule, root: Node) -> set[Node]:
    """The nodes that depend on ``root``."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if root in node.all_input_nodes or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def draws(graph: GraphModule) -> Piece:
    """The part that draws random numbers, run by torch itself, so that order and layout are those of plain PyTorch.

    It is empty if any of them depends on an input: then all stay in the compiled graph, which uses the same generators.
    """
    piece = cut(graph, [node for node in graph.graph.nodes if is_random(node)], is_operation)
    if piece.arguments:
        return cut(graph, [], is_operation)
    for node in piece.graph.graph.nodes:
        if node.target is aten.bernoulli.p:
            node.target = _bernoulli
    piece.graph.recompile()
    return piece


def _bernoulli(like: Tensor, p: float) -> Tensor:
    """As dropout draws its mask: in the order of memory."""
    return torch.empty_like(like).bernoulli_(p)


def is_operation(node: Node) -> bool:
    """Whether it is computed: neither an input nor a constant."""
    return node.op == "call_function"


def is_random(node: Node) -> bool:
    """Whether it draws random numbers."""
    return _has_tag(node, torch.Tag.nondeterministic_seeded) and isinstance(node.meta.get("val"), Tensor)


def is_cheap(node: Node) -> bool:
    """Whether computing it again costs no more than reading it: a view, or what inductor fuses into its readers."""
    is_view = isinstance(node.target, OpOverload) and (node.target.is_view or node.target is aten._unsafe_view.default)
    is_filled = is_operation(node) and not node.all_input_nodes
    return not is_random(node) and (is_view or is_filled or _has_tag(node, torch.Tag.pointwise))


def _has_tag(node: Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, OpOverload) and tag in node.target.tags


def compiled(graph: GraphModule, arguments: Sequence[Tensor]) -> Run:
    """The graph compiled by inductor, for arguments of the shapes, strides and types of these.

    On a CPU its kernels are called from C++ if inductor can do that: 0.91 of the time on a small net.
    """

    def compile_(cpp_wrapper: bool) -> Run:
        with torch.no_grad(), _no_warnings():
            run = torch._inductor.compile(graph, list(arguments), options={**OPTIONS, "cpp_wrapper": cpp_wrapper})
        return lambda values: run(*values)

    if all(value.device.type == "cpu" for value in arguments):
        with suppress(Exception):
            return compile_(cpp_wrapper=True)
    return compile_(cpp_wrapper=False)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence the warnings of torch's compiler, which are about its own code; what matters is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
