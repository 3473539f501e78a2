"""The folds' hypergradients at once: equal to those in turn to 1e-9, and in turn wherever it can't be or gains nothing."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from test_cross_validated import X, Y, cross_validated, decays, loop, make, val_loss
from torch import nn
from torch.optim import Adam

import hoptim
from hoptim.recipes import WeightDecay
from hoptim.training import side_by_side

STEPS = 12
SHORT = {"steps": STEPS, "hypersteps": 3}
EVEN = [(range(3, 9), range(3)), ([0, 1, 2, 6, 7, 8], [3, 4, 5]), (range(6), range(6, 9))]


def both(train: Any = None, **changed: Any) -> tuple[list[Any], list[Any]]:
    """The records of a fit in turn, and side by side, whose models and hyperparameters agree to 1e-9."""
    found, records = [], ([], [])
    for each, at_once in zip(records, (False, True), strict=True):
        torch.manual_seed(5)
        hparams = decays()
        options = {"outer": Adam(hparams.parameters(), lr=0.1), "hooks": [each.append], **SHORT, **changed}
        found.append(cross_validated(hparams, side_by_side=at_once, **options).fit(train or loop(STEPS)))
    for name, value in found[0].hyperparameters.items():
        torch.testing.assert_close(found[1].hyperparameters[name], value, rtol=0, atol=1e-9)
    for model, expected in zip([found[1].model, *found[1].models], [found[0].model, *found[0].models], strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=1e-9)
    return records


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attempt to compute them at once succeeded."""
    seen: list[bool] = []
    call = side_by_side.SideBySide.__call__

    def counted(self: Any, drawn: Any) -> Any:
        found = call(self, drawn)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(side_by_side.SideBySide, "__call__", counted)
    return seen


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)  # another value in each fold, since they draw their own
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"folds": EVEN},
        {"folds": EVEN, "hypergradient": hoptim.Implicit(hoptim.CG(terms=9), damping=0.5)},
        {"hypergradient": hoptim.Implicit(hoptim.Identity(), curvature=hoptim.Exact())},
        {"hypergradient": hoptim.Implicit(hoptim.MINRES(terms=7, tolerance=0.0), damping=0.1)},
        {"folds": EVEN, "make": partly_frozen},
        {"folds": 2},
    ],
    ids=["unequal", "equal", "cg, damped", "identity", "minres", "partly frozen", "two"],
)
def test_it_is_equal_to_in_turn_to_1e_9(changed, at_once):
    in_turn, together = both(**changed)
    assert at_once == [True] * 3
    for here, there in zip(together, in_turn, strict=True):
        for part in ("grads", "direct", "indirect", "val_loss", "train_loss", "gradient_norm"):
            expected = getattr(there.result, part)
            torch.testing.assert_close(getattr(here.result, part), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(here.result.solution.value, there.result.solution.value, rtol=0, atol=1e-9)
        row, expected_row = here.row(), there.row()
        assert (row["status"], row["inner_step"]) == (expected_row["status"], expected_row["inner_step"])
        if not changed:  # else a fold may stop before the others in turn
            assert row["products"] == expected_row["products"] == 15
        for figure in ("standard_error", "residual", "hypergradient_norm"):
            assert row[figure] == (expected_row[figure] and pytest.approx(expected_row[figure], rel=1e-6))
    assert here.result.grads["decay"].std(0).min() > 1e-6  # the rows are the folds', not their mean


def untouched_by_lambda(model: Any, hparams: Any, batch: Any) -> Any:
    return (model(X[batch]) - Y[batch]).square().mean()


def test_a_validation_loss_that_no_hyperparameter_touches(at_once):
    _, together = both(folds=EVEN, val_loss=untouched_by_lambda)
    assert at_once == [True] * 3
    assert together[-1].result.direct["decay"].abs().max() == 0


def test_a_recipe_in_float32(at_once):
    def train_loss(model: Any, hparams: Any, batch: Any) -> Any:
        return val(model, hparams, batch) + hparams.penalty(model)

    def val(model: Any, hparams: Any, batch: Any) -> Any:
        return (model(X[batch].float()) - Y[batch].float()).square().mean()

    def make_float() -> nn.Module:
        return make().float()

    found = []
    for together in (False, True):
        decay = WeightDecay(make_float(), start=0.05)
        settings = {"make": make_float, "train_loss": train_loss, "val_loss": val, "side_by_side": together}
        found.append(cross_validated(decay, **SHORT, **settings).fit(loop(STEPS)).hyperparameters)
    assert at_once == [True] * 3
    assert found[0].keys() == {"decay.0.weight", "decay.2.weight"}
    for name, value in found[0].items():
        assert (value - 0.05).abs() > 1e-4
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=0)


def test_it_is_one_solve(monkeypatch):
    calls: list[Any] = []
    solve = hoptim.MINRES.solve
    monkeypatch.setattr(
        hoptim.MINRES, "solve", lambda self, A, g, state=None: calls.append(g.shape) or solve(self, A, g, state)
    )
    cross_validated(side_by_side=True, **SHORT).fit(loop(STEPS))
    assert calls == [(21,)] * 3 + [(3, 21)] + [(21,)] * 3 + [(3, 21)] * 2  # dry runs; the first time both ways


def test_it_is_resumed_to_the_bit(tmp_path):
    from test_resumable import EPOCHS, KilledError, assert_same, outcome

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in optimizer.resumable(range(EPOCHS)):
            for batch in examples[torch.randperm(len(examples))].split(2):
                if steps[0] == 0:
                    raise KilledError
                steps[0] -= 1
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()

    def fit(**more: Any) -> Any:
        torch.manual_seed(5)
        hparams = decays()
        settings = {"folds": EVEN, "steps": lambda n: 3 * EPOCHS, "outer": Adam(hparams.parameters(), lr=0.1)}
        return outcome(cross_validated(hparams, side_by_side=True, **settings).fit(train, **more))

    steps = [25]
    with pytest.raises(KilledError):
        fit(checkpoint=tmp_path / "fit.pt", every_seconds=0)
    steps = [1000]
    assert_same(fit(checkpoint=tmp_path / "fit.pt"), fit())


