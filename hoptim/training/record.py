"""Record: what a hyperstep did, for the caller, for hooks and for logs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hoptim.linalg import dicts
from hoptim.linalg.vectors import Tensors
from hoptim.methods.result import Hypergradient
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import Status

FEW = 12  # a hyperparameter of at most so many numbers is logged and printed number by number
SAMPLE = 100_000  # the quantiles of a larger tensor are those of about so many of its numbers
QUANTILES = {"min": 0.0, "quantile_0.05": 0.05, "median": 0.5, "quantile_0.95": 0.95, "max": 1.0}


@dataclass(frozen=True, kw_only=True, repr=False)
class Record:
    """What one hyperstep did. Printed, it is one paragraph.

    Attributes:
        inner_step: inner steps taken before it.
        hyper_step: its number, from 1; failed ones count.
        moved: whether the outer optimizer moved the hyperparameters: true unless the solve failed.
        result: the hypergradient, with the solution behind it.
        hyperparameters: their natural values after the step, detached, by name.
        seconds: wall-clock time of the hyperstep.
        val_weights: the weights of several validation losses, also in the figures of ``row()``; ``None`` for the mean.
        last_gradient: the hypergradient of the last hyperstep that moved; empty for the first one.
    """

    inner_step: int
    hyper_step: int
    moved: bool
    result: Hypergradient
    hyperparameters: Tensors
    seconds: float
    val_weights: list[float] | None = None
    last_gradient: Tensors = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """How the solve ended."""
        return self.result.solution.status

    @property
    def cosine_to_last(self) -> float | None:
        """The cosine between this hypergradient and the one before, over the entries that are zero in neither.

        It is near 1 if they agree, near 0 if noise dominates, and ``None`` for the first one, for one that failed, and if
        there is no such entry, as for example weights if two batches have no example in common.
        """
        return cosine_in_common(self.result.combined(self.val_weights), self.last_gradient) if self.moved else None

    @property
    def failure(self) -> str:
        """What went wrong in a failed hyperstep, and what to do."""
        detail = self.result.solution.detail or "no detail"
        words = f"{self.status.name}: {self.status.message} ({detail})"
        return f"hyperstep {self.hyper_step} failed and moved nothing: {words}"

    def __repr__(self) -> str:
        """A paragraph: where the training was, how the solve ended, the losses and the hyperparameters."""
        row = self.row()
        facts = [f"residual {row['residual']:.2g}"] if row["residual"] is not None else []
        facts += [f"{row['products']} products", f"{self.seconds:.3g} s"]
        begin = f"Hyperstep {self.hyper_step} after {self.inner_step} inner steps: {self.status.name}, {', '.join(facts)}."
        losses = f"Training loss {loss_in_words(row['train_loss'])}, validation loss {loss_in_words(row['val_loss'])}."
        end = [] if self.moved else [f"It moved nothing: {self.status.message} ({row['detail'] or 'no detail'})."]
        return " ".join([begin, losses, f"Hyperparameters: {in_words(self.hyperparameters)}.", *end])

    def row(self) -> dict[str, Any]:
        """The figures and the :func:`values` of the hyperparameters, for a log; ``None`` if unknown or not finite."""
        result, solution = self.result, self.result.solution
        lengths = {
            f"{name}_norm": float(dicts.norm(result.mixed_by(self.val_weights, tree)))
            for name, tree in (("hypergradient", result.grads), ("direct", result.direct), ("indirect", result.indirect))
        }
        row = {
            "inner_step": self.inner_step,
            "hyper_step": self.hyper_step,
            "moved": self.moved,
            "status": solution.status.name,
            "detail": solution.detail,
            "residual": float(solution.residuals[-1].amax()) if len(solution.residuals) else None,
            "step_size": solution.step_size,
            "products": solution.products,
            "val_loss": float(result.mixed_by(self.val_weights, {"": result.val_loss})[""]),
            "train_loss": float(result.train_loss),
            "train_gradient_norm": float(result.gradient_norm),
            **lengths,
            "cosine_to_last": self.cosine_to_last,
            "standard_error": standard_error(result, self.val_weights),
            "hyper_seconds": self.seconds,
            **values(self.hyperparameters),
        }
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def values(hyperparameters: Tensors) -> dict[str, float]:
    """Hyperparameters as flat figures: each number of a small tensor; mean and five quantiles of one with more than twelve.

    >>> values({"decay": torch.tensor(0.5), "mix": torch.tensor([0.25, 0.75])})
    {'hyperparameters/decay': 0.5, 'hyperparameters/mix/0': 0.25, 'hyperparameters/mix/1': 0.75}
    >>> list(values({"w": torch.arange(101.0)}).values())
    [50.0, 0.0, 5.0, 50.0, 95.0, 100.0]
    """
    found: dict[str, float] = {}
    for name, value in hyperparameters.items():
        flat, key = value.detach().flatten().cpu(), f"hyperparameters/{name}"
        if len(flat) == 1:
            found[key] = flat.item()
        elif len(flat) <= FEW:
            found |= {f"{key}/{place}": number for place, number in enumerate(flat.tolist())}
        else:
            some = flat[:: max(1, len(flat) // SAMPLE)].sort().values
            figures = {"mean": flat.double().mean().item()}
            figures |= {label: some[round(q * (len(some) - 1))].item() for label, q in QUANTILES.items()}
            figures |= {"min": flat.min().item(), "max": flat.max().item()}  # these are not of a sample
            found |= {f"{key}/{label}": figure for label, figure in figures.items()}
    return found


def in_words(hyperparameters: Tensors) -> str:
    """The values of hyperparameters for people: the first twelve tensors, the large ones by their mean and range.

    >>> in_words({"decay": torch.tensor([0.5]), "mix": torch.tensor([0.25, 0.75]), "w": torch.arange(101.0)})
    'decay 0.5, mix (0.25, 0.75), w of 101: mean 50, 0 to 100'
    """
    words = []
    for name, value in list(hyperparameters.items())[:FEW]:
        flat = value.detach().flatten().cpu().double()
        if len(flat) > FEW:
            mean, low, high = (float(each) for each in (flat.mean(), flat.min(), flat.max()))
            words.append(f"{name} of {len(flat):,}: mean {mean:.4g}, {low:.4g} to {high:.4g}")
        else:
            numbers = ", ".join(f"{number:.4g}" for number in flat.tolist())
            words.append(f"{name} {numbers}" if len(flat) == 1 else f"{name} ({numbers})")
    left = len(hyperparameters) - FEW
    return ", ".join(words + [f"and {left} more"] * (left > 0))


def loss_in_words(loss: float | None) -> str:
    """A loss of a row, which has ``None`` for one that is not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def cosine(a: Tensors, b: Tensors) -> float:
    """⟨a, b⟩ / (‖a‖ ‖b‖); zero if one of them is zero."""
    lengths = dicts.norm(a) * dicts.norm(b)
    return float(dicts.dot(a, b) / torch.where(lengths == 0, 1.0, lengths))


