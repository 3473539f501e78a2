"""EKFAC as a preconditioner: the curvature of linear layers and convolutions by Kronecker factors of small matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hoptim.checks import is_finite
from hoptim.linalg.operators import Operator, Root
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.methods.preconditioners import Preconditioner
from hoptim.problem.functional import restore_attributes

LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True, kw_only=True)
class EKFAC(Preconditioner):
    """D = Q (Λ + damping · mean Λ) Qᵀ for each layer, with Q = Q_G ⊗ Q_A.

    Q_A and Q_G are the eigenvectors of E[a aᵀ], with the layer's inputs a, and of E[g gᵀ], with the gradients g in its
    outputs for labels of the model. Λ is the diagonal of the Fisher matrix in the basis Q. All this costs two passes over
    ``batches``, with up to ``samples`` gradients of each. With ``Identity`` it is the whole solve, x = D⁻¹g, as influence
    functions take it; in front of MINRES or CG it makes the curvature of each layer alike.

    The layers are ``nn.Linear`` and ``nn.Conv2d``. Other weights, such as those of norms, have the mean of the layers'
    mean Λ. It is computed by curvlinops: in a checkout of hoptim, ``pip install '.[kfac]'``.

    Args:
        model: the model of the problem, from the inputs of a batch to the outputs that the criterion takes. It is in
            evaluation mode meanwhile.
        criterion: ``nn.CrossEntropyLoss()``, ``nn.MSELoss()`` or ``nn.BCEWithLogitsLoss()``, as in the training loss.
        batches: the training data, as batches (inputs, targets) that can be gone through several times.
        damping: relative to the mean of Λ in each layer, above 0, default 0.1.
        samples: how many labels are drawn for each example; default 10. If the model has no more outputs for an example,
            the mean over all labels is taken instead, which costs no more and has no noise.

    Raises:
        ImportError: curvlinops is missing.
        TypeError: when called, weights are sharded.
        ValueError: ``damping`` or ``samples`` is not positive; when called, no layer of the model holds weights of the
            problem, or the factors of several ranks differ: give the same batches to all.

    Source: George et al. 2018, Fast approximate natural gradient descent in a Kronecker-factored eigenbasis
    (arXiv 1806.03884); for influence, with this damping: Grosse et al. 2023 (arXiv 2308.03296), section 2.2.

    >>> EKFAC(model=nn.Linear(2, 1), criterion=nn.MSELoss(), batches=[(torch.ones(1, 2), torch.ones(1, 1))]).damping
    0.1
    """

    model: nn.Module
    criterion: nn.Module
    batches: Iterable[Any]
    damping: float = 0.1
    samples: int = 10

    def __post_init__(self) -> None:
        if not (is_finite(self.damping) and self.damping > 0):
            raise ValueError(f"damping={self.damping!r}: give a positive number, relative to a layer's mean eigenvalue")
        if not (isinstance(self.samples, int) and self.samples > 0):
            raise ValueError(f"samples={self.samples!r}: give how many labels are drawn for each example, such as 10")

    def __call__(self, A: Operator, weights: Tensors, inner: Optimizer | None) -> Root:
        """D^(−1/2) and its inverse."""
        from curvlinops import EKFACLinearOperator  # type: ignore[import-untyped]

        if any(hasattr(weight, "device_mesh") for weight in weights.values()):
            raise TypeError("EKFAC needs whole weights, and these are sharded over ranks: take Jacobi() or SecondMoments()")
        names = {weight.data_ptr(): name for name, weight in weights.items()}  # the model's may be others on the same memory
        layers = [part for part in self.model.modules() if isinstance(part, LAYERS)]
        held = {names[p.data_ptr()]: p for part in layers for p in part._parameters.values()
                if p is not None and p.data_ptr() in names}  # fmt: skip
        if not held:
            raise ValueError("no nn.Linear or nn.Conv2d of EKFAC's model holds weights of the problem: give its own model")
        with restore_attributes(list(self.model.modules())):
            self.model.eval()
            with torch.no_grad():
                few = next((self.model(x)[0].numel() <= self.samples for x, _ in self.batches), False)
            factors = EKFACLinearOperator(
                self.model, self.criterion, list(held.values()), self.batches, check_deterministic=False,
                fisher_type="type-2" if few else "mc", mc_samples=1 if few else self.samples,
            )  # fmt: skip
            factors._maybe_compute_ekfac()
        found = factors._corrected_eigenvalues
        every = torch.stack([values.mean() for layer in found.values() for values in layer.values()]).mean()
        damped = {
            layer: {k: values + self.damping * values.mean().clamp(min=1e-6 * every) for k, values in of_layer.items()}
            for layer, of_layer in found.items()
        }
        layout = Layout.of(weights)

        def power(exponent: float) -> Any:
            raised = copy.copy(factors)
            raised._corrected_eigenvalues = {
                layer: {k: values**exponent for k, values in of_layer.items()} for layer, of_layer in damped.items()
            }
            rest = ((1 + self.damping) * every) ** exponent

            def product(v: Tensor) -> Tensor:
                flat = v.reshape(-1, layout.size)
                rows = layout.unflatten(flat)
                columns = raised._matmat([rows[name].movedim(0, -1).contiguous() for name in held])
                own = dict(zip(held, (column.movedim(-1, 0) for column in columns), strict=True))
                others = {name: rest * t for name, t in rows.items() if name not in own}
                return layout.flatten({**own, **others}, (len(flat),)).view_as(v)

            return product

        return Root(power(-0.5), power(0.5), like=A)
