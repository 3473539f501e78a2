"""A fit that is left at any moment and gone on with in a new object ends in the bits of one that was not."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from test_cross_validated import FOLDS, N, X, cross_validated, decays
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Subset, TensorDataset

import hoptim
from hoptim import CrossValidated, HyperParameters, Implicit, Neumann
from hoptim.training.files import read_whole, write_atomically

EPOCHS = 4
STEPS = {len(train): EPOCHS * -(-len(train) // 2) for train in (*(train for train, _ in FOLDS), range(N))}


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files have to outlive a fit, not the machine, and a hundred of them would wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))


def noisy_train_loss(model: Any, hparams: Any, batch: Any) -> Any:
    fit = (model(X[batch]) - 1.0).square().mean()
    return fit + sum(hparams["decay"][i].exp() * model[3 * i].weight.square().sum() for i in (0, 1))


def noisy_val_loss(model: Any, hparams: Any, batch: Any) -> Any:
    model.eval()
    return (model(X[batch]) - 1.0).square().mean()


class Loop:
    """An ordinary loop over epochs, which is killed before step number ``kill``, counted over all trainings."""

    def __init__(self, kill: int | None = None, way: str = "randperm") -> None:
        self.kill, self.way, self.steps, self.seen = kill, way, 0, []

    def __call__(self, model: Any, optimizer: Any, examples: Any) -> None:
        order = examples[torch.randperm(len(examples))]  # which is drawn before the loop, as a subset may be
        draws = torch.Generator().manual_seed(len(examples))
        loader = DataLoader(Subset(TensorDataset(torch.arange(N)), order.tolist()), batch_size=2, shuffle=True)
        scheduler = CosineAnnealingLR(optimizer, EPOCHS)
        for epoch in optimizer.resumable(range(EPOCHS), scheduler, draws):
            model.train()
            self.seen.append((len(examples), epoch))
            batches = [batch for (batch,) in loader] if self.way == "loader" else order[torch.randperm(len(order))].split(2)
            for batch in batches:
                if self.steps == self.kill:
                    raise KilledError
                self.steps += 1
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                for p in model.parameters():
                    p.grad += 0.01 * torch.randn(p.shape, generator=draws)
                nn.utils.clip_grad_norm_(model.parameters(), 2.0)
                optimizer.step()
            scheduler.step()


def build(seed: int = 5, **changed: Any) -> CrossValidated:
    torch.manual_seed(seed)
    hparams = changed.pop("hparams", None) or decays()
    settings = {"make": make, "train_loss": noisy_train_loss, "val_loss": noisy_val_loss, "hypersteps": 3}
    settings |= {"steps": lambda n: EPOCHS * -(-n // 2), "outer": Adam(hparams.parameters(), lr=0.1), **changed}
    return cross_validated(hparams, **settings)


def outcome(found: Any) -> dict[str, Any]:
    """Every tensor and every figure of a fit, without times."""
    models = {
        f"{number}.{name}": t.clone()
        for number, model in enumerate([found.model, *found.models])
        for name, t in model.state_dict().items()
    }
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in found.history]
    return {**models, **found.hyperparameters, "history": rows, "random": torch.get_rng_state()}


def assert_same(here: dict[str, Any], there: dict[str, Any]) -> None:
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(value, there[name]) if isinstance(value, torch.Tensor) else value == there[name], name


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the file holds, each time that it is written."""
    held: list[dict[str, Any]] = []

    def write(path: Path, data: bytes, remedy: str) -> None:
        write_atomically(path, data, remedy)
        held.append(read_whole(path)["ranks"][0])

    monkeypatch.setattr("hoptim.training.fit_file.write_atomically", write)
    return held


