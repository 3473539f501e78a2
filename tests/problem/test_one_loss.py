"""One loss for training and validation: it equals two that are written out, and leaves modes and buffers as they were."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hoptim
from hoptim import CompositeLoss, HyperParameters, Problem, hypergradient
from hoptim.recipes import (
    Augmentation,
    AugmentationNet,
    Categorical,
    DistilledData,
    DomainWeights,
    Dropout,
    ExampleWeights,
    Gate,
    Initialization,
    LabelSmoothing,
    LossWeights,
    NoiseWidth,
    PriorScale,
    Rater,
    SoftLabels,
    Temperature,
    WeightDecay,
)

X, Y = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
TRAIN, VAL = torch.arange(10), torch.arange(10, 24)


def net(*between: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *between, nn.Linear(5, 3))


def decays(value: float = 0.1) -> HyperParameters:
    return HyperParameters({"decay": torch.tensor(value)})


def each(z: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(z, Y[b], reduction="none")


def plain(m: Any, h: Any, b: Any) -> Tensor:
    """The validation loss of most cases, written out: no recipe, in evaluation mode."""
    return F.cross_entropy(m.eval()(X[b]), Y[b])


def size_of(m: Any) -> Tensor:
    return sum(p.square().sum() for p in m.parameters())


@dataclass(frozen=True)
class Case:
    """One loss, and the validation loss that it has to equal."""

    hparams: Callable[[nn.Module], nn.Module]
    loss: Any
    val: Any = plain
    model: Callable[[], nn.Module] = net
    has_aux: bool = False

    def problems(self) -> tuple[Problem, Problem]:
        """With one loss, and with two."""
        model = self.model()
        hparams = self.hparams(model).double()
        return tuple(
            Problem(*copy.deepcopy((model, hparams)), self.loss, *val, has_aux=self.has_aux) for val in ((), (self.val,))
        )


def in_training(m: Any, h: Any, b: Any) -> Tensor:
    """With a penalty of its own, which is for training alone."""
    return F.cross_entropy(m(X[b]), Y[b]) + (h["decay"] * size_of(m) if h.training else 0)


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = net(nn.Dropout(0.5), nn.BatchNorm1d(5)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x.requires_grad_(), use_reentrant=self.reentrant)


def frozen_norm() -> nn.Module:
    """A user's own fine-tuning: the whole model trains in evaluation mode, and its norm keeps its statistics."""
    model = net(nn.BatchNorm1d(5), nn.Dropout(0.5))
    model(X)
    return model.eval()


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def pictures(change: Callable[[Any, Tensor], Tensor]) -> Any:
    return lambda m, h, b: F.cross_entropy(m(change(h, X[b].reshape(-1, 1, 2, 2))), Y[b])


def moved_net() -> AugmentationNet:
    torch.manual_seed(2)
    learned = AugmentationNet(1, hidden=2)
    nn.init.normal_(learned.layers[-1].weight, std=0.1)
    return learned


def decayed(h: Any, m: Any, loss: Tensor) -> Tensor:
    return loss + h.penalty(m)


def criterion(z: Tensor, h: Any, b: Any) -> Tensor:
    return F.cross_entropy(z, Y[b])


COMPOSITE = CompositeLoss(lambda m, h, b: m(X[b]), criterion, lambda m, h: h["decay"] * size_of(m))

