"""scripts/fidelity.py: its truths against finite differences of retraining, its figures against ones made by hand."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import fidelity
import numpy as np
import pytest
import torch
from fidelity_problems import boston, learning, measure, methods, pictures, problems, ranking
from fidelity_problems.truth import Training, trained
from torch import nn

import hoptim

TINY = Training(steps=23, lr=0.1, momentum=0.8)
NOWHERE = Path("nowhere")


def images(root):
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(80) % 10
    return torch.randint(0, 256, (80, 28, 28), generator=generator).float() * (1 + y[:, None, None]) / 10, y


SPECS = {
    "ridge": problems.Spec(
        title="ridge", make=partial(problems.ridge, features=6, count=20), training=replace(TINY, steps=800, lr=0.3)
    ),
    "logistic": problems.Spec(title="logistic", make=problems.digits(None, count=20), training=TINY),
    "digits": problems.Spec(title="digits", make=problems.digits(5, count=20), training=TINY),
    "iris": problems.Spec(title="iris", make=problems.iris(nn.Tanh, hidden=6), training=TINY),
    "batches": problems.Spec(
        title="batches", make=problems.iris(nn.ReLU, hidden=6, wrong=0.4), training=replace(TINY, size=16)
    ),
    "cnn": problems.Spec(title="cnn", make=problems.cnn(count=12, images=images), training=replace(TINY, steps=6)),
}


def retrained(spec, seed, change):
    """The validation loss after training from scratch with the leaves changed, by torch's own SGD."""
    setup = spec.make(seed, torch.float64, NOWHERE)
    with torch.no_grad():
        for name, leaf in setup.problem.leaves().items():
            leaf.add_(change[name])
    training, batch_at = spec.training, spec.batches(setup, seed)
    optimizer = torch.optim.SGD(setup.problem.model.parameters(), lr=training.lr, momentum=training.momentum)
    for step in range(training.steps):
        optimizer.zero_grad()
        setup.problem.loss(batch_at(step)).backward()
        optimizer.step()
    return setup.problem.val_loss(setup.problem.model, setup.problem.hparams, setup.val).item()


@pytest.mark.parametrize("name", SPECS)
def test_the_truth_is_the_slope_of_retraining(name):
    spec = SPECS[name]
    truth = spec.trained(1, NOWHERE).truth
    length = math.sqrt(sum(float(value.square().sum()) for value in truth.values()))
    along = {key: value / length for key, value in truth.items()}
    generator = torch.Generator().manual_seed(0)
    random = {key: torch.randn(value.shape, generator=generator) for key, value in truth.items()}
    for direction in (along, random):
        ends = [retrained(spec, 1, {key: sign * 1e-4 * d for key, d in direction.items()}) for sign in (1, -1)]
        slope = sum(float((truth[key] * d).sum()) for key, d in direction.items())
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(slope, rel=1e-4, abs=1e-6 * length)
    assert length > 1e-5


def test_a_truncated_truth_is_hoptims_own_unrolling_and_the_whole_is_the_truth():
    spec = SPECS["batches"]
    setup = spec.make(0, torch.float64, NOWHERE)
    found = trained(setup.problem, spec.batches(setup, 0), setup.val, spec.training, lag=11, truncate=(5, 23))
    case = measure.Case("batches", spec, 0, NOWHERE, found, dtype=torch.float64)
    for name, value in found.truncated[23].items():
        torch.testing.assert_close(value, found.truth[name])
    row = case.measured(methods.METHODS["Unrolled, 5"], "Unrolled, 5")
    assert row.status == "FINISHED"
    result = case.hypergradient(methods.METHODS["Unrolled, 5"])
    for name, value in found.truncated[5].items():
        torch.testing.assert_close(result.grads[name], value)
        assert not torch.allclose(value, found.truth[name], rtol=0.1)
    assert row.cosine == pytest.approx(measure.compared(found.truncated[5], found.truth)[0])


def test_earlier_weights_and_momentum_are_those_of_a_shorter_run():
    spec = SPECS["iris"]
    whole, short = spec.trained(0, NOWHERE), replace(spec, training=replace(TINY, steps=23 - spec.lag)).trained(0, NOWHERE)
    assert spec.lag == 11
    for name in whole.weights:
        torch.testing.assert_close(whole.earlier[name], short.weights[name])
        torch.testing.assert_close(whole.earlier_velocity[name], short.velocity[name])


