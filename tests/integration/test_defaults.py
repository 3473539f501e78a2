"""scripts/defaults.py: its scores against ones made by hand, its tasks against plain loops, and its way past a kill."""

import json
import math
from dataclasses import replace
from pathlib import Path

import defaults
import pytest
import torch
from learning_tasks import data, pictures, scores, settings, tables, tasks, training
from learning_tasks.scores import Results
from learning_tasks.settings import DEFAULT, SETTINGS
from learning_tasks.tasks import HALVES, TASKS
from learning_tasks.training import Row
from torch import nn
from torch.nn import functional as F

import hoptim
from hoptim import MINRES, Implicit, hypergradient

NOWHERE = Path("nowhere")


@pytest.fixture
def made_up(float64, monkeypatch):
    """Data in place of what has to be downloaded, and everything in float32, as the study runs."""
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 10
    images = torch.rand(3000, 1, 14, 14, generator=generator) * (1 + y[:, None, None, None]) / 10
    features = torch.randn(506, 13, generator=generator)
    monkeypatch.setattr(data, "fashion", lambda root: (images, y))
    monkeypatch.setattr(data, "boston", lambda root: (features, features[:, :1] + 1))
    text = torch.randint(27, (15_000,), generator=generator)
    monkeypatch.setattr(data, "novel", lambda root: text)


def short(task):
    return replace(task, steps=24, every=6, hypersteps=3)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_learns_with_finite_losses_and_is_plain_without(name, made_up):
    found = training.run(name, short(TASKS[name]), DEFAULT, 0, NOWHERE)
    assert math.isfinite(found.test + found.val)
    assert (found.hypersteps, found.skipped) == (3 if TASKS[name].folds else 4, 0)  # after steps 6, 12, 18, 24
    assert found.products > 0
    plain = training.run(name, short(TASKS[name]), "plain", 0, NOWHERE)
    assert (plain.hypersteps, plain.products) == (0, 0)
    assert plain.test != found.test
    assert training.run(name, short(TASKS[name]), "plain", 0, NOWHERE).test == plain.test
    assert training.run(name, short(TASKS[name]), "plain", 1, NOWHERE).test != plain.test


def test_the_plain_training_is_a_loop_with_the_starting_decay(made_up):
    task = replace(TASKS["cancer"], steps=7)
    torch.manual_seed(1003)
    setup = task.setup(NOWHERE)
    (x, y), (train, test) = data.breast_cancer(), (setup.train, setup.test)
    x = (x - x[train].mean(0)) / x[train].std(0)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = []
    for _ in range(7):
        batches = batches or list(train[torch.randperm(100)].split(25))
        batch = batches.pop()
        optimizer.zero_grad()
        penalty = sum(w.square().sum() for w in model.parameters() if w.ndim > 1) * task.start / 2
        (F.cross_entropy(model(x[batch]), y[batch]) + penalty).backward()
        optimizer.step()
    expected = F.cross_entropy(model(x[test]), y[test]).item()
    assert training.run("cancer", task, "plain", 3, NOWHERE).test == pytest.approx(expected, rel=1e-5)


def test_parts_of_a_split_are_disjoint_and_wrong_labels_are_in_the_training_part_alone(made_up):
    for name, task in TASKS.items():
        torch.manual_seed(0)
        setup = task.setup(NOWHERE)
        parts = [set(part.tolist()) for part in (setup.train, setup.val, setup.test)]
        assert len(set.union(*parts)) == sum(map(len, parts)), name
        assert min(map(len, parts)) >= 40, name
    setup = TASKS["any-label"].setup(NOWHERE)
    x, y = data.digits()
    for part, is_right in ((setup.train, False), (setup.val, True)):
        model = setup.make()
        found = setup.loss(model, setup.hparams(model, 0.5), part)
        assert torch.allclose(found, F.cross_entropy(model(x[part]), y[part]) / 2) == is_right
    y = torch.arange(5000) % 10
    torch.manual_seed(0)
    assert float((tasks.drawn(y) != y).double().mean()) == pytest.approx(0.36, abs=0.03)  # a tenth is drawn right
    moved = tasks.shifted(y)
    assert float((moved != y).double().mean()) == pytest.approx(0.4, abs=0.03)
    assert set(((moved - y) % 10).tolist()) == {0, 1}


