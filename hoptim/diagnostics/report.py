"""The results of an audit, as a table, a dict or a picture, with advice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hoptim.linalg.lanczos import Ritz
from hoptim.solvers.solution import Status

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Compared:
    """This hypergradient compared with another one: their cosine, and ‖this‖ / ‖other‖."""

    other: str
    cosine: float
    length: float


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The slope of the validation loss along one direction of hyperparameters: predicted, and measured by retraining."""

    name: str
    predicted: float
    measured: float
    noise: float

    @property
    def verdict(self) -> str:
        """What retraining says about the prediction."""
        if not math.isfinite(self.measured):
            return "diverges"
        if self.measured == 0 and self.predicted:
            return "does not move"
        if abs(self.measured) <= 2 * self.noise:
            return "lost in noise"
        if self.predicted * self.measured <= 0:
            return "opposite sign"
        ratio = self.predicted / self.measured
        return "agrees" if 0.5 <= ratio <= 2 else f"same sign, {ratio:.2g} times as long"


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The ends of A's spectrum by Lanczos, and the share of its eigenvalues below zero."""

    lowest: float
    highest: float
    negative_share: float

    @classmethod
    def of(cls, ritz: Ritz) -> Spectrum:
        """From Ritz values."""
        return cls(lowest=ritz.lowest, highest=ritz.highest, negative_share=ritz.negative_share)


@dataclass(frozen=True, kw_only=True)
class ErrorBound:
    """How far the hypergradient can be from the exact one, relative to its own length.

    ``solve``: ‖B‖·‖r‖ / (μ·‖h‖) for the residual r of x, where A ⪰ μI; ``inner``: the change of h over one Newton step to
    the stationary point, ‖h(w − A⁻¹∇L_T) − h(w)‖ / ‖h‖, an estimate; ``mu`` is ``known`` if it is the damping, else
    it is the lowest Ritz value, which is not below the lowest eigenvalue.
    """

    mu: float
    known: bool
    solve: float
    inner: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Is this hypergradient right, on this model? The results of :func:`audit`.

    Attributes:
        method: the method audited.
        status: how its solve ended; ``detail`` has the figures.
        gradient_norm: ‖F‖, by default ‖∇_w L_T‖: zero at points where the formula is exact.
        distance: the length of a Newton step to the stationary point, relative to ‖w‖; ``None`` if its solve failed.
        spectrum: the ends of A's spectrum; ``None`` for an A that is not symmetric.
        residuals: relative residuals, one for each product.
        compared: comparisons with a much longer solve and with unrolling.
        directions: slopes along directions in hyperparameter space, predicted and by retraining.
        standard_error: of the hypergradient over chunks of the validation batch, relative to its length; ``None`` if it
            can't be split.
        bound: how far it can be from the exact one; ``None`` if the curvature is not positive definite.
        product_cost: the time of a product relative to that of a training gradient.
        cost: the whole hypergradient, in training gradients.
        path: (products, residual, cosine to the longer solve) for fewer terms.
        missing: what could not be measured, and why.
        advice: what to change; empty if nothing is wrong.
    """

    method: str
    status: Status
    detail: str
    gradient_norm: float
    distance: float | None
    spectrum: Spectrum | None
    residuals: tuple[float, ...]
    compared: tuple[Compared, ...]
    directions: tuple[Direction, ...]
    standard_error: float | None
    bound: ErrorBound | None
    product_cost: float
    cost: float
    path: tuple[tuple[int, float, float], ...]
    missing: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All results as plain values, for JSON."""
        return {**asdict(self), "status": self.status.name}

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"Audit of {self.method}", title_justify="left")
        table.add_column("question")
        table.add_column("answer", justify="right")
        table.add_column("what it means")
        for row in _rows(self):
            table.add_row(*row)
        for line in self.missing:
            table.add_row("not measured", "", line)
        for number, line in enumerate(self.advice, 1):
            table.add_row(f"advice {number}", "", line, style="bold")
        if not self.advice:
            table.add_row("advice", "", "nothing to change", style="bold")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()

    def plot(self, path: str | Path) -> None:
        """Write a picture: residual and cosine to the longer solve against products. It needs the extra ``plots``."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.semilogy(range(1, len(self.residuals) + 1), self.residuals, marker=".")
        left.set(xlabel="products", ylabel="relative residual", title=f"{self.method}", xlim=(0, None))
        left.title.set_fontsize(8)
        if self.path:
            products, _, cosines = zip(*self.path, strict=True)
            right.plot(products, cosines, marker="o")
        right.axhline(1, color="0.7", linewidth=0.8)
        right.set(xlabel="products", ylabel="cosine to the longer solve", ylim=(None, 1.05))
        figure.savefig(path, dpi=150)


def brief(strategy: Any) -> str:
    """A strategy as one would write it, without options that have their default or are not for showing.

    >>> from hoptim import CG, Implicit
    >>> brief(Implicit(CG(terms=5), damping=0.1))
    'Implicit(solver=CG(terms=5), damping=0.1)'
    """
    if not is_dataclass(strategy) or isinstance(strategy, type):
        return repr(strategy)
    shown = []
    for option in fields(strategy):
        value = getattr(strategy, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if option.repr and value != default:
            shown.append(f"{option.name}={brief(value)}")
    return f"{type(strategy).__name__}({', '.join(shown)})"


def _rows(found: Audit) -> Iterator[tuple[str, str, str]]:
    """The table's rows: question, figure, meaning."""
    yield "how did the solve end?", found.status.name, found.detail or found.status.message
    yield "how stationary is the training loss?", f"{found.gradient_norm:.2e}", "‖∇L_T‖: zero where the formula is exact"
    if found.distance is not None:
        yield "  a Newton step to the stationary point", f"{found.distance:.1%}", "of ‖w‖"
    if found.spectrum is not None:
        ends = f"{found.spectrum.lowest:.2e} … {found.spectrum.highest:.2e}"
        yield "the curvature's spectrum", ends, f"{found.spectrum.negative_share:.1%} of it negative"
    if found.residuals:
        yield "residual after the last product", f"{found.residuals[-1]:.2e}", f"{len(found.residuals)} products"
    for one in found.compared:
        yield f"beside {one.other}", f"cosine {one.cosine:.3f}", f"{one.length:.2f} of its length"
    for line in found.directions:
        measured = f"{line.measured:+.2e} ± {line.noise:.0e} by retraining: {line.verdict}"
        yield f"slope along {line.name}", f"{line.predicted:+.2e}", measured
    if found.standard_error is not None:
        yield "standard error over the validation batch", f"{found.standard_error:.2f}", "of its own length"
    if found.bound is not None:
        kind = "known" if found.bound.known else "estimated"
        means = f"of its length, with {kind} μ = {found.bound.mu:.1e}; {found.bound.inner:.2g} for not being stationary"
        yield "error of the solve at most", f"{found.bound.solve:.2g}", means
    yield "cost of a product", f"{found.product_cost:.2f}", "training gradients"
    yield "cost of the hypergradient", f"{found.cost:.1f}", "training gradients"