CASES = {
    "dropout of the model": Case(lambda m: decays(), in_training, model=lambda: net(nn.Dropout(0.4))),
    "batch norm": Case(lambda m: decays(), in_training, model=lambda: net(nn.BatchNorm1d(5))),
    "checkpoints": Case(lambda m: decays(), in_training, model=lambda: Checkpointed(False)),
    "reentrant checkpoints": Case(lambda m: decays(), in_training, model=lambda: Checkpointed(True)),
    "a model that trains in evaluation mode": Case(
        lambda m: nn.ModuleDict({"smooth": LabelSmoothing(0.2), "decay": WeightDecay(m, start=0.1)}),
        lambda m, h, b: decayed(h["decay"], m, h["smooth"].cross_entropy(m(X[b]), Y[b])),
        model=frozen_norm,
    ),
    "CompositeLoss": Case(lambda m: decays(), COMPOSITE, model=lambda: net(nn.Dropout(0.4))),
    "CompositeLoss with aux": Case(lambda m: decays(), COMPOSITE, has_aux=True),
    "aux": Case(
        lambda m: decays(), lambda m, h, b: (in_training(m, h, b), "aux"), lambda m, h, b: (plain(m, h, b), 0), has_aux=True
    ),
    "WeightDecay": Case(WeightDecay, lambda m, h, b: decayed(h, m, F.cross_entropy(m(X[b]), Y[b]))),
    "PriorScale": Case(lambda m: PriorScale(m, 10), lambda m, h, b: decayed(h, m, F.cross_entropy(m(X[b]), Y[b]))),
    "Initialization": Case(Initialization, lambda m, h, b: F.cross_entropy(m(X[b]), Y[b]) + h.penalty(m, 0.3)),
    "NoiseWidth": Case(lambda m: NoiseWidth(m, start=0.4), lambda m, h, b: F.cross_entropy(h.call(m, X[b]), Y[b])),
    "Dropout": Case(lambda m: Dropout(m, start=0.4), lambda m, h, b: F.cross_entropy(h.call(m, X[b]), Y[b])),
    "LabelSmoothing": Case(lambda m: LabelSmoothing(0.2), lambda m, h, b: h.cross_entropy(m(X[b]), Y[b])),
    "LabelSmoothing of probabilities": Case(
        lambda m: LabelSmoothing(0.2), lambda m, h, b: h.cross_entropy(m(X[b]), F.one_hot(Y[b], 3).double())
    ),
    "SoftLabels": Case(lambda m: SoftLabels(Y, start=0.6), lambda m, h, b: h.cross_entropy(m(X[b]), b)),
    "ExampleWeights": Case(
        lambda m: ExampleWeights(10, start=0.3, trusted=[0]), lambda m, h, b: h.mean(each(m(X[b]), b), b)
    ),
    "DomainWeights": Case(lambda m: DomainWeights({"a": 3, "b": 1, "c": 1}), lambda m, h, b: h.mean(each(m(X[b]), b), Y[b])),
    "DomainWeights as drawn": Case(
        lambda m: DomainWeights({"a": 3, "b": 1, "c": 1}),
        lambda m, h, b: h.mean(each(m(X[b]), b), Y[b], torch.full((len(b),), 0.2)),
    ),
    "LossWeights": Case(
        lambda m: of_losses(),
        lambda m, h, b: h.sum({"fit": F.cross_entropy(m(X[b]), Y[b]), "size": 0.1 * m(X[b]).square().mean()}),
        lambda m, h, b: plain(m, h, b) + 0.1 * m(X[b]).square().mean(),
    ),
    "Rater": Case(
        lambda m: Rater(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))),
        lambda m, h, b: h.mean(each(m(X[b]), b), X[b]),
    ),
    "Augmentation": Case(
        lambda m: Augmentation(start=0.3), pictures(lambda h, x: h.augment(x)), pictures(lambda h, x: x), Pictures
    ),
    "AugmentationNet": Case(lambda m: moved_net(), pictures(lambda h, x: h(x)), pictures(lambda h, x: x), Pictures),
    # What belongs to the model is in both
    "Temperature": Case(
        lambda m: Temperature(1.7),
        lambda m, h, b: h.cross_entropy(m(X[b]), Y[b]),
        lambda m, h, b: F.cross_entropy(m(X[b]) / h["temperature"], Y[b]),
    ),
    "Gate": Case(
        lambda m: Gate(4),
        lambda m, h, b: F.cross_entropy(m(X[b] * h.values()), Y[b]),
        lambda m, h, b: F.cross_entropy(m(X[b] * h.values(training=False)), Y[b]),
    ),
    "Categorical": Case(
        lambda m: Categorical(["as it is", "turned"], relaxation="gumbel"),
        lambda m, h, b: F.cross_entropy(m(h.mix({"as it is": X[b], "turned": X[b].flip(1)})), Y[b]),
        lambda m, h, b: F.cross_entropy(m(h.mix({"as it is": X[b], "turned": X[b].flip(1)}, training=False)), Y[b]),
    ),
    "several recipes": Case(
        lambda m: nn.ModuleDict({"decay": WeightDecay(m), "smooth": LabelSmoothing(0.2), "drop": Dropout(m)}),
        lambda m, h, b: decayed(h["decay"], m, h["smooth"].cross_entropy(h["drop"].call(m, X[b]), Y[b])),
    ),
    "several losses": Case(
        lambda m: decays(),
        lambda m, h, b: in_training(m, h, b) if h.training else each(m(X[b]), b).reshape(2, -1).mean(1),
        lambda m, h, b: each(m.eval()(X[b]), b).reshape(2, -1).mean(1),
    ),
}