# In turn


def test_where_a_fold_fails_it_is_named(at_once):
    def broken(model: Any, hparams: Any, batch: Any) -> Any:
        return val_loss(model, hparams, batch) * torch.where((batch == 5).any() & (taken[0] > 20), torch.nan, 1.0)

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        optimizer.register_step_post_hook(lambda *_: taken.__setitem__(0, taken[0] + 1))
        loop(STEPS)(model, optimizer, examples)

    taken = [0]
    with pytest.warns(UserWarning, match=r"NON_FINITE_LOSS: .*\(fold 2 of 3: the validation loss is nan\)"):
        found = cross_validated(folds=EVEN, val_loss=broken, side_by_side=True, **SHORT).fit(train)
    assert [row["moved"] for row in found.history] == [True, False, False]
    assert at_once == [True, False, False]


def noisy(model: Any, hparams: Any, batch: Any) -> Any:
    return val_loss(model, hparams, batch) + 0.1 * torch.randn(()) * model[0].bias.sum()


def reads(model: Any, hparams: Any, batch: Any) -> Any:
    loss = val_loss(model, hparams, batch)
    return loss * 2 if float(loss) > 1 else loss


class Signed(nn.Linear):
    """Its sign is a plain attribute, which is another one in the second model."""

    count = 0

    def __init__(self) -> None:
        super().__init__(4, 1)
        Signed.count += 1
        self.sign = -1.0 if Signed.count % 4 == 3 else 1.0

    def forward(self, x: Any) -> Any:
        return self.sign * super().forward(x)


def signed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Signed())


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def convolved() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 4), nn.Flatten())


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 8001), nn.Linear(8001, 1))


def uneven(model: Any, optimizer: Any, examples: Any) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        optimizer.loss(examples).backward()
        optimizer.step()


def accumulating(model: Any, optimizer: Any, examples: Any) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        for batch in examples[:4].split(2):
            optimizer.loss(batch).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("changed", "train", "words"),
    [
        ({"train_loss": noisy}, None, "torch.func.vmap can't do the losses .*randomness"),
        ({"val_loss": noisy}, None, "the validation loss draws random numbers"),
        ({"folds": EVEN, "val_loss": noisy}, None, "torch.func.vmap can't do the losses .*randomness"),
        ({"folds": EVEN, "val_loss": reads}, None, "torch.func.vmap can't do the losses"),
        ({"make": signed}, None, "the hypergradient of 'decay' would differ by"),
        ({}, uneven, "their training batches are not tensors of the same shapes"),
        ({}, accumulating, "their training batches are not tensors of the same shapes"),
        ({"hypergradient": hoptim.Unrolled(2)}, None, "the method is not Implicit"),
        ({"hypergradient": hoptim.Implicit(hoptim.Neumann(terms=3))}, None, "the curvature is not Exact.*or the solver"),
        ({"hypergradient": hoptim.Implicit(preconditioner=hoptim.Jacobi())}, None, "no preconditioner"),
    ],
)
def test_what_cannot_be_done_at_once_is_in_turn_and_a_warning_says_why(changed, train, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both(train, **changed)
    told = [str(each.message) for each in caught if "not side by side" in str(each.message)]
    assert len(told) == 1
    assert re.search(words, told[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [(normed, "the model has buffers"), (convolved, "has convolutions"), (large, "48,023 weights, and above 40,000")],
)
def test_a_model_that_is_not_faster_so_is_in_turn(make, words):
    cv = cross_validated(make=make, side_by_side=True)
    with pytest.warns(UserWarning, match=words):
        assert not side_by_side.SideBySide(cv._parts.optimizers).is_possible


def test_it_is_true_or_false():
    with pytest.raises(TypeError, match="side_by_side='auto': give True or False"):
        cross_validated(side_by_side="auto")


def test_it_leaves_no_trace(at_once):
    def val(model: Any, hparams: Any, batch: Any) -> Any:
        model.eval()
        return val_loss(model, hparams, batch)

    found, states = [], []
    for together in (False, True):
        hparams = decays()
        outer = torch.optim.SGD(hparams.parameters(), lr=0.0)
        settings = {"outer": outer, "val_loss": val, "folds": EVEN, "side_by_side": together}
        found.append(cross_validated(hparams, **SHORT, **settings).fit(loop(STEPS)))
        states.append(torch.get_rng_state())
        assert all(part.training for model in found[-1].models for part in model.modules())
        assert all(leaf.grad is None for leaf in hparams.parameters())
        torch.manual_seed(0)
    assert at_once == [True] * 3
    for model, expected in zip(found[1].models, found[0].models, strict=True):
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert torch.equal(*states)


def test_under_autocast_the_folds_are_in_turn_where_it_holds(at_once):
    def train(model: Any, optimizer: Any, examples: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loop(STEPS)(model, optimizer, examples)

    cross_validated(side_by_side=True, **SHORT).fit(train)
    assert at_once == []


def test_a_layer_that_was_replaced_is_an_error(at_once):
    def train(model: Any, optimizer: Any, examples: Any) -> None:
        loop(8)(model, optimizer, examples)
        model[0] = nn.Linear(3, 4)
        loop(STEPS - 8)(model, optimizer, examples)

    with pytest.warns(UserWarning, match="the inner optimizer does not hold"):
        cross_validated(side_by_side=True, **SHORT).fit(train)
    assert at_once == [True] * 3
