from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

import pytest
import torch
from cases import (
    INNERS,
    advance,
    classes,
    cross_entropy_with_decay,
    evaluated_cross_entropy,
    noisy_model,
    noisy_run,
    same,
    shuffled,
    through_disk,
)
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from hoptim import BilevelOptimizer, HyperParameters, Implicit, Neumann, Problem, Record, Status
from hoptim.training.record import cosine_in_common

DIVERGING = Implicit(Neumann(terms=1000, step_size=1e3))


# One hyperstep, by hand


def quadratic(outer: Callable[[Any], torch.optim.Optimizer], start: float = 1.0, constraint: Any = constraints.real) -> Any:
    """w* = a, L_V = w²/2: at w = 3 the hypergradient is 3 for each entry of the hyperparameter."""
    model = nn.ParameterDict({"w": torch.full((2,), 3.0)})
    hparams = HyperParameters({"a": torch.full((2,), start)}, {"a": constraint})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (m["w"] - h["a"]).square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: 0.5 * m["w"].square().sum())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return BilevelOptimizer(inner, outer(hparams.parameters()), problem, val_batches=["val"], every=1)


def test_hyperstep_moves_the_leaves_down_the_hypergradient() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1))
    record = optimizer.hyperstep("train")
    torch.testing.assert_close(optimizer.problem.hparams["a"].detach(), torch.full((2,), 1 - 0.1 * 3))
    assert record is optimizer.record
    assert (record.moved, record.status, record.hyper_step) == (True, Status.CONVERGED, 1)
    torch.testing.assert_close(record.hyperparameters["a"], torch.full((2,), 0.7))
    assert optimizer.problem.hparams.get_parameter("a").grad is None


def test_inner_step_comes_first_and_the_hyperstep_sees_the_new_weights() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer.loss("train").backward()
    optimizer.step()
    moved = 3 - 0.1 * (3 - 1)
    torch.testing.assert_close(optimizer.problem.model["w"].detach(), torch.full((2,), moved))
    torch.testing.assert_close(optimizer.problem.hparams["a"].detach(), torch.full((2,), 1 - 0.1 * moved))


def test_nonnegative_is_projected_after_the_outer_step() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=10.0), constraint=constraints.nonnegative)
    record = optimizer.hyperstep("train")
    assert record.hyperparameters["a"].tolist() == [0.0, 0.0]
    assert optimizer.problem.hparams["a"].tolist() == [0.0, 0.0]


def test_positive_is_moved_in_its_leaf() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1), 2.0, constraints.positive)
    optimizer.hyperstep("train")
    expected = math.exp(math.log(2.0) - 0.1 * 3 * 2.0)  # dL/dθ = 3 · dλ/dθ = 3 · λ
    torch.testing.assert_close(optimizer.problem.hparams["a"].detach(), torch.full((2,), expected))


def test_old_gradients_of_the_hyperparameters_play_no_part() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1))
    for leaf in optimizer.problem.hparams.parameters():
        leaf.grad = torch.full_like(leaf, 100.0)
    optimizer.hyperstep("train")
    torch.testing.assert_close(optimizer.problem.hparams["a"].detach(), torch.full((2,), 0.7))


def test_hyperstep_leaves_the_gradients_of_the_weights_alone() -> None:
    run = noisy_run(every=None)
    advance(run, 0, 2)
    before = [p.grad.clone() for p in run.model.parameters()]
    assert run.optimizer.hyperstep().moved
    assert same([p.grad for p in run.model.parameters()], before)


