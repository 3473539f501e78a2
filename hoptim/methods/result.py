"""Hypergradient: the result of a method, assembled from its direct and its indirect term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hoptim.linalg import dicts
from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.methods.learned_options import LearnedOption
from hoptim.methods.validation_loss import Validation
from hoptim.problem.mixed_precision import full_precision
from hoptim.solvers.solution import Solution, Status


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """A hypergradient, its two terms and the solve behind it.

    After a failed solve all of ``indirect`` and ``grads`` is NaN, so that nobody takes them for an answer. If the
    validation loss returned R losses, ``val_loss`` has shape (R,), and the three dicts have a leading axis of R.

    Attributes:
        grads: dL_V/dλ = direct + indirect, by the names of ``hparams.named_parameters()``: with respect to the leaves.
        direct: ∂L_V/∂λ; a view of a single zero if the validation loss does not depend on a hyperparameter.
        indirect: −Bᵀx; the same tensor as in ``grads`` if the validation loss does not depend on a hyperparameter.
        solution: x by the names of the weights, its status and its residuals.
        val_loss: L_V, on the device.
        train_loss: L_T, a scalar on the device.
        gradient_norm: ‖F‖, for ``Gradient`` ‖∇_w L_T + c ⊙ w‖ with the inner optimizer's own decay c, a scalar on the
            device: zero where the formula is exact.
        untouched: the hyperparameters that neither loss depends on with these batches; their gradient is zero.
    """

    grads: Tensors
    direct: Tensors
    indirect: Tensors
    solution: Solution
    val_loss: Tensor
    train_loss: Tensor
    gradient_norm: Tensor
    untouched: tuple[str, ...] = ()

    def check_touched(self, learned: Sequence[LearnedOption] = (), *, sees_options: bool = False) -> None:
        """Raise ``ValueError`` if neither loss depends on a hyperparameter.

        Args:
            learned: the learned options of the inner optimizer.
            sees_options: whether the method sees them; then a learned option may have had no effect so far.
        """
        untouched = [name for name in self.untouched if not sees_options or name not in {option.name for option in learned}]
        for option in learned:
            if option.name in untouched:
                raise ValueError(
                    f"hyperparameter {option.name!r} is the inner optimizer's {option.key}, on which the training gradient "
                    "does not depend: with the condition Gradient(), Implicit does not see it. Take hoptim.Unrolled(20), or "
                    "on a trained model hoptim.Implicit(condition=hoptim.Update())"
                )
        if untouched:
            raise ValueError(
                f"hyperparameters {untouched} are touched by neither loss: the training loss's gradient and the "
                'validation loss do not depend on them. Use hparams["name"] in a loss, without detach(), and a recipe in '
                "training mode, or drop them. An option of the inner optimizer, such as a learning rate, is seen by "
                "hoptim.Unrolled(20), or on a trained model by hoptim.Implicit(condition=hoptim.Update()), given "
                "inner=optimizer"
            )

    def combined(self, weights: Sequence[float] | None = None) -> Tensors:
        """One gradient for the outer optimizer: Σ_r weights[r] · grads[r], by default the mean; ``grads`` for a single loss.

        Raises:
            ValueError: there are not as many weights as validation losses.
        """
        return self.mixed_by(weights, self.grads)

    def mixed_by(self, weights: Sequence[float] | None, tree: Tensors) -> Tensors:
        """Σ_r weights[r] · tree[r] of ``grads``, ``direct`` or ``indirect``, or of ``{"": val_loss}``."""
        if not self.val_loss.ndim:
            if weights is not None:
                raise ValueError("val_weights are given, but the validation loss is a single one: return a vector of losses")
            return tree
        losses = len(self.val_loss)
        if weights is not None and len(weights) != losses:
            raise ValueError(f"{len(weights)} val_weights for {losses} validation losses: give one a loss")
        share = self.val_loss.new_tensor([1 / losses] * losses if weights is None else list(weights))
        with full_precision():
            return {name: torch.tensordot(share.to(value), value, dims=1) for name, value in tree.items()}


class Terms(NamedTuple):
    """What a method computes.

    Attributes:
        validation: L_V and its derivatives.
        indirect: −Bᵀx by the names of the leaves; ``None`` for one that F does not depend on.
        solution: x by name, and how the solve ended.
        train_loss: L_T.
        gradient_norm: ‖F‖, the length of the condition's value.
    """

    validation: Validation
    indirect: OptionalTensors
    solution: Solution
    train_loss: Tensor
    gradient_norm: Tensor


def assemble(terms: Terms, leaves: Tensors) -> Hypergradient:
    """∂L_V/∂λ + the indirect term, where ``None`` counts as zero; all NaN if something failed."""
    validation, indirect, solution, train_loss, gradient_norm = terms
    direct = {name: _whole(validation.direct[name], leaf, validation.loss) for name, leaf in leaves.items()}
    through = {name: _whole(indirect[name], leaf, validation.loss) for name, leaf in leaves.items()}
    grads = {name: part if validation.direct[name] is None else direct[name] + part for name, part in through.items()}
    result = Hypergradient(
        grads=grads,
        direct=direct,
        indirect=through,
        solution=solution,
        val_loss=validation.loss,
        train_loss=train_loss,
        gradient_norm=gradient_norm,
        untouched=tuple(name for name in leaves if validation.direct[name] is None and indirect[name] is None),
    )
    return _failed_if_not_finite(result)


def _whole(found: Tensor | None, leaf: Tensor, loss: Tensor) -> Tensor:
    """The derivative in the type of the leaf, or zeros, a view of a single one, with the leading axis of the losses."""
    return leaf.new_zeros(()).expand((*loss.shape, *leaf.shape)) if found is None else found.detach().to(leaf)


def _failed_if_not_finite(result: Hypergradient) -> Hypergradient:
    """The result, as a failure if a loss, F or the hypergradient is not finite. The host reads once."""
    device = result.train_loss.device  # hyperparameters may live on another one
    figures = (result.val_loss.sum(), result.train_loss, result.gradient_norm, dicts.norm(result.grads))
    val_loss, train_loss, F, grads = torch.stack([t.detach().to(device, torch.float64) for t in figures]).tolist()
    solution = result.solution
    more = f"; {solution.detail}" if "task " in solution.detail else ""  # the name of the one of many that failed
    if not math.isfinite(F):
        solution = replace(solution, status=Status.NON_FINITE_GRADIENT, detail=f"of the training loss{more}")
    for name, loss in (("validation", val_loss), ("training", train_loss)):
        if not math.isfinite(loss):
            solution = replace(solution, status=Status.NON_FINITE_LOSS, detail=f"the {name} loss is {loss}{more}")
    if solution.status.ok and not math.isfinite(grads):
        term = "indirect" if bool(dicts.norm(result.direct).isfinite()) else "direct"
        solution = replace(solution, status=Status.NON_FINITE_GRADIENT, detail=f"in the {term} term")
    if solution.status.ok:
        return result
    nan = {name: torch.full_like(value, math.nan) for name, value in result.direct.items()}
    return replace(result, grads=nan, indirect=nan, solution=replace(solution, state={}))
