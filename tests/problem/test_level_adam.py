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
from hoptim.problem.level_adam import Level, LevelAdam
from hoptim.problem.outer_adam import outer_adam
from hoptim.recipes import Dropout, ExampleWeights, LabelSmoothing, WeightDecay

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


class Moves:
    """The moves of torch's Adam, at the falling rate."""

    def __init__(self, lr: float, betas: tuple[float, float], shape: tuple[int, ...]) -> None:
        self.at = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.at], lr=lr, betas=betas, eps=1e-12)
        self.fall = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda t: (1 + t / 2) ** -0.5)

    def after(self, grad: Tensor) -> Tensor:
        before, self.at.grad = self.at.detach().clone(), grad
        self.adam.step()
        self.fall.step()
        return self.at.detach() - before


@pytest.mark.parametrize("validation", [50, 200])
def test_the_step_is_the_sum_of_a_level_and_what_sets_finer_ones_and_entries_apart(validation: int) -> None:
    hparams = made()
    found = moved(hparams, hparams.optimizer(validation=validation), 30)
    top, rows = Moves(0.6, (0.5, 0.9), ()), Moves(0.2, (0.5, 0.9), (5,))
    own = {name: Moves(0.1, (0.9, 0.99), tuple(value.shape)) for name, value in TARGET.items()}
    leaves = {name: torch.zeros_like(value) for name, value in TARGET.items()}
    for step in range(30):
        grads = {name: 2 * (leaves[name] - value) for name, value in TARGET.items()}
        by_row = torch.cat([grads["a"].sum(1), grads["b"].sum()[None]])
        level, of_rows = top.after(by_row.sum()), rows.after(by_row)
        of_rows = of_rows - of_rows.mean()
        pull = 0.1 * (1 + step / 2) ** -0.5 * 100 / validation
        for name, shared in (("a", of_rows[:4, None]), ("b", of_rows[4])):
            move, offset = own[name].after(grads[name]), leaves[name] - leaves[name].mean(-1, keepdim=True)
            leaves[name] = leaves[name] + level + shared + move - move.mean(-1, keepdim=True) - pull * offset
    torch.testing.assert_close(found, torch.cat([leaf.flatten() for leaf in leaves.values()]), rtol=1e-11, atol=1e-11)
    assert float((leaves["a"] - TARGET["a"]).std()) < float(TARGET["a"].std()), "entries are on their way"


def test_what_all_entries_have_in_common_takes_one_way_however_many_they_are() -> None:
    """A level over 12 entries that all agree is the level of one."""

    def way(count: int) -> Tensor:
        values = {"a": torch.ones(count).double()}
        hparams = hoptim.HyperParameters(values, {"a": constraints.positive}, [{"a": ALL}])
        return moved(hparams, hparams.optimizer(), 9, lambda leaves: (leaves["a"] - 3).square().sum())

    torch.testing.assert_close(way(12), way(1).expand(12), rtol=1e-12, atol=1e-12)


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
    full = made()
    expected = moved(full, full.optimizer(), 1) - start
    torch.testing.assert_close(step, 0.1 * expected.abs(), rtol=1e-12, atol=0)


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


def test_levels_without_a_gradient_stay_and_a_leaf_without_one_moves_with_the_level_alone() -> None:
    hparams = made()
    outer = hparams.optimizer()
    before = hparams["b"].detach().log()
    moved(hparams, outer, 1, lambda leaves: (leaves["a"] - TARGET["a"]).square().sum())  # zero_grad() leaves None
    step = hparams["b"].detach().log() - before
    assert step.unique().numel() == 1, "entries have no gradient and no step of their own"
    assert step[0].abs() == pytest.approx(0.6, abs=0.2), "the level of all has moved, and their own by 0 less the mean"
    outer.zero_grad()
    before = hparams["b"].detach().clone()
    outer.step()
    assert torch.equal(hparams["b"], before)


def test_one_optimizer_for_several_recipes_has_the_levels_of_each() -> None:
    model = nn.Linear(3, 2)
    hparams = nn.ModuleDict({"decay": WeightDecay(model, per="weight"), "smoothing": LabelSmoothing(), "own": made()})
    outer = outer_adam(hparams.double())
    assert len(_levels(outer)) == 3
    before = {name: leaf.detach().clone() for name, leaf in hparams.named_parameters()}
    for leaf in hparams.parameters():
        leaf.grad = torch.full_like(leaf, 2.0)
    outer.step()
    sizes = {name: (before[name] - leaf).detach() for name, leaf in hparams.named_parameters()}
    assert all(value.allclose(torch.tensor(0.6).double()) for name, value in sizes.items() if "smoothing" not in name)
    assert sizes["smoothing.smoothing"].item() == pytest.approx(0.3)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([{"a": torch.zeros(3)}], TypeError, "'a' is a Tensor.*whole numbers"),
    ([{"a": torch.tensor([True])}], TypeError, "whole numbers"),
    ([{"a": 0}], TypeError, "'a' is an int"),
    ([{"a": torch.tensor([-1])}], ValueError, "negative numbers"),
    ([{"a": torch.arange(4)}], ValueError, r"shape \(4,\).*broadcasts to \(4, 3\)"),
    ([{"a": torch.zeros(2, 3, dtype=torch.long)}], ValueError, r"shape \(2, 3\).*broadcasts to \(4, 3\)"),
    ([{"a": torch.zeros(1, dtype=torch.complex64)}], TypeError, "whole numbers"),
    ([{"a": ALL, "c": ALL}], ValueError, "shared by a, c, of several kinds"),
    ([{"a": torch.zeros(1, 1, 1, dtype=torch.long)}], ValueError, r"broadcasts to \(4, 3\)"),
    ([{"d": torch.tensor(0)}], KeyError, "'d'"),
    ([{"a": ALL}] * 3, ValueError, "3 dicts: give at most two"),
    ([{"a": ALL}, {"a": ROWS, "b": ALL}], ValueError, "the second dict of levels names a, b, the first a"),
    ([{"a": ROWS, "b": ALL}, {"a": ALL, "b": ALL}], ValueError, "the second dict of levels are not within one of the first"),
]