@pytest.mark.parametrize("hparams", [nn.ModuleDict({"a": nn.Linear(1, 2, bias=False)}), nn.Linear(1, 2, bias=False)])
def test_any_module_of_hyperparameters_is_moved_and_recorded(hparams: nn.Module) -> None:
    hparams = hparams.double()
    model = nn.ParameterDict({"w": torch.full((2,), 3.0)})
    (leaf,) = hparams.parameters()
    nn.init.ones_(leaf)

    def train(m: Any, h: Any, b: Any) -> Tensor:
        module = h["a"] if isinstance(h, nn.ModuleDict) else h
        return 0.5 * (m["w"] - module(torch.ones(1))).square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: 0.5 * m["w"].square().sum())
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=0.1)
    record = BilevelOptimizer(inner, outer, problem, val_batches=["val"]).hyperstep("train")
    torch.testing.assert_close(leaf.detach(), torch.full((2, 1), 0.7))
    (value,) = record.hyperparameters.values()
    assert torch.equal(value, leaf)


# loss()


def test_loss_fills_no_gradient_of_the_hyperparameters() -> None:
    run = noisy_run()
    run.optimizer.loss(run.batches[0]).backward()
    assert [p.grad for p in run.hparams.parameters()] == [None]
    assert all(p.grad is not None for p in run.model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_loss_sees_the_hyperparameters_as_they_are_now(dtype: torch.dtype | None) -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer.hyperstep("train")
    if dtype:
        optimizer.problem.hparams.to(dtype)
    assert optimizer.loss("train").item() == pytest.approx(0.5 * 2 * (3 - 0.7) ** 2, rel=1e-6)
    optimizer.hyperstep("train")
    assert optimizer.loss("train").item() == pytest.approx(0.5 * 2 * (3 - 0.4) ** 2, rel=1e-6)


def test_loss_sees_hyperparameters_that_were_loaded() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer.loss("train")
    optimizer.problem.hparams.load_state_dict({"a": torch.zeros(2)})
    assert optimizer.loss("train").item() == pytest.approx(9.0)


# When a solve fails


def test_failed_solve_moves_nothing_and_says_so() -> None:
    run = noisy_run(hypergradient=DIVERGING, every=2)
    before = copy.deepcopy(run.hparams.state_dict())
    with pytest.warns(UserWarning, match="hyperstep 1 failed and moved nothing: STEP_TOO_LARGE.*smaller step_size"):
        advance(run, 0, 2)
    record = run.optimizer.record
    assert same(run.hparams.state_dict(), before)
    assert (record.moved, record.status, record.row()["moved"]) == (False, Status.STEP_TOO_LARGE, False)
    assert record.result.grads["decay"].isnan()
    assert record.result.solution.products <= 64
    assert run.optimizer.outer.state_dict()["state"] == {}
    assert [p.grad for p in run.hparams.parameters()] == [None]


@pytest.mark.filterwarnings("error")
def test_second_failure_of_a_kind_is_recorded_without_a_warning() -> None:
    run = noisy_run(hypergradient=DIVERGING, every=None)
    advance(run, 0, 1)
    with pytest.warns(UserWarning, match="STEP_TOO_LARGE"):
        run.optimizer.hyperstep()
    assert not run.optimizer.hyperstep().moved
    assert run.optimizer.hyper_steps == 2


def test_non_finite_loss_moves_nothing() -> None:
    run = noisy_run(every=None)
    x, y = classes(8, 0)
    before = copy.deepcopy(run.hparams.state_dict())
    with pytest.warns(UserWarning, match="NON_FINITE_LOSS.*validation loss is nan"):
        record = run.optimizer.hyperstep((x, y), (x * math.nan, y))
    assert not record.moved
    assert same(run.hparams.state_dict(), before)


def test_mild_negative_curvature_is_a_remark_and_moves() -> None:
    model = nn.ParameterDict({"w": torch.tensor([1.0, 1.0])})
    hparams = HyperParameters({"a": torch.tensor(0.0)})
    H = torch.tensor([-0.02, 1.0])

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (H * m["w"].square()).sum() - h["a"] * m["w"].sum()

    problem = Problem(model, hparams, train, lambda m, h, b: m["w"][0])
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=1.0)
    method = Implicit(Neumann(terms=10, step_size=1.0))
    record = BilevelOptimizer(inner, outer, problem, val_batches=[0], hypergradient=method).hyperstep("train")
    assert (record.moved, record.status) == (True, Status.NEGATIVE_CURVATURE)
    assert hparams["a"].item() == pytest.approx(-sum(1.02**j for j in range(11)))