def test_batches_are_shuffled_parts_of_the_set_and_the_same_at_each_call():
    spec = replace(SPECS["batches"], training=replace(TINY, size=20))
    setup = spec.make(0, torch.float64, NOWHERE)
    first, again = spec.batches(setup, 0), spec.batches(setup, 0)
    epoch = torch.cat([first(step)[0] for step in range(3)])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, setup.train[0].tolist()))
    assert all(torch.equal(first(step)[0], again(step)[0]) for step in range(23))
    assert not torch.equal(first(0)[0], first(3)[0])
    uneven = SPECS["batches"].batches(setup, 0)
    assert {len(uneven(step)[0]) for step in range(23)} == {16}  # 60 = 3 · 16 + 12


def test_wrong_labels_are_wrong_and_as_many_as_said():
    y = torch.arange(3000) % 3
    assert float((problems.mislabelled(y, 0.4, 3, 0) != y).double().mean()) == pytest.approx(0.4, abs=0.03)
    assert torch.equal(problems.mislabelled(y, 0.0, 3, 0), y)


def test_float32_begins_at_the_same_weights_and_leaves():
    for spec in SPECS.values():
        wide, narrow = (spec.make(5, dtype, NOWHERE).problem for dtype in (torch.float64, torch.float32))
        for a, b in ((wide.weights(), narrow.weights()), (wide.leaves(), narrow.leaves())):
            for name in a:
                torch.testing.assert_close(a[name], b[name].double(), rtol=1e-6, atol=1e-7)
                assert (a[name].dtype, b[name].dtype) == (torch.float64, torch.float32)