@pytest.mark.parametrize(("levels", "error", "words"), BAD)
def test_levels_that_fit_nothing_are_refused(levels: Any, error: type[Exception], words: str) -> None:
    values = {"a": torch.ones(4, 3), "b": torch.ones(3), "c": torch.ones(3)}
    with pytest.raises(error, match=words):
        hoptim.HyperParameters(values, {"c": constraints.positive}, levels)


def sums(per: str) -> Iterator[Tensor]:
    decay = WeightDecay(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), per=per)  # type: ignore[arg-type]
    for level in _levels(decay.optimizer()):
        yield level.sums([torch.ones_like(leaf) for leaf, _ in level.members])


@pytest.mark.parametrize(("per", "entries"), [("global", [1]), ("tensor", [1, 1]), ("channel", [3, 2]), ("weight", [12, 6])])
def test_decays_have_a_level_for_all_and_one_for_each_tensor_of_several(per: str, entries: list[int]) -> None:
    several = [[sum(entries)], entries] if per in ("channel", "weight") else [[sum(entries)]]
    assert [found.tolist() for found in sums(per)] == several


def test_dropout_a_unit_and_example_weights_of_a_source_share_levels_at_the_rate_of_each() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    dropout, source = Dropout(net, per="unit"), torch.tensor([0, 1, 1, 0, 1])
    weights = ExampleWeights(5, groups=source)
    rates = [[group["lr"] for group in hparams.optimizer().param_groups] for hparams in (dropout, weights)]
    assert rates == [[0.3, 0.3, 0.3], [0.3, 0.3]]
    assert [level.count for level in _levels(dropout.optimizer())] == [1, 2]
    before = weights["example_weight"].detach().logit()
    for leaf in weights.parameters():
        leaf.grad = torch.tensor([1.0, -1.0, -1.0, 3.0, 1.0])
    weights.optimizer().step()
    moves = weights["example_weight"].detach().logit() - before
    own = 0.3 * torch.tensor([0.0, 1.0, 1.0, 0.0, -1.0])
    own[source == 1] -= own[source == 1].mean()
    level = 0.3 * torch.tensor([-1.0, 1.0])  # the sums are 4 and -1
    torch.testing.assert_close(moves, level[source] + own, rtol=1e-5, atol=1e-6)


def test_entries_are_drawn_to_the_mean_and_not_past_it() -> None:
    """With a single validation example the pull would be ten times the offset."""
    hparams = hoptim.HyperParameters({"a": torch.tensor([1.0, 2.0, 4.0])}, {"a": constraints.positive}, [{"a": ALL}])
    outer = hparams.optimizer(validation=1)
    for leaf in hparams.parameters():
        leaf.grad = torch.zeros_like(leaf)
    outer.step()
    torch.testing.assert_close(hparams["a"].detach(), torch.full((3,), 2.0))


def test_a_frozen_leaf_stays_and_does_not_count() -> None:
    hparams, alone = (WeightDecay(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), per="channel").double() for _ in "ab")
    frozen, free = hparams.parameters()
    frozen.requires_grad_(False)
    before, outer = frozen.clone(), hparams.optimizer()
    free.grad = torch.tensor([3.0, -1.0]).double()
    outer.step()
    assert torch.equal(frozen, before)
    one = hoptim.HyperParameters({"a": alone["decay.1.weight"].detach()}, {"a": constraints.positive}, [{"a": ALL}])
    for leaf in one.parameters():
        leaf.grad = torch.tensor([3.0, -1.0]).double()
    one.optimizer().step()
    torch.testing.assert_close(free.detach(), one["a"].detach().log(), rtol=1e-12, atol=0)
    later = alone.optimizer()  # and a leaf that is frozen afterwards
    moving, kept = alone.parameters()
    moving.grad, before = torch.ones_like(moving), kept.clone()
    kept.requires_grad_(False)
    later.step()
    assert torch.equal(kept, before)