def in_folds(written: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The mark and the number of hypersteps that all folds have come to, in each file that is written in their phase."""
    found = []
    for saved in written:
        if saved["phase"] == "folds":
            (mark,) = {state["mark"] for state in saved["folds"]}
            (hypersteps,) = {state["optimizer"]["hoptim"]["hyper_steps"] for state in saved["folds"]}
            assert hypersteps == len(saved["history"])
            found.append((mark, hypersteps))
    return found


@cache
def whole(way: str) -> dict[str, Any]:
    return outcome(build().fit(Loop(way=way)))


TOTAL = sum(STEPS.values())  # 36 on the folds, and 24


@pytest.mark.parametrize("way", ["randperm", "loader"])
@pytest.mark.parametrize("kill", [2, 18, 35, 36, 50, 59])
def test_a_fit_that_was_killed_goes_on_to_the_same_bits(kill, way, tmp_path):
    path = tmp_path / "fit.pt"
    with pytest.raises(KilledError):
        build().fit(Loop(kill, way), checkpoint=path, every_seconds=0)
    again = Loop(way=way)
    found = build(seed=6).fit(again, checkpoint=path, every_seconds=0)  # the seed of the first one is in the file
    assert again.steps < TOTAL - 0.8 * kill + 9
    assert_same(outcome(found), whole(way))


def test_one_that_is_killed_again_and_again(tmp_path):
    path, kills = tmp_path / "fit.pt", 0
    while True:
        train = Loop(kill=17)
        try:
            found = build().fit(train, checkpoint=path, every_seconds=0)
            break
        except KilledError:
            kills += 1
    assert kills == 5
    assert_same(outcome(found), whole("randperm"))


def test_a_checkpoint_changes_nothing_and_is_written_where_all_folds_have_come_as_far(tmp_path, written):
    found = build().fit(Loop(), checkpoint=tmp_path / "fit.pt", every_seconds=0)
    assert_same(outcome(found), whole("randperm"))
    assert [mark for mark, _ in in_folds(written)] == list(range(EPOCHS))
    for mark, saved in enumerate(written[:EPOCHS]):
        taken = [state["optimizer"]["hoptim"]["inner_steps"] for state in saved["folds"]]
        assert taken == [2 * mark, 3 * mark, 4 * mark]
    assert written[-1]["last"]["mark"] == EPOCHS - 1


def resumed(tmp_path: Any, kill: int, every_seconds: float = 0, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outcome of a fit that was killed and gone on with, and of one that was not."""
    path = tmp_path / "fit.pt"
    with pytest.raises(KilledError):
        build(**{name: value() for name, value in changed.items()}).fit(
            Loop(kill), checkpoint=path, every_seconds=every_seconds
        )
    found = build(**{name: value() for name, value in changed.items()}).fit(
        Loop(), checkpoint=path, every_seconds=every_seconds
    )
    return outcome(found), outcome(build(**{name: value() for name, value in changed.items()}).fit(Loop()))


def shuffled(held_out: Any) -> Any:
    return DataLoader(Subset(TensorDataset(torch.arange(N)), held_out.tolist()), batch_size=2, shuffle=True)


def val_loss_of_a_list(model: Any, hparams: Any, batch: Any) -> Any:
    return noisy_val_loss(model, hparams, batch[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"hypergradient": lambda: Implicit(Neumann(terms=3))},
        {"hypergradient": lambda: Implicit(hoptim.Nystrom(rank=2))},
        {"hypergradient": lambda: hoptim.Unrolled(2)},
        {"val_batches": lambda: shuffled, "val_loss": lambda: val_loss_of_a_list},
        {"average": lambda: False},
        {"inner": lambda: lambda model: torch.optim.AdamW(model.parameters(), lr=0.05)},
    ],
    ids=["neumann", "nystrom", "unrolled", "shuffled validation batches", "not averaged", "adamw"],
)
def test_what_solver_loader_and_optimizer_carry_is_there_again(changed, tmp_path):
    assert_same(*resumed(tmp_path, 20, **changed))


def test_a_learned_rate_is_resumed(tmp_path):
    path, outcomes = tmp_path / "fit.pt", []

    def fit(kill: int | None, **more: Any) -> None:
        rate = HyperParameters({"lr": torch.tensor(0.05)}, {"lr": torch.distributions.constraints.positive})
        inner, options = (lambda model: SGD(model.parameters(), lr=0.05)), {"lr": "lr"}
        settings = {"train_loss": noisy_val_loss, "inner": inner, "options": options}
        train = loop(EPOCHS, kill)
        outcomes.append(outcome(build(hparams=rate, **settings).fit(train, **more)))

    def loop(epochs: int, kill: int | None) -> Any:
        steps = [0]

        def train(model: Any, optimizer: Any, examples: Any) -> None:
            for _ in optimizer.resumable(range(epochs)):
                for batch in examples.split(2):
                    if steps[0] == kill:
                        raise KilledError
                    steps[0] += 1
                    optimizer.zero_grad()
                    optimizer.loss(batch).backward()
                    optimizer.step()

        return train

    fit(None)
    for kill in (30, 20):
        with pytest.raises(KilledError):
            fit(kill, checkpoint=path, every_seconds=0)
    fit(None, checkpoint=path)
    assert_same(*outcomes)
    assert float(outcomes[0]["lr"]) != 0.05


