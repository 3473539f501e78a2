"""The hypergradients of all folds at once, from their stacked models, by ``torch.func.vmap``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap
from torch.utils import _pytree as pytree

from hoptim.curvature.exact import Exact
from hoptim.curvature.linearization import as_leaves
from hoptim.linalg import trees
from hoptim.linalg.operators import Symmetric
from hoptim.linalg.vectors import Layout, Tree
from hoptim.linalg.vjp import VJP
from hoptim.methods.conditions import Gradient
from hoptim.methods.implicit import Implicit
from hoptim.methods.result import Hypergradient, assemble
from hoptim.methods.validation_loss import Validation, validate
from hoptim.problem.data import MicroBatches
from hoptim.problem.functional import restore_attributes
from hoptim.problem.problem import LossName, Problem
from hoptim.solvers.cg import CG
from hoptim.solvers.identity import Identity
from hoptim.solvers.minres import MINRES
from hoptim.training.fold_optimizer import Drawn, FoldOptimizer

MOST_WEIGHTS = 40_000  # of a model: with more, or with convolutions, it is no faster (measured on one core)


class SideBySide:
    """The hypergradients of K folds at once.

    The weights are stacked to shape (K, …), and the hyperparameters expanded to it. Since no fold's loss depends on another
    fold's row, the rows of the gradient of the summed losses are the K gradients. So one graph serves the products with all
    K curvatures, and a solver of K right-hand sides solves the K systems, each with its own coefficients.

    If the models differ in more than their parameters, for example in a plain attribute, this would use that of the first.
    So the first time the folds are computed in turn as well, and from then on only in turn if the results differ.

    Args:
        optimizers: the optimizers of the folds.

    Attributes:
        is_possible: whether they can be computed at once, as far as is known.
        is_checked: whether a result was compared with the one in turn.
    """

    def __init__(self, optimizers: Sequence[FoldOptimizer]) -> None:
        self._optimizers, self._problems = optimizers, [optimizer.problem for optimizer in optimizers]
        self._was_told = self.is_checked = False
        self.is_possible = not self._tell(_reason(optimizers[0]))

    def __call__(self, drawn: Sequence[Drawn]) -> Hypergradient | None:
        """The hypergradients, with a leading axis of the folds; ``None`` if they have to be computed in turn."""
        for optimizer in self._optimizers:
            optimizer._context(None)  # for its checks
        batches = _stacked([one.train_batch for one in drawn])
        if batches is None:
            self._tell("their training batches are not tensors of the same shapes")
            return None
        try:
            with self._problems[0].untouched():
                found = self._at_once(drawn, batches)
        except Exception as error:  # an error of the losses themselves will come again in turn
            self.is_possible = False
            reason = str(error).strip().partition("\n")[0]
            self._tell(f"torch.func.vmap can't do the losses ({type(error).__name__}: {reason})")
            return None
        return found if found.solution.status.ok else None  # in turn, the record says which fold failed

    def checked(self, found: Hypergradient, in_turn: Hypergradient) -> Hypergradient:
        """``found``, at once, if it agrees with ``in_turn``; otherwise ``in_turn``, and no more at once from now on."""
        self.is_checked = True
        for name, expected in in_turn.grads.items():
            rows = expected.reshape(len(expected), -1)
            error = (found.grads[name].reshape(rows.shape) - rows).norm(dim=1)
            if bool((error > torch.finfo(rows.dtype).eps ** (1 / 3) * rows.norm(dim=1)).any()):
                self.is_possible = False
                self._tell(f"the hypergradient of {name!r} would differ by {float(error.max()):.3g}")
                return in_turn
        return found

    def _tell(self, reason: str) -> bool:
        if reason and not self._was_told:
            self._was_told = True
            warnings.warn(f"the folds' hypergradients are computed in turn, not side by side: {reason}", stacklevel=2)
        return bool(reason)

    def _at_once(self, drawn: Sequence[Drawn], batches: Any) -> Hypergradient:
        first, method, count = self._problems[0], self._optimizers[0].hypergradient, len(self._problems)
        assert isinstance(method, Implicit)
        parameters, _ = stack_module_state([problem.model for problem in self._problems])
        weights = {name: t for name, t in parameters.items() if t.requires_grad}
        leaves = {name: leaf.detach().expand(count, *leaf.shape).requires_grad_() for name, leaf in first.leaves().items()}
        validation = self._validate(drawn, parameters, weights, leaves)
        losses = _losses(first, "train_loss")(parameters, leaves, batches)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()), create_graph=True)
        F = dict(zip(weights, gradients, strict=True))
        curved = {name: t for name, t in F.items() if t.requires_grad}
        layout = Layout.of({name: t[0] for name, t in weights.items()})

        def flat(tree: Mapping[str, Tensor | None]) -> Tensor:
            return layout.flatten(tree, (count,))

        product = VJP(curved, weights)
        A = Symmetric(lambda v: flat(product(layout.unflatten(v))), like=torch.empty(layout.size).to(flat(F)))
        solution = method.chosen(first).solver.solve(A + method.damping, flat(validation.g))
        indirect = VJP(curved, leaves)(layout.unflatten(-solution.value))
        named = replace(solution, value=layout.views(solution.value), products=count * solution.products)
        found = assemble(validation, indirect, named, first.leaves(), losses.detach().mean(), flat(F).detach())
        return replace(found, gradient_norm=flat(F).detach().norm(dim=1).mean())

    def _validate(self, drawn: Sequence[Drawn], parameters: Tree, weights: Tree, leaves: Tree) -> Validation:
        """The validation losses and their derivatives; in turn if the validation batches differ in shape."""
        batches = _stacked([one.val_batch for one in drawn])
        if batches is not None:
            losses = _losses(self._problems[0], "val_loss")(parameters, leaves, batches)
            inputs = [*weights.values(), *leaves.values()]
            found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
            g = trees.filled(dict(zip(weights, found, strict=False)), weights)
            return Validation(loss=losses.detach(), g=g, direct=dict(zip(leaves, found[len(weights) :], strict=True)))
        each = [
            _validate_alone(
                problem, one.val_batch, *({name: t[row] for name, t in tree.items()} for tree in (weights, leaves))
            )
            for row, (problem, one) in enumerate(zip(self._problems, drawn, strict=True))
        ]
        return Validation(
            loss=torch.stack([one.loss for one in each]),
            g={name: torch.stack([one.g[name] for one in each]) for name in weights},
            direct=trees.stack([one.direct for one in each]),
        )


def _validate_alone(problem: Problem, batch: Any, weights: Tree, leaves: Tree) -> Validation:
    """The validation loss of one fold and its derivatives."""
    weights, leaves, before = as_leaves(weights), as_leaves(leaves), torch.get_rng_state()
    with problem.untouched():
        found = problem.call(weights, leaves, lambda: validate(problem, weights, leaves, batch))
        if not torch.equal(torch.get_rng_state(), before):
            raise ValueError("the validation loss draws random numbers")
    if found.loss.ndim:
        raise ValueError("val_loss is a vector of losses")
    return found


def _losses(problem: Problem, name: LossName) -> Callable[[Tree, Tree, Any], Tensor]:
    """The K losses of stacked weights, leaves and batches. Raises if they draw random numbers, which would be different."""

    def one(weights: Tree, leaves: Tree, batch: Any) -> Tensor:
        def inside() -> Tensor:
            with restore_attributes(list(problem.joint.modules())):
                loss = problem.call_loss(name, problem.model, problem.hparams, batch)[0]
            if loss.numel() != 1:
                raise ValueError(f"{name} is a vector of losses")
            return loss.reshape(())

        return problem.call(weights, leaves, inside)

    return vmap(one, randomness="error")


def _stacked(batches: Sequence[Any]) -> Any:
    """Stack batches, with a leading axis; ``None`` if they differ in structure or shape."""
    if any(isinstance(batch, MicroBatches) for batch in batches):
        return None
    flat, specs = zip(*[pytree.tree_flatten(batch) for batch in batches], strict=True)
    columns = list(zip(*flat, strict=True)) if all(spec == specs[0] for spec in specs) else []
    alike = [
        all(isinstance(t, Tensor) and (t.shape, t.dtype) == (column[0].shape, column[0].dtype) for t in column)
        for column in columns
    ]
    return pytree.tree_unflatten([torch.stack(column) for column in columns], specs[0]) if columns and all(alike) else None


def _reason(optimizer: FoldOptimizer) -> str:
    """Why the folds can't be computed at once, as far as is known beforehand; empty if they can."""
    problem, method = optimizer.problem, optimizer.hypergradient
    if not (isinstance(method, Implicit) and isinstance(method.condition, Gradient) and method.preconditioner is None):
        return "the method is not Implicit() with the condition Gradient() and no preconditioner"
    chosen = method.chosen(problem)
    if chosen.curvature != Exact() or type(chosen.solver) not in (MINRES, CG, Identity):
        return "the curvature is not Exact(), or the solver not MINRES, CG or Identity"
    if any(True for _ in problem.model.buffers()):
        return "the model has buffers, as those of batch norm"
    if any(isinstance(part, nn.modules.conv._ConvNd) for part in problem.model.modules()):
        return "the model has convolutions, which are no faster so"
    if (size := sum(w.numel() for w in problem.weights().values())) > MOST_WEIGHTS:
        return f"the model has {size:,} weights, and above {MOST_WEIGHTS:,} it is no faster"
    if optimizer.learned_options or problem.ranks.size > 1 or problem.wrapper is not problem.model:
        return "an option of the inner optimizer is learned, or the model is wrapped"
    return ""