# An optimizer in the eyes of torch


def test_it_is_an_optimizer_whose_groups_state_and_defaults_are_the_inner_ones() -> None:
    run = noisy_run("adam", every=None)
    advance(run, 0, 1)
    optimizer = run.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}


@pytest.mark.parametrize("inner", INNERS)
def test_without_hypersteps_a_run_is_the_inner_optimizer_alone(inner: str) -> None:
    run = noisy_run(inner, every=None)
    ours: list[Tensor] = []
    advance(run, 0, 30, lambda: ours.append(torch.cat([p.detach().flatten() for p in run.model.parameters()])))

    torch.manual_seed(0)
    model, decay, batches = noisy_model(), run.hparams["decay"].detach(), run.batches
    bare = INNERS[inner](model.parameters())
    for i in range(30):
        bare.zero_grad()
        cross_entropy_with_decay(model, {"decay": decay}, batches[i % 5]).backward()
        bare.step()
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), ours[i])
    state = run.optimizer.state_dict()
    del state["hoptim"]
    assert same(state, bare.state_dict())
    assert same(dict(run.model.state_dict()), dict(model.state_dict()))


def test_closure_is_called_by_the_inner_step_and_its_loss_returned() -> None:
    run, plain = noisy_run(every=2), noisy_run(every=2)
    losses = []

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.optimizer.loss(run.batches[0])
        loss.backward()
        losses.append(loss)
        return loss

    torch.manual_seed(1)
    returned = [run.optimizer.step(closure) for _ in range(2)]
    plain.batches = plain.batches[:1]
    torch.manual_seed(1)
    advance(plain, 0, 2)
    assert returned == losses
    assert run.optimizer.hyper_steps == 1
    assert same(dict(run.model.state_dict()), dict(plain.model.state_dict()))
    assert same(dict(run.hparams.state_dict()), dict(plain.hparams.state_dict()))


def test_zero_grad_clears_the_weights() -> None:
    run = noisy_run()
    run.optimizer.loss(run.batches[0]).backward()
    run.optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in run.model.parameters())
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in run.model.parameters())


def test_added_group_is_the_inner_optimizers() -> None:
    run = noisy_run(every=None)
    extra = nn.Parameter(torch.ones(1))
    run.optimizer.add_param_group({"params": [extra], "lr": 7.0})
    extra.grad = torch.ones(1)
    run.optimizer.step()
    assert run.optimizer.inner.param_groups[1]["lr"] == 7.0
    assert extra.item() == 1.0 - 7.0 * 1.9  # Nesterov: g + 0.9 g


def test_added_group_may_come_as_a_generator() -> None:
    run, extra = noisy_run(), nn.Linear(2, 1)
    run.optimizer.add_param_group({"params": extra.parameters()})
    added = run.optimizer.inner.param_groups[1]["params"]
    assert [id(p) for p in added] == [id(p) for p in extra.parameters()]