def test_halves_have_one_of_each_pair_and_the_same_number():
    assert sorted(HALVES) == sorted(TASKS)
    assert [sorted(HALVES[name] for name in pair) for pair in tasks.PAIRS] == [["A", "B"]] * 6
    for a, b in tasks.PAIRS:
        assert TASKS[a].constraint == TASKS[b].constraint


def linear_problem():
    x, y = torch.randn(24, 3), torch.randn(24, 1)
    model = nn.Linear(3, 1, bias=False)
    hparams = hoptim.HyperParameters({"decay": torch.tensor(0.1)})

    def val_loss(model, hparams, batch):
        return (model.eval()(x[batch]) - y[batch]).square().mean()

    def train_loss(model, hparams, batch):
        return val_loss(model, hparams, batch) + hparams["decay"] * model.weight.square().sum()

    return hoptim.Problem(model, hparams, train_loss, val_loss), x, y


def test_the_noise_is_the_standard_error_of_the_validation_gradient_and_the_solve_stops_there():
    problem, x, y = linear_problem()
    batch = torch.arange(24)
    w = problem.model.weight.detach()[0]
    g = torch.stack([2 * xs.T @ (xs @ w - ys[:, 0]) / len(xs) for xs, ys in zip(x.chunk(6), y.chunk(6), strict=True)])
    expected = math.sqrt(sum(float((each - g.mean(0)).square().sum()) for each in g) / (6 * 5)) / float(g.mean(0).norm())
    assert settings.relative_noise(problem, batch.chunk(6)) == pytest.approx(expected)
    assert problem.model.training
    found = hypergradient(problem, batch, batch, settings.ToNoise(chunks=6))
    same = hypergradient(problem, batch, batch, Implicit(MINRES(terms=50, tolerance=min(expected, 0.9))))
    assert torch.equal(found.grads["decay"], same.grads["decay"])
    assert found.solution.products == same.solution.products < 4


def test_a_combination_has_of_each_setting_what_is_its_own():
    one = settings.setting_of("CG 10 & exact Hessian & warm-up 0.1 & Adam 0.3")
    assert one.method == Implicit(hoptim.CG(terms=10), curvature=hoptim.Exact())
    assert (one.warmup, one.outer.keywords, one.average) == (0.1, {"kind": torch.optim.Adam, "lr": 0.3}, True)
    assert settings.setting_of("CG 10, +0.1").method == Implicit(hoptim.CG(terms=10), damping=0.1)
    assert settings.setting_of("last leaves & MINRES 3").average is False
    assert settings.setting_of(DEFAULT).method == Implicit(MINRES(terms=5))


def row(task, setting, seed, test, **more):
    return Row(task=task, setting=setting, seed=seed, test=test, val=more.pop("val", 1.0), **more)


def study(changes):
    """Rows of all tasks on three seeds: the default's loss depends on the task and seed, others are so many times it."""
    rows = []
    for number, task in enumerate(TASKS):
        for seed in range(3):
            base = (1 + number) * (1 + seed / 10)
            rows.append(row(task, DEFAULT, seed, base, seconds=2.0, hypersteps=10))
            rows += [row(task, name, seed, base * f(task), seconds=3.0, hypersteps=10, skipped=1) for name, f in changes]
    return rows


def test_scores_are_means_over_tasks_of_paired_log_ratios():
    factors = dict(zip([task for task in TASKS if HALVES[task] == "A"], (0.9, 0.8, 1.2, 1.0, 0.5, 0.7), strict=True))
    results = Results(study([("CG 5", lambda task: factors.get(task, 2.0))]))
    score = results.score("CG 5", list(factors))
    logs = [math.log(f) for f in factors.values()]
    mean = sum(logs) / 6
    error = math.sqrt(sum((log - mean) ** 2 for log in logs) / 5 / 6)
    assert (score.mean, score.error) == pytest.approx((mean, error))
    assert (score.worst, score.wins, score.tasks) == pytest.approx((math.log(1.2), 4, 6))
    assert score.worst_task == "digits-cv"
    assert (score.cost, score.skipped) == pytest.approx((1.5, 0.1))
    assert score.median == pytest.approx((math.log(0.8) + math.log(0.9)) / 2)
    assert results.score("CG 10", list(factors)) is None


