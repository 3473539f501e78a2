"""Influence: scores by dense linear algebra, by retraining, and by the hypergradient of weights of examples."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim import CG, Exact, Identity, Implicit, Problem, Solution, Status, influence, self_influence
from hoptim.recipes import DomainWeights

DECAY = 0.1
LONG = Implicit(CG(terms=200, tolerance=1e-13), curvature=Exact())


def losses(model: Any, hparams: Any, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0])[:, 0] - batch[1]).square()


def penalty(model: nn.Module) -> Tensor:
    return 0.5 * DECAY * sum(p.square().sum() for p in model.parameters())


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return losses(model, hparams, batch).mean() + penalty(model)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Ridge:
    """A linear model at its optimum, in closed form."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.y, self.queries = draw(12, 4), draw(12), (draw(3, 4), draw(3))
        self.model = nn.Linear(4, 1, bias=False).double()
        self.model.weight.data[0] = self.fitted(torch.ones(12, dtype=torch.float64))
        self.train = (self.x, self.y)
        self.problem = Problem(self.model, None, train_loss, losses)

    def fitted(self, weights: Tensor) -> Tensor:
        """argmin (1/n) Σ wᵢ ℓᵢ + the penalty."""
        A = self.x.T @ (weights[:, None] * self.x) / 12 + DECAY * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(A, self.x.T @ (weights * self.y) / 12)

    def query_losses(self, w: Tensor) -> Tensor:
        x, y = self.queries
        return 0.5 * (x @ w - y).square()


def net() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return model, (draw(8, 3), draw(8)), (draw(4, 3), draw(4))


def test_scores_are_those_of_dense_linear_algebra() -> None:
    own = Ridge()
    A = own.x.T @ own.x / 12 + DECAY * torch.eye(4, dtype=torch.float64)
    w = own.model.weight.detach()[0]
    by_example = (own.x @ w - own.y)[:, None] * own.x
    by_query = (own.queries[0] @ w - own.queries[1])[:, None] * own.queries[0]
    found = influence(own.problem, losses, own.train, own.queries, LONG)
    torch.testing.assert_close(found.scores, -by_query @ torch.linalg.solve(A, by_example.T), rtol=0, atol=1e-11)
    assert found.solution.status is Status.CONVERGED
    assert found.solution.value["weight"].shape == (3, 1, 4)
    diagonal = -(by_example * torch.linalg.solve(A, by_example.T).T).sum(1)
    torch.testing.assert_close(self_influence(own.problem, losses, own.train, LONG).scores, diagonal, rtol=0, atol=1e-11)


def test_sums_of_scores_are_the_slopes_of_retraining() -> None:
    """And leaving an example out changes a validation loss by −score/n, to first order."""
    own, step = Ridge(), 1e-5
    scores = influence(own.problem, losses, own.train, own.queries, LONG).scores
    for group in ([0], [1, 4, 7], list(range(12))):
        moved = torch.zeros(12, dtype=torch.float64)
        moved[group] = step
        up, down = (own.query_losses(own.fitted(1 + sign * moved)) for sign in (1, -1))
        torch.testing.assert_close(scores[:, group].sum(1) / 12, (up - down) / (2 * step), rtol=1e-6, atol=1e-9)
    without = torch.ones(12, dtype=torch.float64)
    without[5] = 0
    change = own.query_losses(own.fitted(without)) - own.query_losses(own.fitted(torch.ones_like(without)))
    assert ((change + scores[:, 5] / 12).abs() < 0.5 * change.abs()).all()


