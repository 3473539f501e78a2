"""Products with A and Bᵀ by compiled graphs: one that is run once at a point, others that are run for each vector."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hoptim.curvature.compiled import constants as reads
from hoptim.curvature.compiled import splitting
from hoptim.curvature.compiled.derivatives import Way, derivatives
from hoptim.curvature.compiled.splitting import Piece, Run, UntraceableError
from hoptim.linalg.trees import Found, Tree
from hoptim.problem.mixed_precision import lowered
from hoptim.problem.problem import Problem

Kind = Literal["product", "mixed"]
WAYS: tuple[Way, ...] = ("forward", "reverse")  # of tracing, tried in turn
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative, with plain PyTorch; half precision: 0.1
MOST = 16  # programs kept for a problem


@dataclass(frozen=True, kw_only=True)
class Products:
    """L_T, F and the products of one solve, at one point; it owns the residuals that they need.

    Attributes:
        loss: L_T, detached.
        value: F = ∇_w L_T, detached, for the weights that the loss touches.
        untouched: the weights that it does not touch.
        product: A v for those that it touches; R products where ``v`` has a leading axis.
        mixed: Bᵀx by hyperparameter, likewise; ``None`` for one that F does not depend on.
    """

    loss: Tensor
    value: Tree
    untouched: list[str]
    product: Callable[[Tree], Tree]
    mixed: Callable[[Tree], Found]


def compiled_products(
    problem: Problem, weights: Tree, leaves: Tree, batch: Any, *, gauss_newton: bool = False
) -> Products | None:
    """The products of a training loss at a point, from graphs that are traced and compiled once for all values.

    ∇_w L_T, A v and Bᵀv are traced together as one function of (w, λ, buffers, batch, v), and the graph is cut by what
    depends on v. Weights, hyperparameters, buffers, the batch's tensors and v are its inputs: other values compile nothing;
    other shapes, modes or plain Python values that the loss reads compile anew. Dropout draws its masks from torch's
    generators, one mask for all products. A fresh graph is checked against plain PyTorch once.

    Args:
        problem: the problem; the graphs live as long as it does.
        weights: w.
        leaves: λ.
        batch: any tree of tensors and plain values.
        gauss_newton: A = Jᵀ (∂²c/∂z²) J + ∂²penalty/∂w² in place of the exact one; the training loss must show its parts.

    Returns:
        The products; ``None``, after one warning that names the operation, where the loss can't be traced.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    >>> hparams = torch.nn.ParameterDict({"decay": torch.tensor(3.0)})
    >>> def loss(model, hparams, batch):
    ...     return 0.5 * hparams["decay"] * model.weight.square().sum() + model(batch).sum()
    >>> problem = Problem(torch.nn.Linear(2, 1, bias=False), hparams, loss, loss)
    >>> found = compiled_products(problem, problem.weights(), problem.leaves(), torch.ones(1, 2))
    >>> found.product({"weight": torch.tensor([[1.0, 2.0]])})
    {'weight': tensor([[3., 6.]])}
    """
    programs = _PROGRAMS.setdefault(problem, {})
    key: tuple[Any, ...] = ()  # of what has no key
    try:
        point = _Point.of(problem, weights, leaves, batch)
        key = (gauss_newton, *point.key(problem))
        if key not in programs:
            program = _checked(problem, point, gauss_newton)
            _make_room(programs)
            programs[key] = program
    except Exception as error:  # whatever a model of any kind may raise while it is traced: plain PyTorch takes over
        programs[key] = None
        if _FAILED not in programs:
            programs[_FAILED] = None
            warnings.warn(
                f"hoptim: the training loss can't be compiled, its products are computed by plain PyTorch: {_named(error)}",
                stacklevel=2,
            )
        return None
    found = programs[key]
    return None if found is None else found.at(point.tensors)


def _make_room(programs: dict[Any, _Program | None]) -> None:
    """Drop the oldest of too many programs; many are made only where something changes that should not."""
    made = [key for key, program in programs.items() if program is not None]
    if len(made) < MOST:
        return
    if _CROWDED not in programs:
        programs[_CROWDED] = None
        warnings.warn(
            f"hoptim: the training loss has been compiled for {MOST} shapes, modes or plain values that it reads, and "
            "the oldest is dropped. Give batches of one size; make a number that changes a tensor, which is read anew",
            stacklevel=3,
        )
    del programs[made[0]]


def _named(error: Exception) -> str:
    """What failed, in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if kind == "GuardOnDataDependentSymNode":
        kind = "aten._local_scalar_dense, by which Python code looks at a tensor's value"
    return f"{kind}: {lines[0].strip() if lines else ''}"