def test_grad_scaler_skips_a_step_and_it_does_not_count() -> None:
    run = noisy_run(every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, steps in ((1.0, 1), (math.inf, 1), (1.0, 2)):
        run.optimizer.zero_grad()
        scaler.scale(run.optimizer.loss(run.batches[0]) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        assert (run.optimizer.inner_steps, run.optimizer.hyper_steps) == (steps, steps)


# Copies


def copied(optimizer: BilevelOptimizer) -> BilevelOptimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: BilevelOptimizer) -> BilevelOptimizer:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
@pytest.mark.parametrize("loader", [False, True], ids=["list", "loader"])
@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_goes_on_to_the_same_bits_and_leaves_the_original_alone(
    duplicate: Callable[[Any], Any], loader: bool, scheduled: bool
) -> None:
    run = noisy_run("adam", val_batches=shuffled(own_generator=True) if loader else None, every=2)
    if scheduled:
        lrs.StepLR(run.optimizer, 3)
    advance(run, 0, 5)
    twin = copy.copy(run)
    twin.optimizer = duplicate(run.optimizer)
    twin.problem = twin.optimizer.problem
    here = copy.deepcopy([run.problem.model.state_dict(), run.problem.hparams.state_dict()])
    state = torch.get_rng_state()
    advance(twin, 5, 9)
    assert same([run.problem.model.state_dict(), run.problem.hparams.state_dict()], here)
    torch.set_rng_state(state)
    advance(run, 5, 9)
    assert (twin.optimizer.every, twin.optimizer.inner_steps, twin.optimizer.hyper_steps) == (2, 9, 4)
    assert same(dict(twin.problem.model.state_dict()), dict(run.problem.model.state_dict()))
    assert same(dict(twin.problem.hparams.state_dict()), dict(run.problem.hparams.state_dict()))
    assert "hoptim" in twin.optimizer.state_dict()


# Interrupted and restored


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.full((4,), float(i)), torch.tensor(i % 3)) for i in range(8)])


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "list": lambda: {"val_batches": [classes(16, i) for i in range(3)]},
    "shuffled": lambda: {"val_batches": shuffled(own_generator=False)},
    "shuffled, own generator": lambda: {"val_batches": shuffled(own_generator=True)},
    "generator in the sampler": lambda: {
        "val_batches": DataLoader(
            data := TensorDataset(*classes(20, 2)),
            4,
            sampler=RandomSampler(data, generator=torch.Generator().manual_seed(9)),
        )
    },
    "iterable dataset": lambda: {"val_batches": DataLoader(Stream(), batch_size=4)},
    "train_batches too": lambda: {"train_batches": shuffled(own_generator=True)},
}


STOPS, END = (1, 4, 7, 12, 17), 24


def fresh(name: str, seed: int) -> Any:
    return noisy_run("adam", every=2, warmup=3, seed=seed, **BATCHES[name]())


@cache
def whole_and_saved(name: str) -> tuple[Any, dict[int, Any]]:
    """A run without a stop, and what another one saves at each of them, which changes nothing."""
    whole = fresh(name, 0)
    advance(whole, 0, END)
    first, saved = fresh(name, 0), {}
    for start, stop in pairwise((0, *STOPS, END)):
        advance(first, start, stop)
        saved[stop] = through_disk([first.model.state_dict(), first.optimizer.state_dict(), torch.get_rng_state()])
    assert same(first.optimizer.state_dict(), whole.optimizer.state_dict())
    return whole, saved


@pytest.mark.filterwarnings("ignore:hyperstep")
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", BATCHES)
def test_interrupted_run_continues_to_the_same_bits(name: str, stop: int) -> None:
    whole, saved = whole_and_saved(name)
    second = fresh(name, 99)
    second.model.load_state_dict(saved[stop][0])
    second.optimizer.load_state_dict(saved[stop][1])
    torch.set_rng_state(saved[stop][2])
    advance(second, stop, END)

    assert second.optimizer.hyper_steps == whole.optimizer.hyper_steps == 11
    assert same(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert same(timeless(second.optimizer.record), timeless(whole.optimizer.record))


def timeless(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.row().items() if key != "hyper_seconds"}


def test_loading_leaves_the_global_generator_alone() -> None:
    run = noisy_run("sgd", shuffled(own_generator=False), every=1)
    advance(run, 0, 3)
    state = run.optimizer.state_dict()
    before = torch.get_rng_state()
    run.optimizer.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_scheduler_still_moves_the_inner_learning_rate_after_a_load() -> None:
    run = noisy_run(every=None)
    scheduler = lrs.StepLR(run.optimizer, step_size=1, gamma=0.5)
    run.optimizer.load_state_dict(through_disk(run.optimizer.state_dict()))
    advance(run, 0, 1)
    scheduler.step()
    assert run.optimizer.inner.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] == 0.025
    assert "state" not in vars(run.optimizer)
    assert "param_groups" not in vars(run.optimizer)


