"""The step of finite differences in float32, on small nets as they are, against double backward in float64."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hoptim import MINRES, Exact, FiniteDifference, HyperParameters, Identity, Implicit, Problem, hypergradient

WORDS, LONG = 300, 16


class Language(nn.Module):
    """One causal block between an embedding, which has most of ‖w‖, and logits."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, WORDS, bias=False)
        self.before, self.after, self.qkv, self.out = (
            nn.LayerNorm(32),
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
        )
        nn.init.normal_(self.embedding.weight, std=std)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        mask = torch.full((LONG, LONG), -1e9, dtype=x.dtype).triu(1)
        x = x + self.out((q @ k.transpose(-1, -2) / math.sqrt(32) + mask).softmax(-1) @ v)
        return self.head(self.after(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def words(seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, WORDS, (8, LONG + 1), generator=torch.Generator().manual_seed(seed)) ** 2 // WORDS
    return drawn[:, :-1], drawn[:, 1:]


def rows(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(40, 8, 8, generator=draw, dtype=torch.float64), torch.randint(0, 10, (40,), generator=draw)


def losses(model: Any, batch: Any) -> Tensor:
    x, y = batch
    z = model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
    each = F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none")
    return each.view(len(y), -1).mean(1)


def train(model: Any, hparams: Any, batch: Any) -> Tensor:
    return 2 * (hparams["weights"].sigmoid() * losses(model, batch)).mean()


NETS: dict[str, Any] = {
    "language": (lambda: Language(1.0), words, 0),
    "language, trained": (lambda: Language(1.0), words, 40),
    "language, small embedding": (lambda: Language(0.02), words, 40),
    "recurrent": (Recurrent, rows, 0),
    "recurrent, trained": (Recurrent, rows, 80),
    "smooth": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), rows, 0),
}
KINKED = (
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))),
    rows,
    400,
)


def problems(make: Any, data: Any, steps: int) -> tuple[Problem, Problem, Any, Any]:
    """The same in float32 and in float64, after some steps of Adam."""
    torch.manual_seed(0)
    model, batch = make().double(), data(0)
    hparams = HyperParameters({"weights": torch.zeros(len(batch[1]), dtype=torch.float64)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        train(model, hparams, batch).backward()
        optimizer.step()
    model = model.float()

    def problem(dtype: torch.dtype) -> Problem:
        val = lambda model, hparams, batch: losses(model, batch).mean()  # noqa: E731
        return Problem(copy.deepcopy(model).to(dtype), copy.deepcopy(hparams).to(dtype), train, val)

    return problem(torch.float32), problem(torch.float64), batch, data(1)


def error(single: Problem, double: Problem, data: tuple[Any, Any], solver: Any, curvature: Any) -> float:
    truth = hypergradient(double, *data, Implicit(solver, curvature=Exact())).indirect["weights"]
    found = hypergradient(single, *data, Implicit(solver, curvature=curvature)).indirect["weights"]
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("solver", [Identity(), MINRES(terms=3)])
@pytest.mark.parametrize("name", NETS)
def test_the_default_step_is_right_to_two_percent_in_float32(name: str, solver: Any) -> None:
    single, double, *data = problems(*NETS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(single, double, (data[0], data[1]), solver, FiniteDifference()) < 0.02


def test_a_step_that_is_given_is_used_as_it_is_and_not_checked() -> None:
    single, double, *data = problems(*NETS["language, trained"])
    seen = []
    counted = Problem(single.model, single.hparams, lambda *args: seen.append(1) or train(*args), single.val_loss)
    hypergradient(counted, *data, Implicit(Identity(), curvature=FiniteDifference(step=0.05)))
    given = len(seen)
    assert error(single, double, (data[0], data[1]), Identity(), FiniteDifference(step=0.05)) > 0.05
    hypergradient(counted, *data, Implicit(Identity(), curvature=FiniteDifference()))
    assert given == 3  # F, and the two sides of one difference
    assert given + 2 <= len(seen) - given <= given + 2 * 5


def test_the_checks_cost_one_difference_each_where_the_first_two_agree() -> None:
    single, _, *data = problems(*NETS["smooth"])
    seen = []
    counted = Problem(single.model, single.hparams, lambda *args: seen.append(1) or train(*args), single.val_loss)
    hypergradient(counted, *data, Implicit(MINRES(terms=3, tolerance=0.0), curvature=FiniteDifference()))
    assert len(seen) == 1 + 2 * (3 + 1) + 2 + 2  # one for the first product, one for Bᵀx


def test_kinks_are_told_with_the_figure_once() -> None:
    single, double, *data = problems(*KINKED)
    method = Implicit(MINRES(terms=3), curvature=FiniteDifference())
    with pytest.warns(UserWarning, match=r"(products differ|weights' differs) by [0-9]+%.*kinks.*float64.*step=.*Exact"):
        found = hypergradient(single, *data, method)
    truth = hypergradient(double, *data, Implicit(MINRES(terms=3), curvature=Exact())).indirect["weights"]
    assert (found.indirect["weights"].double() - truth).norm() > 0.05 * truth.norm()  # rightly so
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(single, *data, method)
