"""EKFAC against the dense matrix of curvlinops, as a whole solve and in front of other solvers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvlinops import EKFACLinearOperator
from torch import Tensor, nn
from torch.nn import functional as F

from hoptim import CG, EKFAC, MINRES, Exact, Identity, Implicit, Problem, WarmStart, influence, self_influence
from hoptim.linalg.operators import Symmetric

CRITERION = nn.CrossEntropyLoss()


def losses(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.eval()(batch[0]), batch[1], reduction="none")


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return losses(model, hparams, batch).mean() + 0.05 * sum(p.square().sum() for p in model.parameters())


def made(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        x = torch.randn(12, 3)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 3, bias=False)
        )
        x = torch.randn(12, 1, 4, 4)
    return model, (x, torch.arange(12) % 3)


def dense_of(model: nn.Module, names: list[str], batches: Any, damping: float, draws: int = 0) -> Tensor:
    """curvlinops' matrix of these weights, each tensor with its damping; by labels that are drawn, or by all."""
    weights = [dict(model.named_parameters())[name] for name in names]
    model.eval()
    labels = {"fisher_type": "mc", "mc_samples": draws} if draws else {"fisher_type": "type-2"}
    factors = EKFACLinearOperator(model, CRITERION, weights, batches, check_deterministic=False, **labels)
    dense = factors @ torch.eye(sum(w.numel() for w in weights))
    model.train()
    first = 0
    for w in weights:
        block = slice(first, first := first + w.numel())
        dense[block, block] += damping * dense[block, block].trace() / w.numel() * torch.eye(w.numel())
    return dense


@pytest.mark.parametrize(("kind", "samples", "draws"), [("mlp", 3, 0), ("cnn", 10, 0), ("mlp", 2, 2)])
def test_its_root_is_that_of_the_dense_matrix(kind: str, samples: int, draws: int) -> None:
    model, batch = made(kind)
    weights = dict(model.named_parameters())
    names = [name for name in weights if not name.startswith("1.")]  # not those of the norm
    size = sum(w.numel() for w in weights.values())
    batches = [(x, y) for x, y in zip(batch[0].split(5), batch[1].split(5), strict=True)]
    root = EKFAC(model=model, criterion=CRITERION, batches=batches, damping=0.2, samples=samples)(
        Symmetric(lambda v: v, like=torch.ones(size)), weights, None
    )
    whole = root @ torch.eye(size)
    assert torch.allclose(whole, whole.T, atol=1e-5)
    assert torch.allclose(root.inverse @ whole, torch.eye(size), atol=1e-4)
    assert torch.allclose(root @ torch.ones(size), whole.sum(0), atol=1e-4)
    own = torch.cat([torch.full((w.numel(),), name in names) for name, w in weights.items()])
    dense = dense_of(model, names, batches, 0.2, draws)
    torch.testing.assert_close((whole @ whole)[own][:, own] @ dense, torch.eye(int(own.sum())), rtol=0, atol=2e-3)
    if not own.all():  # the norm's have the mean of those of the layers' tensors, damped
        rest = (whole @ whole)[~own][:, ~own]
        sizes = [weights[name].numel() for name in names]
        mean = torch.stack([part.mean() for part in dense.diagonal().split(sizes)]).mean()
        torch.testing.assert_close(rest, torch.eye(len(rest)) / mean, rtol=1e-4, atol=1e-6)


def test_of_one_example_it_is_the_fisher_matrix_itself_damped() -> None:
    """(diag p − ppᵀ) ⊗ xxᵀ: with labels drawn from the model it would be another in each draw."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False), torch.randn(1, 4)
    p = model(x)[0].detach().softmax(0)
    fisher = torch.kron(p.diag() - torch.outer(p, p), torch.outer(x[0], x[0]))
    ekfac = EKFAC(model=model, criterion=CRITERION, batches=[(x, torch.tensor([1]))], damping=0.5)
    root = ekfac(Symmetric(lambda v: v, like=torch.ones(12)), dict(model.named_parameters()), None)
    dense = root.inverse @ (root.inverse @ torch.eye(12))
    torch.testing.assert_close(dense, fisher + 0.5 * fisher.trace() / 12 * torch.eye(12), rtol=1e-4, atol=1e-5)


def test_alone_it_is_the_whole_solve() -> None:
    model, batch = made("mlp")
    names = [name for name, _ in model.named_parameters()]
    method = Implicit(Identity(), preconditioner=EKFAC(model=model, criterion=CRITERION, batches=[batch]))
    gradients = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)])
            for one in losses(model, None, batch)
        ]
    )
    known = -gradients @ torch.linalg.solve(dense_of(model, names, [batch], 0.1), gradients.T)
    problem = Problem(model, None, train_loss, losses)
    torch.testing.assert_close(influence(problem, losses, batch, batch, method).scores, known, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(self_influence(problem, losses, batch, method).scores, known.diagonal(), rtol=1e-3, atol=1e-3)


def test_its_factors_are_made_once_for_all_examples() -> None:
    model, batch = made("mlp")
    passes: list[int] = []

    class Counting(list[Any]):
        def __iter__(self) -> Any:
            passes.append(1)
            return super().__iter__()

    method = Implicit(Identity(), preconditioner=EKFAC(model=model, criterion=CRITERION, batches=Counting([batch])))
    problem, pieces = Problem(model, None, train_loss, losses), list(zip(batch[0].split(2), batch[1].split(2), strict=True))
    counts = []
    for examples in (pieces[:1], pieces):
        passes.clear()
        self_influence(problem, losses, batch, method, examples=examples)
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("solver", [CG(terms=60, tolerance=1e-6), WarmStart(MINRES(terms=60, tolerance=1e-6))])
def test_in_front_of_a_solver_it_does_not_change_a_long_solve(solver: Any) -> None:
    model, batch = made("mlp")
    problem = Problem(model, None, train_loss, losses)
    known = influence(problem, losses, batch, batch, Implicit(solver, curvature=Exact(), damping=0.5)).scores
    ekfac = EKFAC(model=model, criterion=CRITERION, batches=[batch])
    method = Implicit(solver, curvature=Exact(), damping=0.5, preconditioner=ekfac)
    torch.testing.assert_close(influence(problem, losses, batch, batch, method).scores, known, rtol=1e-3, atol=1e-4)


def test_it_leaves_no_trace() -> None:
    model, batch = made("cnn")
    problem = Problem(model, None, train_loss, losses)
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    method = Implicit(MINRES(terms=3), preconditioner=EKFAC(model=model, criterion=CRITERION, batches=[batch]))
    assert influence(problem, losses, batch, batch, method).scores.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_what_cannot_be_says_why() -> None:
    model, batch = made("mlp")
    with pytest.raises(ValueError, match="damping=0: give a positive number"):
        EKFAC(model=model, criterion=CRITERION, batches=[batch], damping=0)
    with pytest.raises(ValueError, match="samples=0: give how many labels"):
        EKFAC(model=model, criterion=CRITERION, batches=[batch], samples=0)
    other = EKFAC(model=made("mlp")[0], criterion=CRITERION, batches=[batch])
    with pytest.raises(ValueError, match="holds weights of the problem"):
        influence(Problem(model, None, train_loss, losses), losses, batch, batch, Implicit(preconditioner=other))