def test_saved_state_is_the_inner_optimizers_and_one_entry_more() -> None:
    run = noisy_run("adam", every=2)
    advance(run, 0, 3)
    state = run.optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "hoptim"}
    assert same(state["hoptim"]["hparams"], dict(run.hparams.state_dict()))
    assert (state["hoptim"]["inner_steps"], state["hoptim"]["hyper_steps"]) == (3, 1)
    assert state["hoptim"]["solver_state"]


def test_failed_load_changes_nothing() -> None:
    run, other = noisy_run("adam", every=1), noisy_run("adam", every=1, seed=1)
    advance(other, 0, 2)
    state = other.optimizer.state_dict()
    state["param_groups"] = [{**state["param_groups"][0], "params": [0]}]
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match="size of optimizer's group"):
        run.optimizer.load_state_dict(state)
    assert same(run.optimizer.state_dict(), before)


# The schedule, the batches, the record


@pytest.mark.parametrize(
    ("every", "warmup", "expected"),
    [(1, 0, [1, 2, 3, 4, 5, 6, 7, 8]), (3, 0, [3, 6]), (2, 5, [6, 8]), (4, 4, [4, 8]), (1, 7, [7, 8]), (None, 0, [])],
)
@pytest.mark.filterwarnings("ignore:hyperstep")
def test_when_hypersteps_are_due(every: int | None, warmup: int, expected: list[int]) -> None:
    due: list[int] = []
    run = noisy_run(every=every, warmup=warmup, hooks=[lambda record: due.append(record.inner_step)])
    advance(run, 0, 8)
    assert due == expected
    assert (run.optimizer.inner_steps, run.optimizer.hyper_steps) == (8, len(expected))


def recording(**options: Any) -> tuple[Any, list[Any]]:
    """A run whose losses write down the batches that hypersteps give them."""
    seen: list[Any] = []
    run = noisy_run(**options)
    inner, outer = run.problem.train_loss, run.problem.val_loss
    batch = classes(8, 0)

    def train(m: Any, h: Any, name: Any) -> Tensor:
        seen.append(name) if h is run.hparams else None
        return inner(m, h, batch)

    def val(m: Any, h: Any, name: Any) -> Tensor:
        seen.append(name)
        return outer(m, h, batch)

    run.problem.train_loss, run.problem.val_loss = train, val
    return run, seen


def test_hyperstep_uses_the_last_training_batch_and_cycles_the_validation_batches() -> None:
    run, seen = recording(every=2, val_batches=["v0", "v1"])
    run.batches = ["t0", "t1", "t2", "t3", "t4", "t5"]
    run.optimizer._progress.first_steps = None  # no dry run
    advance(run, 0, 6)
    assert seen == ["v0", "t1", "v1", "t3", "v0", "t5"]


def test_hyperstep_draws_from_train_batches_where_given() -> None:
    run, seen = recording(every=1, val_batches=["v"], train_batches=["a", "b"])
    run.batches = ["t"]
    run.optimizer._progress.first_steps = None  # no dry run
    advance(run, 0, 3)
    assert seen == ["v", "a", "v", "b", "v", "a"]


def test_batches_given_to_hyperstep_are_used_and_none_is_drawn() -> None:
    run, seen = recording(every=None, val_batches=["v0", "v1"])
    run.optimizer.hyperstep("train", "val")
    run.optimizer.hyperstep("train")
    assert seen == ["val", "train", "v0", "train"]


def test_hooks_get_the_record_in_order() -> None:
    seen: list[tuple[str, Record]] = []
    run = noisy_run(every=1, hooks=[lambda r: seen.append(("a", r)), lambda r: seen.append(("b", r))])
    advance(run, 0, 1)
    assert seen == [("a", run.optimizer.record), ("b", run.optimizer.record)]