def of_losses() -> LossWeights:
    weights = LossWeights(["fit", "size"])
    weights["share"] = torch.tensor([0.8, 0.2])
    return weights


def sgd(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.model.parameters(), lr=0.1)


def modes(problem: Problem) -> list[bool]:
    return [part.training for part in problem.joint.modules()]


def state(problem: Problem) -> list[Any]:
    """Modes, buffers and gradients of model and hyperparameters, and the random state."""
    buffers = {name: t.clone() for name, t in problem.joint.named_buffers()}
    grads = [p.grad for p in problem.joint.parameters()]
    return [modes(problem), buffers, grads, torch.get_rng_state()]


def assert_same(found: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


METHODS = [None, hoptim.Implicit(curvature=hoptim.FiniteDifference()), hoptim.Unrolled(3), hoptim.Replay([TRAIN] * 2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", CASES)
def test_the_hypergradient_is_that_of_two_losses(name: str, method: Any) -> None:
    one, two = CASES[name].problems()
    train = None if isinstance(method, hoptim.Replay) else TRAIN
    found, expected = (hypergradient(each, train, VAL, method, inner=sgd(each)) for each in (one, two))
    for field in ("grads", "direct", "indirect", "val_loss", "train_loss"):
        assert_same(getattr(found, field), getattr(expected, field))
    assert any(g is not None and g.abs().max() > 1e-7 for g in found.grads.values())


@pytest.mark.parametrize("name", CASES)
def test_modes_and_buffers_are_as_they_were(name: str) -> None:
    one, _ = CASES[name].problems()
    one.hparams.register_module("of_the_user", nn.Sequential(nn.Dropout()).eval())
    one.hparams.of_the_user[0].train()
    before = state(one)
    hypergradient(one, TRAIN, VAL)
    assert_same(state(one), before)
    one.val_loss(one.model, one.hparams, VAL)  # by itself too, but for a model that counts its forward passes
    assert modes(one) == before[0]


class Split(nn.Module):
    """A model with a head that a loss calls by itself, and a part in a mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = net(nn.Dropout()), nn.BatchNorm1d(3).eval(), nn.Sequential(nn.Dropout(0.1)).eval()
        self.head[0].train()

    def forward(self, x: Tensor) -> Any:
        z = self.head(self.norm(self.body(x)))
        return z if self.training else [z]  # as of a detector, which returns its losses in training mode alone


def test_a_loss_that_fails_in_evaluation_mode_names_the_remedy_and_leaves_the_modes() -> None:
    hparams = nn.ModuleDict({"decay": decays(), "other": LabelSmoothing().eval()})
    problem = Problem(Split(), hparams, lambda m, h, b: F.cross_entropy(m(X[b]), Y[b]) + h["decay"]["decay"] * size_of(m))
    before = state(problem)
    for call in (lambda: hypergradient(problem, TRAIN, VAL), lambda: problem.val_loss(problem.model, hparams, VAL)):
        with pytest.raises(TypeError) as caught:
            call()
        assert any("no val_loss was given" in note and "give a val_loss" in note for note in caught.value.__notes__)
        assert_same(state(problem), before)
    assert before[0].count(True) not in (0, len(before[0]))


def test_a_validation_batch_of_another_kind_is_named() -> None:
    def loss(m: Any, h: Any, batch: Any) -> Tensor:
        return h.mean(F.cross_entropy(m(batch["x"]), batch["y"], reduction="none"), batch["number"])

    def batch(of: Tensor) -> dict[str, Tensor]:
        return {"x": X[of], "y": Y[of], "number": of}

    problem = Problem(net(), ExampleWeights(10), loss)
    with pytest.raises(TypeError, match="tuple indices") as caught:
        hypergradient(problem, batch(TRAIN), (X[VAL], Y[VAL], VAL))
    notes = " ".join(caught.value.__notes__)
    assert "no val_loss was given, so train_loss ran" in notes
    assert "val_loss was called with a batch that is a tuple" in notes
    found = hypergradient(problem, batch(TRAIN), batch(VAL))  # of examples that have no weights, which need none
    assert_same(found.val_loss, plain(problem.model, None, VAL).detach())


def own_penalty(m: Any, h: Any, b: Any) -> Tensor:
    return F.cross_entropy(m(X[b]), Y[b]) + h["decay"] * size_of(m)


def of_model() -> HyperParameters:
    hparams = HyperParameters({"decay": torch.tensor(0.1)})
    hparams.acts_in_evaluation = True
    return hparams


DIRECT: dict[str, tuple[Any, str]] = {
    "a penalty": (lambda: Problem(net(), decays(), own_penalty), "'decay'"),
    "a penalty beside recipes": (
        lambda: Problem(
            net(),
            nn.ModuleDict({"T": Temperature(), "own": decays()}),
            lambda m, h, b: own_penalty(m, h["own"], b) + h["T"].cross_entropy(m(X[b]), Y[b]),
        ),
        "'own.decay'",
    ),
    "a penalty in a ParameterDict": (
        lambda: Problem(net(), nn.ParameterDict({"decay": torch.tensor(0.1)}), own_penalty),
        "'decay'",
    ),
    "learned examples": (
        lambda: Problem(
            net(), DistilledData(3, (4,)), lambda m, h, b: decay_of(m) + F.cross_entropy(m(h["input"]), h.labels)
        ),
        "'input'",
    ),
    "for training alone": (lambda: Problem(net(), decays(), in_training), ""),
    "a part of the model": (lambda: Problem(net(), of_model(), own_penalty), ""),
    "two losses": (lambda: Problem(net(), decays(), own_penalty, own_penalty), ""),
    "Temperature": (lambda: CASES["Temperature"].problems()[0], ""),
}


def decay_of(m: Any) -> Tensor:
    return 0.1 * size_of(m)


@pytest.mark.parametrize("name", DIRECT)
def test_what_the_validation_loss_would_shrink_by_itself_is_named_once(name: str) -> None:
    make, named = DIRECT[name]
    problem = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            hypergradient(problem, TRAIN, VAL)
    told = [str(one.message) for one in caught if "no val_loss was given" in str(one.message)]
    assert len(told) == bool(named)
    assert all(f"depends on {named} in evaluation mode" in one for one in told)


@pytest.mark.parametrize("recipe", [Dropout, NoiseWidth])
def test_layers_in_training_mode_get_their_inputs_as_they_are_if_the_recipe_is_in_evaluation_mode(recipe: Any) -> None:
    model = net()
    assert_same(recipe(model).eval().call(model, X), model(X), rtol=0, atol=0)


def test_a_recipe_in_evaluation_mode_learns_nothing_in_a_training_and_says_so() -> None:
    model = net()
    problem = Problem(model, WeightDecay(model).eval(), lambda m, h, b: decayed(h, m, F.cross_entropy(m(X[b]), Y[b])))
    with pytest.raises(ValueError, match=r"touched by neither loss.*a recipe in training mode"):
        hypergradient(problem, TRAIN, VAL)


def test_the_given_labels_are_no_part_of_a_state_and_move_with_their_module() -> None:
    hparams = SoftLabels(Y.int(), start=0.6)
    assert list(hparams.state_dict()) == list(dict(hparams.named_parameters())) == ["label"]
    earlier = {"label": torch.zeros_like(hparams.label)}  # without the labels
    assert not any(hparams.load_state_dict(earlier))
    problem = Problem(net(), hparams, CASES["SoftLabels"].loss)
    assert list(problem.leaves()) == ["label"]
    assert hparams.degrees_of_freedom == sum(leaf.numel() for leaf in problem.leaves().values())
    for again in (copy.deepcopy(hparams), pickle.loads(pickle.dumps(hparams)), hparams.float().double().to("meta")):
        assert (again.given.dtype, again.given.device) == (torch.int64, again.label.device)


def test_a_function_that_is_given_twice_runs_as_it_is() -> None:
    def smoothed(m: Any, h: Any, b: Any) -> Tensor:
        return h.cross_entropy(m.eval()(X[b]), Y[b])

    model, hparams = net(nn.Dropout(0.4)), LabelSmoothing(0.2)
    twice, once = (Problem(model, hparams, smoothed, *val) for val in ((smoothed,), ()))
    z = model.eval()(X[VAL])
    expected = F.cross_entropy(z, Y[VAL], label_smoothing=0.2), F.cross_entropy(z, Y[VAL])
    found = [hypergradient(problem, TRAIN, VAL) for problem in (twice, once)]
    assert_same([one.val_loss for one in found], [value.detach() for value in expected])
    assert [bool(one.direct["smoothing"]) for one in found] == [True, False]


def test_a_training_has_the_bits_of_one_with_two_losses() -> None:
    ends = []
    for problem in CASES["several recipes"].problems():
        torch.manual_seed(3)
        optimizer = hoptim.BilevelOptimizer(
            sgd(problem), hoptim.outer_adam(problem.hparams), problem, val_batches=[VAL], every=2
        )
        for _ in range(8):
            optimizer.zero_grad()
            optimizer.loss(TRAIN).backward()
            optimizer.step()
        assert optimizer.record.moved
        ends.append((problem.model.state_dict(), problem.hparams.state_dict()))
    assert_same(*ends, rtol=0, atol=0)


def test_folds_a_retraining_and_an_audit_have_it_too() -> None:
    """Each makes problems of its own."""
    ends: list[Any] = []
    for val in ((), (plain,)):
        torch.manual_seed(4)
        case = CASES["several recipes"]
        hparams = case.hparams(net()).double()

        def train(model: Any, optimizer: Any, examples: Tensor) -> None:
            for _ in range(6):
                optimizer.zero_grad()
                optimizer.loss(examples).backward()
                optimizer.step()

        def inner(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.1)

        fit = hoptim.CrossValidated(
            net, hparams, case.loss, *val, inner=inner, examples=24, steps=6, folds=2, hypersteps=2
        ).fit(train)
        problem = Problem(net(), hparams, case.loss, *val)
        again = hoptim.retrain(problem, net, train, TRAIN, inner=inner)
        found = hoptim.audit(problem, TRAIN, VAL, inner=sgd(problem), steps=3)
        figures = [[one.predicted, one.measured] for one in found.directions]
        ends.append([fit.hyperparameters, fit.model.state_dict(), again.state_dict(), figures, found.standard_error])
    assert_same(*ends)


def test_an_audit_by_a_copy_of_the_training_has_it_too() -> None:
    """The steps of an LBFGS are taken by the optimizer itself, on copies."""
    figures = []
    for problem in CASES["LabelSmoothing"].problems():
        inner = torch.optim.LBFGS(problem.model.parameters(), lr=0.1, max_iter=2)
        found = hoptim.audit(problem, TRAIN, VAL, inner=inner, steps=2)
        figures.append([[one.predicted, one.measured] for one in found.directions])
    assert_same(*figures)


@pytest.mark.parametrize("method", [None, hoptim.Implicit(hoptim.CG(terms=4), curvature=hoptim.GaussNewton())])
def test_tasks_have_it_too(method: Any) -> None:
    """The pull towards the start is for training alone, and so is the penalty of a CompositeLoss."""

    def composite() -> CompositeLoss:
        return CompositeLoss(lambda m, h, b: m(X[b]), criterion, lambda m, h: h.penalty(m, 0.5))

    def val(m: Any, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(m.eval()(X[b]), Y[b])

    found = []
    for more in ((), (val,)):
        model = net(nn.Dropout(0.4))
        problem, inner = Problem(model, Initialization(model), composite(), *more, has_aux=True), torch.optim.SGD
        tasks, held_out = TRAIN.reshape(2, 5), VAL.reshape(2, 7)
        result = hypergradient(problem, tasks, held_out, hoptim.PerTask(2, method), inner=inner(model.parameters(), lr=0.1))
        assert all(part.training for part in problem.joint.modules())
        found.append([result.grads, result.val_loss])
    assert_same(*found)


def test_a_problem_of_one_loss_can_be_copied_and_pickled() -> None:
    problem = Problem(net(), decays(), in_training)
    for again in (copy.deepcopy(problem.val_loss), pickle.loads(pickle.dumps(problem.val_loss))):
        assert_same(again(problem.model, problem.hparams, VAL), plain(problem.model, None, VAL))
