"""Graphs of tensor operations taken apart: what a product A v needs once, and what it needs for each v."""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize, vmap
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
Run = Callable[[list[Tensor]], Sequence[Tensor]]  # it may empty the list

# Random numbers come from torch's own generators, so that a mask is the one that plain PyTorch would draw. Convolutions
# keep the layout of their inputs: channels last costs a copy of each at every product (0.98 against 0.68 on a small CNN).
OPTIONS = {"fallback_random": True, "layout_optimization": False}


class UntraceableError(Exception):
    """The function can't be taken apart; the message names the operation."""


@dataclass(frozen=True)
class Piece:
    """A graph cut out of a larger one: the nodes there that are its arguments, and those that it computes."""

    graph: GraphModule
    arguments: tuple[Node, ...]
    results: tuple[Node, ...]


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """``function`` of these tensors as a graph without mutations, made of the operations that inductor knows.

    Tensors that it reads besides its arguments stay in the graph as they are, by reference. Nothing is computed: where the
    function would look at a value, the trace raises.
    """
    with _quiet():
        import torch._inductor.lowering
        from torch._inductor.decomposition import select_decomp_table
    with torch._inductor.config.patch(OPTIONS), _quiet():
        first = _make(function)(*inputs)  # by autograd, in place where it likes
        first.graph.eliminate_dead_code()
        first.recompile()
        graph = _make(functionalize(first), select_decomp_table())(*inputs)
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
            raise UntraceableError(f"{node.target}: what it returns to Python depends on values")
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Whatever matters is raised: warnings of the libraries are about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _make(function: Callable[..., Any], table: dict[Any, Any] | None = None) -> Callable[..., GraphModule]:
    return make_fx(function, decomposition_table=table, tracing_mode="fake", _allow_non_fake_inputs=True)


def results(graph: GraphModule) -> list[Node]:
    """The nodes of what the graph returns."""
    return list(next(node for node in graph.graph.nodes if node.op == "output").args[0])


def constants(graph: GraphModule) -> dict[Node, Tensor]:
    """Tensors that the graph reads besides its arguments."""
    return {node: operator.attrgetter(node.target)(graph) for node in graph.graph.nodes if node.op == "get_attr"}


def dependents(graph: GraphModule, roots: Iterable[Node]) -> set[Node]:
    """The nodes that depend on ``roots``, and these themselves."""
    found = set(roots)
    for node in graph.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
            if _is_random(node):
                raise UntraceableError(f"{node.target}: random numbers that depend on the vector")
    return found


def tangent(graph: GraphModule, results: Sequence[Node], per_vector: Collection[Node]) -> Piece:
    """What has to be computed for each v, and what of the rest costs no more to compute again than to read.

    Computed again: views, constants, and elementwise functions, which inductor fuses into what reads them. So the
    residuals are inputs of the loss, and the results of matrix products, convolutions and reductions.
    """

    def again(node: Node) -> bool:
        if node.op != "call_function" or node in per_vector:
            return node.op == "call_function"
        return not _is_random(node) and (_is_view(node) or _is_elementwise(node) or not node.all_input_nodes)

    return _cut(graph, results, again)


def draws(graph: GraphModule) -> Piece:
    """The random numbers, where none depends on an input: drawn by torch in its own order, each in its own layout.

    So a mask is the one that plain PyTorch would draw. Where one depends on an input all stay in the compiled graph, which
    draws from the same generators too.
    """
    piece = _cut(graph, _random(graph), lambda node: node.op == "call_function")
    if piece.arguments:
        return _cut(graph, [], lambda _: False)
    for node in piece.graph.graph.nodes:
        if node.target is aten.bernoulli.p:
            node.target = _bernoulli
    piece.graph.recompile()
    return piece


def _bernoulli(like: Tensor, p: float) -> Tensor:
    """As dropout draws its mask: the order of the numbers is that of the memory."""
    return torch.empty_like(like).bernoulli_(p)


def primal(graph: GraphModule, results: Sequence[Node], drawn: Collection[Node]) -> Piece:
    """What does not depend on v, from the inputs and what was drawn; all else that is random is in it, needed or not."""
    wanted = dict.fromkeys(node for node in (*results, *_random(graph)) if node not in drawn)
    return _cut(graph, list(wanted), lambda node: node.op == "call_function" and node not in drawn)


def _cut(graph: GraphModule, results: Sequence[Node], inside: Callable[[Node], bool]) -> Piece:
    """The part of the graph that computes ``results``; what is not ``inside`` becomes an argument."""
    needed: set[Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes if inside(node) else []
    order = [node for node in graph.graph.nodes if node in needed]
    arguments = tuple(node for node in order if not inside(node))
    part, copies = Graph(), {}
    for node in arguments:
        copies[node] = part.placeholder(node.name)
    for node in order:
        if node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in results))
    return Piece(GraphModule(torch.nn.Module(), part), arguments, tuple(results))


def batched(piece: Piece, axes: Sequence[int | None], arguments: Sequence[Tensor]) -> GraphModule:
    """The piece for a leading axis of R in those of its arguments whose place in ``axes`` is 0."""
    graph = copy.deepcopy(piece.graph)
    for node in graph.graph.nodes:
        if node.target is torch.ops.prims.convert_element_type.default:  # vmap has no rule for it
            node.target, node.kwargs = aten._to_copy.default, {"dtype": node.args[1]}
            node.args = node.args[:1]
    graph.recompile()
    return traced(vmap(graph, in_dims=tuple(axes)), arguments)


def compiled(graph: GraphModule, arguments: Sequence[Tensor]) -> Run:
    """The graph compiled by inductor for arguments like these, as a function of a list of them.

    On a CPU the kernels are called from C++ (0.45 against 0.53 of plain PyTorch on a small net), where inductor can. Of a
    graph that draws no random numbers, inductor's innermost function is called, if it gives the same: what is wrapped
    around it serves aliases and mutations, of which there are none here, and costs a tenth of a small product.
    """
    with _quiet():
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    whole: Any = None
    innermost: list[Any] = []

    def inner(*args: Any, **options: Any) -> Any:
        innermost.append(compile_fx_inner(*args, **options))
        return innermost[-1]

    on_cpu = all(value.device.type == "cpu" for value in arguments)
    draws = any(map(_is_random, graph.graph.nodes))
    for in_cpp in (True, False) if on_cpu else (False,):
        innermost.clear()
        try:
            with torch.no_grad(), _quiet():
                patches = {**OPTIONS, "cpp_wrapper": in_cpp}
                whole = compile_fx(graph, list(arguments), inner_compile=inner, config_patches=patches)
                known = None if draws or len(innermost) != 1 else whole(*arguments)
            break
        except Exception:  # an operation that the C++ wrapper does not know may be known to the other
            if not in_cpp:
                raise
    if known is not None and _same(innermost[0], arguments, known):
        return getattr(innermost[0], "current_callable", None) or innermost[0]
    return lambda values: whole(*values)


def _same(run: Any, arguments: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether ``run`` gives the same tensors, and leaves its arguments alone."""
    before = [value._version for value in arguments]
    with contextlib.suppress(Exception), torch.no_grad():
        found = run(list(arguments))
        pairs = zip(found, expected, strict=True)
        same = all(a.stride() == b.stride() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)
        return bool(same) and [value._version for value in arguments] == before
    return False


def _is_random(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _random(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if _is_random(node) and isinstance(node.meta.get("val"), Tensor)]


def _is_view(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and (node.target.is_view or node.target is aten._unsafe_view.default)


def _is_elementwise(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
