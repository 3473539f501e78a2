"""CrossValidated: K separate problems and the mean of their hypergradients, then a plain training, by value."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from jobs import ROOT
from plain import own_threads
from torch import nn
from torch.distributions import constraints
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader, Subset, TensorDataset

import hoptim
from hoptim import CrossValidated, HyperParameters
from hoptim.problem.random_stream import RandomStream
from hoptim.training.fold_optimizer import FoldOptimizer, due_steps

DRAW = torch.Generator().manual_seed(0)
N = 11
X = torch.randn(N, 3, generator=DRAW, dtype=torch.float64)
Y = torch.randn(N, 1, generator=DRAW, dtype=torch.float64)
FOLDS = [([0, 1, 2], [3, 4]), ([0, 1, 2, 3, 4], [5, 6, 7]), (list(range(8)), [8, 9, 10])]  # as TimeSeriesSplit has them


def make(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def decays() -> Any:
    return nn.ParameterDict({"decay": nn.Parameter(torch.tensor([-2.0, -1.0], dtype=torch.float64))})


def val_loss(model: Any, hparams: Any, batch: Any) -> Any:
    return (model(X[batch]) - Y[batch]).square().mean() + 0.1 * hparams["decay"].sin().sum()


def train_loss(model: Any, hparams: Any, batch: Any) -> Any:
    fit = (model(X[batch]) - Y[batch]).square().mean()
    return fit + sum(hparams["decay"][i].exp() * model[2 * i].weight.square().sum() for i in (0, 1))


def inner(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.5)


def loop(steps: int, size: int = 2) -> Any:
    """Mini-batches in order, over and over."""

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            optimizer.loss(examples.roll(-size * step)[:size]).backward()
            optimizer.step()

    return train


def cross_validated(hparams: Any = None, **changed: Any) -> CrossValidated:
    hparams = decays() if hparams is None else hparams
    learned = isinstance(hparams, nn.Module) and list(hparams.parameters())
    outer = SGD(learned, lr=0.5) if learned else None
    settings = {"make": make, "train_loss": train_loss, "val_loss": val_loss, "inner": inner, "examples": N}
    settings |= {"folds": FOLDS, "steps": 40, "hypersteps": 5, "outer": outer, **changed}
    return CrossValidated(hparams=hparams, **settings)


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs)


# The mathematics


def test_it_is_k_problems_and_the_mean_of_their_hypergradients_to_1e_9():
    found = cross_validated(average=False).fit(loop(40))
    hparams = decays()
    problems = [hoptim.Problem(make(), hparams, train_loss, val_loss) for _ in FOLDS]
    inners = [inner(problem.model) for problem in problems]
    for step in range(40):
        batches = [torch.tensor(train).roll(-2 * step)[:2] for train, _ in FOLDS]
        for problem, optimizer, batch in zip(problems, inners, batches, strict=True):
            optimizer.zero_grad()
            problem.loss(batch).backward()
            optimizer.step()
        if step + 1 in (16, 22, 28, 34, 40):
            held_out = [torch.tensor(part) for _, part in FOLDS]
            grads = [
                hoptim.hypergradient(problem, batch, part).grads["decay"]
                for problem, batch, part in zip(problems, batches, held_out, strict=True)
            ]
            with torch.no_grad():
                hparams["decay"] -= 0.5 * sum(grads) / 3
    torch.testing.assert_close(found.hyperparameters["decay"], hparams["decay"].detach(), rtol=0, atol=1e-9)
    assert not torch.allclose(hparams["decay"], decays()["decay"], atol=0.01)
    for model, problem in zip(found.models, problems, strict=True):
        assert same(model, problem.model, 1e-9)
    last = hoptim.Problem(make(), hparams, train_loss, val_loss)
    optimizer = inner(last.model)
    for step in range(40):
        optimizer.zero_grad()
        last.loss(torch.arange(N).roll(-2 * step)[:2]).backward()
        optimizer.step()
    assert same(found.model, last.model, 1e-9)


def test_of_a_ridge_regression_it_is_the_closed_form():
    """L_T = ½ mean (w x − y)² + ½ λ w², L_V = ½ mean (w x − y)²: dL_V/dλ = −g w / (mean x² + λ)."""
    x, y, records = X[:, 0], Y[:, 0], []

    def val(model: Any, hparams: Any, batch: Any) -> Any:
        return 0.5 * (model.weight[0, 0] * x[batch] - y[batch]).square().mean()

    def train(model: Any, hparams: Any, batch: Any) -> Any:
        return val(model, hparams, batch) + 0.5 * hparams["decay"] * model.weight.square().sum()

    def whole(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    hparams = nn.ParameterDict({"decay": nn.Parameter(torch.tensor(0.3, dtype=torch.float64))})
    cv = cross_validated(
        hparams,
        make=lambda: nn.Linear(1, 1, bias=False).double(),
        train_loss=train,
        val_loss=val,
        inner=lambda model: SGD(model.parameters(), lr=0.1),
        outer=SGD(hparams.parameters(), lr=0.1),
        steps=4,
        hypersteps=1,
        hooks=[records.append],
    )
    found = cv.fit(whole)
    parts = []
    for model, (train_part, held_out) in zip(found.models, FOLDS, strict=True):
        w = model.weight.item()  # which does not move after the last step
        g = float((x[held_out] * (w * x[held_out] - y[held_out])).mean())
        parts.append(-g * w / (float(x[train_part].square().mean()) + 0.3))
    (record,) = records
    torch.testing.assert_close(record.result.grads["decay"], torch.tensor(parts, dtype=torch.float64), rtol=0, atol=1e-9)
    assert found.hyperparameters["decay"].item() == pytest.approx(0.3 - 0.1 * sum(parts) / 3, abs=1e-9)
    spread = torch.tensor(parts).std() / 3**0.5
    assert record.row()["standard_error"] == pytest.approx(float(spread / abs(sum(parts) / 3)), rel=1e-5)


@dataclass(frozen=True, kw_only=True)
class Counted(hoptim.MINRES):
    calls: list[int]

    def solve(self, A: Any, g: Any, state: Any = None) -> Any:
        self.calls.append(A.size)
        return super().solve(A, g, state)


def test_it_costs_a_solve_a_fold_of_the_size_of_a_model():
    calls: list[int] = []
    solver = Counted(terms=3, tolerance=0.0, calls=calls)
    found = cross_validated(hypergradient=hoptim.Implicit(solver)).fit(loop(40))
    assert calls == [21] * 3 * (1 + 5)  # the dry run at the first loss, and five hypersteps
    assert [row["products"] for row in found.history] == [9] * 5


@dataclass(frozen=True, kw_only=True)
class Remembering(hoptim.MINRES):
    seen: list[Any]

    def solve(self, A: Any, g: Any, state: Any = None) -> Any:
        found = replace(super().solve(A, g), state={"mine": g.clone()})
        self.seen.append(((state or {}).get("mine"), g.clone()))
        return found


def test_each_fold_carries_its_own_solver_state():
    seen: list[Any] = []
    cross_validated(hypergradient=hoptim.Implicit(Remembering(terms=3, seen=seen))).fit(loop(40))
    solves = [*seen[1:6:2], *seen[6:]]  # without the dry run at each fold's first loss
    assert len(solves) == 3 * 5
    assert all(carried is None for carried, _ in solves[:3])
    for (_, before), (carried, _) in zip(solves, solves[3:], strict=False):
        assert torch.equal(carried, before)


def test_an_lbfgs_of_each_fold_begins_anew_when_the_hyperparameters_have_moved():
    seen: list[tuple[bool, bool]] = []  # after each step, whether they moved in it, and whether the state is empty

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = optimizer.loss(examples)
            loss.backward()
            return loss

        for _ in range(12):
            before = getattr(optimizer, "hyper_steps", 0)
            optimizer.step(closure)
            if isinstance(optimizer, FoldOptimizer):
                seen.append((optimizer.hyper_steps > before, not optimizer.inner.state))

    def lbfgs(model: nn.Module) -> LBFGS:
        return LBFGS(model.parameters(), lr=0.1, max_iter=2)

    cross_validated(inner=lbfgs, steps=12, hypersteps=3).fit(train)
    moved = [is_empty for has_moved, is_empty in seen if has_moved]
    assert len(moved) == 3 * len(FOLDS)
    assert all(moved)
    assert not any(is_empty for has_moved, is_empty in seen if not has_moved)


def test_the_leaves_are_averaged_over_the_second_half():
    values = []
    found = cross_validated(hypersteps=5, hooks=[lambda record: values.append(record.hyperparameters["decay"])]).fit(
        loop(40)
    )
    torch.testing.assert_close(found.hyperparameters["decay"], torch.stack(values[2:]).mean(0), rtol=0, atol=1e-12)
    plain = cross_validated(average=False).fit(loop(40))
    assert torch.equal(plain.hyperparameters["decay"], values[-1])


def test_a_positive_hyperparameter_is_averaged_on_its_leaf():
    values = []
    start = {"decay": torch.tensor([0.1, 0.2], dtype=torch.float64)}
    hparams = HyperParameters(start, {"decay": torch.distributions.constraints.positive})
    hooks = [lambda record: values.append(record.hyperparameters["decay"])]
    found = cross_validated(hparams, hooks=hooks, hypersteps=4).fit(loop(40))
    expected = (values[2] * values[3]).sqrt()
    torch.testing.assert_close(hparams["decay"].detach(), expected, rtol=0, atol=1e-12)
    assert torch.equal(found.hyperparameters["decay"], hparams["decay"])


# The schedule


@pytest.mark.parametrize(("steps", "warmup", "count"), [(40, 0.25, 5), (601, 0.25, 60), (60, 0.0, 60), (997, 0.9, 7)])
def test_hypersteps_fill_the_rest_of_the_training_evenly(steps, warmup, count):
    due, begin = due_steps(steps, warmup, count), int(warmup * steps)
    assert len(due) == count
    assert due[-1] == steps
    gaps = [b - a for a, b in zip([begin, *due], due, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_trainings_of_unequal_length_meet_at_the_same_shares():
    steps = {3: 30, 5: 50, 8: 80, N: 110}
    seen: list[list[int]] = []

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        before, at = optimizer.hyper_steps, []
        for step in range(steps[len(examples)]):
            optimizer.zero_grad()
            optimizer.loss(examples[step % len(examples)][None]).backward()
            optimizer.step()
            if optimizer.hyper_steps > before:
                before = optimizer.hyper_steps
                at.append(step + 1)
        seen.append(at)

    found = cross_validated(steps=lambda n: 10 * n, hypersteps=4, warmup=0.2).fit(train)
    assert sorted(seen) == [[], [12, 18, 24, 30], [20, 30, 40, 50], [32, 48, 64, 80]]
    assert [row["hyper_step"] for row in found.history] == [1, 2, 3, 4]
    assert 1 < found.cost < 50


def test_a_training_of_another_length_than_was_said():
    with pytest.raises(ValueError, match="the training of fold 1 took 10 steps, where steps says 40: it ended before"):
        cross_validated().fit(loop(10))
    with pytest.warns(UserWarning, match="fold 1 took 30 steps, where steps says 40, so that 3 hypersteps were not spread"):
        cross_validated().fit(loop(30))
    with pytest.warns(UserWarning, match="took 50 steps, where steps says 40, so that 5 hypersteps"):
        cross_validated().fit(loop(50))


def test_a_training_that_ends_just_before_the_only_hyperstep():
    with pytest.raises(ValueError, match="the training of fold 1 took 99 steps, where steps says 100: it ended before"):
        cross_validated(steps=100, hypersteps=1).fit(loop(99))


def test_where_a_training_ends_early_hypersteps_end_and_the_others_go_on():
    def train(model: Any, optimizer: Any, examples: Any) -> None:
        loop(30 if len(examples) == 5 else 40)(model, optimizer, examples)
        taken.append((len(examples), optimizer.inner_steps, optimizer.hyper_steps))

    taken: list[Any] = []
    with pytest.warns(UserWarning, match="fold 2 took 30 steps, where steps says 40, so that 3 hypersteps"):
        found = cross_validated().fit(train)
    assert [row["inner_step"] for row in found.history] == [16, 22, 28]
    assert sorted(taken) == [(3, 40, 3), (5, 30, 3), (8, 40, 3), (11, 40, 0)]


# Random numbers


def noisy(model: Any, hparams: Any, batch: Any) -> Any:
    return train_loss(model, hparams, batch) + 0.1 * torch.randn(()) * model[0].bias.sum()


def shuffled(model: Any, optimizer: Any, examples: Any) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    loader = DataLoader(
        Subset(TensorDataset(torch.arange(N)), examples.tolist()), batch_size=2, shuffle=True, drop_last=True
    )
    steps = 0
    while steps < 20:
        for (batch,) in loader:
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            steps += 1
            if steps == 20:
                break


def unseeded() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def fitted(**changed: Any) -> Any:
    torch.manual_seed(5)
    return cross_validated(make=unseeded, train_loss=noisy, steps=20, **changed).fit(shuffled)


def alone(hparams: Any, examples: Any) -> nn.Module:
    model = unseeded()
    problem = hoptim.Problem(model, hparams, noisy, val_loss)
    problem_loss, optimizer = problem.loss, inner(model)
    optimizer.loss = problem_loss  # type: ignore[attr-defined]
    shuffled(model, optimizer, examples)
    return model


def test_the_last_training_has_the_bits_of_a_plain_one_with_the_learned_values():
    found = fitted()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert same(found.model, alone(nn.ParameterDict(found.hyperparameters), torch.arange(N)))
    assert torch.equal(torch.get_rng_state(), after)


def test_a_fold_has_the_bits_of_a_plain_training_in_its_own_random_stream():
    hparams = decays()
    found = fitted(hparams=hparams, outer=SGD(hparams.parameters(), lr=0.0))
    torch.manual_seed(5)
    for number, (model, (train, _)) in enumerate(zip(found.models, FOLDS, strict=True), 1):
        with RandomStream(f"fold {number}").drawing():
            assert same(model, alone(decays(), torch.tensor(train)))


def test_a_run_repeats_to_the_bit():
    first, second = fitted(), fitted()
    assert all(same(a, b) for a, b in zip([first.model, *first.models], [second.model, *second.models], strict=True))
    assert torch.equal(first.hyperparameters["decay"], second.hyperparameters["decay"])
    assert not same(first.models[0], first.models[1])


# Failures


optimizer_steps = [0]


def broken_in_fold_two(model: Any, hparams: Any, batch: Any) -> Any:
    return val_loss(model, hparams, batch) * (float("nan") if 5 in batch and optimizer_steps[0] > 50 else 1.0)


def counting(model: Any, optimizer: Any, examples: Any) -> None:
    optimizer.register_step_post_hook(lambda *_: optimizer_steps.__setitem__(0, optimizer_steps[0] + 1))
    loop(40)(model, optimizer, examples)


def test_where_one_fold_fails_nothing_moves_and_the_record_names_it():
    optimizer_steps[0], records = 0, []
    hparams = decays()
    outer = torch.optim.Adam(hparams.parameters(), lr=0.1)
    cv = cross_validated(hparams, val_loss=broken_in_fold_two, outer=outer, hooks=[records.append])
    with pytest.warns(UserWarning, match=r"hyperstep 2 failed and moved nothing: NON_FINITE_LOSS: .*\(fold 2 of 3: "):
        cv.fit(counting)
    assert [record.moved for record in records] == [True, False, False, False, False]
    assert all(record.row()["detail"].startswith("fold 2 of 3: the validation loss") for record in records[1:])
    assert all(torch.equal(record.hyperparameters["decay"], records[0].hyperparameters["decay"]) for record in records)
    assert outer.state[hparams["decay"]]["step"] == 1
    assert optimizer_steps[0] == 4 * 40  # a hook of the user's is called once a step


def test_raise_ends_all_folds():
    optimizer_steps[0], threads = 0, own_threads()
    cv = cross_validated(val_loss=broken_in_fold_two, on_failure="raise")
    with pytest.raises(RuntimeError, match=r"hyperstep 2 failed.*fold 2 of 3"):
        cv.fit(counting)
    assert own_threads() == threads


def test_an_error_in_the_loop_names_the_fold_and_leaves_no_thread():
    threads, cleaned = own_threads(), []

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        try:
            loop(20)(model, optimizer, examples)
            if len(examples) == 5:
                raise KeyError("mine")
            loop(20)(model, optimizer, examples)
        finally:
            cleaned.append(len(examples))

    with pytest.raises(KeyError, match="mine") as caught:
        cross_validated().fit(train)
    assert caught.value.__notes__ == ["hoptim: in the training of fold 2 of 3"]
    assert sorted(cleaned) == [3, 5, 8]
    assert own_threads() == threads


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, which pytest-xdist switches off in its workers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_fold_that_runs(interruptible):
    threads, cleaned = own_threads(), []

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        try:
            optimizer.loss(examples)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10_000):
                optimizer.loss(examples)
        finally:
            cleaned.append(len(examples))

    with pytest.raises(KeyboardInterrupt):
        cross_validated().fit(train)
    assert cleaned == [3]
    assert own_threads() == threads


# What it works with


def test_a_learned_rate_is_unrolled_and_used_in_the_last_training():
    rate = HyperParameters({"lr": torch.tensor(0.01, dtype=torch.float64)}, {"lr": torch.distributions.constraints.positive})

    def plain(model: Any, hparams: Any, batch: Any) -> Any:
        return (model(X[batch]) - Y[batch]).square().mean()

    cv = cross_validated(
        rate,
        train_loss=plain,
        val_loss=plain,
        inner=lambda model: SGD(model.parameters(), lr=0.01),
        options={"lr": "lr"},
        outer=torch.optim.Adam(rate.parameters(), lr=0.1),
    )
    found = cv.fit(loop(40))
    learned = float(found.hyperparameters["lr"])
    assert abs(learned - 0.01) > 1e-3
    model = make()
    optimizer = SGD(model.parameters(), lr=learned)
    for step in range(40):
        optimizer.zero_grad()
        plain(model, None, torch.arange(N).roll(-2 * step)[:2]).backward()
        optimizer.step()
    assert same(found.model, model, 1e-9)


def test_validation_batches_of_ones_own_and_adam_at_a_rate_of_5_percent_by_default():
    seen = []

    def val(model: Any, hparams: Any, batch: Any) -> Any:
        seen.append(tuple(batch.tolist()))
        return val_loss(model, hparams, batch)

    values = []
    hooks = [lambda record: values.append(record.hyperparameters["decay"])]
    settings = {"outer": None, "val_loss": val, "val_batches": lambda held_out: held_out.split(1), "hooks": hooks}
    cross_validated(**settings).fit(loop(40))
    assert set(seen) == {(index,) for _, held_out in FOLDS for index in held_out}
    torch.testing.assert_close((values[0] - decays()["decay"]).abs(), torch.full((2,), 0.05).double(), rtol=1e-4, atol=0)


def test_by_default_a_unit_interval_has_a_larger_rate():
    hparams = HyperParameters({"decay": torch.tensor([0.02, 0.04]).double()}, {"decay": constraints.unit_interval})
    values = [hparams["decay"].detach().clone()]
    hooks = [lambda record: values.append(record.hyperparameters["decay"])]
    cross_validated(hparams, outer=None, hooks=hooks).fit(loop(40))
    moved = values[1].logit() - values[0].logit()
    torch.testing.assert_close(moved.abs(), torch.full((2,), 0.3).double(), rtol=1e-4, atol=0)


# Mistakes

SHARED = nn.Linear(3, 4).double()
ONE = make()


def sharing() -> nn.Module:
    return nn.Sequential(SHARED, nn.Tanh(), nn.Linear(4, 1).double())


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"make": sharing}, ValueError, "two models that make returned share the tensor '0.weight'"),
        ({"make": lambda: ONE}, ValueError, "two models that make returned share the tensor '0.weight'"),
        ({"make": lambda: 3}, TypeError, "model is an int: give an nn.Module"),
        ({"inner": lambda model: None}, TypeError, "inner is a NoneType: give a torch.optim.Optimizer"),
        ({"inner": lambda model: inner(ONE)}, ValueError, "the inner optimizer holds no weight of the model"),
        ({"hparams": {"decay": 1.0}}, TypeError, "hparams is a dict"),
        ({"hparams": nn.ParameterDict(), "outer": None}, ValueError, "no parameter of hparams requires a gradient"),
        ({"outer": inner(ONE)}, ValueError, "the outer optimizer holds no hyperparameter"),
        ({"folds": [([0, 1], [1])]}, ValueError, "fold 1 trains on 1 of the examples that it holds out"),
        ({"folds": 12}, ValueError, "folds=12 of 11 examples"),
        ({"examples": 5}, ValueError, "examples=5"),
        ({"warmup": 1.0}, ValueError, "warmup=1.0: give the share of the training"),
        ({"warmup": 100}, ValueError, "warmup=100: give the share"),
        ({"warmup": 0.95}, ValueError, "steps=40 with a warmup of 38 leaves 2 for hypersteps=5"),
        ({"hypersteps": 0}, ValueError, "hypersteps=0"),
        ({"hypergradient": hoptim.Unrolled(20)}, ValueError, "goes back 20 inner steps, but hypersteps come every 6"),
        ({"val_batches": lambda held_out: []}, ValueError, "val_batches is empty"),
        ({"on_failure": "stop"}, ValueError, "on_failure='stop'"),
        ({"hooks": print}, TypeError, "hooks is"),
    ],
)
def test_a_mistake_is_named_at_construction(changed, error, words):
    with pytest.raises(error, match=words):
        cross_validated(**changed)


def test_hyperparameters_of_a_model_are_no_hyperparameters():
    model = make()
    with pytest.raises(ValueError, match="are the same tensor"):
        cross_validated(nn.ParameterDict({"decay": model[0].weight}), make=lambda: model)


def test_fit_is_for_one_training():
    cv = cross_validated()
    with pytest.raises(TypeError, match="train takes"):
        cv.fit(lambda model: None)
    cv.fit(loop(40))
    with pytest.raises(RuntimeError, match="fit was called before"):
        cv.fit(loop(40))


@pytest.mark.parametrize("epochs", [30, pytest.param(375, marks=pytest.mark.slow)])
def test_the_example_is_short_and_better_than_a_fixed_decay_of_the_same_start(epochs, capsys):
    source = (ROOT / "scripts" / "examples" / "cross_validated.py").read_text()
    assert len(source.splitlines()) < 60
    assert source.count("375") == 2
    torch.set_default_dtype(torch.float32)
    exec(source.replace("375", str(epochs)), {})
    output = capsys.readouterr().out
    losses = dict(re.findall(r"^(learned|fixed decay [\d.]+).*: test cross-entropy ([\d.]+)", output, re.MULTILINE))
    assert float(losses["learned"]) < 0.8 * float(losses["fixed decay 0.01"])


# What is set around a fit


def outcome_of(found: Any) -> list[Any]:
    models = [found.model, *found.models]
    return [found.hyperparameters["decay"], *(t for model in models for t in model.state_dict().values())]


def test_a_loss_with_an_aux_serves_as_one_without():
    def with_aux(model: Any, hparams: Any, batch: Any) -> Any:
        return train_loss(model, hparams, batch), batch

    def both(model: Any, optimizer: Any, examples: Any) -> None:
        for step in range(40):
            optimizer.zero_grad()
            batch = examples.roll(-2 * step)[:2]
            value, aux = optimizer.loss(batch)
            assert aux is batch
            value.backward()
            optimizer.step()

    expected = cross_validated().fit(loop(40))
    found = cross_validated(train_loss=with_aux, has_aux=True).fit(both)
    assert all(map(torch.equal, outcome_of(found), outcome_of(expected)))
    with pytest.raises(TypeError, match="has_aux=1: give True"):
        cross_validated(has_aux=1)


def test_under_no_grad_it_is_the_same_fit():
    expected = cross_validated().fit(loop(40))
    with torch.no_grad():
        found = cross_validated().fit(loop(40))
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, outcome_of(found), outcome_of(expected)))
    rates = []
    for around in (torch.enable_grad(), torch.no_grad()):
        hparams = HyperParameters({"rate": torch.tensor(0.05)}, {"rate": constraints.positive})
        with around:
            learned = {
                "train_loss": plain,
                "val_loss": plain,
                "inner": lambda m: SGD(m.parameters(), lr=0.05),
                "options": {"lr": "rate"},
            }
            rates.append(cross_validated(hparams, **learned).fit(loop(40)).hyperparameters["rate"])
    assert torch.equal(*rates)
    assert abs(rates[0] - 0.05) > 1e-4


def plain(model: Any, hparams: Any, batch: Any) -> Any:
    return (model(X[batch]) - Y[batch]).square().mean()


def test_under_inference_mode_it_is_refused_at_once_and_may_be_called_again():
    cv, steps = cross_validated(), []

    def counted(model: Any, optimizer: Any, examples: Any) -> None:
        steps.append(0)
        loop(40)(model, optimizer, examples)

    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"fit was called under torch.inference_mode\(\)"):
        cv.fit(counted)
    assert not steps
    assert all(map(torch.equal, outcome_of(cv.fit(counted)), outcome_of(cross_validated().fit(loop(40)))))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"made inside torch.inference_mode\(\)"):
        cross_validated()