def test_a_clear_win_needs_two_standard_errors_and_no_task_much_worse():
    clear = Results(study([("CG 5", lambda task: 0.9)])).score("CG 5", list(TASKS))
    assert clear.wins_clearly
    one_bad = Results(study([("CG 5", lambda task: 1.06 if task == "lstm" else 0.9)])).score("CG 5", list(TASKS))
    assert not one_bad.wins_clearly
    noisy = Results(study([("CG 5", lambda task: 0.5 if task == "lstm" else 1.01)])).score("CG 5", list(TASKS))
    assert noisy.mean < 0
    assert not noisy.wins_clearly


def test_a_half_chooses_by_its_own_tasks_and_the_first_seeds():
    def good_on(half, other=1.3):
        return lambda task: 0.9 if HALVES[task] == half else other

    changes = [("CG 5", good_on("A")), ("CG 10", good_on("B")), ("warm-up 0.5", lambda task: 1.1)]
    rows = study(changes)
    later = [row(task, name, 7, 1.0 if name == DEFAULT else 9.0) for task in TASKS for name in (DEFAULT, "CG 5", "CG 10")]
    results = Results(rows + later)
    assert (results.chosen("A"), results.chosen("B")) == (["CG 5"], ["CG 10"])
    assert results.combination("A") == "CG 5"
    risky = Results(study([*changes, ("CG 20", lambda task: 1.06 if task == "cnn" else 0.5)]))
    assert risky.chosen("A") == ["CG 5"]  # one task of A is worse by 6 %
    assert risky.chosen("B") == ["CG 20"]
    better = Results(study([*changes, ("Adam 0.1", good_on("A"))]))
    assert better.combination("A") == "CG 5 & Adam 0.1"
    assert better.combination("B") == "CG 10"


def test_a_setting_that_is_the_default_in_a_task_has_its_row():
    results = Results([*study([]), *(row("digits-cv", "last leaves", seed, 1e-3) for seed in range(3))])
    score = results.score("last leaves", ["digits-cv", "iris", "cnn", "lstm"])
    assert score.mean == pytest.approx(-1 / 4)  # clipped
    assert results.score("last leaves", ["diabetes-cv"]) is None


def test_a_loss_that_came_to_nothing_is_the_worst():
    assert scores.log_ratio(float("nan"), 1.0) == scores.log_ratio(float("inf"), 1.0) == scores.log_ratio(1e9, 1.0) == 1.0
    assert scores.log_ratio(1e-9, 1.0) == -1.0
    assert scores.log_ratio(0.5, 1.0) == pytest.approx(math.log(0.5))


def test_the_best_fixed_setting_is_chosen_by_validation_loss():
    rows = [row("iris", "plain", 0, 0.5, val=0.4), row("iris", "fixed 0.1", 0, 0.7, val=0.3), row("rare", "plain", 0, 1.0)]
    assert Results(rows).best_fixed("iris", 0).setting == "fixed 0.1"
    assert Results(rows).best_fixed("rare", 0) is None