def test_cosine_and_length():
    truth = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert measure.compared({"a": torch.tensor([-6.0]), "b": torch.tensor([-8.0])}, truth) == pytest.approx((-1.0, 2.0))
    assert measure.compared({"a": torch.tensor([4.0]), "b": torch.tensor([-3.0])}, truth) == pytest.approx((0.0, 1.0))
    assert measure.compared({"a": torch.tensor([1.0]), "b": torch.tensor([0.0])}, truth) == pytest.approx((0.6, 0.2))
    assert measure.compared({"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}, truth) == (0.0, 0.0)


def test_solved_to_the_end_ridge_has_its_closed_form_and_the_identity_has_not():
    case = measure.Case("ridge", SPECS["ridge"], 0, NOWHERE, SPECS["ridge"].trained(0, NOWHERE), dtype=torch.float64)
    rows = {name: case.measured(methods.METHODS[name], name) for name in ("CG, exact, 50", "CG, GN, 50", "Identity, 0")}
    for name in ("CG, exact, 50", "CG, GN, 50"):
        assert (rows[name].cosine, rows[name].length) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert rows["Identity, 0"].cosine < 0.9
    assert rows["Identity, 0"].products == 0 < rows["CG, exact, 50"].products <= 50
    assert rows["Identity, 0"].cost > 0  # measured: how long each took is no matter of a test


@pytest.mark.parametrize("name", ["batches", "digits", "cnn"])
def test_every_method_runs_on_every_kind_of_problem(name):
    spec = SPECS[name]
    case = measure.Case(name, spec, 0, NOWHERE, spec.trained(0, NOWHERE))
    for label, entry in methods.METHODS.items():
        if entry.terms <= 5:
            row = case.measured(entry, label)
            assert math.isfinite(row.cosine + row.length + row.cost), label
            assert row.ok or row.cosine == row.length == 0, label
            assert abs(row.cosine) <= 1 + 1e-6, label


def test_a_method_that_carries_something_is_given_what_the_hyperstep_before_left():
    spec = SPECS["iris"]
    case = measure.Case("iris", spec, 0, NOWHERE, spec.trained(0, NOWHERE))
    for label, first, later in (("Neumann, GN, 5", 15, 7), ("warm CG, GN, 5", 5, 6), ("CG, GN, 5", 5, 5)):
        entry = methods.METHODS[label]
        assert case.hypergradient(entry).solution.products == first, label
        assert case.measured(entry, label).products == later, label


def test_a_failed_solve_counts_as_no_answer():
    spec = SPECS["iris"]
    case = measure.Case("iris", spec, 0, NOWHERE, spec.trained(0, NOWHERE))
    diverging = hoptim.Implicit(hoptim.Neumann(terms=5, step_size=1e3), curvature=hoptim.Exact())
    found = case.measured(methods.Entry(family="Neumann 1000", terms=5, method=diverging), "Neumann 1000, 5")
    assert (found.cosine, found.length, found.ok, found.status) == (0.0, 0.0, False, "STEP_TOO_LARGE")


def test_the_table_of_methods_names_each_once_and_says_what_it_needs():
    for label, entry in methods.METHODS.items():
        assert label == f"{entry.family}, {entry.terms}"
        uses = "GaussNewton" in repr(entry.method)
        assert (entry.curvature == "GN") == uses, label
    assert {"CG, GN, +0.01, 10", "Identity, 0", "Neumann 0.1 (the blog's), 5"} <= set(methods.METHODS)
    implicit = [entry.method for entry in methods.METHODS.values() if isinstance(entry.method, hoptim.Implicit)]
    assert len(set(map(repr, implicit))) == len(implicit)


def test_a_kept_truth_is_used_again_until_what_decides_it_changes(tmp_path, monkeypatch):
    spec = SPECS["iris"]
    first = measure.kept("iris", spec, 0, NOWHERE, tmp_path)
    monkeypatch.setattr(problems.Spec, "trained", lambda *_: pytest.fail("trained again"))
    again = measure.kept("iris", spec, 0, NOWHERE, tmp_path)
    for name, value in first.truth.items():
        assert torch.equal(again.truth[name], value)
    monkeypatch.undo()
    changed = measure.kept("iris", replace(spec, training=replace(TINY, steps=5)), 0, NOWHERE, tmp_path)
    assert not torch.allclose(next(iter(changed.truth.values())), next(iter(first.truth.values())))


def row(method, problem, seed, cosine, cost=1.0, ok=True):
    return measure.Row(
        problem=problem, method=method, seed=seed, cosine=cosine, length=2.0, cost=cost, products=3, status="", ok=ok
    )


RANKED = [
    *(row("a", "p", seed, cosine) for seed, cosine in enumerate((0.1, 0.5, 0.9))),
    *(row("b", "p", seed, cosine) for seed, cosine in enumerate((0.6, 0.6, 0.0))),
    *(row("a", "q", seed, cosine, cost=5.0) for seed, cosine in enumerate((0.8, 0.9, 1.0))),
    *(row("b", "q", seed, cosine, ok=seed > 0) for seed, cosine in enumerate((0.3, 0.5, 0.7))),
    *(row("dear", problem, seed, 1.0, cost=50.0) for problem in "pq" for seed in range(3)),
    row("partial", "p", 0, 1.0),
]


def test_records_are_medians_quartiles_and_the_worst_seed():
    records = {(one["problem"], one["method"]): one for one in ranking.summed_up(RANKED)}
    one = records["p", "a"]
    assert (one["cosine"], one["low"], one["high"], one["worst"]) == (0.5, 0.3, 0.7, 0.1)
    assert (one["length"], one["products"], one["cost"], one["seeds"], one["failed"]) == (2.0, 3, 1.0, 3, 0)
    assert records["q", "b"]["failed"] == 1


def test_ranking_within_a_budget():
    first, second = ranking.ranked(RANKED, budget=10.0)
    assert (first.method, second.method) == ("a", "b")
    assert (first.mean, first.median, first.cost, first.dearest) == pytest.approx((0.7, 0.7, 3.0, 5.0))
    assert (second.mean, second.worst, second.worst_problem, second.worst_seed) == pytest.approx((0.55, 0.5, "q", 0.0))
    assert (first.rank, second.rank) == (1.5, 1.5)
    assert (first.failed, second.failed) == pytest.approx((0.0, 1 / 6))
    assert first.longest == 2.0
    assert first.low <= first.mean <= first.high
    assert 0.5 < first.first < 1.0
    assert first.first + second.first >= 1.0
    assert [one.method for one in ranking.ranked(RANKED, budget=4.0)] == ["a", "b"]  # the median cost counts
    assert [(one.method, one.first) for one in ranking.ranked(RANKED, 100.0)] == [("dear", 1.0), ("a", 0.0), ("b", 0.0)]
    assert [one.method for one in ranking.ranked(RANKED, 100.0, lambda method: method != "dear")] == ["a", "b"]


def test_new_rows_take_the_place_of_old_ones():
    old, new = [row("a", "p", 0, 0.1), row("a", "p", 1, 0.2), row("b", "p", 0, 0.3)], [row("a", "p", 0, 0.9)]
    assert [(one.method, one.seed, one.cosine) for one in ranking.merged(old, new)] == [
        ("a", 1, 0.2),
        ("b", 0, 0.3),
        ("a", 0, 0.9),
    ]


def test_ranks_of_equals_are_shared():
    found = ranking._ranks(np.array([[0.9, 0.1], [0.9, 0.3], [0.2, 0.2]]))
    assert found.tolist() == [[1.5, 3.0], [1.5, 1.0], [3.0, 2.0]]


def test_differences_against_a_saved_table():
    before = [{"problem": "p", "method": m, "cosine": c, "failed": 0} for m, c in (("a", 0.5), ("b", 0.5), ("c", 0.5))]
    now = [{"problem": "p", "method": m, "cosine": c, "failed": 0} for m, c in (("a", 0.505), ("b", 0.2), ("new", 0.9))]
    now.append({"problem": "p", "method": "c", "cosine": 0.5, "failed": 2})
    assert [(one["method"], round(one["change"], 3)) for one in ranking.differences(now, before)] == [
        ("b", -0.3),
        ("c", 0.0),
    ]


def features(count=60):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 13, generator=generator) @ torch.randn(13, 13, generator=generator)
    return x, x @ torch.randn(13, generator=generator) + torch.randn(count, generator=generator)


def test_the_papers_exact_answer_is_that_of_retraining_to_the_end():
    def optimum(decay):
        (x, y), (x_val, y_val) = case.train, case.val
        w = torch.linalg.solve(x.T @ x / len(x) + torch.diag(decay), x.T @ y / len(x))
        return w, 0.5 * (x_val @ w - y_val).square().mean()

    case = boston.regression(*features(), seed=0)
    (leaf,) = case.problem.leaves().values()
    assert leaf.shape == (1, 14)
    log_decay = leaf.detach()[0].clone().requires_grad_()
    w, loss = optimum(log_decay.exp())
    (expected,) = torch.autograd.grad(loss, log_decay)
    with torch.no_grad():
        case.problem.model.weight.copy_(w[None])
    torch.testing.assert_close(case.exact(), expected)
    torch.testing.assert_close(case.approximate(hoptim.CG(terms=50, tolerance=1e-12)), expected)


def test_the_papers_series_takes_the_inner_learning_rate():
    case = boston.regression(*features(), seed=0)
    with torch.no_grad():
        case.problem.model.weight.fill_(0.3)
    (x, _), (x_val, y_val) = case.train, case.val
    w, decay = torch.full((14,), 0.3), torch.full((14,), 1e-2)
    A, term = x.T @ x / len(x) + torch.diag(decay), x_val.T @ (x_val @ w - y_val) / len(x_val)
    total = term.clone()
    for _ in range(5):
        term = term - 0.1 * A @ term
        total = total + term
    torch.testing.assert_close(case.approximate(boston.APPROXIMATIONS["Neumann 5"]), -decay * w * 0.1 * total)


def test_the_papers_comparison_gets_better_with_terms():
    rows = boston.compared(boston.regression(*features(), seed=0), outer_steps=8)
    assert [one["outer_step"] for one in rows] == list(range(1, 9))
    figures = boston.summary([rows])
    distances = [figures[f"Neumann {terms}"]["distance"] for terms in (0, 1, 5, 20)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5 > figures["CG 20"]["distance"]
    assert figures["CG 20"]["cosine"] > 0.99


def test_the_command_writes_its_table_and_pictures_and_merges_calls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "HERE", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(boston, "read", lambda root: features())
    monkeypatch.setattr(boston, "compared", partial(boston.compared, outer_steps=10))
    short = {name: SPECS[name] for name in ("iris", "digits")}
    for module in (fidelity, pictures):
        monkeypatch.setattr(module, "PROBLEMS", short)
    out = ["--out", str(tmp_path / "out"), "--seeds", "2"]
    fidelity.main(["--problems", "iris", "--methods", "CG, GN, 5", "Ident*", *out])
    fidelity.main(["--problems", "digits", "boston", "--methods", "CG, GN, 5", "Ident*", *out, "--save"])
    fidelity.main(["--problems", "iris", "--methods", "CG, GN, 5", *out])
    saved = json.loads((tmp_path / "kept" / "fidelity.json").read_text())
    wanted = {(problem, method) for problem in short for method in ("CG, GN, 5", "Identity, 0")}
    records = [dict(zip(saved["columns"], values, strict=True)) for values in saved["records"]]
    assert {(one["problem"], one["method"]) for one in records} == wanted
    assert all(one["seeds"] == 2 for one in records)
    assert set(saved["boston"]) == set(boston.APPROXIMATIONS)
    for name in ("fidelity.png", "fidelity_boston.png"):
        assert (tmp_path / "kept" / name).stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Iris" not in printed
    assert "at most 25 gradients, exact curvature only" in printed
    assert "0 of 4 records changed" in printed


def test_an_unknown_method_is_refused_with_the_names(tmp_path):
    with pytest.raises(SystemExit, match="Neumann, exact, 5"):
        fidelity.main(["--problems", "ridge", "--methods", "Newton", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


def test_learning_with_the_default_beats_learning_without_and_its_answers_keep_their_length():
    without = learning.learned("without", None, 1)
    found = learning.learned("default", methods.METHODS["MINRES, GN, 5"].method, 1)
    assert without.uneven == 0
    assert found.loss < 0.6 * without.loss
    assert found.accuracy > without.accuracy
    assert found.uneven < 10
    assert found.skipped == 0