@pytest.mark.parametrize("method", [Implicit(Neumann(terms=3)), Implicit(Neumann(terms=0, step_size=0.1)), DIVERGING])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_row_of_a_record_is_plain_and_right(method: Implicit) -> None:
    run = noisy_run(every=2, hypergradient=method)
    advance(run, 0, 2)
    record, row = run.optimizer.record, run.optimizer.record.row()
    solution = record.result.solution
    assert all(value is None or type(value) in (int, float, bool, str) for value in row.values())
    assert json.loads(json.dumps(row, allow_nan=False)).keys() == row.keys()
    assert (row["inner_step"], row["hyper_step"], row["moved"]) == (2, 1, solution.status.ok)
    assert (row["status"], row["products"], row["step_size"]) == (
        solution.status.name,
        solution.products,
        solution.step_size,
    )
    assert row["residual"] == (solution.residuals[-1].item() if len(solution.residuals) else None)
    norm = record.result.grads["decay"].abs().item()
    assert row["hypergradient_norm"] == (pytest.approx(norm) if record.moved else None)
    assert row["hyper_seconds"] > 0


def test_losses_of_a_record_are_those_of_the_losses() -> None:
    run = noisy_run(every=None)
    advance(run, 0, 3)
    run.model.eval()
    before = {"decay": run.hparams["decay"].detach().clone()}
    row = run.optimizer.hyperstep(run.batches[0], run.batches[1]).row()
    assert row["train_loss"] == cross_entropy_with_decay(run.model, before, run.batches[0]).item()
    assert row["val_loss"] == evaluated_cross_entropy(run.model, None, run.batches[1]).item()


def test_recorded_values_are_copies() -> None:
    optimizer = quadratic(lambda p: torch.optim.SGD(p, lr=0.1))
    first, second = optimizer.hyperstep("train"), optimizer.hyperstep("train")
    torch.testing.assert_close(first.hyperparameters["a"], torch.full((2,), 0.7))
    torch.testing.assert_close(second.hyperparameters["a"], torch.full((2,), 0.4))


def test_products_are_fewer_from_the_second_hyperstep_on() -> None:
    products: list[int] = []
    run = noisy_run(every=4, hooks=[lambda record: products.append(record.result.solution.products)])
    advance(run, 0, 12)
    assert products == [10 + 3, 2 + 3, 2 + 3]


def test_a_failed_solve_makes_the_next_one_start_afresh() -> None:
    run = noisy_run(every=None)
    advance(run, 0, 2)
    x, y = run.batches[0]
    assert run.optimizer.hyperstep().result.solution.products == 13
    with pytest.warns(UserWarning, match="NON_FINITE_LOSS"):
        run.optimizer.hyperstep((x, y), (x * math.nan, y))
    assert run.optimizer.hyperstep().result.solution.products == 13


def test_learned_decay_improves_the_validation_loss() -> None:
    """Ridge regression whose true weights are zero: more decay is better, and the optimizer finds it."""
    x, y = torch.randn(20, 4), torch.randn(20)
    model = nn.Linear(4, 1, bias=False)
    hparams = HyperParameters({"decay": torch.tensor(1e-2)}, {"decay": constraints.positive})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return (m(x).squeeze(1) - y).square().mean() + h["decay"] * m.weight.square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: m(x).square().mean())
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(hparams.parameters(), lr=0.1)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[0], every=10)
    losses = []
    for _ in range(500):
        optimizer.zero_grad()
        optimizer.loss(0).backward()
        optimizer.step()
        losses.append(float(optimizer.record.result.val_loss) if optimizer.record else math.inf)
    assert hparams["decay"] > 0.5
    assert losses[-1] < 0.2 * losses[20]


# What a second look found


