"""The recipes' experiments at a tiny size, and the losses of their tasks against the formulas written out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import recipes as table
import torch
import train
from hydra import compose, initialize_config_dir
from jobs import ROOT
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tasks import data, folds, models, schema
from tasks.calibration import Calibration
from tasks.classification import Classification
from tasks.run import Run
from tasks.side_losses import SideLosses
from tasks.supernet import OPTIONS, Search
from tasks.task import measure
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import Categorical, LossWeights, WeightDecay

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment" / "recipes").glob("*.yaml"))
TINY = ("hoptim/tracker=[]", "outer_steps=1", "inner_steps=2", "every=2", "warmup=0")


@pytest.fixture(autouse=True)
def fashion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in place of Fashion-MNIST, which is not on every machine."""
    made, read = torch.Generator().manual_seed(0), data.read
    images = data.Labelled(
        torch.rand(3400, 1, 4, 4, generator=made, dtype=torch.float32),
        torch.randint(10, (3400,), generator=made),
        training=1300,
    )
    monkeypatch.setattr(data, "read", lambda name, root: images if name == "fashion_mnist" else read(name, root))


@pytest.fixture
def float32() -> None:
    torch.set_default_dtype(torch.float32)


def config(*overrides: str) -> DictConfig:
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*overrides])


def measured(run: Run) -> dict[str, float]:
    return measure(run.task, run.problem.model, run.problem.hparams, run.parts)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_learns_and_its_baselines_do_not(name: str, float32: None) -> None:
    cfg = config(f"experiment=recipes/{name}", *TINY)
    assert cfg.name == f"recipes/{name}"
    assert cfg.baselines
    for label, own in {"learned": cfg, **train.baselines(cfg)}.items():
        run = Run.of(own)
        before = [leaf.clone() for leaf in run.problem.hparams.parameters()]
        run.advance()
        moved = [not torch.equal(*pair) for pair in zip(before, run.problem.hparams.parameters(), strict=True)]
        assert all(map(math.isfinite, measured(run).values()))
        assert (len(run.records), run.optimizer.inner_steps) == (label == "learned", 2)
        assert any(moved) == (label == "learned"), label
        if own.retrain:
            again = measure(run.task, run.retrained(), run.problem.hparams, run.parts)
            assert math.isfinite(again["test_loss"])


# The losses of Classification by hand, in float64. The models have Flatten, Linear 1, ReLU, Linear 3.


def classification(kind: type[Classification] = Classification, **options: Any) -> tuple[Any, nn.Module, nn.Module]:
    """A small task, its model and its hyperparameters, moved off their start."""
    torch.manual_seed(1)
    small = {"data": "digits", "train": 12, "val": 6, "model_of": partial(models.mlp, hidden=[5])}
    task = kind(**(small | options))
    task.setup(0)
    task.x = task.x.double()
    model = task.model().double()
    hparams = task.hparams(model).double()
    with torch.no_grad():
        for leaf in hparams.parameters():
            leaf.add_(0.3 * torch.randn_like(leaf))
    return task, model, hparams


def losses(task: Classification, model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(task.x[batch]), task.y[batch], reduction="none")


