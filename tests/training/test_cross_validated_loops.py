"""CrossValidated with loops and folds as people have them: K separate plain loops and the mean of their hypergradients."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sklearn import model_selection
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset, TensorDataset

import hoptim
from hoptim import CrossValidated
from hoptim.training.fold_optimizer import due_steps
from hoptim.training.folds import Fold, make_folds

N, EPOCHS, HYPERSTEPS = 24, 3, 3
DRAW = torch.Generator().manual_seed(2)
X, Y = torch.randn(N, 3, generator=DRAW), torch.randint(2, (N,), generator=DRAW)
GROUPS = [0] * 4 + [1] * 9 + [2] * 5 + [3] * 6
UNEQUAL = [(range(6, 24), range(6)), (range(9), range(9, 20)), ([0, 5, 9, 14, 18], [2, 3])]
SPLITTERS: dict[str, Callable[[], Any]] = {
    "unequal": lambda: UNEQUAL,
    "kfold": lambda: model_selection.KFold(3).split(X),
    "stratified": lambda: model_selection.StratifiedKFold(3, shuffle=True, random_state=1).split(X, Y),
    "grouped": lambda: model_selection.GroupKFold(4).split(X, Y, GROUPS),
    "in time": lambda: model_selection.TimeSeriesSplit(3).split(X),
    "repeated": lambda: model_selection.RepeatedKFold(n_splits=2, n_repeats=2, random_state=1).split(X),
}


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def make_float() -> nn.Module:
    return make().float()  # since autocast leaves float64 alone


def inner(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.5)


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(X[batch].to(model[0].weight)), Y[batch])


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    penalty = sum(hparams["decay"][i].exp() * model[2 * i].weight.square().sum() for i in (0, 1))
    return val_loss(model, hparams, batch) + penalty


def decays() -> nn.ParameterDict:
    return nn.ParameterDict({"decay": nn.Parameter(torch.tensor([-3.0, -2.0]))})


def bf16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


# A loop is a generator: it yields the batch of a step after each step, so that K of them can be taken side by side.


def batches_in_order(examples: Tensor) -> Iterator[Tensor]:
    for epoch in range(EPOCHS):
        yield from examples.roll(epoch).split(3)


def plain(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    for batch in batches_in_order(examples):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        yield batch


def scheduled(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    scheduler = LambdaLR(optimizer, lambda step: 0.97**step)
    for batch in plain(model, optimizer, loss, examples):
        scheduler.step()
        yield batch


def clipped(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    for batch in batches_in_order(examples):
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        yield batch


def accumulated(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    even = examples[: len(examples) // 2 * 2]
    for epoch in range(EPOCHS):
        optimizer.zero_grad()
        halves = even.roll(epoch).chunk(2)
        for half in halves:
            (loss(half) / 2).backward()
        optimizer.step()
        yield torch.cat(halves)


def scaled(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    for batch in batches_in_order(examples):
        optimizer.zero_grad()
        with bf16():
            found = loss(batch)
        scaler.scale(found).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        yield batch


def autocast(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    for batch in batches_in_order(examples):
        with bf16():
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        yield batch


def shuffled(model: Any, optimizer: Any, loss: Any, examples: Tensor) -> Iterator[Any]:
    draws = torch.Generator().manual_seed(3)
    data = Subset(TensorDataset(torch.arange(N)), examples.tolist())
    loader = DataLoader(data, batch_size=3, shuffle=True, generator=draws)
    for _ in range(EPOCHS):
        for (batch,) in loader:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            yield batch


def per_epoch(n: int) -> int:
    return EPOCHS * -(-n // 3)


LOOPS: dict[str, tuple[Any, Callable[[int], int], Any]] = {  # the loop, its steps, what is around a hyperstep
    "plain": (plain, per_epoch, nullcontext),
    "scheduler": (scheduled, per_epoch, nullcontext),
    "clipping": (clipped, per_epoch, nullcontext),
    "accumulation": (accumulated, lambda n: EPOCHS, nullcontext),
    "autocast": (autocast, per_epoch, bf16),
    "autocast and GradScaler": (scaled, per_epoch, nullcontext),  # whose hyperstep comes after the autocast has ended
    "shuffling loader": (shuffled, per_epoch, nullcontext),
}


def make_for(name: str) -> Callable[[], nn.Module]:
    return make_float if "autocast" in name else make


def side_by_side(name: str, folds: list[Fold], hparams: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """K plain loops, step by step, with λ moved by hand; and the hypergradients of each hyperstep, one row a fold."""
    loop, steps, around = LOOPS[name]
    problems = [hoptim.Problem(make_for(name)(), hparams, train_loss, val_loss) for _ in folds]
    inners = [inner(problem.model) for problem in problems]
    loops = [
        loop(problem.model, optimizer, problem.loss, fold.train)
        for problem, optimizer, fold in zip(problems, inners, folds, strict=True)
    ]
    due = [due_steps(steps(len(fold.train)), 0.25, HYPERSTEPS) for fold in folds]
    taken, found = [0] * len(folds), []
    for number in range(HYPERSTEPS):
        rows = []
        for k, (problem, fold) in enumerate(zip(problems, folds, strict=True)):
            while taken[k] < due[k][number]:
                batch = next(loops[k])
                taken[k] += 1
            with around():
                rows.append(hoptim.hypergradient(problem, batch, fold.held_out).grads["decay"])
        found.append(torch.stack(rows))
        with torch.no_grad():
            hparams["decay"] -= 0.3 * found[-1].mean(0)
    assert all(next(one, None) is None for one in loops)
    return [problem.model for problem in problems], found


def cross_validated(name: str, hparams: Any, **more: Any) -> Any:
    loop, steps, _ = LOOPS[name]

    def train(model: Any, optimizer: Any, examples: Tensor) -> None:
        for _ in loop(model, optimizer, optimizer.loss, examples):
            pass

    settings = {"inner": inner, "outer": SGD(hparams.parameters(), lr=0.3), "examples": N, "steps": steps, **more}
    cv = CrossValidated(make_for(name), hparams, train_loss, val_loss, average=False, hypersteps=HYPERSTEPS, **settings)
    return cv.fit(train)


@pytest.mark.parametrize(
    ("loop", "folds"),
    [(loop, "unequal") for loop in LOOPS] + [("plain", folds) for folds in SPLITTERS if folds != "unequal"],
)
def test_it_is_k_plain_loops_and_the_mean_of_their_hypergradients(loop, folds):
    hparams, by_hand, records = decays(), decays(), []
    found = cross_validated(loop, hparams, folds=SPLITTERS[folds](), hooks=[records.append])
    models, rows = side_by_side(loop, make_folds(SPLITTERS[folds](), N), by_hand)
    tolerance = {"rtol": 0.0, "atol": 1e-9}
    for record, expected in zip(records, rows, strict=True):
        torch.testing.assert_close(record.result.grads["decay"], expected, **tolerance)
        error = expected.std(0).norm() / len(expected) ** 0.5 / expected.mean(0).norm()
        assert record.row()["standard_error"] == pytest.approx(float(error), rel=1e-5)
    torch.testing.assert_close(found.hyperparameters["decay"], by_hand["decay"].detach(), **tolerance)
    assert (by_hand["decay"] - decays()["decay"]).abs().max() > 1e-3
    for model, expected in zip(found.models, models, strict=True):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, **tolerance)


def test_steps_that_a_scaler_skips_do_not_count():
    seen = []

    def train(model: Any, optimizer: Any, examples: Tensor) -> None:
        scaler, number = torch.amp.GradScaler("cpu", init_scale=4.0), 0
        while optimizer.inner_steps < 20:
            optimizer.zero_grad()
            scaler.scale(optimizer.loss(examples)).backward()
            if number % 3 == 0:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            number += 1
            seen.append((number, optimizer.inner_steps))

    hparams = decays()
    cv = CrossValidated(make, hparams, train_loss, val_loss, inner=inner, examples=N, steps=20, hypersteps=5)
    found = cv.fit(train)
    assert [row["inner_step"] for row in found.history] == due_steps(20, 0.25, 5)
    assert max(seen) == (30, 20)


def test_trackers_see_each_hyperstep_of_all_folds_once(tmp_path, monkeypatch):
    import wandb
    from wandb_file import read_finished

    from hoptim.tracking import Console, JsonLines, WandB

    monkeypatch.setenv("WANDB_MODE", "offline")
    path, tracker = tmp_path / "rows.jsonl", WandB(project="mine", directory=tmp_path)
    found = cross_validated("plain", decays(), folds=UNEQUAL, hooks=[JsonLines(path=path), tracker, Console()])
    run = wandb.run
    tracker.finish()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == found.history
    assert [row["hyper_step"] for row in rows] == [1, 2, 3]
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    read = read_finished(written)
    assert read["id"] == run.id
    losses = [row["metrics/val_loss"] for row in read["history"] if "metrics/val_loss" in row]
    assert losses == [row["val_loss"] for row in rows]
    assert [row["hypergradient/standard_error"] for row in read["history"]] == [row["standard_error"] for row in rows]


def test_a_rate_is_learned_over_folds_and_is_that_of_the_last_training() -> None:
    """It begins 50 times too low. The last training is one of plain SGD at the learned rate, to the bit."""
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(60, 1)
    hparams = hoptim.HyperParameters({"rate": torch.tensor(0.002)}, {"rate": constraints.positive})

    starts: list[nn.Module] = []

    def make() -> nn.Module:
        starts.append(nn.Linear(4, 1))
        return copy.deepcopy(starts[-1])

    def loss(model: Any, h: Any, batch: Any) -> Tensor:
        return (model(x[batch]) - y[batch]).square().mean()

    def loop(model: Any, optimizer: Any, examples: Tensor) -> None:
        for _ in range(80):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    fit = hoptim.CrossValidated(
        make, hparams, loss, loss, inner=lambda model: torch.optim.SGD(model.parameters(), lr=9.0), options={"lr": "rate"},
        outer=torch.optim.Adam(hparams.parameters(), lr=0.3), examples=60, steps=80, warmup=0.0, hypersteps=20,
    )  # fmt: skip
    found = fit.fit(loop)
    ways = [model(x).detach() for model in found.models]
    torch.testing.assert_close(found.ensemble(x), torch.stack(ways).mean(0))
    torch.testing.assert_close(found.ensemble(x, of=torch.exp), torch.stack(ways).exp().mean(0))
    learned = hparams["rate"].item()
    assert learned == found.hyperparameters["rate"].item()
    assert learned > 0.02
    assert all(row["moved"] for row in found.history)
    model = starts[0]  # the first is for the last training
    plain = torch.optim.SGD(model.parameters(), lr=learned)
    plain.loss = lambda batch: loss(model, None, batch)  # type: ignore[attr-defined]
    loop(model, plain, torch.arange(60))
    for a, b in zip(model.parameters(), found.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_an_ensemble_is_without_dropout_and_leaves_the_modes() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)) for _ in range(3)]
    models[1][1].eval()
    fit = hoptim.training.cross_validated.CrossValidatedFit(
        model=models[0], models=models, hyperparameters={}, history=[], cost=1.0
    )
    x = torch.randn(5, 3)
    expected = sum(model[2](model[0](x)) for model in models) / 3
    torch.testing.assert_close(fit.ensemble(x), expected.detach())
    assert [model[1].training for model in models] == [True, False, True]
    assert all(model.training for model in models)