def pair(inner_holds: Any = None, outer_holds: Any = None, **options: Any) -> BilevelOptimizer:
    """Two weights and two hyperparameters; each optimizer may be given fewer."""
    model = nn.ParameterDict({"v": torch.ones(1), "w": torch.ones(1)})
    hparams = HyperParameters({"a": torch.ones(1), "b": torch.ones(1)})
    problem = Problem(
        model,
        hparams,
        lambda m, h, x: (m["v"] - h["a"]).square().sum() + (m["w"] - h["b"]).square().sum(),
        lambda m, h, x: m["v"].square().sum() + m["w"].square().sum(),
    )
    weights, leaves = list(model.parameters()), list(hparams.parameters())
    inner = torch.optim.SGD(weights if inner_holds is None else [weights[i] for i in inner_holds], lr=0.1)
    outer = torch.optim.SGD(leaves if outer_holds is None else [leaves[i] for i in outer_holds], lr=0.1)
    return BilevelOptimizer(inner, outer, problem, val_batches=["val"], every=1, **options)


def test_what_an_optimizer_does_not_hold_is_named() -> None:
    with pytest.warns(UserWarning, match=r"inner optimizer does not hold \['w'\]"):
        pair(inner_holds=[0])
    with pytest.warns(UserWarning, match=r"outer optimizer does not hold \['b'\]"):
        optimizer = pair(outer_holds=[0])
    optimizer.hyperstep("train")
    assert [leaf.grad for leaf in optimizer.problem.leaves().values()] == [None, None]
    assert optimizer.problem.hparams["b"].item() == 1.0


def test_gradients_are_cleared_though_the_outer_step_raises() -> None:
    optimizer = pair()
    optimizer.outer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.hyperstep("train")
    assert [leaf.grad for leaf in optimizer.problem.leaves().values()] == [None, None]


def test_a_loss_without_gradient_is_no_training_batch() -> None:
    seen: list[Any] = []
    optimizer = pair(hooks=[lambda record: seen.append(record.row()["train_loss"])])
    train = optimizer.problem.train_loss
    optimizer.problem.train_loss = lambda m, h, b: train(m, h, None) + b
    optimizer.loss(2.0).backward()
    with torch.no_grad():
        optimizer.loss(1000.0)
    optimizer.step()
    assert seen[0] == pytest.approx(2.0)


def test_nonnegative_hyperparameters_inside_another_module_are_projected() -> None:
    inside = HyperParameters({"a": torch.full((1,), 0.1)}, {"a": constraints.nonnegative})
    hparams = nn.ModuleDict({"decays": inside})
    model = nn.ParameterDict({"w": torch.ones(1)})
    problem = Problem(
        model, hparams, lambda m, h, b: (m["w"] - h["decays"]["a"]).square().sum(), lambda m, h, b: m["w"].square().sum()
    )
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=10.0)
    BilevelOptimizer(inner, outer, problem, val_batches=["val"], every=1).hyperstep("train")
    assert inside["a"].tolist() == [0.0]


def test_a_load_that_fails_in_the_hyperparameters_changes_nothing() -> None:
    run, other = noisy_run("adam", every=1), noisy_run("adam", every=1, seed=1)
    advance(run, 0, 1)
    advance(other, 0, 2)
    state = copy.deepcopy(other.optimizer.state_dict())
    state["hoptim"]["hparams"]["decay"] = torch.ones(3, 1)
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for decay"):
        run.optimizer.load_state_dict(state)
    assert same(run.optimizer.state_dict(), before)


class Packed(torch.optim.SGD):
    """An optimizer that keeps its state in a form of its own, as those in 8 bits do."""

    packed = torch.zeros(3, dtype=torch.uint8)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "packed": self.packed.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.packed = state_dict["packed"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "packed"})


def test_the_inner_optimizers_own_form_of_state_is_kept() -> None:
    def made() -> BilevelOptimizer:
        optimizer = pair()
        inner = Packed(optimizer.problem.model.parameters(), lr=0.1)
        return BilevelOptimizer(inner, optimizer.outer, optimizer.problem, val_batches=["val"])

    first, second = made(), made()
    first.inner.packed = torch.tensor([1, 2, 3], dtype=torch.uint8)
    second.load_state_dict(first.state_dict())
    assert second.inner.packed.tolist() == [1, 2, 3]
    assert second.inner.packed.dtype == torch.uint8


