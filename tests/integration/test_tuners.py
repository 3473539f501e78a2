"""scripts/tuners.py: trainings' costs, counted by hand; curves that know nothing from later; pruning, resuming, drawing."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import tuners
from common import search
from learning_tasks import data
from tuner_study import costs, curves, methods, pictures, problems, runs, tables
from tuner_study.costs import Meter, Pruned, loss_of, trial
from tuner_study.curves import Curves, at_budget
from tuner_study.methods import Found
from tuner_study.problems import COUNTS, RANGES, SETS, Problem
from tuner_study.runs import Row

import hoptim


@pytest.fixture
def made_up(float64, monkeypatch):
    """Data in place of what has to be read, short trainings, and everything in float32, as the study runs."""
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 6, generator=generator)
    values = x[:, :1] + 0.3 * torch.randn(900, 1, generator=generator)
    classes = (x[:, :3] + 0.5 * torch.randn(900, 3, generator=generator)).argmax(1)
    sizes = {"train": 100, "val": 60, "test": 200, "hidden": 5, "steps": 16, "batch": 20}
    for name, y in (("housing", values), ("fashion", classes), ("letters", classes)):
        made = problems.DataSet(title=name, read=lambda root, y=y: (x, y), lr=0.05, **sizes)
        monkeypatch.setitem(SETS, name, made)


def problem_of(count=1, name="fashion", seed=0, tmp_path=None):
    return Problem(name, count, seed, tmp_path)


def test_a_training_costs_its_steps_and_a_third_of_a_gradient_for_each_batch_of_validation(made_up):
    problem = problem_of()
    meter = Meter(problem)
    model, val = trial(problem, problem.hparams(), meter)
    assert val == loss_of(problem, model, problem.val, Meter(problem))
    assert meter.gradients == pytest.approx(16 + 60 / (3 * 20))
    assert meter.trainings == pytest.approx(17 / 16)


def test_a_pruned_trial_is_charged_what_it_did(made_up):
    problem = problem_of()
    meter, told = Meter(problem), []

    def report(part, val):
        told.append((part, val))
        if part == 3:
            raise Pruned

    with pytest.raises(Pruned):
        trial(problem, problem.hparams(), meter, report)
    assert meter.gradients == pytest.approx(3 * 2 + 3 * 1)  # three eighths of 16 steps, and three validation losses
    assert [part for part, _ in told] == [1, 2, 3]
    meter, told = Meter(problem), []
    _, val = trial(problem, problem.hparams(), meter, lambda part, val: told.append(part))
    assert told == [1, 2, 3, 4, 5, 6, 7]  # the last eighth is the result itself
    assert meter.gradients == pytest.approx(16 + 8)
    assert val == trial(problem, problem.hparams(), Meter(problem))[1]  # to look at it changes nothing


def moved(problem, made, trainings, **options):
    """The leaves with which each of the first trainings of hoptim began."""
    rounds = methods.learned(problem, Meter(problem), **options)
    seen = []
    for _ in range(trainings):
        next(rounds)
        seen.append([leaf.detach().clone() for leaf in made[0].parameters()])
    return seen


@pytest.fixture
def made(monkeypatch):
    """The hyperparameters that methods make."""
    found, make = [], Problem.hparams
    monkeypatch.setattr(Problem, "hparams", lambda self: found.append(make(self)) or found[-1])
    return found


def test_a_round_of_hoptim_costs_its_steps_and_every_product_of_one_hyperstep(made_up):
    problem = problem_of(count=100)
    meter = Meter(problem)
    rounds = methods.learned(problem, meter)
    assert next(rounds).trainings == pytest.approx((16 + 60 / (3 * 20)) / 16)
    second = next(rounds)  # MINRES has five products, and one more is the mixed one
    assert second.trainings == pytest.approx((2 * (16 + 60 / (3 * 20)) + 60 / 20 + 1 + 2 * 6) / 16)
    assert second.trainings == meter.trainings


def test_a_round_is_a_plain_training_and_the_next_begins_where_its_hyperstep_led(made_up, made):
    problem = problem_of(count=1)
    rounds = methods.learned(problem, Meter(problem), factor=2.0, fall=1e-9)
    first = next(rounds)
    assert first.val == trial(problem, problem_of(count=1).hparams(), Meter(problem))[1]
    torch.manual_seed(problem.seed)
    model, own, batches = problem.make(), problem_of(count=1).hparams(), []
    stated, inner = hoptim.Problem(model, own, problem.loss, problem.val_loss), problem.inner(model)
    inner.loss = lambda batch: batches.append(batch) or stated.loss(batch)
    costs.loop(problem, model, inner, problem.train, after=lambda _: None)
    outer = hoptim.outer_adam(own, validation=60)
    for group in outer.param_groups:
        group["lr"] *= 2
    start = own["decay"].decay.item()
    own["decay"].decay.grad = hoptim.hypergradient(stated, batches[-1], problem.val).grads["decay.decay"]
    outer.step()
    next(rounds)
    assert own["decay"].decay.item() == pytest.approx(made[0]["decay"].decay.item(), abs=1e-6)
    assert abs(own["decay"].decay.item() - start) > 0.05
    next(rounds)  # at rates that have fallen
    assert own["decay"].decay.item() == pytest.approx(made[0]["decay"].decay.item(), abs=1e-6)


def test_after_a_training_worse_than_the_first_hoptim_goes_half_way_back(made_up, made, monkeypatch):
    problem, told = problem_of(count=100), iter([2.0, 1.0, 3.0, math.inf, 1.5, 1.5])
    monkeypatch.setattr(methods, "loss_of", lambda *_: next(told))
    _, *later = moved(problem, made, 6)
    for b, c, d, e, f in zip(*later, strict=True):
        assert not torch.equal(b, c)
        assert torch.allclose(d, (b + c) / 2)
        assert torch.allclose(e, (b + d) / 2)
        assert not torch.allclose(f, (b + e) / 2, atol=1e-3)  # worse than the best, but not than the first


def test_the_best_model_is_handed_out(made_up):
    problem = problem_of(count=100)
    found = [one for _, one in zip(range(5), methods.learned(problem, Meter(problem)), strict=False)]
    vals = [one.val for one in found]
    assert vals == sorted(vals, reverse=True)
    assert [loss_of(problem, one.model, problem.val, Meter(problem)) for one in found] == vals
    assert (vals[0] != vals[-1]) == (found[0].model is not found[-1].model)


def test_a_plain_training_has_the_bits_of_retrain(made_up):
    problem = problem_of(count=10)
    hparams = problem.hparams()
    own = costs.train(problem, problem.hparams(), problem.train, Meter(problem))
    torch.manual_seed(problem.seed)
    stated = hoptim.Problem(problem.make_quietly(), hparams, problem.loss, problem.val_loss)

    def train(model, optimizer, examples):
        costs.loop(problem, model, optimizer, examples, after=lambda step: None)

    again = hoptim.retrain(stated, problem.make, train, problem.train, inner=problem.inner)
    for a, b in zip(own.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def fake(trainings, asked):
    """A method with a new model after so many trainings, each with a lower test loss by chance or not."""

    def method(problem, meter):
        for number, spent in enumerate(trainings):
            asked.append(spent)
            torch.manual_seed(number)
            yield Found(model=problem.make(), trainings=spent, val=1.0 - number / 10, dropped=number % 2)

    return method


def test_the_curve_at_a_budget_knows_nothing_from_later(made_up):
    problem, asked = problem_of(), []
    row = runs.run(problem, "fake", 4, fake([1.5, 2.0, 3.5, 4.0, 4.2, 9.0], asked))
    assert [point[0] for point in row.points] == [1.0, 1.5, 2.0, 3.5, 4.0]
    assert asked == [1.5, 2.0, 3.5, 4.0, 4.2]  # and after that nothing was asked for
    assert (row.results, row.dropped, row.budget) == (4, 2, 4)
    losses = [point[3] for point in row.points]
    assert len(set(losses)) == 5
    assert [at_budget(row, budget) for budget in (1, 1.4, 1.5, 2, 3.4, 3.5, 4, 100)] == [
        losses[0], losses[0], losses[1], losses[2], losses[2], losses[3], losses[4], losses[4],
    ]  # fmt: skip
    torch.manual_seed(2)
    expected = loss_of(problem, problem.make(), problem.test, Meter(problem))
    assert losses[3] == pytest.approx(expected, rel=1e-4)
    plain, _ = trial(problem, problem.hparams(), Meter(problem))
    assert losses[0] == pytest.approx(loss_of(problem, plain, problem.test, Meter(problem)), rel=1e-4)


def test_a_budget_in_seconds_is_that_many_times_a_plain_training():
    points = [[1, 0.5, 0, 5.0], [1, 2.0, 0, 4.0], [2, 6.0, 0, 3.0]]
    row = made_row("fashion", 1, "hoptim", 0, [])
    row = replace(row, points=points)
    assert [at_budget(row, budget, unit=0.5) for budget in (1, 3.9, 4, 11.9, 12)] == [5.0, 5.0, 4.0, 4.0, 3.0]


def test_searches_hand_out_the_best_trial_so_far_and_begin_at_the_start(made_up):
    problem = problem_of(count=3)
    meter = Meter(problem)
    found = [one for _, one in zip(range(6), methods.random_search(problem, meter), strict=False)]
    vals = [one.val for one in found]
    assert vals == sorted(vals, reverse=True)
    assert vals[0] == trial(problem, problem.hparams(), Meter(problem))[1]
    assert [loss_of(problem, one.model, problem.val, Meter(problem)) for one in found] == vals
    assert [one.trainings for one in found] == pytest.approx([(number + 1) * 17 / 16 for number in range(6)])


def test_draws_stay_in_their_ranges_and_are_uniform_on_their_scale():
    import numpy as np

    ranges = [RANGES["decay"], RANGES["dropout"]]
    draws = torch.stack([methods.drawn(ranges, np.random.default_rng(seed)) for seed in range(2000)])
    for column, one in zip(draws.T, ranges, strict=True):
        assert one.low <= column.min() < column.max() <= one.high
    assert float((draws[:, 0] < 10**-2.5).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(draws[:, 1].mean()) == pytest.approx((0.7 + 0.005) / 2, abs=0.02)


@pytest.mark.parametrize("name", ["fashion", "housing"])
@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 3), (10, 10), (100, None), (10_000, None)])
def test_each_problem_has_its_number_of_hyperparameters_and_all_move(made_up, monkeypatch, name, count, expected):
    problem = problem_of(count, name)
    hparams = problem.hparams()
    start = {kind: [recipe[n].detach().clone() for n in recipe] for kind, recipe in hparams.items()}
    number = sum(leaf.numel() for leaf in hparams.parameters())
    outputs = 1 if name == "housing" else 3
    weights = 6 * 5 + 5 * outputs
    known = {100: 5 + outputs, 10_000: weights, 10: 9 if name == "housing" else 10}  # regression has no label smoothing
    assert number == known.get(count, expected) == len(problems.ranges_of(hparams))
    monkeypatch.setattr(problem, "hparams", lambda: hparams)
    rounds = methods.learned(problem, Meter(problem))
    next(rounds), next(rounds)
    for kind, recipe in hparams.items():
        for before, n in zip(start[kind], recipe, strict=True):
            assert not torch.equal(recipe[n], before), (kind, n)
    parts = [set(part.tolist()) for part in (problem.train, problem.val, problem.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 360


def test_filled_values_come_back_and_reach_the_loss(made_up):
    problem = problem_of(count=10)
    hparams = problem.hparams()
    vector = torch.linspace(0.1, 0.3, 10)
    problems.fill(hparams, vector)
    back = torch.cat([recipe[n].detach().flatten() for _, recipe, n in problems.entries(hparams)])
    assert torch.allclose(back, vector, atol=1e-6)
    problem = problem_of(count=10_000)
    model = problem.make()
    grouped = problems.fill(problem.hparams(), problems.from_groups(problem, torch.tensor([0.5, 0.25])))
    expected = (0.5 * model[0].weight.square().sum() + 0.25 * model[2].weight.square().sum()) / 2
    assert problem._penalty(model, grouped).item() == pytest.approx(expected.item(), rel=1e-5)


def test_noise_and_dropout_both_change_training_and_neither_the_test(made_up):
    problem = problem_of(count=3)
    model, batch = problem.make(), problem.train[:20]
    plain = model(problem.x[batch])
    for kinds in ({"noise": 0.5, "dropout": 1e-6}, {"noise": 1e-6, "dropout": 0.5}):
        changed = problem._predict(model.train(), methods.at(problem, kinds), batch)
        assert (changed - plain).abs().max().item() > 0.01
    silent = problem._predict(model.train(), methods.at(problem, {"noise": 1e-6, "dropout": 1e-6}), batch)
    assert torch.allclose(silent, plain, atol=1e-4)
    assert torch.equal(problem._predict(model.eval(), problem.hparams(), batch), plain)


def test_a_training_that_diverges_has_the_worst_loss(made_up):
    problem = problem_of()
    with torch.no_grad():
        model = problem.make()
        model[0].weight.fill_(float("nan"))
    assert loss_of(problem, model, problem.val, Meter(problem)) == costs.WORST


def test_optuna_prunes_and_is_charged_for_it(made_up):
    pytest.importorskip("optuna", reason="needs the extra tuners: pip install '.[tuners]'")
    problem = problem_of(count=3)
    meter = Meter(problem)
    found = [one for _, one in zip(range(14), methods.METHODS["optuna"](problem, meter), strict=False)]
    pruned = [one.dropped for one in found]
    assert found[0].val == trial(problem, problem.hparams(), Meter(problem))[1]  # the first trial is the start
    spent = [b.trainings - a.trainings for a, b in pairwise(found)]
    assert not any(pruned[:5])  # the pruner's own first trials
    assert any(pruned)
    for cost, was in zip(spent, pruned[1:], strict=True):
        whole = (16 + 8) / 16
        assert (cost < whole - 1e-6) if was else (cost == pytest.approx(whole))
        assert round(cost * 16 / 3, 6) in set(range(1, 9))  # an eighth is two steps and a validation loss
    vals = [one.val for one in found]
    assert vals == sorted(vals, reverse=True)


def test_the_gaussian_process_begins_at_the_start_runs_whole_trials_and_learns_from_the_fifth_on(made_up):
    pytest.importorskip("optuna", reason="needs the extra tuners: pip install '.[tuners]'")
    problem, seen = problem_of(count=1), []

    def watched(seed, **options):
        sampler = search.gp_sampler(seed, **options)
        relative = sampler.sample_relative

        def sample(study, trial, space):
            seen.append((trial.number, relative(study, trial, space)))
            return seen[-1][1]

        sampler.sample_relative = sample
        return sampler

    method = methods.METHODS["gp"]
    sampler = partial(watched, **method.keywords["sampler"].keywords)
    results = method.func(problem, Meter(problem), **{**method.keywords, "sampler": sampler})
    found = [one for _, one in zip(range(7), results, strict=False)]
    assert [one.trainings for one in found] == pytest.approx([(number + 1) * 17 / 16 for number in range(7)])
    assert found[0].val == trial(problem, problem.hparams(), Meter(problem))[1]
    assert [number for number, values in seen if values] == [4, 5, 6]
    vals = [one.val for one in found]
    assert vals == sorted(vals, reverse=True)


def made_row(name, count, method, seed, losses):
    points = [[float(2**n), float(2**n), 1.0, loss] for n, loss in enumerate(losses)]
    return Row(
        set=name, count=count, method=method, seed=seed, budget=32, points=points, spent=[31.0, 31.0], results=6, dropped=0
    )  # fmt: skip


def made_study():
    """hoptim gains 20 % at once; Optuna nothing at first, and 30 % at a budget of 16."""
    rows = []
    for name in SETS:
        for count in COUNTS:
            for seed in range(4):
                start, noise = 1.0 + seed, 1 + 0.01 * seed
                by = {
                    "fixed": [0.9],
                    "random": [1.0],
                    "hoptim": [1.0, 0.8],
                    "optuna": [1.0, 1.0, 1.0, 1.0, 0.7 * noise],
                    "gp": [1.0],
                }
                rows += [made_row(name, count, m, seed, [start * loss for loss in losses]) for m, losses in by.items()]
    return rows


def test_differences_are_paired_log_ratios_and_the_winner_changes_where_it_should():
    found = Curves(made_study())
    difference = found.difference("fashion", 1, "hoptim", "optuna", 4)
    assert difference.mean == pytest.approx(math.log(0.8))
    assert difference.error == pytest.approx(0, abs=1e-9)  # starts that differ by seed cancel
    logs = [math.log(0.8 / (0.7 * (1 + 0.01 * seed))) for seed in range(4)]
    mean = sum(logs) / 4
    error = math.sqrt(sum((one - mean) ** 2 for one in logs) / 3 / 4)
    assert found.difference("fashion", 1, "hoptim", "optuna", 16) == pytest.approx((mean, error))
    expected = {1: "", 2: "hoptim", 4: "hoptim", 8: "hoptim", 16: "optuna", 32: "optuna"}
    assert found.winners("fashion", 1, "hoptim", "optuna") == expected
    assert found.winners("fashion", 1, "hoptim", "optuna", in_seconds=True) == expected
    gains = pictures.gains(found, "fashion", 1, "hoptim", False)
    assert (gains[0].mean, gains[-1].mean) == pytest.approx((0.0, 100 * math.log(0.8)))
    assert curves.estimate([1.0]).mean == 1.0


def test_saved_results_are_drawn_and_nothing_runs(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tuners.json"
    runs.save(path, made_study())
    assert sorted(runs.read(path), key=lambda row: row.key) == sorted(made_study(), key=lambda row: row.key)
    monkeypatch.setattr(tuners, "run", None)
    monkeypatch.setattr(pictures, "STEPS", 10)
    tuners.main(["--saved", "--out", str(path)])
    shown = capsys.readouterr().out
    assert "−22.3 ± 0.0 *" in shown
    assert "13,4" not in shown
    for name in ("tuners.png", "tuners_seconds.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    assert tables.percent(curves.Estimate(0.02, 0.03)) == "2.0 ± 3.0"


def test_labels_are_moved_apart_by_as_little_as_it_takes():
    assert pictures.apart([0.0, 0.2, 5.0], 1.0) == [-0.4, 0.6, 5.0]
    assert pictures.apart([0.0, 0.0, 0.0, 1.1], 1.0) == [-1.225, -0.225, 0.775, 1.775]
    assert pictures.apart([0.0, 2.0], 1.0) == [0.0, 2.0]


def test_a_run_goes_on_where_it_stopped(made_up, tmp_path, monkeypatch):
    path, ran = tmp_path / "tuners.json", []

    def counted(problem, method, most):
        ran.append((problem.name, problem.count, method, problem.seed))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return runs.run(problem, method, most)

    monkeypatch.setattr(tuners, "run", counted)
    monkeypatch.setattr(pictures, "draw", lambda *_, **options: None)
    words = ["--only", "fashion", "1", "fixed", "random", "--seeds", "2", "--budget", "2"]
    words = ["--out", str(path), "--root", str(tmp_path), *words]
    with pytest.raises(KeyboardInterrupt):
        tuners.main(words)
    assert len(json.loads(path.read_text())["records"]) == 2
    tuners.main(words)
    assert [key[2:] for key in ran] == [("fixed", 0), ("random", 0), ("fixed", 1), ("fixed", 1), ("random", 1)]
    assert len(runs.read(path)) == 4
    tuners.main([*words[:-1], "4"])  # a larger budget takes the place of a smaller one
    assert len(ran) == 9
    assert [row.budget for row in runs.read(path)] == [4] * 4


def test_letters_are_one_hot_and_followed_by_the_next(float64, monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    text = torch.arange(90) % 27
    monkeypatch.setattr(data, "novel", lambda root: text)
    problems.letters.cache_clear()
    x, y = problems.letters(tmp_path)
    problems.letters.cache_clear()
    assert x.shape == (10, 8 * 27)
    assert torch.equal(x.reshape(10, 8, 27).argmax(2)[1], text[9:17])
    assert y[1] == text[17]


def test_a_missing_optuna_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    monkeypatch.setattr(tuners, "run", None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[tuners\]'"):
        tuners.main(["--only", "fashion", "1", "--out", str(tmp_path / "none.json"), "--root", str(tmp_path)])