def test_a_scaler_and_an_averaged_model_are_stateful(tmp_path):
    def train(model: Any, optimizer: Any, examples: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        mean = torch.optim.swa_utils.AveragedModel(model)
        for _ in optimizer.resumable(range(EPOCHS), scaler, mean):
            for batch in examples.split(2):
                if steps[0] == 0:
                    raise KilledError
                steps[0] -= 1
                optimizer.zero_grad()
                scaler.scale(optimizer.loss(batch)).backward()
                scaler.step(optimizer)
                scaler.update()
                mean.update_parameters(model)
        ends.append({"scale": scaler.get_scale(), **{name: t.clone() for name, t in mean.state_dict().items()}})

    steps, ends = [1000], []
    expected, expected_ends = outcome(build().fit(train)), ends.copy()
    for kill in (25, 30):
        steps, path = [kill], tmp_path / "fit.pt"
        with pytest.raises(KilledError):
            build().fit(train, checkpoint=path, every_seconds=0)
    steps, ends = [1000], []
    assert_same(outcome(build().fit(train, checkpoint=path)), expected)
    assert_same(ends[-1], expected_ends[-1])


def test_an_error_in_a_hook_is_a_kill_as_well(tmp_path):
    path = tmp_path / "fit.pt"

    def hook(record: Any) -> None:
        if record.hyper_step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        build(hooks=[hook]).fit(Loop(), checkpoint=path, every_seconds=0)
    assert_same(outcome(build().fit(Loop(), checkpoint=path)), whole("randperm"))


def test_marks_that_the_folds_reach_between_other_hypersteps_are_passed_over(tmp_path, written):
    """Fold k has 3, 5 or 8 steps an epoch, and its hypersteps come just before or just after an epoch's end."""

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in optimizer.resumable(range(4)):
            for example in examples.split(1):
                optimizer.zero_grad()
                optimizer.loss(example).backward()
                optimizer.step()

    cv = build(steps=lambda n: 4 * n, warmup=0.26)  # so they follow steps 6, 9, 12; 10, 15, 20; 16, 24, 32
    cv.fit(train, checkpoint=tmp_path / "first.pt", every_seconds=0)
    assert in_folds(written) == [(0, 0), (1, 0), (2, 1), (3, 2)]
    written.clear()
    told = {3: 12, 5: 23, 8: 36}
    cv = build(steps=told.get, warmup=0.26)  # they follow steps 6, 9, 12; 11, 17, 23; 18, 27, 36
    cv.fit(train, checkpoint=tmp_path / "second.pt", every_seconds=0)
    assert in_folds(written) == [(0, 0), (1, 0)]


# The file


def test_it_is_written_when_time_has_gone_by_and_between_the_phases(tmp_path):
    path = tmp_path / "fit.pt"
    with pytest.raises(KilledError):
        build().fit(Loop(kill=35), checkpoint=path)
    assert not path.exists()
    with pytest.raises(KilledError):
        build().fit(Loop(kill=59), checkpoint=path)
    saved = read_whole(path)["ranks"][0]
    assert (saved["phase"], saved["last"]["mark"]) == ("last", None)
    again = Loop()
    found = build(seed=7).fit(again, checkpoint=path)
    assert again.steps == STEPS[N]
    assert_same(outcome(found), whole("randperm"))
    assert found.cost > 1.5  # with the time of the folds


def unmarked(kill: int | None = None) -> Any:
    steps = [0]

    def train(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in range(EPOCHS):
            for batch in examples.split(2):
                if steps[0] == kill:
                    raise KilledError
                steps[0] += 1
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()

    return train


def test_a_loop_without_marks_is_saved_between_the_phases(tmp_path):
    path = tmp_path / "fit.pt"
    expected = outcome(build().fit(unmarked()))
    with pytest.raises(KilledError):
        build().fit(unmarked(50), checkpoint=path, every_seconds=0)
    assert_same(outcome(build(seed=7).fit(unmarked(), checkpoint=path)), expected)


@cache
def killed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fit.pt")
        with pytest.raises(KilledError):
            build().fit(Loop(kill=30), checkpoint=path, every_seconds=0)
        return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a fit that was killed among the folds, to go on with or to damage."""
    path = tmp_path / "fit.pt"
    path.write_bytes(killed())
    return path


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hypersteps": 2}, "hypersteps is 3 there, 2 here; the steps of the hypersteps is"),
        ({"warmup": 0.5}, r"the steps of the hypersteps is \[\[4, "),
        ({"steps": lambda n: 100}, "the steps of the hypersteps is"),
        ({"folds": FOLDS[:2]}, "its folds are others"),
        ({"folds": [FOLDS[0], FOLDS[1], ([0, 1, 2, 3, 4, 5, 6, 10], [7, 8, 9])]}, "its folds are others"),
        ({"average": False}, "average is True there, False here"),
        ({"examples": 12}, "examples is 11 there, 12 here"),
        ({"hypergradient": Implicit(Neumann(terms=4))}, "hypergradient is Implicit.*None.* there, .*Neumann.*here"),
        ({"hypergradient": Implicit()}, None),
        ({"outer": None}, None),  # which is an Adam as well
        ({"inner": lambda model: Adam(model.parameters())}, "the inner optimizer is SGD there, Adam here"),
        ({"make": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 1))}, r"weights is \[.*4, 3"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused_and_what_differs_is_named(changed, words, path):
    before = path.read_bytes()
    if words is None:
        build(**changed).fit(Loop(), checkpoint=path)
        return
    with pytest.raises(ValueError, match=words):
        build(**changed).fit(Loop(), checkpoint=path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused(path):
    data, held = path.read_bytes(), read_whole(path)
    for damaged in (b"", b"nothing", data[: len(data) // 2], data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fit\.pt is damaged or no fit's .*: delete it to begin anew"):
            build().fit(Loop(), checkpoint=path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"is damaged or no fit's \(KeyError"):
        build().fit(Loop(), checkpoint=path)
    torch.save({**held, "settings": {**held["settings"], "version": 2}}, path)
    cv = build()
    with pytest.raises(ValueError, match="is of another fit: version is 2 there, 1 here"):
        cv.fit(Loop(), checkpoint=path)
    path.unlink()
    assert_same(outcome(cv.fit(Loop(), checkpoint=path)), whole("randperm"))  # nothing was begun by what was refused


def test_a_loop_that_is_not_the_one_that_was_saved_is_refused(path):
    with pytest.raises(ValueError, match="is of a loop that was marked, and this one is not"):
        build().fit(unmarked(), checkpoint=path)

    def other(epochs: int, *stateful: Any) -> Any:
        def train(model: Any, optimizer: Any, examples: Any) -> None:
            scheduler = CosineAnnealingLR(optimizer, EPOCHS)
            for _ in optimizer.resumable(range(epochs), scheduler, *stateful):
                optimizer.loss(examples)

        return train

    with pytest.raises(
        ValueError, match=r"was given \['CosineAnnealingLR', 'Generator'\] where .*, and \['CosineAnnealingLR'"
    ):
        build().fit(other(EPOCHS), checkpoint=path)
    with pytest.raises(ValueError, match="is at mark 3 of a loop, which has 2 now"):
        build().fit(other(2, torch.Generator()), checkpoint=path)


# Mistakes


def fit_with(body: Any, **options: Any) -> None:
    def train(model: Any, optimizer: Any, examples: Any) -> None:
        body(optimizer, examples)

    build().fit(train, **options)


def step(optimizer: Any, examples: Any) -> None:
    optimizer.zero_grad()
    optimizer.loss(examples).backward()
    optimizer.step()


class Odd:
    def state_dict(self) -> Any:
        return {"a": Odd}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_mistakes_with_marks_are_named(tmp_path):
    def after_a_step(optimizer: Any, examples: Any) -> None:
        step(optimizer, examples)
        optimizer.resumable(range(3))

    def twice(optimizer: Any, examples: Any) -> None:
        optimizer.resumable(range(3))
        optimizer.resumable(range(3))

    for body in (after_a_step, twice):
        with pytest.raises(ValueError, match="is for the whole loop of a training"):
            fit_with(body)
    with pytest.raises(UnpicklingError):
        fit_with(lambda o, _: list(o.resumable(range(3), Odd())), checkpoint=tmp_path / "fit.pt", every_seconds=0)
    assert not (tmp_path / "fit.pt").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"checkpoint": "no/such/folder/fit.pt"}, ValueError, "give a file in a folder that is there"),
        ({"checkpoint": "."}, ValueError, "give a file in a folder that is there"),
    ],
)
def test_mistakes_with_the_file_are_named(options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        build().fit(Loop(), **options)


def test_nothing_is_saved_in_the_middle_of_a_step(tmp_path, written):
    def train(model: Any, optimizer: Any, examples: Any) -> None:
        for epoch in optimizer.resumable(range(8)):  # each of them half a step
            if epoch % 2 == 0:
                optimizer.zero_grad()
            (optimizer.loss(examples) / 2).backward()
            if epoch % 2:
                optimizer.step()

    build(steps=4).fit(train, checkpoint=tmp_path / "fit.pt", every_seconds=0)
    assert [mark for mark, _ in in_folds(written)] == [0, 2, 4, 6]
