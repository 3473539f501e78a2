"""The problems that the tests share: dense operators, ridge regression, a small MLP, a model with dropout and BatchNorm."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import hoptim
from hoptim.linalg.operators import Symmetric

Tensors = dict[str, Tensor]

# Vectors ------------------------------------------------------------------------------------------------------------

SHAPES = {"layer.weight": (3, 2), "bias": (4,), "gain": (1,)}
SIZE = 11


def like(dtype: torch.dtype | None = None) -> Tensors:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def flat(tree: Tensors, lead: tuple[int, ...] = ()) -> Tensor:
    """The dict as one vector, or as a matrix of R rows."""
    return torch.cat([value.reshape(*lead, -1) for value in tree.values()], dim=-1)


def unflat(vector: Tensor, shapes: Tensors) -> Tensors:
    """The inverse of ``flat``; what stands before the last axis stays."""
    parts = vector.split([value.numel() for value in shapes.values()], dim=-1)
    return {
        name: part.reshape((*vector.shape[:-1], *value.shape))
        for (name, value), part in zip(shapes.items(), parts, strict=True)
    }


def loss_at(problem: hoptim.Problem, name: Any, weights: Tensors, leaves: Tensors, batch: Any) -> Tensor:
    """A loss of the problem at these tensors."""
    with problem.at(weights, leaves) as at, at.loss(name, batch) as (loss, *_):
        return loss


# Operators ----------------------------------------------------------------------------------------------------------


class Counted(Symmetric):
    """A dense symmetric matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0
        super().__init__(self._apply, like=matrix[0])

    def _apply(self, v: Tensor) -> Tensor:
        self.calls += 1
        return v @ self.matrix