def test_the_command_goes_on_where_it_was_killed_and_draws_from_the_rows(tmp_path, monkeypatch, capsys):
    ran = []

    def run(name, task, setting, seed, root):
        ran.append((name, setting, seed))
        if len(ran) == 20:
            raise KeyboardInterrupt
        loss = 1.0 + len(setting) / 100 + seed / 10
        return row(name, setting, seed, loss, val=loss, hypersteps=5, seconds=1.0)

    monkeypatch.setattr(defaults, "run", run)
    monkeypatch.setattr(defaults, "HERE", tmp_path)
    chosen = ["--tasks", "iris", "cancer", "rare", "clamped", "--settings", "CG 5", "Adam*"]
    words = [*chosen, "--out", str(tmp_path), "--more", "1"]
    with pytest.raises(KeyboardInterrupt):
        defaults.main(words)
    kept = {(one["task"], one["setting"], one["seed"]) for one in json.loads((tmp_path / "rows.json").read_text())}
    assert kept == {one for one in ran if one[0] == "iris"}
    defaults.main([*words, "--save"])
    again = ran[20:]
    assert not kept & set(again)
    assert len(set(again)) == len(again)
    assert {seed for _, _, seed in again} == {0, 1, 2, 3}
    assert ("rare", "Adam 0.3", 2) in again  # the shortest names are the best here
    assert ("rare", "CG 5 & Adam 1", 2) in again
    assert {setting for _, setting, seed in again if seed == 3} == {DEFAULT, settings.BY_CONSTRAINT, settings.LEVELS}
    printed = capsys.readouterr().out
    defaults.main(["--saved"])
    assert capsys.readouterr().out.splitlines()[-20:] == printed.splitlines()[-20:]
    assert (tmp_path / "defaults.png").stat().st_size > 10_000


def test_the_rates_of_the_picture_are_those_of_the_settings():
    leaf = nn.ParameterDict({"x": torch.ones(1)})
    drawn = {rate: settings.setting_of(name).outer(leaf) for rate, name in pictures.ADAM.items()}
    assert all(type(made) is torch.optim.Adam for made in drawn.values())
    assert {made.param_groups[0]["lr"] for made in drawn.values()} == set(drawn) == {0.003, 0.01, 0.03, 0.05, 0.1, 0.3, 1}
    assert len(SETTINGS) == len({repr(replace(one, differs=None)) for one in SETTINGS.values()})


def test_a_setting_that_did_not_run_on_all_seeds_is_not_chosen():
    rows = study([("CG 5", lambda task: 0.9), ("CG 10", lambda task: 0.8)])
    kept = [one for one in rows if (one.task, one.setting, one.seed) != ("iris", "CG 10", 2)]
    assert Results(rows).chosen("A") == ["CG 10"]
    assert Results(kept).chosen("A") == ["CG 5"]
    assert Results(kept).chosen("B") == ["CG 10"]


def test_each_half_chooses_a_rate_for_each_constraint_by_its_own_tasks_of_that_kind():
    def loss(task):
        return {"any-label": 0.5, "next-label": 2.0, "sources": 2.0, "rare": 2.0}.get(task, 1.5)

    results = Results(study([("Adam 0.3", loss), ("Adam 0.1", lambda task: 0.8)]))
    assert results.rates("A")["unit interval"] == "Adam 0.3"
    assert results.rates("B")["unit interval"] == results.rates("A")["real"] == "Adam 0.1"
    assert list(results.rates("A")) == ["positive", "positive, unit interval", "unit interval", "real", "non-negative"]
    worse = Results(study([("Adam 0.3", lambda task: 1.1)]))
    assert set(worse.rates("B").values()) == {DEFAULT}


def test_levels_are_compared_with_the_same_rates_without_them_on_old_and_fresh_seeds():
    names = (settings.BY_CONSTRAINT, settings.LEVELS)
    rows = [row("iris", name, seed, loss) for seed in range(6) for name, loss in zip(names, (2.0, 1.8), strict=True)]
    rows += [row("cnn", settings.LEVELS, 0, 1.0), row("cancer", settings.BY_CONSTRAINT, 0, 1.0)]  # one alone is no pair
    found = tables.of_levels(Results([*rows, row("iris", settings.LEVELS, 3, 2.2)]))
    cells = [list(column.cells) for column in found.columns]
    assert cells[:2] == [["iris"], ["−10.0 ± 0.0"]]
    assert cells[2][0].startswith("−3.8")  # the mean of log 1.1, log 0.9, log 0.9
    hparams = hoptim.recipes.WeightDecay(nn.Linear(3, 2), per="weight")
    assert type(settings.by_constraint(hparams)) is torch.optim.Adam