@pytest.mark.parametrize("method", [LONG, Implicit(hoptim.MINRES(terms=3), curvature=Exact(), damping=0.3)])
def test_a_score_is_the_hypergradient_of_a_weight_of_the_example(method: Implicit) -> None:
    model, train, val = net()
    weights = nn.ParameterDict({"weight": torch.ones(8, dtype=torch.float64)})

    def weighted(model: Any, hparams: Any, batch: Any) -> Tensor:
        return (hparams["weight"] * losses(model, hparams, batch)).mean() + penalty(model)

    def mean(model: Any, hparams: Any, batch: Any) -> Tensor:
        return losses(model, hparams, batch).mean()

    problem = Problem(model, weights, weighted, mean)
    known = hoptim.hypergradient(problem, train, val, method).grads["weight"]
    found = influence(problem, losses, train, val, method).scores
    torch.testing.assert_close(found / 8, known, rtol=0, atol=1e-10)


def test_mean_scores_of_sources_are_the_slopes_of_their_shares() -> None:
    """∂L_V/∂p_d is the mean score of source d; the hypergradient goes on to the leaves of the shares, for each target."""
    model, train, val = net()
    source = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    hparams = DomainWeights({"a": 3, "b": 2, "c": 3}).double()

    def mixed(model: Any, hparams: Any, batch: Any) -> Tensor:
        return hparams.mean(losses(model, hparams, batch), source) + penalty(model)

    problem = Problem(model, hparams, mixed, losses)
    scores = influence(problem, losses, train, val, LONG).scores
    table = torch.stack([scores[:, source == d].mean(1) for d in range(3)], dim=1)
    leaf = hparams.get_parameter("mixture")
    jacobian = torch.stack([torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in hparams["mixture"]])
    found = hoptim.hypergradient(problem, train, val, LONG).grads["mixture"]
    torch.testing.assert_close(table @ jacobian, found, rtol=0, atol=1e-10)
    assert found.abs().max() > 1e-3


def test_the_sum_of_scores_of_a_source_foretells_a_training_without_it() -> None:
    """−Σ_i s_i/n is the change by less weight on the source, up to all of it, and the mean is the slope of its share."""
    own, source = Ridge(), torch.arange(12) % 3
    scores = influence(own.problem, losses, own.train, own.queries, LONG).scores
    for d in range(3):
        foretold = -scores[:, source == d].sum(1) / 12
        less, more = (own.query_losses(own.fitted(1 + sign * 1e-5 * (source == d).double())) for sign in (-1, 1))
        torch.testing.assert_close(foretold, (less - more) / 2e-5, rtol=1e-6, atol=1e-9)
        share = 4 / 12  # of the source; p/q is the weight of its examples
        steps = [1 + (source == d).double() * (sign * 1e-5 / share) for sign in (-1, 1)]
        less, more = (own.query_losses(own.fitted(weights)) for weights in steps)
        torch.testing.assert_close(scores[:, source == d].mean(1), (more - less) / 2e-5, rtol=1e-6, atol=1e-9)


def test_examples_in_pieces_have_the_scores_of_all_at_once_also_new_ones() -> None:
    model, train, val = net()
    problem, other = Problem(model, None, train_loss, losses), (draw(5, 3), draw(5))
    pieces = [(x, y) for x, y in zip(train[0].split(3), train[1].split(3), strict=True)]
    whole = influence(problem, losses, train, val, LONG).scores
    torch.testing.assert_close(
        influence(problem, losses, train, val, LONG, examples=pieces).scores, whole, rtol=0, atol=1e-12
    )
    stream = influence(problem, losses, train, val, LONG, examples=iter([*pieces, other])).scores
    assert whole.shape == (4, 8)
    assert stream.shape == (4, 13)
    torch.testing.assert_close(stream[:, :8], whole, rtol=0, atol=1e-12)
    joined = tuple(map(torch.cat, zip(train, other, strict=True)))
    together = influence(problem, losses, train, val, LONG, examples=[joined]).scores
    torch.testing.assert_close(stream, together, rtol=0, atol=1e-12)


class Half(torch.autograd.Function):
    """A function whose author wrote no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 0.5 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.5 * grad


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2).eval(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x[:, None])).tanh().flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.stack([x, x.sin(), x.cos(), x**2], -1)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[..., None])[0][:, -1])


class Gated(nn.Linear):
    """Under no_grad, which forward mode does not heed."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.weight.square().sum()
        return gate * super().forward(x)