def with_spectrum(eigenvalues: Tensor | list[float], seed: int = 0) -> Tensor:
    """A dense symmetric matrix of these eigenvalues, in a random basis."""
    eigenvalues = torch.as_tensor(eigenvalues)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).to(eigenvalues.dtype))
    matrix = q @ torch.diag(eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def spd(condition: float = 100.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return with_spectrum(torch.logspace(0, -torch.tensor(condition).log10().item(), SIZE, dtype=dtype), seed)


OPERATORS: dict[str, Callable[[], Tensor]] = {
    "spd": spd,
    "ill_conditioned": lambda: spd(1e6),
    "indefinite": lambda: with_spectrum(torch.linspace(-0.05, 1.0, SIZE)),
    "singular": lambda: with_spectrum([0.0, 0.0, *torch.linspace(0.1, 1.0, SIZE - 2).tolist()]),
    "zero": lambda: torch.zeros(SIZE, SIZE),
}


# Ridge regression -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """Ridge regression: the minimum w*(λ) is known, and autograd through it is the closed-form hypergradient."""

    start: Callable[[], Tensor]  # the hyperparameter's natural values
    decays: Callable[[Tensor], Any]  # λ → one decay a weight
    weights: Callable[[Tensor], Any]  # λ → one weight an example
    features: int = 4

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1)
        x, x_val = (torch.randn(12, self.features, generator=draw) for _ in range(2))
        y, y_val = (torch.randn(12, generator=draw) for _ in range(2))
        return x, y, x_val, y_val

    def solution(self, value: Tensor) -> Tensor:
        """w*(λ) = (Xᵀ S X / n + D)⁻¹ Xᵀ S y / n."""
        x, y, _, _ = self.data()
        s = self.weights(value) * torch.ones(12)
        matrix = x.T @ (s[:, None] * x) / 12 + torch.diag(self.decays(value) * torch.ones(self.features))
        return torch.linalg.solve(matrix, x.T @ (s * y) / 12)

    def exact(self, value: Tensor) -> Tensor:
        """dL_V/dλ, from the closed form of w*."""
        _, _, x_val, y_val = self.data()
        value = value.detach().clone().requires_grad_()
        loss = 0.5 * (x_val @ self.solution(value) - y_val).square().mean()
        return torch.autograd.grad(loss, value)[0]

    def problem(self, hparams: nn.Module | None = None) -> hoptim.Problem:
        """The same as a Problem, with the model at its minimum. The batch is "train" or "val"."""
        x, y, x_val, y_val = self.data()
        hparams = hparams or hoptim.HyperParameters({"value": self.start()})
        model = nn.Linear(self.features, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(self.solution(hparams["value"])[None])

        def train_loss(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
            errors = (model(x).squeeze(1) - y).square()
            penalty = (self.decays(hparams["value"]) * model.weight.squeeze(0).square()).sum()
            return 0.5 * (self.weights(hparams["value"]) * errors).mean() + 0.5 * penalty

        def val_loss(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
            return 0.5 * (model(x_val).squeeze(1) - y_val).square().mean()

        return hoptim.Problem(model, hparams, train_loss, val_loss)


RIDGES = {
    "scalar": Ridge(lambda: torch.tensor(0.3), lambda v: v, lambda v: 1.0),
    "per_weight": Ridge(lambda: torch.linspace(0.2, 0.8, 4), lambda v: v, lambda v: 1.0),
    "per_example": Ridge(lambda: torch.linspace(0.5, 1.5, 12), lambda v: 0.4, lambda v: v),
}


# A small tanh MLP at its minimum ----------------------------------------------------------------------------------------


class Trained:
    """A tanh MLP with one decay a weight, through exp, trained by dense Newton steps until its gradient is below 1e-12."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.x, self.x_val = (torch.randn(20, 2, generator=draw) for _ in range(2))
        self.y, self.y_val = (torch.sin(2 * x[:, :1]) + 0.3 * x[:, 1:].square() for x in (self.x, self.x_val))
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.shapes = {name: p.detach() for name, p in self.model.named_parameters()}
        natural = {name: torch.rand(p.shape, generator=draw) * 0.02 + 0.02 for name, p in self.shapes.items()}
        self.hparams = hoptim.HyperParameters(natural, dict.fromkeys(natural, constraints.positive))
        start = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.minimum = self.retrain(flat(dict(self.hparams.named_parameters())).detach(), start)
        self.write(self.minimum)

    def write(self, w: Tensor) -> None:
        nn.utils.vector_to_parameters(w, self.model.parameters())

    def objective(self, w: Tensor, theta: Tensor) -> Tensor:
        predicted = functional_call(self.model, unflat(w, self.shapes), (self.x,))
        return (predicted - self.y).square().mean() + (theta.exp() * w.square()).sum()

    def validation(self, w: Tensor) -> Tensor:
        return (functional_call(self.model, unflat(w, self.shapes), (self.x_val,)) - self.y_val).square().mean()

    def retrain(self, theta: Tensor, w: Tensor) -> Tensor:
        """Newton's method with a dense Hessian, made positive definite while it is not."""
        gradient = torch.func.grad(self.objective)
        for _ in range(300):
            g, h = gradient(w, theta), torch.func.hessian(self.objective)(w, theta)
            if g.norm() < 1e-12:
                return w
            eigenvalues, basis = torch.linalg.eigh(h)
            step = basis @ ((basis.T @ g) / eigenvalues.abs().clamp(min=1e-3))
            length = 1.0
            while self.objective(w - length * step, theta) > self.objective(w, theta) + 1e-14 and length > 1e-6:
                length /= 2
            w = (w - length * step).detach()
        raise AssertionError(f"not trained: gradient norm {g.norm():.2e}")

    def problem(self) -> hoptim.Problem:
        def train_loss(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
            penalty = sum((hparams[name] * p.square()).sum() for name, p in model.named_parameters())
            return (model(self.x) - self.y).square().mean() + penalty

        def val_loss(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
            return (model(self.x_val) - self.y_val).square().mean()

        return hoptim.Problem(self.model, self.hparams, train_loss, val_loss)


# A model with dropout and BatchNorm, and runs of the optimizer on it ---------------------------------------------------


def noisy_model() -> nn.Module:
    inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), inner, nn.Linear(6, 3))


def cross_entropy_with_decay(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y) + hparams["decay"] * sum(p.square().sum() for p in model.parameters())


def evaluated_cross_entropy(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
    x, y = batch
    model.eval()
    return nn.functional.cross_entropy(model(x), y)


def classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=draw)
    return torch.randn(n, 4, generator=draw) + y[:, None], y


def noisy_problem(decay: float = 1e-2) -> hoptim.Problem:
    hparams = hoptim.HyperParameters({"decay": torch.tensor(decay)}, {"decay": constraints.positive})
    return hoptim.Problem(noisy_model(), hparams, cross_entropy_with_decay, evaluated_cross_entropy)


INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def shuffled(own_generator: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(9) if own_generator else None
    return DataLoader(TensorDataset(*classes(20, 2)), batch_size=4, shuffle=True, generator=generator)


def noisy_run(inner: str = "sgd", val_batches: Any = None, seed: int = 0, **options: Any) -> SimpleNamespace:
    """A freshly built problem with its BilevelOptimizer, and a list of training batches."""
    torch.manual_seed(seed)
    problem = noisy_problem()
    options = {"every": 3, "hypergradient": hoptim.Implicit(hoptim.Neumann(terms=3)), **options}
    optimizer = hoptim.BilevelOptimizer(
        INNERS[inner](problem.model.parameters()),
        torch.optim.Adam(problem.hparams.parameters(), lr=0.05),
        problem,
        val_batches=[classes(16, 2), classes(16, 3)] if val_batches is None else val_batches,
        **options,
    )
    return SimpleNamespace(
        problem=problem,
        model=problem.model,
        hparams=problem.hparams,
        optimizer=optimizer,
        batches=[classes(8, 10 + i) for i in range(5)],
    )


def advance(run: Any, first: int, last: int, after: Callable[[], None] = lambda: None) -> None:
    """The user's loop, from inner step ``first`` up to ``last``."""
    for i in range(first, last):
        run.optimizer.zero_grad()
        run.optimizer.loss(run.batches[i % len(run.batches)]).backward()
        run.optimizer.step()
        after()


def snapshot(problem: hoptim.Problem) -> dict[str, Any]:
    """All that a hypergradient must leave alone."""
    modules = {"model": problem.model, "hparams": problem.hparams}
    return {
        "tensors": {k: copy.deepcopy(m.state_dict()) for k, m in modules.items()},
        "buffers": {k: [b.clone() for b in m.buffers()] for k, m in modules.items()},
        "grads": {k: [None if p.grad is None else p.grad.clone() for p in m.parameters()] for k, m in modules.items()},
        "modes": {k: [part.training for part in m.modules()] for k, m in modules.items()},
        "rng": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def through_disk(state: Any) -> Any:
    """Saved and loaded again, with nothing but tensors and plain values allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