def test_a_batch_that_leaves_a_hyperparameter_out_is_an_error_only_at_first() -> None:
    optimizer = pair()
    train = optimizer.problem.train_loss
    optimizer.problem.train_loss = lambda m, h, b: train(m, h if b == "both" else {"a": h["a"], "b": 0.0}, b)
    with pytest.raises(ValueError, match=r"\['b'\] are touched by neither loss"):
        optimizer.hyperstep("one")
    optimizer.hyperstep("both")
    before = optimizer.problem.hparams["b"].item()
    record = optimizer.hyperstep("one")
    assert record.result.untouched == ("b",)
    assert (record.moved, optimizer.problem.hparams["b"].item()) == (True, before)


def test_cosine_to_last_is_that_of_consecutive_hypergradients_also_over_a_checkpoint() -> None:
    run, other = noisy_run(every=1), noisy_run(every=1)
    found: list[Any] = []
    advance(run, 0, 4, after=lambda: found.append((run.optimizer.record.result.grads["decay"], run.optimizer.record)))
    assert found[0][1].cosine_to_last is None
    for (before, _), (now, record) in pairwise(found):
        assert record.cosine_to_last == pytest.approx(float(torch.sign(before * now)))
        assert record.last_gradient["decay"] is before  # so that a history of records holds each gradient once
    advance(other, 0, 2)
    resumed = noisy_run(every=1)
    resumed.model.load_state_dict(other.model.state_dict())
    resumed.optimizer.load_state_dict(other.optimizer.state_dict())
    record = resumed.optimizer.hyperstep(run.batches[0], run.batches[1])
    assert record.row()["cosine_to_last"] is not None


def test_cosine_of_two_vectors_is_over_what_both_touch() -> None:
    a, b, c = ({"x": torch.tensor(x)} for x in ([2.0, 1.0, 0.0, 5.0], [1.0, 2.0, 3.0, 0.0], [0.0, 0.0, -1.0, 0.0]))
    expected = [None, pytest.approx(4 / 5), pytest.approx(1.0), pytest.approx(-1.0), None]
    assert [cosine_in_common(*two) for two in pairwise(({}, a, b, b, c, a))] == expected
    assert cosine_in_common({"x": torch.zeros(4)}, a) is None
    assert cosine_in_common({"x": torch.zeros(3)}, a) is None


def test_cosine_of_example_weights_is_known_where_batches_share_examples() -> None:
    torch.manual_seed(0)
    model, (x, y) = noisy_model(), classes(12, 0)
    hparams = HyperParameters({"weight": torch.full((12,), 0.5)}, {"weight": constraints.unit_interval})

    def train(m: Any, h: Any, batch: Any) -> Tensor:
        return (h["weight"][batch] * nn.functional.cross_entropy(m(x[batch]), y[batch], reduction="none")).mean()

    def val(m: Any, h: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(m.eval()(x[batch]), y[batch])

    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, Problem(model, hparams, train, val), val_batches=[torch.arange(6, 12)])
    records = [optimizer.hyperstep(torch.tensor(batch)) for batch in ([0, 1, 2], [3, 4, 5], [3, 4, 8])]
    before, now = (record.result.grads["weight"][[3, 4]] for record in records[1:])
    shared = nn.functional.cosine_similarity(before, now, dim=0).item()
    assert [record.cosine_to_last for record in records] == [None, None, pytest.approx(shared)]
    assert optimizer.record.row()["cosine_to_last"] == pytest.approx(shared)


def test_the_loss_is_a_tensor_for_a_type_checker() -> None:
    assert get_type_hints(BilevelOptimizer.loss)["return"] is Tensor