class Physical(nn.Linear):
    """Its output is a derivative in the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(super().forward(x).tanh().sum(), x, create_graph=True)[0]


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Half.apply(super().forward(x))


@pytest.mark.parametrize(
    ("made", "fast"),
    [
        (Conv, True), (Attention, True), (Recurrent, None),
        (lambda: Gated(3, 1), False), (lambda: Physical(3, 1), False), (lambda: Custom(3, 1), False),
    ],
)  # fmt: skip
def test_many_pieces_have_the_scores_of_one_by_forward_mode_or_without_it(made: Any, fast: bool | None) -> None:
    torch.manual_seed(3)
    model, train, val = made().double(), (draw(10, 3), draw(10)), (draw(4, 3), draw(4))
    backward: list[bool] = []

    def seen(model: Any, hparams: Any, batch: Any) -> Tensor:
        backward.append(torch.is_grad_enabled())
        return losses(model, hparams, batch)

    problem = Problem(model, None, train_loss, lambda *given: losses(*given).mean())
    method = Implicit(hoptim.MINRES(terms=3), curvature=Exact(), damping=1.0)
    whole = influence(problem, seen, train, val, method).scores
    assert backward == [True]
    backward.clear()
    pieces = list(zip(train[0].split(2), train[1].split(2), strict=True))
    found = influence(problem, seen, train, val, method, examples=iter(pieces)).scores
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    assert whole.abs().max() > 1e-3
    assert fast is None or backward == [True, False, True, *([not fast] * 3)]
    assert all(p.grad is None for p in model.parameters())


def test_self_influence_is_the_diagonal_of_influence() -> None:
    model, train, _ = net()
    problem = Problem(model, None, train_loss, losses)
    pieces = [(x, y) for x, y in zip(train[0].split(3), train[1].split(3), strict=True)]
    whole = influence(problem, losses, train, train, LONG).scores
    torch.testing.assert_close(self_influence(problem, losses, train, LONG, examples=pieces).scores, whole.diagonal())


def test_identity_without_curvature_gives_products_of_gradients() -> None:
    model, train, val = net()
    weights = list(model.parameters())

    def rows(batch: tuple[Tensor, Tensor]) -> Tensor:
        found = losses(model, None, batch)
        return torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(one, weights, retain_graph=True)]) for one in found]
        )

    found = influence(Problem(model, None, train_loss, losses), losses, train, val, Implicit(Identity())).scores
    torch.testing.assert_close(found, -rows(val) @ rows(train).T, rtol=0, atol=1e-12)


def test_the_optimizers_own_decay_is_a_part_of_the_curvature() -> None:
    own = Ridge()

    def mean(model: Any, hparams: Any, batch: Any) -> Tensor:
        return losses(model, hparams, batch).mean()

    inner = torch.optim.SGD(own.model.parameters(), lr=0.1, weight_decay=DECAY)
    known = influence(own.problem, losses, own.train, own.queries, LONG).scores
    bare = Problem(own.model, None, mean, losses)
    found = influence(bare, losses, own.train, own.queries, LONG, inner=inner).scores
    torch.testing.assert_close(found, known, rtol=0, atol=1e-11)
    assert not torch.allclose(influence(bare, losses, own.train, own.queries, LONG).scores, known, rtol=0.01)
    unknown = torch.optim.Adafactor(own.model.parameters(), weight_decay=DECAY)
    for score in (lambda: influence(bare, losses, own.train, own.queries, LONG, inner=unknown),
                  lambda: self_influence(bare, losses, own.train, LONG, inner=unknown)):  # fmt: skip
        with pytest.warns(UserWarning, match="Adafactor"):
            score()


def test_it_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    train, val = (draw(8, 3), draw(8)), (draw(4, 3), draw(4))

    def in_eval(model: Any, hparams: Any, batch: Any) -> Tensor:
        return losses(model.eval(), hparams, batch)

    problem = Problem(model, None, train_loss, in_eval)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    for found in (influence(problem, in_eval, train, val), self_influence(problem, in_eval, train)):
        assert found.scores.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    with pytest.warns(UserWarning, match="losses runs 1 BatchNorm1d and 1 Dropout in training mode"):
        influence(problem, losses, train, val)


def test_a_failed_solve_has_no_scores() -> None:
    model, train, val = net()
    flat = Problem(model, None, lambda model, hparams, batch: model[2].bias.sum() + 0 * model(batch[0]).sum(), losses)
    found = influence(flat, losses, train, val)
    assert not found.solution.status.ok
    assert found.scores.isnan().all()
    assert found.scores.shape == (4, 8)
    bad = (train[0], train[1].clone().index_fill(0, torch.tensor([2]), torch.nan))
    found = self_influence(Problem(model, None, train_loss, losses), losses, train, examples=[train, bad])
    assert found.scores[:8].isfinite().all()
    assert found.scores[8:].isnan().all()
    assert found.solution.status is Status.NON_FINITE_GRADIENT
    found = self_influence(Problem(model, None, train_loss, losses), losses, train, examples=[bad, train])
    assert found.solution.status is Status.NON_FINITE_GRADIENT
    assert found.scores[8:].isfinite().all()


def test_self_influence_does_not_hold_the_solutions_of_all_examples() -> None:
    model, train, _ = net()
    held: list[int] = []

    def counted(model: Any, hparams: Any, batch: Any) -> Tensor:
        gc.collect()
        held.append(sum(isinstance(one, Solution) for one in gc.get_objects()))
        return losses(model, hparams, batch)

    pieces = list(zip(train[0].split(1), train[1].split(1), strict=True))
    self_influence(Problem(model, None, train_loss, losses), counted, train, examples=pieces)
    assert len(held) == 8
    assert held[-1] == held[2]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": hoptim.Unrolled(3)}, TypeError, "method is an Unrolled"),
        ({"examples": []}, ValueError, "examples is empty"),
        ({"examples": iter([])}, ValueError, "examples is empty: it must give at least one batch"),
        ({"examples": "train"}, ValueError, "looks like one batch"),
        ({"losses": train_loss}, ValueError, "losses returned a scalar: return the loss of each example"),
        ({"losses": lambda model, hparams, batch: batch[1].clone().requires_grad_()}, ValueError, "none of the weights"),
        ({"losses": lambda model, batch: 0}, TypeError, "losses takes"),
        ({"problem": "model"}, TypeError, "problem is"),
    ],
)
@pytest.mark.parametrize("function", [influence, self_influence])
def test_what_cannot_be_scored_says_why(function: Any, change: dict[str, Any], error: type[Exception], words: str) -> None:
    model, train, val = net()
    given: dict[str, Any] = {"problem": Problem(model, None, train_loss, losses), "losses": losses, "train_batch": train}
    given |= {"val_batch": val} if function is influence else {}
    with pytest.raises(error, match=words):
        function(**{**given, **{key: train if value == "train" else value for key, value in change.items()}})


def test_a_problem_without_hyperparameters_trains_but_does_not_learn() -> None:
    model, train, val = net()
    problem = Problem(model, None, train_loss, losses)
    problem.loss(train).backward()
    assert model[0].weight.grad is not None
    with pytest.raises(ValueError, match="there is nothing to learn"):
        hoptim.hypergradient(problem, train, val)


def test_classes_of_a_net_with_convolutions_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3

    def each(model: Any, hparams: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    problem = Problem(model, None, lambda *given: each(*given).mean(), each)
    method = Implicit(CG(terms=30), curvature=Exact(), damping=5.0)
    found = influence(problem, each, (x, y), (x, y), method).scores
    exact = Problem(model.double(), None, lambda *given: each(*given).mean(), each)
    known = influence(exact, each, (x.double(), y), (x.double(), y), method).scores
    torch.testing.assert_close(found.double(), known, rtol=1e-3, atol=1e-5)
