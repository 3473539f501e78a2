"""A = ∂F/∂w as a linear operator on dicts of tensors: products from one graph that is built once and used many times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim import trees
from hoptim.problem import Parts
from hoptim.trees import Tree


class Operator(ABC):
    """A square linear operator on vectors of the names and shapes of ``like``.

    ``A @ v`` is the product; a vector whose entries have a leading axis of R right-hand sides gives R products at once.
    ``A.T`` is the transpose, ``A + sigma`` is A + σI.
    """

    def __init__(self, like: Tree) -> None:
        self.like = like

    @abstractmethod
    def __matmul__(self, v: Tree) -> Tree:
        """The product A v, or R of them."""

    @property
    @abstractmethod
    def T(self) -> Operator:  # noqa: N802 (the field's own name)
        """The transpose Aᵀ."""

    def __add__(self, sigma: float) -> Operator:
        return _Shifted(self, sigma) if sigma else self

    def is_batched(self, v: Tree) -> bool:
        """Whether ``v`` has the leading axis of R right-hand sides."""
        name, value = next(iter(v.items()))
        return value.ndim > self.like[name].ndim


class Symmetric(Operator):
    """A symmetric operator given by its product.

    >>> A = Symmetric(lambda v: {"w": 2 * v["w"]}, like={"w": torch.ones(2)})
    >>> ((A + 1.0) @ {"w": torch.ones(2)})["w"]
    tensor([3., 3.])
    """

    def __init__(self, product: Callable[[Tree], Tree], like: Tree) -> None:
        super().__init__(like)
        self._product = product

    def __matmul__(self, v: Tree) -> Tree:
        return self._product(v)

    @property
    def T(self) -> Operator:  # noqa: N802
        """The operator itself."""
        return self


class _Shifted(Operator):
    def __init__(self, base: Operator, sigma: float) -> None:
        super().__init__(base.like)
        self.base, self.sigma = base, sigma

    def __matmul__(self, v: Tree) -> Tree:
        return trees.add(self.base @ v, v, alpha=self.sigma)

    @property
    def T(self) -> Operator:  # noqa: N802
        return _Shifted(self.base.T, self.sigma)


def in_float32(A: Operator) -> Operator:
    """A for vectors in float32 where weights are in half precision, which would lose sums of many terms; else A itself."""
    wide = trees.widened(A.like)
    return A if all(wide[name] is A.like[name] for name in wide) else _Widened(A, wide)


class _Widened(Operator):
    def __init__(self, base: Operator, like: Tree) -> None:
        super().__init__(like)
        self.base = base

    def __matmul__(self, v: Tree) -> Tree:
        return trees.widened(self.base @ trees.cast(v, self.base.like))

    @property
    def T(self) -> Operator:  # noqa: N802
        return _Widened(self.base.T, self.like)


class StationarityGraph:
    """F(w, λ) = ∇_w L_T with its graph kept: every product with A = ∂F/∂w and B = ∂F/∂λ is one backward pass through it.

    The graph costs one training gradient with ``create_graph=True``; a product costs 0.9 to 1.9 gradients more. Dropout
    masks are part of the graph: one mask for a whole solve.

    Args:
        loss: L_T, computed from the two that follow.
        weights: w, leaves that require a gradient.
        leaves: λ, likewise.
        parts: the loss taken apart, where it is a :class:`CompositeLoss`.

    Raises:
        TypeError: a weight has a sparse gradient.
    """

    def __init__(self, loss: Tensor, weights: Tree, leaves: Tree, parts: Parts | None = None) -> None:
        self.loss, self.parts = loss, parts
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        found = dict(zip(weights, gradients, strict=True))
        if sparse := [name for name, gradient in found.items() if gradient is not None and gradient.is_sparse]:
            raise TypeError(f"the weights {sparse} have sparse gradients: build their layers with sparse=False")
        self.value: Tree = {name: gradient for name, gradient in found.items() if gradient is not None}
        self.weights = {name: weights[name] for name in self.value}
        self.leaves = leaves
        self._outputs = {name: value for name, value in self.value.items() if value.requires_grad}
        self.untouched_weights = [name for name, gradient in found.items() if gradient is None]

    def vjp(self, v: Tree, inputs: Tree, *, batched: bool = False) -> dict[str, Tensor | None]:
        """vᵀ ∂F/∂inputs; ``None`` for an input that F does not depend on. ``batched``: R products in one vmapped pass."""
        outputs = self._outputs
        if not outputs or not inputs:
            return dict.fromkeys(inputs)
        return pulled_back(outputs, {name: v[name] for name in outputs}, inputs, batched=batched)

    def jacobian(self) -> Operator:
        """A = ∂F/∂w = the Hessian of L_T: symmetric, so that vᵀA is A v."""
        like = {name: value.detach() for name, value in self.weights.items()}

        def product(v: Tree) -> Tree:  # it names no operator: a cycle would keep the graph until a garbage collection
            name, value = next(iter(v.items()))
            found = self.vjp(v, self.weights, batched=value.ndim > like[name].ndim)
            return {name: torch.zeros_like(v[name]) if part is None else part for name, part in found.items()}

        return Symmetric(product, like)

    def mixed(self, x: Tree) -> dict[str, Tensor | None]:
        """Bᵀx, shaped as λ; ``None`` for a hyperparameter that F does not depend on."""
        return self.vjp(x, self.leaves)


def pulled_back(outputs: Tree, v: Tree, inputs: Tree, *, batched: bool) -> dict[str, Tensor | None]:
    """vᵀ ∂outputs/∂inputs through a graph that is kept; ``batched``: R products in one vmapped pass."""
    products = torch.autograd.grad(
        list(outputs.values()),
        list(inputs.values()),
        list(v.values()),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return dict(zip(inputs, products, strict=True))


class Curvature(ABC):
    """A strategy for A: a frozen dataclass that makes the operator from the graph of F."""

    @abstractmethod
    def __call__(self, graph: StationarityGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""


@dataclass(frozen=True, kw_only=True)
class Exact(Curvature):
    """The exact curvature: A = ∂F/∂w by double backward through one cached graph.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def __call__(self, graph: StationarityGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""
        return graph.jacobian()


@dataclass(frozen=True, kw_only=True)
class GaussNewton(Curvature):
    """The Gauss-Newton curvature of the criterion plus the exact Hessian of the penalty: A = Jᵀ (∂²c/∂z²) J + ∂²penalty/∂w².

    J = ∂z/∂w is the derivative of the model's output. Positive semidefinite where the criterion is convex in z and the
    penalty in w, however curved the model is. Products go through cached graphs: J v by a double backward pass, the
    criterion's Hessian on z alone, Jᵀ by one more backward pass; no output Hessian is formed.

    Raises:
        ValueError: when called, the training loss is no :class:`CompositeLoss`.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

    def __call__(self, graph: StationarityGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""
        if graph.parts is None:
            raise ValueError(
                "GaussNewton needs a training loss that shows its parts: build it as hoptim.CompositeLoss(predict, "
                "criterion, penalty), or take hoptim.Exact()"
            )
        weights, parts = graph.weights, graph.parts
        like = {name: value.detach() for name, value in weights.items()}
        z = {"z": parts.z}
        at = {"z": parts.z.detach().requires_grad_()}
        slope = {"z": _gradient(parts.criterion(at["z"]), at)["z"]}
        u = {"z": torch.zeros_like(parts.z).requires_grad_()}  # Jᵀu is linear in u, so that its derivative along v is J v
        pulled = _present(_graph_of(z, u, weights))
        penalty = _present({}) if parts.penalty is None else _penalty_gradient(parts.penalty, weights)

        def product(v: Tree) -> Tree:
            name, value = next(iter(v.items()))
            batched = value.ndim > like[name].ndim
            found = {name: torch.zeros_like(value) for name, value in v.items()}
            if pulled and slope["z"].requires_grad:
                Jv = pulled_back(pulled, {name: v[name] for name in pulled}, u, batched=batched)["z"]
                HJv = None if Jv is None else pulled_back(slope, {"z": Jv}, at, batched=batched)["z"]
                if HJv is not None:
                    found |= _present(pulled_back(z, {"z": HJv}, weights, batched=batched))
            if penalty:
                second = _present(pulled_back(penalty, {name: v[name] for name in penalty}, weights, batched=batched))
                found |= {name: found[name] + part for name, part in second.items()}
            return found

        return Symmetric(product, like)


def _gradient(value: Tensor, inputs: Tree) -> Tree:
    return dict(zip(inputs, torch.autograd.grad(value, list(inputs.values()), create_graph=True), strict=True))


def _graph_of(outputs: Tree, v: Tree, inputs: Tree) -> dict[str, Tensor | None]:
    """vᵀ ∂outputs/∂inputs, as a function of v."""
    found = torch.autograd.grad(
        list(outputs.values()), list(inputs.values()), list(v.values()), create_graph=True, allow_unused=True
    )
    return dict(zip(inputs, found, strict=True))


def _penalty_gradient(penalty: Tensor, weights: Tree) -> Tree:
    """∂penalty/∂w with its graph, where it depends on a weight."""
    if not penalty.requires_grad:
        return {}
    found = torch.autograd.grad(penalty, list(weights.values()), create_graph=True, allow_unused=True)
    return {name: part for name, part in _present(dict(zip(weights, found, strict=True))).items() if part.requires_grad}


def _present(found: dict[str, Tensor | None]) -> Tree:
    return {name: part for name, part in found.items() if part is not None}
