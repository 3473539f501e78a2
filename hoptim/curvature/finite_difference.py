"""A curvature that needs first derivatives alone: central differences of gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.checks import is_finite
from hoptim.curvature.linearization import Curvature, Draw, Linearization, check_dense
from hoptim.linalg import dicts, vectors
from hoptim.linalg.operators import Symmetric
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.problem.live import LiveAt, Move
from hoptim.problem.problem import At, as_leaves
from hoptim.problem.random_stream import set_generators

Difference = tuple[OptionalTensors, OptionalTensors]  # (∂F/∂w v, ∂F/∂λᵀ v)
APART = 4.0  # from one step to the next that is tried
AGREE, TELL = 0.01, 6.0  # how far apart two of them may be for the smaller to be taken; and for no warning, as a multiple
HALF = 1e-4  # in half precision, with a rounding error above this, no other step is good enough to check Bᵀx
LARGER = 3  # how many larger steps are tried


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Curvature):
    """Central differences of gradients: A v = (∇L_T(w + εv) − ∇L_T(w − εv)) / 2ε, and Bᵀx likewise. No double backward.

    For models without second derivatives in torch. A product costs two gradients; each starts from the same random state, so
    that dropout masks agree.

    The error has two parts: one of the loss's third derivative, which grows as the square of the step, and one of rounding,
    which grows as the step falls. Where their sum is least depends on the model. So the first difference of each
    hypergradient is compared with one over a quarter of the step. Within 1 % the quarter is used for all products. Else
    smaller steps are tried, and then larger ones, until two agree. If none do, those that agree best are used, and if they
    are more than 6 % apart, as at the kinks of a ReLU, a warning says so, once for each problem. Bᵀx is compared with
    one over four times the step, for each hyperparameter by itself. In half precision both percentages are more, and Bᵀx is
    not checked.

    Args:
        step: the length of εv relative to that of w, > 0, which is used as it is; ``None``, the default, to choose it: it is
            tried first at a quarter of the cube root of the rounding error, 1.2e-3 in float32.

    Raises:
        ValueError: ``step`` is not positive.

    Source: Liu, Simonyan and Yang 2019 (arXiv 1806.09055), equation 8; the cube root: Nocedal and Wright, section 8.1.

    >>> FiniteDifference(step=1e-3)
    FiniteDifference(step=0.001)
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not (is_finite(self.step) and self.step > 0):
            raise ValueError(f"step={self.step!r}: give a positive number, or None to choose it")

    @property
    def is_first_order(self) -> bool:
        """Whether first derivatives are enough for it: yes."""
        return True

    @contextmanager
    def linearize(self, at: At, batch: Any, draw: Draw | None = None) -> Iterator[Linearization]:
        """F; each product evaluates two gradients at other weights."""
        yield self._linearized(at, batch)

    def _linearized(self, at: At, batch: Any) -> Linearization:
        states = at.problem.generators()  # saved here, since drawing a batch between products would change the masks
        loss, gradient, _ = gradients(at, batch)
        touched = dicts.present(gradient)
        layout = Layout.of({name: at.weights[name] for name in touched})
        norm = at.norm(layout)
        length = norm(layout.flatten(at.weights).detach())
        size = torch.where(length > 0, length, 1.0)
        chosen, rounding = self.step, at.problem.rounding(weight.dtype for weight in at.weights.values())

        def quotient(step: float, v: Tensor) -> Difference:
            """The difference over a step of this length relative to w."""
            along = norm(v)
            epsilon = size * step / torch.where(along > 0, along, 1.0)
            (up, up_leaves), (down, down_leaves) = (
                gradients(at, batch, Move(layout.views(v), step), states)[1:] for step in (epsilon, -epsilon)
            )
            return _quotient(up, down, 2 * epsilon), _quotient(up_leaves, down_leaves, 2 * epsilon)

        def difference(v: Tensor, part: int) -> OptionalTensors:
            """One part of a difference; the first one chooses the step."""
            nonlocal chosen
            if chosen is not None:
                return quotient(chosen, v)[part]
            within = max(AGREE, rounding ** (2 / 3))
            chosen, found, apart = _best_step(
                lambda step: quotient(step, v)[part],
                dicts.norm if part else lambda x: norm(layout.flatten(x)),
                first_step(rounding),
                50 * rounding,
                within,
            )
            tell("the products differ", apart, within)
            return found

        def tell(words: str, apart: float, within: float) -> None:
            if apart > TELL * within and "steps" not in at.problem.checked:
                at.problem.checked.add("steps")
                warnings.warn(
                    f"FiniteDifference: over steps of about {chosen:.1g} times the length of the weights {words} by "
                    f"{apart:.0%} from one step to the next, for rounding or for kinks such as those of ReLU. Compute in "
                    "float64, or give a step=..., or take curvature=hoptim.Exact() if autograd knows the second derivatives",
                    stacklevel=2,
                )

        def product(v: Tensor) -> Tensor:
            return torch.stack([product_one(row) for row in v]) if v.ndim > 1 else product_one(v)

        def product_one(v: Tensor) -> Tensor:  # a call of itself would keep the weights in memory
            return layout.flatten(difference(v, 0))

        def mixed(x: Tensor) -> OptionalTensors:
            return dicts.stack([mixed_one(row) for row in x]) if x.ndim > 1 else mixed_one(x)

        def mixed_one(x: Tensor) -> OptionalTensors:
            found = difference(x, 1)
            if self.step is None and chosen is not None and rounding < HALF:  # checked too, since it is the answer
                name, apart = _farthest(found, quotient(chosen * APART, x)[1])
                tell(f"the derivative in {name!r} differs", apart, AGREE)
            return found

        return Linearization(
            loss=loss,
            layout=layout,
            value=layout.flatten(touched),
            A=Symmetric(product, like=layout),
            mixed=mixed,
            untouched=tuple(name for name in gradient if name not in touched),
            is_on_shards=isinstance(at, LiveAt),
        )