_PROGRAMS: WeakKeyDictionary[Problem, dict[Any, _Program | None]] = WeakKeyDictionary()
_HERE = object()
_FAILED, _CROWDED = "it was said that a loss can't be compiled", "it was said that there are too many programs"


@dataclass(frozen=True)
class _Point:
    """Every tensor that the loss is a function of, and what stands around them: names, and plain values of the batch."""

    tensors: list[Tensor]
    others: list[Any]  # the tree's leaves, with _HERE for a tensor
    spec: TreeSpec

    @classmethod
    def of(cls, problem: Problem, weights: Tree, leaves: Tree, batch: Any) -> _Point:
        """(w, λ, frozen weights, constant hyperparameters, buffers, batch), taken apart."""
        frozen = {name: p for name, p in problem.model.named_parameters() if name not in weights}
        constant = {name: p for name, p in problem.hparams.named_parameters() if name not in leaves}
        buffers = dict(problem.joint.named_buffers())
        found, spec = tree_flatten((weights, leaves, frozen, constant, buffers, batch))
        for value in found:
            if not isinstance(value, (Tensor, *reads.PLAIN)):
                raise UntraceableError(f"the batch holds a {type(value).__name__}: give tensors in dicts, lists and tuples")
        tensors = [value.detach() for value in found if isinstance(value, Tensor)]
        return cls(tensors, [_HERE if isinstance(value, Tensor) else value for value in found], spec)

    def tree(self, tensors: Sequence[Tensor]) -> Any:
        """The same with other tensors."""
        left = iter(tensors)
        return tree_unflatten([next(left) if other is _HERE else other for other in self.others], self.spec)

    def key(self, problem: Problem) -> tuple[Any, ...]:
        """All that a graph is made for."""
        return (
            self.spec,
            tuple((type(other), other) for other in self.others),
            tuple((value.shape, value.stride(), value.dtype, value.device) for value in self.tensors),
            lowered(),
            torch.get_default_dtype(),
            tuple(reads.options(problem.joint)),
            id(problem.train_loss),
            tuple(reads.read(problem.train_loss)),
        )


def _checked(problem: Problem, point: _Point, gauss_newton: bool) -> _Program:
    """A program, once it has given what plain PyTorch gives for a random vector, from the same random state."""
    weights = point.tree(point.tensors)[0]
    with problem.untouched():
        v = {name: torch.randn_like(w) for name, w in weights.items()}
    with problem.untouched():
        loss, F, product, _ = derivatives(problem, point.tree(point.tensors), v, "reverse", gauss_newton)
    for way in WAYS:
        try:
            with problem.untouched():
                program = _Program(problem, point, v, way, gauss_newton)
            with problem.untouched():
                found = program.at(point.tensors)
            along = {name: v[name] for name in found.value}
            _agree([{"loss": found.loss}, found.value, found.product(along)], [{"loss": loss}, F, product])
        except Exception:
            if way == WAYS[-1]:
                raise
        else:
            return program
    raise AssertionError


