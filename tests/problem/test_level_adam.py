"""Levels that many hyperparameters share: equal to a sum of tensors that Adam moves by themselves, however it is run."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import hoptim
from hoptim.problem.hyperparameters import outer_adam
from hoptim.problem.level_adam import Level, LevelAdam
from hoptim.recipes import LabelSmoothing, WeightDecay

ROWS, ALL = torch.arange(4)[:, None], torch.tensor(0)
TARGET = {
    "a": torch.linspace(-3, 1, 12, dtype=torch.float64).reshape(4, 3),
    "b": torch.linspace(0, 2, 3, dtype=torch.float64),
}


def made() -> hoptim.HyperParameters:
    """A level for all 15 entries, and one for each row of the one tensor and for all of the other."""
    values = {name: torch.ones_like(value) for name, value in TARGET.items()}
    levels = [{"a": ALL, "b": ALL}, {"a": ROWS, "b": torch.tensor([4])}]
    return hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive), levels)


def loss_of(leaves: dict[str, Tensor]) -> Tensor:
    return torch.stack([(leaves[name] - value).square().sum() for name, value in TARGET.items()]).sum()


def moved(hparams: nn.Module, outer: torch.optim.Optimizer, steps: int, loss: Callable[..., Tensor] = loss_of) -> Tensor:
    for _ in range(steps):
        outer.zero_grad()
        loss(dict(hparams.named_parameters())).backward()
        outer.step()
    return torch.cat([leaf.detach().flatten() for leaf in hparams.parameters()])


def test_it_is_adam_on_a_sum_of_levels_and_offsets_at_falling_rates() -> None:
    hparams = made()
    found = moved(hparams, hparams.optimizer(), 30)
    top, rows = torch.zeros((), dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    parts = {"top": top, "rows": rows, **{name: torch.zeros_like(value) for name, value in TARGET.items()}}
    for part in parts.values():
        part.requires_grad_()
    groups = [([parts["a"], parts["b"]], 0.1, (0.9, 0.99)), ([top], 0.6, (0.5, 0.9)), ([rows], 0.2, (0.5, 0.9))]
    adam = torch.optim.Adam([{"params": params, "lr": lr, "betas": betas} for params, lr, betas in groups], eps=1e-12)
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: (1 + t / 2) ** -0.5)
    for _ in range(30):
        adam.zero_grad()
        loss_of({"a": top + rows[:4, None] + parts["a"], "b": top + rows[4] + parts["b"]}).backward()
        adam.step()
        fall.step()
    own = torch.cat([(top + rows[:4, None] + parts["a"]).flatten(), top + rows[4] + parts["b"]])
    torch.testing.assert_close(found, own.detach(), rtol=1e-12, atol=1e-12)


def test_without_levels_it_is_adam_to_the_bit() -> None:
    both = []
    for kind in (LevelAdam, torch.optim.Adam):
        hparams = made()
        both.append(moved(hparams, kind(hparams.parameters(), lr=0.05), 10))
    assert torch.equal(*both)


def through_a_file(outer: torch.optim.Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_resumes_to_the_bit() -> None:
    whole, first, second = made(), made(), made()
    expected = moved(whole, whole.optimizer(), 20)
    outer, again = first.optimizer(), second.optimizer()
    moved(first, outer, 7)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(through_a_file(outer))
    assert torch.equal(moved(second, again, 13), expected)


def _levels(outer: torch.optim.Optimizer) -> list[Level]:
    assert isinstance(outer, LevelAdam)
    return outer.levels


def test_a_state_of_adam_from_before_there_were_levels_loads() -> None:
    """The leaves go on with their moments, and the levels begin: the next step is that of both."""
    hparams, alone, begun = made(), made(), made()
    old = torch.optim.Adam(hparams.parameters(), lr=0.05)
    moved(hparams, old, 5)
    for other in (alone, begun):
        other.load_state_dict(hparams.state_dict())
    outer = begun.optimizer()
    outer.load_state_dict(through_a_file(old))
    start = torch.cat([leaf.detach().flatten() for leaf in hparams.parameters()])
    new_levels = LevelAdam([torch.zeros(1)], _levels(alone.optimizer()))
    step = moved(begun, outer, 1) - start
    of_leaves, of_levels = moved(hparams, old, 1) - start, moved(alone, new_levels, 1) - start
    assert bool((of_levels.abs() > 0.05).all())
    torch.testing.assert_close(step, of_leaves + of_levels, rtol=1e-12, atol=1e-14)


def test_a_run_that_was_saved_with_adam_resumes() -> None:
    def run(outer: Callable[[WeightDecay], torch.optim.Optimizer]) -> tuple[WeightDecay, hoptim.BilevelOptimizer]:
        torch.manual_seed(0)
        x = torch.randn(20, 3)
        model = nn.Linear(3, 1)
        decay = WeightDecay(model, per="weight", start=1e-2)

        def val_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
            return (model(x[batch]) - x[batch].sum(1, keepdim=True)).square().mean()

        def train_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
            return val_loss(model, hparams, batch) + hparams.penalty(model)

        problem = hoptim.Problem(model, decay, train_loss, val_loss)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hoptim.BilevelOptimizer(inner, outer(decay), problem, val_batches=[torch.arange(10, 20)], every=5)
        for _ in range(10):
            optimizer.zero_grad()
            optimizer.loss(torch.arange(10)).backward()
            optimizer.step()
        return decay, optimizer

    saved, old = run(lambda decay: torch.optim.Adam(decay.parameters(), lr=0.05))
    decay, optimizer = run(lambda decay: decay.optimizer())
    optimizer.load_state_dict(old.state_dict())
    assert torch.equal(decay["decay.weight"], saved["decay.weight"])
    optimizer.hyperstep(torch.arange(10))
    assert optimizer.record is not None
    assert optimizer.record.moved
    assert bool(((decay["decay.weight"] / saved["decay.weight"]).log().abs() > 0.2).all())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: torch.load(_saved(both), weights_only=False)])
def test_a_copy_goes_on_to_the_same_bits(copied: Callable[[Any], Any]) -> None:
    hparams = made()
    outer = hparams.optimizer()
    moved(hparams, outer, 3)
    again, other = copied((hparams, outer))
    assert torch.equal(moved(again, other, 5), moved(hparams, outer, 5))


def _saved(both: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return file


def test_a_scheduler_moves_the_rates_of_levels_too() -> None:
    hparams = made()
    outer = hparams.optimizer()
    torch.optim.lr_scheduler.LambdaLR(outer, lambda _: 0.1)
    start = torch.cat([leaf.detach().flatten() for leaf in hparams.parameters()])
    step = (moved(hparams, outer, 1) - start).abs()
    assert float(step.max()) == pytest.approx(0.1 * (0.6 + 0.2 + 0.1))


def test_a_step_that_failed_leaves_the_rates_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    hparams, others = made(), made()
    outer = hparams.optimizer()
    moved(hparams, outer, 2)
    rates = [group["lr"] for group in outer.param_groups]
    outer.param_groups[0]["betas"] = None  # at which Adam raises an error, half way through a step
    with pytest.raises(TypeError):
        moved(hparams, outer, 1)
    outer.param_groups[0]["betas"] = (0.9, 0.99)
    moved(hparams, outer, 1)
    assert [group["lr"] for group in outer.param_groups] == rates
    again = others.optimizer()
    again.load_state_dict(outer.state_dict())
    assert [group["lr"] for group in again.param_groups] == rates


def test_leaves_without_a_gradient_stay_and_so_do_levels_of_none() -> None:
    hparams = made()
    outer = hparams.optimizer()
    levels = _levels(outer)
    start = hparams["b"].detach().log()
    moved(hparams, outer, 3, lambda leaves: (leaves["a"] - TARGET["a"]).square().sum())  # zero_grad() leaves None
    own = levels[1].zeros()
    assert bool((hparams["b"].log() != start).all()), "the level of all has moved"
    assert levels[1].gathered(own) is not None
    outer.zero_grad()
    assert levels[1].gathered(own) is None
    before = hparams["b"].detach().clone()
    outer.step()
    assert torch.equal(hparams["b"], before)


def test_one_optimizer_for_several_recipes_has_the_levels_of_each() -> None:
    model = nn.Linear(3, 2)
    hparams = nn.ModuleDict({"decay": WeightDecay(model, per="weight"), "smoothing": LabelSmoothing(), "own": made()})
    outer = outer_adam(hparams.double())
    assert len(_levels(outer)) == 4
    before = {name: leaf.detach().clone() for name, leaf in hparams.named_parameters()}
    for leaf in hparams.parameters():
        leaf.grad = torch.full_like(leaf, 2.0)
    outer.step()
    sizes = {name: (before[name] - leaf).detach() for name, leaf in hparams.named_parameters()}
    assert all(value.allclose(torch.tensor(0.9).double()) for name, value in sizes.items() if "smoothing" not in name)
    assert sizes["smoothing.smoothing"].item() == pytest.approx(0.3)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([{"a": torch.zeros(3)}], TypeError, "'a' is a Tensor.*whole numbers"),
    ([{"a": torch.tensor([True])}], TypeError, "whole numbers"),
    ([{"a": 0}], TypeError, "'a' is an int"),
    ([{"a": torch.tensor([-1])}], ValueError, "numbers from -1"),
    ([{"a": torch.arange(4)}], ValueError, r"shape \(4,\).*broadcasts to \(4, 3\)"),
    ([{"a": torch.zeros(1, 1, 1, dtype=torch.long)}], ValueError, r"broadcasts to \(4, 3\)"),
    ([{"c": torch.tensor(0)}], KeyError, "no hyperparameter 'c'"),
    ([{"a": ALL}] * 3, ValueError, "3 dicts: give at most 2"),
    ([{}], ValueError, "an empty dict"),
]


@pytest.mark.parametrize(("levels", "error", "words"), BAD)
def test_levels_that_fit_nothing_are_refused(levels: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        hoptim.HyperParameters({"a": torch.ones(4, 3)}, levels=levels)


def sums(per: str) -> Iterator[Tensor]:
    decay = WeightDecay(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), per=per)  # type: ignore[arg-type]
    for leaf in decay.parameters():
        leaf.grad = torch.ones_like(leaf)
    for level in _levels(decay.optimizer()):
        gathered = level.gathered(level.zeros())
        assert gathered is not None
        yield gathered


@pytest.mark.parametrize(("per", "entries"), [("global", [1]), ("tensor", [1, 1]), ("channel", [3, 2]), ("weight", [12, 6])])
def test_decays_have_a_level_for_all_and_one_for_each_tensor_of_several(per: str, entries: list[int]) -> None:
    several = [[sum(entries)], entries] if per in ("channel", "weight") else [[sum(entries)]]
    assert [found.tolist() for found in sums(per)] == several