def first_step(rounding: float) -> float:
    """The step that is tried first, relative to the length of the weights, for losses with this relative rounding error.

    It is not less than 100 rounding errors, so that in half precision it is the cube root itself.

    >>> [f"{first_step(torch.finfo(dtype).eps):.1g}" for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    ['2e-06', '0.001', '0.2']
    """
    root: float = rounding ** (1 / 3)
    return max(root / APART, min(100 * rounding, root))


def _best_step(
    at: Callable[[float], OptionalTensors],
    norm: Callable[[Tensors], Tensor],
    first: float,
    shortest: float,
    within: float,
) -> tuple[float, OptionalTensors, float]:
    """The best step from ``first`` on, its difference, and how far this is from that of another step, by this norm."""
    seen: dict[int, OptionalTensors] = {}

    def found(k: int) -> OptionalTensors:
        if k not in seen:
            seen[k] = at(first * APART**k)
        return seen[k]

    def apart(k: int) -> float:
        large, small = dicts.present(found(k)), dicts.present(found(k - 1))
        if not large:
            return 0.0
        length = norm(large)
        return float(norm({name: t - small[name] for name, t in large.items()}) / torch.where(length > 0, length, 1.0))

    smaller = math.floor(math.log(first / shortest, APART))
    best, least = 0, apart(0)
    for k in (*range(-1, -smaller - 1, -1), *range(1, LARGER + 1)):
        if not least > within:
            break
        if (error := apart(k)) < least:
            best, least = k, error
    agreed = least <= within and first * APART ** (best - 1) >= shortest
    used = best - 1 if agreed else best  # of two that agree the smaller is the better one, unless it is lost in rounding
    return first * APART**used, found(used), least if math.isfinite(least) else 0.0


def _farthest(found: OptionalTensors, other: OptionalTensors) -> tuple[str, float]:
    """The name whose tensors differ most, relative to their length, or to a thousandth of that of all if this is longer."""
    one, two = dicts.present(found), dicts.present(other)
    if not one:
        return "", 0.0
    least = 1e-3 * dicts.norm(one)
    sizes = {name: torch.maximum(vectors.norm(t.detach().reshape(-1)), least) for name, t in one.items()}
    apart = {name: float((one[name] - two[name]).norm() / size) if size > 0 else 0.0 for name, size in sizes.items()}
    name = max(apart, key=lambda name: apart[name])
    return name, apart[name] if math.isfinite(apart[name]) else 0.0


def gradients(
    at: At, batch: Any, move: Move | None = None, states: Tensors | None = None
) -> tuple[Tensor, OptionalTensors, OptionalTensors]:
    """L_T, ∂L_T/∂w and ∂L_T/∂λ at w or a move from it, with these states of random generators.

    The states do not change; by default they are the present ones. Of a sharded model that runs as it trains, the
    derivatives are means over the ranks.
    """
    if isinstance(at, LiveAt):
        loss, by_weight, by_leaf = at.gradients("train_loss", batch, move, states)
        return loss, by_weight, at.problem.ranks.mean_of_found(by_leaf, at.leaves)
    w, leaves = as_leaves(at.weights if move is None else move.of(at.weights)), as_leaves(at.leaves)
    with at.problem.leave_no_trace():
        set_generators(states or {})
        with at.problem.at(w, leaves) as there, there.loss("train_loss", batch) as (loss, *_):
            grads = torch.autograd.grad(loss, [*w.values(), *leaves.values()], allow_unused=True)
    by_weight, by_leaf = dict(zip(w, grads[: len(w)], strict=True)), dict(zip(leaves, grads[len(w) :], strict=True))
    check_dense(by_weight)
    return loss.detach(), by_weight, by_leaf


def _quotient(up: OptionalTensors, down: OptionalTensors, width: Tensor) -> OptionalTensors:
    """(up − down) / width, ``None`` where one is missing. It empties the two, since they may be as large as the model."""
    pairs = ((name, up.pop(name), down.pop(name)) for name in list(up))
    return {name: None if high is None or low is None else (high - low) / width for name, high, low in pairs}