def decayed(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    own = hparams["weight_decay"]
    penalty = sum(
        (own[f"decay.{name}"] * model.get_parameter(name).square().sum(1)).sum() for name in ("1.weight", "3.weight")
    )
    return losses(task, model, batch).mean() + penalty / 2


def with_prior(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    own = hparams["prior_scale"]
    terms = [model.get_parameter(name).square().sum() / (2 * own.scale(name) ** 2 * 12) for name in ("1.weight", "3.weight")]
    return losses(task, model, batch).mean() + sum(terms)


def smoothed(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    amount = hparams["label_smoothing"]["smoothing"].item()
    return F.cross_entropy(model(task.x[batch]), task.y[batch], label_smoothing=amount)


def noisy(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    own, x = hparams["noise_width"], task.x[batch].flatten(1)
    hidden = model[1](x + own["width.1"] * torch.randn_like(x)).relu()
    z = model[3](hidden + own["width.3"] * torch.randn_like(hidden))
    return F.cross_entropy(z, task.y[batch])


def dropped(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    def drop(x: Tensor, p: Tensor) -> Tensor:
        u = torch.rand_like(x)
        s = torch.sigmoid((torch.log(p / (1 - p)) + torch.log(u / (1 - u))) / 0.1)
        return x * (1 - s) / (1 - p)

    own, x = hparams["dropout"], task.x[batch].flatten(1)
    hidden = model[1](drop(x, own["rate.1"])).relu()
    return F.cross_entropy(model[3](drop(hidden, own["rate.3"])), task.y[batch])


def weighted(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    weight = hparams["example_weights"]["example_weight"] / 0.5  # relative to the start
    return sum(weight[i] * loss for i, loss in zip(batch, losses(task, model, batch), strict=True)) / len(batch)


def soft(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    q = hparams["soft_labels"]["label"][batch]
    return -(q * model(task.x[batch]).log_softmax(1)).sum(1).mean()


def mixed(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    weight = 3 * hparams["domain_weights"]["mixture"][batch % 3]  # each source has a third of the training part
    return (torch.where(batch < 12, weight, 1.0) * losses(task, model, batch)).mean()


def scaled(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(task.x[batch]) / hparams["temperature"]["temperature"], task.y[batch])


def distilled(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(hparams["distilled_data"]["input"]), torch.arange(10))


def augmented(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(hparams["augmentation"].augment(task.x[batch])), task.y[batch])


def changed_by_net(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(hparams["augmentation_net"](task.x[batch])), task.y[batch])


def gated(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    open_ = hparams["gate"]["openness"]
    u = torch.rand_like(open_)
    s = torch.sigmoid((torch.log(u / (1 - u)) + torch.log(open_ / (1 - open_))) * 1.5)
    z = model(task.x[batch] * (1.2 * s - 0.1).clamp(0, 1)[:, None, None])
    return F.cross_entropy(z, task.y[batch])


def plain(task: Any, model: Any, hparams: Any, batch: Tensor) -> Tensor:
    squares = sum(weight.square().sum() for weight in model.parameters())
    return losses(task, model, batch).mean() + 0.05 * squares


BY_HAND: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "weight_decay": ({"recipes": {"weight_decay": partial(WeightDecay, per="channel", start=0.1)}}, decayed),
    "prior_scale": ({}, with_prior),
    "label_smoothing": ({}, smoothed),
    "noise_width": ({}, noisy),
    "dropout": ({}, dropped),
    "example_weights": ({"wrong_labels": 0.5}, weighted),
    "soft_labels": ({"wrong_labels": 0.5}, soft),
    "domain_weights": ({"wrong_labels": [0.0, 0.5, 1.0]}, mixed),
    "temperature": ({}, scaled),
    "distilled_data": ({}, distilled),
    "augmentation": ({}, augmented),
    "augmentation_net": ({}, changed_by_net),
    "gate": ({}, gated),
    "step": ({"decay": 0.1}, plain),
}
CLASSES = {"step": partial(hoptim.HyperParameters, {"lr": torch.tensor(0.1)})} | {
    name: getattr(hoptim.recipes, "".join(map(str.capitalize, name.split("_")))) for name in BY_HAND if name != "step"
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_training_loss_is_the_formula(name: str) -> None:
    options, by_hand = BY_HAND[name]
    task, model, hparams = classification(**({"recipes": {name: CLASSES[name]}} | options))
    for batch in ([0, 3, 4, 7, 11], [2, 5, 13, 17], [14, 15]):  # a retraining has validation examples too, from 12 on
        found = []
        for loss in (task.train_loss, partial(by_hand, task)):
            torch.manual_seed(5)
            found.append(loss(model.train(), hparams, torch.tensor(batch)))
        assert found[0].item() == pytest.approx(found[1].item(), rel=1e-12)


def test_every_recipe_of_the_task_is_checked_by_hand() -> None:
    assert set(BY_HAND) == Classification.places


def test_recipes_in_different_places_act_together() -> None:
    chosen = {name: CLASSES[name] for name in ("weight_decay", "label_smoothing", "domain_weights")}
    task, model, hparams = classification(recipes=chosen, wrong_labels=[0.0, 0.5], decay=0.1)
    batch = torch.arange(4)
    smooth, p = hparams["label_smoothing"]["smoothing"], hparams["domain_weights"]["mixture"]
    log_p = model(task.x[batch]).log_softmax(1)
    each = -(1 - smooth) * log_p[batch, task.y[batch]] - smooth * log_p.mean(1)
    whole = (2 * p[batch % 2] * each).mean() + hparams["weight_decay"].penalty(model)
    whole = whole + 0.05 * sum(weight.square().sum() for weight in model.parameters())
    assert task.train_loss(model, hparams, batch).item() == pytest.approx(whole.item(), rel=1e-12)


def test_an_open_gate_has_its_price_in_the_validation_loss_alone() -> None:
    task, model, hparams = classification(recipes={"gate": CLASSES["gate"]}, gate_price=0.5)
    free, batch = classification(recipes={"gate": CLASSES["gate"]})[0], torch.arange(12, 18)
    price = 0.5 * hparams["gate"].count()
    assert task.val_loss(model, hparams, batch).item() == pytest.approx(
        (free.val_loss(model, hparams, batch) + price).item(), rel=1e-12
    )
    assert task.figures(model, hparams, batch)["loss"].item() == free.figures(model, hparams, batch)["loss"].item()
    assert int(task.figures(model, hparams, batch)["open"]) == int(hparams["gate"].harden()[0].sum())


def test_joined_parts_train_together_and_wrong_labels_stay_in_train() -> None:
    recipes = {"example_weights": CLASSES["example_weights"]}
    parts = [classification(recipes=recipes, join=join, wrong_labels=1.0)[0] for join in (False, True)]
    assert torch.equal(parts[0].y, parts[1].y)
    assert parts[1].parts["train"].tolist() == list(range(18))
    assert parts[1].parts["val"].tolist() == list(range(12, 18))
    assert len(parts[1].hparams(parts[1].model())["example_weights"]["example_weight"]) == 18


def test_a_temperature_that_calibrates_has_the_direct_hypergradient_alone() -> None:
    task, model, hparams = classification(Calibration, recipes={"temperature": CLASSES["temperature"]})
    batch, val = torch.arange(12), torch.arange(12, 18)
    assert task.train_loss(model, hparams, batch).item() == pytest.approx(losses(task, model, batch).mean().item())
    found = hoptim.hypergradient(hoptim.Problem(model, hparams, task.train_loss, task.val_loss), batch, val)
    assert float(found.indirect["temperature.temperature"]) == 0
    (leaf,), ends = hparams.parameters(), []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            leaf.add_(step)
            z = model(task.x[val]) / hparams["temperature"]["temperature"]
            ends.append(F.cross_entropy(z, task.y[val]))
            leaf.sub_(step)
    assert float(found.grads["temperature.temperature"]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-7)
    figures = task.figures(model, hparams, val)
    p = (model(task.x[val]) / hparams["temperature"]["temperature"]).softmax(1)
    assert figures["overconfidence"].item() == pytest.approx(
        (p.max(1).values.mean() - (p.argmax(1) == task.y[val]).double().mean()).item()
    )


def test_side_losses_are_weighted_and_of_the_turned_images() -> None:
    task, model, hparams = classification(SideLosses, recipes={"loss_weights": LossWeights})
    batch = torch.tensor([0, 1, 2, 7])
    w, z = 3 * hparams["loss_weights"]["share"], model(task.x[batch])
    turned = torch.cat([task.x[i : i + 1].rot90(int(i) % 4, (2, 3)) for i in batch])
    parts = [
        F.cross_entropy(z[:, :10], task.y[batch]),
        F.cross_entropy(model(turned)[:, 10:14], torch.tensor([0, 1, 2, 3])),
        F.cross_entropy(z[:, 14:], task.random[batch]),
    ]
    whole = sum(weight * part for weight, part in zip(w, parts, strict=True))
    assert task.train_loss(model, hparams, batch).item() == pytest.approx(whole.item(), rel=1e-12)
    assert task.val_loss(model, hparams, batch).item() == pytest.approx(parts[0].item(), rel=1e-12)
    started = classification(SideLosses, recipes={"loss_weights": LossWeights}, shares_at_start=[0.5, 0.25, 0.25])[0]
    assert started.hparams(model)["loss_weights"]["share"].tolist() == pytest.approx([0.5, 0.25, 0.25])


def search(**options: Any) -> tuple[Any, nn.Module, nn.Module]:
    recipe = {"categorical": partial(Categorical, **options.pop("recipe", {}))}
    return classification(Search, recipes=recipe, width=3, model_of=None, **options)


def test_the_supernet_mixes_its_operations_and_activations() -> None:
    task, model, hparams = search()
    batch, choices = torch.arange(5), hparams["categorical"]
    p = {name: choices[name]["probability"] for name in OPTIONS}

    def activated(x: Tensor) -> Tensor:
        return p["activation"][0] * x.relu() + p["activation"][1] * x.tanh() + p["activation"][2] * F.gelu(x)

    x = activated(F.conv2d(task.x[batch], model.first.weight, model.first.bias, stride=2, padding=1))
    for name in ("block_0", "block_1", "block_2"):
        three, five = (getattr(model, name)[kind] for kind in ("3x3", "5x5"))
        sums = p[name][0] * F.conv2d(x, three.weight, three.bias, padding=1)
        sums = sums + p[name][1] * F.conv2d(x, five.weight, five.bias, padding=2) + p[name][2] * x
        x = activated(sums)
    whole = F.cross_entropy(model.last(x.mean((2, 3))), task.y[batch])
    assert task.train_loss(model, hparams, batch).item() == pytest.approx(whole.item(), rel=1e-12)
    assert task.val_loss(model, hparams, batch).item() == pytest.approx(whole.item(), rel=1e-12)


def test_the_final_model_has_the_chosen_operations_alone() -> None:
    task, model, hparams = search(fixed={"block_2": "5x5"})
    choices = hparams["categorical"]
    for name, p in {"block_0": [0.1, 0.2, 0.7], "block_1": [0.5, 0.3, 0.2], "activation": [0.2, 0.6, 0.2]}.items():
        choices[name]["probability"] = torch.tensor(p)
    final = task.final_model(hparams).double()
    assert {name: list(getattr(final, name)) for name in OPTIONS if name != "activation"} == {
        "block_0": ["skip"], "block_1": ["3x3"], "block_2": ["5x5"],
    }  # fmt: skip
    assert list(model.block_2) == ["5x5"]
    batch = torch.arange(5)
    x = final.first(task.x[batch]).tanh().tanh()
    x = final.block_2["5x5"](final.block_1["3x3"](x).tanh()).tanh()
    whole = F.cross_entropy(final.last(x.mean((2, 3))), task.y[batch])
    assert task.train_loss(final, hparams, batch).item() == pytest.approx(whole.item(), rel=1e-12)


def test_the_training_lowers_the_temperature_of_a_gumbel_relaxation(float32: None) -> None:
    run, found = Run.of(config("experiment=recipes/categorical_gumbel", *TINY, "outer_steps=4", "inner_steps=1")), []
    for _ in range(4):
        run.advance()
        found += [choice.temperature for choice in run.problem.hparams["categorical"].values()]
    assert found == pytest.approx([0.1**share for share in (0, 0.25, 0.5, 0.75) for _ in OPTIONS])


def test_a_learned_rate_and_momentum_are_those_of_the_steps(float32: None) -> None:
    run = Run.of(config("experiment=recipes/rate", *TINY))
    assert type(run.optimizer.hypergradient).__name__ == "Unrolled"
    run.advance()
    rate = run.problem.hparams["step"]
    assert (rate["lr"].item(), rate["momentum"].item()) != pytest.approx((0.003, 0.5))
    before = {name: weight.clone() for name, weight in run.problem.model.named_parameters()}
    velocity = {
        name: run.optimizer.state[weight]["momentum_buffer"].clone() for name, weight in run.problem.model.named_parameters()
    }
    now = rate["lr"].item(), rate["momentum"].item()
    run.optimizer.zero_grad()
    run.optimizer.loss(run.batches.draw()).backward()
    run.optimizer.step()
    for name, weight in run.problem.model.named_parameters():
        assert torch.allclose(weight, before[name] - now[0] * (now[1] * velocity[name] + weight.grad), atol=1e-6)


def test_folds_are_hoptims_own_cross_validation(tmp_path, monkeypatch, float32: None) -> None:
    monkeypatch.setattr(hoptim, "CrossValidated", partial(hoptim.CrossValidated, hypersteps=4))
    fewer = ("task.train=60", "task.val=30", "task.test=50", "batch_size=null", "outer_steps=2", "inner_steps=5")
    cfg = config("experiment=recipes/folds", *TINY, *fewer, "plots=false", "seed=3")
    folds.cross_validate(cfg, tmp_path)
    torch.manual_seed(3)
    task = Classification(
        data="digits",
        train=60,
        val=30,
        test=50,
        model_of=partial(models.mlp, hidden=[64]),
        recipes={
            "weight_decay": partial(CLASSES["weight_decay"], per="channel", start=0.001),
            "label_smoothing": partial(CLASSES["label_smoothing"], start=0.01),
            "noise_width": partial(CLASSES["noise_width"], start=0.05),
        },
    )
    parts = task.setup(3)
    hparams = task.hparams(task.model())

    def fit(model: nn.Module, optimizer: Any, examples: Tensor) -> None:
        for _ in range(10):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    found = hoptim.CrossValidated(
        task.model,
        hparams,
        task.train_loss,
        task.val_loss,
        inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True),
        examples=90,
        steps=10,
        folds=3,
    ).fit(fit)
    result = json.loads((tmp_path / "result.json").read_text())
    own = measure(task, found.model, hparams, {"test": parts["test"]})
    assert result["test_loss"] == own["test_loss"]
    assert result["val_loss"] == found.history[-1]["val_loss"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["trainings"] > 1


def test_errors_name_what_is_wrong() -> None:
    small = {"data": "digits", "train": 12, "val": 6, "model_of": models.linear}
    decay = {"weight_decay": WeightDecay}
    both = {name: CLASSES[name] for name in ("soft_labels", "temperature")}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"recipes": both}, ValueError, "temperature and soft_labels have the same place"),
        (
            {"recipes": {"nonsense": WeightDecay}},
            ValueError,
            "'nonsense' has no place in this task: give some of augmentation",
        ),
        ({"recipes": {}}, ValueError, "there is no recipe"),
        ({"recipes": {"weight_decay": None}}, ValueError, "there is no recipe"),
        ({"recipes": decay, "train": "many"}, TypeError, "task.train='many': give a whole number"),
        ({"recipes": decay, "decay": True}, TypeError, "task.decay=True: give a number"),
        ({"recipes": decay, "join": 1}, TypeError, "task.join=1: give true or false"),
        ({"recipes": decay, "gate_price": 0.1}, ValueError, "gate_price=0.1: there is no gate"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            Classification(**(small | options))
    with pytest.raises(ValueError, match="train=2000: the data have 1797"):
        Classification(**small | {"recipes": decay, "train": 2000}).setup(0)
    with pytest.raises(ValueError, match="there is no temperature"):
        Calibration(**small, recipes=decay)
    with pytest.raises(ValueError, match="rotations need square images"):
        SideLosses(**small | {"data": "wine", "recipes": {"loss_weights": LossWeights}}).setup(0)
    with pytest.raises(ValueError, match=r"task.fixed has block_0: 7x7, .* block_0: 3x3, 5x5, skip"):
        search(fixed={"block_0": "7x7"})


def test_the_table_pairs_by_seed_and_takes_the_retrained_model(tmp_path) -> None:
    def write(path: str, **figures: float) -> None:
        folder = tmp_path / path
        folder.mkdir(parents=True)
        rows = [{"inner_seconds": 2.0, "hyper_seconds": 3.0 * ("baselines" not in path)}]
        (folder / "result.json").write_text(json.dumps({"status": "finished", **figures}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for seed, (own, other) in enumerate([(0.5, 0.6), (0.3, 0.2)]):
        again = {"retrained_test_loss": own, "retrained_test_accuracy": 0.9}
        write(f"recipes/gate/seed={seed}", test_loss=9.0, test_accuracy=0.1, **again)
        write(f"recipes/gate/seed={seed}/baselines/all", test_loss=other, test_accuracy=0.8)
        write(f"recipes/gate/seed={seed}/baselines/none", test_loss=2 * other, test_accuracy=0.7)
    found = table.read(tmp_path)
    assert list(found) == ["gate"]
    differing = "0.400 ± 0.100", "all 0.400", "+0.000 ± 0.100 (1 of 2)", "0.900 and 0.800", "none 0.800", "3.5"
    assert table.line("gate", found["gate"]) == ["gate", *differing]
    assert table.paired(found["gate"]["learned"], found["gate"]["all"])[1] == pytest.approx([math.log(5 / 6), math.log(1.5)])


def test_the_picture_has_the_retrained_loss_and_no_validation_loss_of_what_trains_on_it(tmp_path, monkeypatch) -> None:
    from tasks import plots

    def rows(loss: float) -> list[dict[str, Any]]:
        figures = {f"{part}_loss": loss for part in ("train", "val", "test")}
        spread = {"a": {"quantiles": [1.0] * len(plots.QUANTILES)}}
        return [{"outer_step": step, **figures, "hyperparameters": spread} for step in (1, 2)]

    baselines = {"joined": {"task": {"join": True}}, "plain": {}}
    for label, loss in {"joined": 0.01, "plain": 0.9}.items():
        folder = tmp_path / "baselines" / label
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(loss)))
    task = SimpleNamespace(loss_name="loss", draw=lambda problem, folder: [])
    run: Any = SimpleNamespace(cfg=OmegaConf.create({"name": "own", "baselines": baselines}), task=task, problem=None)
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    plots.of_run(run, rows(0.5), tmp_path, 0.25)
    shown = [{line.get_label(): float(line.get_ydata()[-1]) for line in axis.lines} for axis in figures["curves.png"].axes]
    assert shown[0] == {"own": 0.5, "joined": 0.01, "plain": 0.9}
    assert {label: loss for label, loss in shown[1].items() if not math.isnan(loss)} == {"own": 0.5, "plain": 0.9}
    assert shown[2] == {"own": 0.5, "joined": 0.01, "plain": 0.9, "retrained": 0.25}
    assert figures["curves.png"].axes[1].get_ylim()[1] > 0.9  # the joined one's loss does not cut the panel


@pytest.mark.parametrize("name", sorted(Classification.places - {"step"}))
def test_every_recipe_learns_by_folds(name: str, tmp_path, monkeypatch, float32: None) -> None:
    count = 25 if name == "weight_decay" else 6  # the first is the default
    if count < 25:
        monkeypatch.setattr(hoptim, "CrossValidated", partial(hoptim.CrossValidated, hypersteps=count))
    net = "cnn" if name.startswith("augmentation") else "mlp"
    options = ["experiment=[]", "name=try", "task=classification", f"task/model_of={net}", f"hoptim/recipe=[{name}]"]
    options += ["task.train=60", "task.val=30", "task.test=50", "folds=2", "outer_steps=4", "inner_steps=20", *TINY[:1]]
    cfg = config(*options, "outer=by_constraint", "plots=false", "task.wrong_labels=[0,0.5]")
    task = Run.of(cfg).task
    start = hoptim.training.record.natural_values(task.problem())
    assert math.isfinite(folds.cross_validate(cfg, tmp_path))
    learned = load_file(tmp_path / "hyperparameters.safetensors")
    assert set(learned) == set(start)
    moved = {key: (learned[key] - start[key]).abs().max().item() for key in learned}
    size = {key: start[key].numel() for key in learned}
    assert all(0 < change < math.inf for key, change in moved.items() if size[key])
    final = json.loads((tmp_path / "result.json").read_text())
    assert (final["hypersteps"], final["moved"]) == (count, count)