def test_a_leaf_that_is_frozen_later_does_not_count_in_the_mean_of_a_level() -> None:
    def moves(names: str) -> list[float]:
        values = {name: torch.tensor(1.0) for name in names}
        hparams = hoptim.HyperParameters(values, dict.fromkeys(names, constraints.positive), [dict.fromkeys(names, ALL)])
        outer = hparams.optimizer()
        for name, leaf in hparams.named_parameters():
            leaf.grad = {"a": torch.tensor(3.0), "b": torch.tensor(2.0)}.get(name)
            leaf.requires_grad_(name != "c")
        outer.step()
        return [hparams[name].item() for name in "ab"]

    assert moves("abc") == pytest.approx(moves("ab"), rel=1e-12)


def test_a_group_that_is_added_later_is_no_level() -> None:
    hparams, extra = made(), nn.Parameter(torch.tensor([5.0]).double())
    outer, alone = hparams.optimizer(), made()
    outer.add_param_group({"params": [extra], "lr": 0.1})
    expected = moved(alone, alone.optimizer(), 1)
    extra.grad = torch.tensor([-1.0]).double()
    loss_of(dict(hparams.named_parameters())).backward()
    outer.step()
    assert torch.equal(torch.cat([leaf.detach().flatten() for leaf in hparams.parameters()]), expected)
    assert extra.item() == pytest.approx(5.1)


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4], [0, 10, 20, 10**13]])
def test_how_levels_are_numbered_does_not_matter(numbers: list[int]) -> None:
    def after(index: Tensor) -> Tensor:
        hparams = hoptim.HyperParameters(
            {"a": torch.ones(4).double()}, {"a": constraints.positive}, [{"a": ALL}, {"a": index}]
        )
        return moved(hparams, hparams.optimizer(), 2, lambda leaves: (leaves["a"] * torch.tensor([1.0, 2, 3, -4])).sum())

    assert torch.equal(after(torch.tensor(numbers)), after(torch.arange(4)))


def test_sums_and_means_are_exact_in_half_precision_and_over_many_entries() -> None:
    leaf = torch.zeros(4000, dtype=torch.float16, requires_grad=True)
    outer = LevelAdam([leaf], [Level([(leaf, torch.zeros(4000, dtype=torch.long))], {"lr": 0.5})], lr=0.1)
    leaf.grad = torch.ones_like(leaf)
    outer.step()
    assert leaf.detach().unique().tolist() == [-0.5]
    many = torch.ones(2**24 + 8, dtype=torch.float32)  # which has no 2^24 + 1
    level = Level([(many, (torch.arange(len(many)) == 0).long())], {})
    assert level.sums([many]).tolist() == [2**24 + 7, 1]


def test_leaves_may_be_cast_after_the_optimizer_is_made() -> None:
    hparams, doubled = made().float(), made()
    outer = hparams.optimizer()
    hparams.double()
    torch.testing.assert_close(moved(hparams, outer, 3), moved(doubled, doubled.optimizer(), 3), rtol=1e-6, atol=1e-6)


def test_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"step\(\) got a closure"):
        made().optimizer().step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize("validation", [0, -5, 0.5, None, "a", True])
def test_a_number_of_validation_examples_that_is_none_is_refused(validation: Any) -> None:
    with pytest.raises(ValueError, match=r"validation is .*: give the number of validation examples"):
        made().optimizer(validation=validation)


def test_entries_of_one_number_each_are_not_drawn_together() -> None:
    hparams = WeightDecay(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    hparams["decay.0.weight"] = torch.tensor(1e-1)
    hparams["decay.1.weight"] = torch.tensor(1e-6)
    for leaf in hparams.parameters():
        leaf.grad = torch.zeros_like(leaf)
    hparams.optimizer().step()
    torch.testing.assert_close(hparams["decay.0.weight"].item(), 0.1, rtol=1e-5, atol=0)


def test_groups_of_a_recipe_without_their_levels_are_refused() -> None:
    model = nn.Linear(3, 1)
    hparams = nn.ModuleDict({"decay": WeightDecay(model, per="weight"), "smoothing": LabelSmoothing()})
    groups = [group for one in hparams.values() for group in one.optimizer().param_groups]  # type: ignore[operator]
    problem = hoptim.Problem(model, hparams, lambda *_: model.weight.sum(), lambda *_: model.weight.sum())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="without the levels that belong to them: give hoptim"):
        hoptim.BilevelOptimizer(inner, torch.optim.Adam(groups), problem, val_batches=[0])


def test_trusted_examples_do_not_count_in_the_level_of_their_group() -> None:
    moves = []
    for n, trusted in ((2, None), (10, range(2, 10))):
        weights = ExampleWeights(n, trusted=trusted, groups=torch.zeros(n, dtype=torch.long))
        leaf = next(weights.parameters())
        leaf.grad = torch.zeros_like(leaf)
        leaf.grad[:2] = torch.tensor([1.0, 2.0])
        weights.optimizer().step()
        moves.append(leaf.detach()[:2].tolist())
    assert moves[0] == pytest.approx([-0.3, -0.3], abs=1e-6), "by their level alone"
    assert moves[1] == pytest.approx(moves[0], abs=1e-6)