def cosine_in_common(a: Tensors, b: Tensors) -> float | None:
    """The cosine over the entries that are zero neither in ``a`` nor in ``b``; ``None`` without any, or for other shapes.

    >>> cosine_in_common({"x": torch.tensor([3.0, 4.0, 0.0])}, {"x": torch.tensor([6.0, 8.0, 9.0])})
    1.0
    >>> cosine_in_common({"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 1.0])}) is None
    True
    """
    if {name: value.shape for name, value in a.items()} != {name: value.shape for name, value in b.items()}:
        return None
    b = {name: value.to(a[name]) for name, value in b.items()}
    both = {name: (value != 0) & (b[name] != 0) for name, value in a.items()}
    if not any(bool(mask.any()) for mask in both.values()):
        return None
    return cosine(*({name: each[name] * mask for name, mask in both.items()} for each in (a, b)))


def standard_error(result: Hypergradient, weights: Sequence[float] | None = None) -> float | None:
    """√Var(h) / ‖h‖ of h = Σ_r w_r h_r, for the hypergradients h_r of R validation losses; ``None`` for a single one.

    The R losses, such as those of batches, folds or groups, are taken as independent draws of the same mean and variance σ²:

        Var(Σ_r w_r h_r) = σ² Σ_r w_r²,    σ² ≈ Σ_r ‖h_r − h̄‖² / (R − 1),    h̄ = Σ_r h_r / R.

    For the mean of the losses √Var(h) = σ/√R.

    Args:
        result: a hypergradient.
        weights: w_r; default 1/R.
    """
    if not result.val_loss.ndim or len(result.val_loss) < 2:
        return None
    count, total, mean = len(result.val_loss), result.combined(weights), result.combined()
    squares = 1 / count if weights is None else sum(weight**2 for weight in weights)
    spread = torch.stack([(each - mean[name]).square().sum() for name, each in result.grads.items()]).sum()
    return float((spread / (count - 1) * squares).sqrt() / dicts.norm(total))


def natural_values(problem: Problem) -> Tensors:
    """Copies of the natural values of every :class:`HyperParameters` in ``hparams``, and of the other parameters in it."""
    with torch.no_grad():
        values = problem.leaves()
        for path, module in problem.hparams.named_modules():
            if isinstance(module, HyperParameters):
                values |= {f"{path}.{name}".lstrip("."): module[name] for name in module}
        return {name: t.detach().clone() if isinstance(t, nn.Parameter) else t for name, t in values.items()}