def _agree(found: list[Tree], expected: list[Found]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        pairs = [(t.double(), 0 * t.double() if (other := theirs[n]) is None else other.double()) for n, t in ours.items()]
        size = sum(float(other.square().sum()) for _, other in pairs) ** 0.5
        error = sum(float((t - other).square().sum()) for t, other in pairs) ** 0.5
        dtypes = [*(t.dtype for t in ours.values()), *(dtype for _, dtype in lowered())]
        allowed = max(AGREEMENT.get(dtype, 0.1) for dtype in dtypes) * size
        if math.isfinite(size) and not error <= allowed:
            raise UntraceableError(f"the compiled answer is off by {error:.1e} of {size:.1e}")


class _Program:
    """The graphs for one shape of everything, and what they were compiled to."""

    def __init__(self, problem: Problem, point: _Point, v: Tree, way: Way, gauss_newton: bool) -> None:
        size = len(point.tensors)
        names: list[list[str]] = []

        def function(*tensors: Tensor) -> list[Tensor]:
            along = dict(zip(v, tensors[size:], strict=True))
            loss, *found = derivatives(problem, point.tree(tensors[:size]), along, way, gauss_newton)
            names[:] = [[name for name, t in tree.items() if t is not None] for tree in found]
            return [loss, *(t for tree in found for t in tree.values() if t is not None)]

        graph = splitting.traced(function, [*point.tensors, *v.values()])
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        left = iter(splitting.results(graph))
        loss = next(left)
        value, product, mixed = ([next(left) for _ in part] for part in names)
        per_vector = splitting.dependents(graph, inputs[size:])
        tangents = {"product": product, "mixed": mixed}
        self._terms = {kind: splitting.tangent(graph, nodes, per_vector) for kind, nodes in tangents.items()}
        residuals = [node for term in self._terms.values() for node in term.arguments if node.op == "call_function"]
        self._draws = splitting.draws(graph)
        self._primal = splitting.primal(graph, [loss, *value, *residuals], self._draws.results)
        self._outputs = [loss, *value]
        self._inputs, vectors = inputs[:size], dict(zip(inputs[size:], v, strict=True))
        self._places = {  # of v among a term's arguments
            kind: [(i, vectors[node]) for i, node in enumerate(term.arguments) if node in vectors]
            for kind, term in self._terms.items()
        }
        self._constants = splitting.constants(graph)
        self._weights, self._leaves, self._names = list(v), list(point.tree(point.tensors)[1]), names
        self._ndim = {name: value.ndim for name, value in v.items()}
        self._runs: dict[Any, Run] = {}

    def at(self, tensors: Sequence[Tensor]) -> Products:
        """L_T, F and the residuals, computed here and now; the products, for later."""
        known = self._constants | dict(zip(self._inputs, tensors, strict=True))
        known |= dict(zip(self._draws.results, self._draws.graph(), strict=True))
        arguments = [known[node] for node in self._primal.arguments]
        if "primal" not in self._runs:
            self._runs["primal"] = splitting.compiled(self._primal.graph, arguments)
        with torch.no_grad():
            known |= dict(zip(self._primal.results, self._runs["primal"](arguments), strict=True))
        loss, *value = (known[node] for node in self._outputs)
        given = {kind: [known.get(node) for node in term.arguments] for kind, term in self._terms.items()}
        touched = self._names[0]

        def product(v: Tree) -> Tree:
            found = self._apply("product", given["product"], v)
            return {name: found[name] if name in found else torch.zeros_like(v[name]) for name in touched}

        def mixed(x: Tree) -> Found:
            return dict.fromkeys(self._leaves) | self._apply("mixed", given["mixed"], x)

        return Products(
            loss=loss,
            value=dict(zip(touched, value, strict=True)),
            untouched=[name for name in self._weights if name not in touched],
            product=product,
            mixed=mixed,
        )

    def _apply(self, kind: Kind, given: list[Tensor | None], v: Tree) -> Tree:
        """The product with v, or with R of them; ``given`` has the residuals, and None in the places of v."""
        term, names = self._terms[kind], self._names[1 if kind == "product" else 2]
        if not names:
            return {}
        name, one = next(iter(v.items()))
        R = len(one) if one.ndim > self._ndim[name] else None
        arguments: list[Any] = given.copy()
        for place, vector in self._places[kind]:
            arguments[place] = v[vector]
        with torch.no_grad():
            if (kind, R) not in self._runs:
                self._runs[kind, R] = self._compiled(term, given, arguments, R)
            return dict(zip(names, self._runs[kind, R](arguments), strict=True))

    def _compiled(self, term: Piece, given: list[Tensor | None], arguments: list[Tensor], R: int | None) -> Run:
        graph = term.graph
        if R is not None:
            graph = splitting.batched(term, [0 if t is None else None for t in given], arguments)
        run = splitting.compiled(graph, arguments)
        layouts = [(i, arguments[i].stride()) for i, t in enumerate(given) if t is None]

        def laid_out(arguments: list[Tensor]) -> Sequence[Tensor]:
            """Compiled code has the layout of its arguments built in."""
            for i, stride in layouts:
                if (t := arguments[i]).stride() != stride:
                    arguments[i] = torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)
            return run(arguments)

        return laid_out
