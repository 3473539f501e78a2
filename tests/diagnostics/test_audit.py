"""The audit against what is known in closed form: spectra, errors, slopes; its advice; and that it leaves no trace."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import RIDGES, Trained, flat, noisy_problem, same, snapshot, unflat
from torch import Tensor, nn

import hoptim
from hoptim import CG, MINRES, Exact, GaussNewton, Implicit, Neumann, Replay, Status, Unrolled, Update, audit
from hoptim.diagnostics.report import Direction, brief
from hoptim.training.record import standard_error


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def quick(problem: hoptim.Problem, method: Any = None, **options: Any) -> hoptim.Audit:
    return audit(problem, torch.zeros(8), torch.zeros(8), method, **{"steps": 30, "directions": 1, **options})


def hessian(case: Trained) -> Tensor:
    theta = flat(dict(case.hparams.named_parameters())).detach()
    return torch.func.hessian(case.objective)(case.minimum, theta)


def exact(case: Trained) -> Tensor:
    """dL_V/dλ by dense linear algebra."""
    theta = flat(dict(case.hparams.named_parameters())).detach()
    g = torch.func.grad(case.validation)(case.minimum)
    B = torch.func.jacrev(torch.func.grad(case.objective), argnums=1)(case.minimum, theta)
    return -B.T @ torch.linalg.solve(hessian(case), g)


def test_at_a_minimum_a_converged_solve_is_confirmed_by_all_that_is_looked_at() -> None:
    case = Trained()
    eigenvalues = torch.linalg.eigvalsh(hessian(case))
    precise = {"tolerance_grad": 1e-13, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    inner = torch.optim.LBFGS(case.model.parameters(), **precise)  # torch can't differentiate it
    found = quick(case.problem(), Implicit(CG(terms=60, tolerance=1e-12)), inner=inner)
    assert found.status is Status.CONVERGED
    assert found.gradient_norm < 1e-10
    assert found.distance is not None
    assert found.distance < 1e-8
    assert found.spectrum is not None
    assert found.spectrum.lowest == pytest.approx(eigenvalues[0].item(), rel=1e-6)
    assert found.spectrum.highest == pytest.approx(eigenvalues[-1].item(), rel=1e-9)
    assert found.spectrum.negative_share == 0
    assert found.compared[0].cosine == pytest.approx(1, abs=1e-9)
    assert found.compared[0].length == pytest.approx(1, rel=1e-5)
    assert [line.verdict for line in found.directions] == ["agrees", "agrees"]
    for line in found.directions:
        assert line.measured == pytest.approx(line.predicted, rel=0.2)  # as far as its line search gets here
    assert found.missing == ("unrolling: torch can't differentiate a step of LBFGS",)
    assert found.bound is not None
    assert found.bound.solve < 1e-6
    assert found.bound.inner < 1e-6
    assert found.path[-1][2] == pytest.approx(1, abs=1e-9)


def test_the_bound_of_the_solve_holds_and_the_comparison_is_the_dense_one() -> None:
    case = Trained()
    for terms in (2, 4, 8):
        method = Implicit(CG(terms=terms, tolerance=0.0))
        found, true = quick(case.problem(), method, longer=400, directions=0), exact(case)
        h = flat(hoptim.hypergradient(case.problem(), None, None, method).grads)
        assert found.bound is not None
        assert ((h - true).norm() / h.norm()).item() <= found.bound.solve * (1 + 1e-6)
        assert found.compared[0].cosine == pytest.approx(((h @ true) / h.norm() / true.norm()).item(), abs=1e-4)
        assert found.compared[0].length == pytest.approx((h.norm() / true.norm()).item(), rel=1e-3)
        residual = found.residuals[-1]
        assert found.path[-1] == (terms, pytest.approx(residual), pytest.approx(found.compared[0].cosine))


def test_retraining_measures_the_slope_of_the_closed_form() -> None:
    ridge = RIDGES["per_weight"]
    value = ridge.start()
    problem = ridge.problem()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    found = quick(problem, Implicit(CG(terms=20, tolerance=1e-12)), inner=inner, steps=300, directions=2)
    true = ridge.exact(value)
    h = hoptim.hypergradient(problem, None, None, Implicit(CG(terms=20, tolerance=1e-12))).grads["value"]
    assert found.directions[0].measured == pytest.approx((true @ h / h.norm()).item(), rel=1e-5)
    assert [line.verdict for line in found.directions] == ["agrees"] * 3
    assert found.compared[1].other == "unrolling 300 steps"
    assert found.compared[1].cosine == pytest.approx(1, abs=1e-9)
    assert found.advice == ()


def test_one_step_of_retraining_is_one_step() -> None:
    problem = RIDGES["scalar"].problem()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.25)
    found = quick(problem, Implicit(Neumann(terms=0, step_size=0.25)), inner=inner, steps=1, directions=0)
    assert found.directions[0].measured == pytest.approx(found.directions[0].predicted, rel=1e-5)


@pytest.mark.parametrize(
    ("predicted", "measured", "noise", "verdict"),
    [
        (1.0, 1.5, 0.1, "agrees"),
        (1.0, -1.5, 0.1, "opposite sign"),
        (1.0, 0.15, 0.1, "lost in noise"),
        (1.0, 4.0, 0.1, "same sign, 0.25 times as long"),
        (-3.0, -1.0, 0.1, "same sign, 3 times as long"),
        (1.0, float("nan"), float("nan"), "diverges"),
        (1.0, float("inf"), float("inf"), "diverges"),
    ],
)
def test_what_retraining_says(predicted: float, measured: float, noise: float, verdict: str) -> None:
    assert Direction(name="d", predicted=predicted, measured=measured, noise=noise).verdict == verdict


class Mean(nn.Module):
    """One weight: the minimum of Σ(w − x)²/2n + d·w²/2 is mean(x) / (1 + d)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    @staticmethod
    def problem(curvature: float = 1.0) -> hoptim.Problem:
        def train(model: Any, hparams: Any, batch: Any) -> Tensor:
            return curvature * 0.5 * (model.w - 4.0).square() + 0.5 * hparams["d"] * model.w.square()

        def val(model: Any, hparams: Any, batch: Any) -> Tensor:
            return 0.5 * (model.w - batch).square().mean()

        return hoptim.Problem(Mean(), nn.ParameterDict({"d": torch.tensor(1.0)}), train, val)


def test_the_standard_error_is_that_of_the_mean_over_chunks() -> None:
    batch = torch.tensor([1.0, 1.0, 0.0, 2.0, 3.0, 1.0])
    found = audit(Mean.problem(), None, batch, Implicit(CG()), steps=5, directions=0, chunks=3)
    each = torch.stack([-(2.0 - part.mean()) * 2.0 / 2.0 for part in batch.split(2)])  # −(w − ȳ)·w / (1 + d)
    assert found.standard_error == pytest.approx((each.std() / 3**0.5 / each.mean().abs()).item())
    whole = audit(Mean.problem(), None, torch.tensor(1.0), steps=5, directions=0)
    assert whole.standard_error is None
    assert "share no first axis" in whole.missing[0]


def test_negative_curvature_is_found_and_the_remedy_named() -> None:
    found = audit(Mean.problem(curvature=-3.0), None, torch.zeros(8), Implicit(MINRES()), steps=1, directions=0)
    assert found.spectrum is not None
    assert found.spectrum.lowest == pytest.approx(-2.0)
    assert found.spectrum.negative_share == 1.0
    assert found.bound is None
    assert any(
        "GaussNewton(), with the loss as a hoptim.CompositeLoss, or damping above 2.0e+00" in line for line in found.advice
    )


def test_what_is_not_trained_is_told_so() -> None:
    problem = Mean.problem()
    problem.model.w.data.fill_(20.0)
    found = audit(problem, None, torch.zeros(8), Implicit(CG()), steps=50, directions=0)
    assert found.distance == pytest.approx(18 / 20)
    assert "the weights are 90% of their length from a stationary point" in found.advice[0]
    assert found.bound is not None
    w = torch.tensor([20.0, 2.0])
    h = -w * w / 2.0  # −g·w/(1 + d) with g = w
    assert found.bound.inner == pytest.approx(((h[1] - h[0]) / h[0]).abs().item(), rel=1e-6)


def test_a_failed_solve_is_the_first_thing_said() -> None:
    found = audit(Mean.problem(), None, torch.zeros(8), Implicit(Neumann(terms=50, step_size=10.0)), steps=5)
    assert found.status is Status.STEP_TOO_LARGE
    assert found.advice == (f"the solve failed: {found.status.message}",)
    assert found.directions == ()


def test_known_mu_is_the_damping_of_gauss_newton() -> None:
    parts = hoptim.CompositeLoss(lambda m, h, b: m.w.reshape(1), lambda z, h, b: 0.5 * (z - 4.0).square().sum() * h["d"])
    problem = hoptim.Problem(
        Mean(), nn.ParameterDict({"d": torch.tensor(1.0)}), parts, lambda m, h, b: 0.5 * (m.w - b).square().mean()
    )
    found = audit(problem, None, torch.zeros(4), Implicit(CG(), curvature=GaussNewton(), damping=0.5), steps=5, directions=0)
    assert found.bound is not None
    assert (found.bound.mu, found.bound.known) == (0.5, True)


@pytest.mark.parametrize(
    "method",
    [Implicit(Neumann(terms=3)), Unrolled(3), Implicit(hoptim.GMRES(terms=5), condition=Update())],
    ids=["neumann", "unrolled", "update"],
)
def test_it_leaves_no_trace_and_can_be_written_down(method: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    problem = noisy_problem()
    inner = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    batch = (torch.randn(16, 4), torch.arange(16) % 3)
    before = snapshot(problem)
    found = audit(problem, batch, batch, method, inner=inner, steps=3, directions=1, longer=10)
    assert same(before, snapshot(problem))
    assert len(inner.state) == 0
    assert json.loads(json.dumps(found.to_dict()))["status"] == found.status.name
    text = str(found)
    for words in (
        "how did the solve end?",
        "standard error",
        "cost of a product",
        "slope along the hypergradient",
    ):
        assert words in text
    found.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 5000
    assert len(found.directions) == 1  # of one hyperparameter: a random direction would be the same one


def test_the_bound_of_the_solve_is_the_norm_of_b_times_the_residual_over_mu() -> None:
    d, C, g = torch.tensor([1.0, 4.0]), torch.tensor([[6.0, 3.0], [-3.0, 5.0]]), torch.tensor([2.0, -1.0])
    problem = hoptim.Problem(
        nn.ParameterDict({"w": torch.tensor([0.3, 0.7])}),
        nn.ParameterDict({"a": torch.tensor([0.5, -0.2])}),
        lambda m, h, b: 0.5 * (d * m["w"].square()).sum() - m["w"] @ C @ h["a"],
        lambda m, h, b: g @ m["w"],
    )
    found = audit(problem, None, None, Implicit(Neumann(terms=1, step_size=0.1)), steps=2, directions=0)
    x = 0.1 * (g + g - 0.1 * d * g)
    residual, h = g - d * x, C.T @ x
    assert found.bound is not None
    assert found.bound.mu == pytest.approx(1.0)
    expected = torch.linalg.matrix_norm(C, 2) * residual.norm() / (1.0 * h.norm())
    assert found.bound.solve == pytest.approx(expected.item(), rel=1e-2)


def test_the_moved_weights_of_the_bound_are_put_back_to_the_last_bit() -> None:
    problem = Mean.problem()
    problem.model.w.data.fill_(20.0 / 3)
    before = problem.model.w.detach().clone()
    audit(problem, None, torch.zeros(8), Implicit(CG()), steps=2, directions=0)
    assert torch.equal(problem.model.w.detach(), before)


def test_retraining_that_diverges_is_no_agreement() -> None:
    problem = RIDGES["scalar"].problem()
    found = quick(problem, Implicit(CG()), inner=torch.optim.SGD(problem.model.parameters(), lr=1e200), steps=4)
    assert [line.verdict for line in found.directions] == ["diverges"]
    assert any(line.startswith("retraining diverges") for line in found.advice)
    assert not any("as long as retraining says" in line for line in found.advice)


def test_a_hypergradient_of_zero_has_no_relative_bound() -> None:
    def train(model: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * (model.w - 4.0).square() + (hparams["d"] * model.w).square()

    hparams = nn.ParameterDict({"d": torch.tensor(0.0)})
    problem = hoptim.Problem(Mean(), hparams, train, lambda model, hparams, batch: 0.5 * (model.w - batch).square().mean())
    found = audit(problem, None, torch.zeros(3), Implicit(CG()), steps=2, directions=0)
    assert found.compared[0].cosine == 0
    assert found.bound is None


def test_a_step_of_ones_own_is_retrained_on_a_copy() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    problem = RIDGES["scalar"].problem()
    inner = Own(problem.model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(inner, factor=1.0)  # puts a method of this optimizer into it
    before = snapshot(problem)
    found = quick(problem, Implicit(CG()), inner=inner)
    plain = quick(problem, Implicit(CG()), inner=torch.optim.SGD(problem.model.parameters(), lr=0.1))
    assert found.directions[0].measured == pytest.approx(plain.directions[0].measured, rel=1e-9)
    assert found.directions[0].verdict == "agrees"
    assert found.missing == ("unrolling: torch can't differentiate a step of Own",)
    assert same(before, snapshot(problem))


def test_an_optimizer_whose_tolerance_stops_it_is_told() -> None:
    case = Trained()
    inner = torch.optim.LBFGS(case.model.parameters(), tolerance_grad=1.0)
    found = quick(case.problem(), Implicit(CG(terms=60, tolerance=1e-12)), inner=inner)
    assert [line.verdict for line in found.directions] == ["does not move"] * 2
    assert any("tolerance_grad and tolerance_change of LBFGS" in line for line in found.advice)


def test_a_copy_that_cannot_be_made_is_told() -> None:
    problem = RIDGES["scalar"].problem()
    problem.model.lock = threading.Lock()
    found = quick(problem, Implicit(CG()), inner=torch.optim.LBFGS(problem.model.parameters()))
    assert found.directions == ()
    assert "a copy of LBFGS and the model can't be trained (TypeError: cannot pickle" in found.missing[0]


def test_a_replay_is_retrained_on_its_own_batches_with_its_own_options() -> None:
    """w ← w − lr_t·(w − b_t), so that the end is linear in each lr, and far from what 30 steps on one batch would give."""
    hparams = hoptim.HyperParameters({"lr": torch.tensor([0.1, 0.4, 0.2])})
    problem = hoptim.Problem(
        Mean(), hparams, lambda m, h, b: 0.5 * (m.w - b).square(), lambda m, h, b: 0.5 * (m.w - b).square().mean()
    )
    problem.model.w.data.fill_(3.0)
    inner = torch.optim.SGD(problem.model.parameters(), lr=1.0)
    batches = [torch.tensor(1.0), torch.tensor(-2.0), torch.tensor(0.5)]
    method = Replay(batches, options=lambda h, t: {"lr": h["lr"][t]})
    found = audit(problem, None, torch.zeros(8), method, inner=inner, directions=2)
    assert [line.verdict for line in found.directions] == ["agrees"] * 3
    for line in found.directions:
        assert line.measured == pytest.approx(line.predicted, rel=1e-6)
    assert (found.compared, found.path, found.bound, found.missing) == ((), (), None, ())
    assert found.advice == ()


def test_a_learned_rate_is_named_by_options_and_retrained_with() -> None:
    """On L = w²/2 from w = 3, T steps end at 3·(1 − lr)ᵀ: dL/d(log lr) = −9·T·lr·(1 − lr)²ᵀ⁻¹, whatever rate inner has."""
    hparams = hoptim.HyperParameters({"rate": torch.tensor(0.02)}, {"rate": torch.distributions.constraints.positive})
    problem = hoptim.Problem(Mean(), hparams, lambda m, h, b: 0.5 * m.w.square(), lambda m, h, b: 0.5 * m.w.square())
    problem.model.w.data.fill_(3.0)
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    found = audit(problem, None, torch.zeros(8), inner=inner, options={"lr": "rate"}, steps=20)
    truth = -9 * 20 * 0.02 * 0.98**39
    assert found.directions[0].verdict == "agrees"
    assert abs(found.directions[0].predicted) == pytest.approx(abs(truth), rel=1e-9)
    assert abs(found.directions[0].measured) == pytest.approx(abs(truth), rel=1e-6)
    assert inner.param_groups[0]["lr"] == 0.5


def test_a_validation_loss_that_cannot_take_a_part_is_told() -> None:
    problem = RIDGES["scalar"].problem()
    whole = problem.val_loss

    def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        if len(batch) != 8:
            raise RuntimeError("expected 8 rows")
        return whole(model, hparams, batch)

    problem.val_loss = val_loss
    found = quick(problem, Implicit(CG()))
    assert found.standard_error is None
    assert found.missing == (
        "the standard error: val_loss fails on a part of the validation batch (RuntimeError: expected 8 rows)",
    )


def turning() -> hoptim.Problem:
    """Curvatures of 1 and 1e-4: few terms see the first alone, whose share of the hypergradient has the other sign."""
    d, c, g = torch.tensor([1.0, 0.9, 1e-4]), torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, 0.3])
    return hoptim.Problem(
        nn.ParameterDict({"w": torch.zeros(3)}),
        nn.ParameterDict({"a": torch.tensor(0.0)}),
        lambda m, h, b: 0.5 * (d * m["w"].square()).sum() - h["a"] * (c * m["w"]).sum(),
        lambda m, h, b: g @ m["w"],
    )


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Implicit(MINRES(terms=2)), "take more terms than MINRES(terms=2) has, or damping"),
        (Implicit(Neumann(terms=2)), "take more terms than Neumann(terms=2) has, or hoptim.CG or MINRES"),
        (Implicit(hoptim.Identity()), "take hoptim.MINRES in place of Identity"),
    ],
)
def test_a_solve_that_is_too_short_is_told_by_its_own_name(method: Any, words: str) -> None:
    advice = " ".join(audit(turning(), None, None, method, steps=2, directions=0).advice)
    assert "a longer solve of the same system points elsewhere (cosine -1.00)" in advice
    assert words in advice
    assert ("in place of Neumann" in advice) is False


def test_an_answer_that_turns_round_on_the_way_is_told() -> None:
    advice = " ".join(audit(turning(), None, None, Implicit(MINRES(terms=10)), steps=2, directions=0).advice)
    assert "between 2 and 5 terms the answer turns round (cosine -1.000 and 1.000 to the longer solve)" in advice
    assert "points elsewhere" not in advice


def test_the_batches_of_a_replay_are_not_shown() -> None:
    assert brief(Replay([torch.ones(3)] * 2, segments=3)) == "Replay(segments=3)"


def test_standard_error_of_one_loss_is_not_known() -> None:
    result = hoptim.hypergradient(Mean.problem(), None, torch.zeros(3), Implicit(CG()))
    assert standard_error(result) is None
    assert standard_error(replace(result, val_loss=torch.zeros(1))) is None


@pytest.mark.parametrize("options", [{"steps": 0}, {"longer": 0}, {"directions": -1}, {"chunks": 1}, {"steps": 1.5}])
def test_wrong_numbers_name_the_value(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: give a whole number"):
        audit(Mean.problem(), None, torch.zeros(3), **options)


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(TypeError, match="problem is a str"):
        audit("no", None, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method is a CG"):
        audit(Mean.problem(), None, None, CG())  # type: ignore[arg-type]


def test_a_vector_of_validation_losses_is_audited_by_its_mean() -> None:
    problem = Mean.problem()
    problem.val_loss = lambda model, hparams, batch: 0.5 * (model.w - batch).square()
    found = audit(problem, None, torch.tensor([0.0, 1.0, 2.0, 5.0]), Implicit(CG()), steps=40, directions=0)
    assert found.directions[0].predicted == pytest.approx(0.0, abs=1e-12) or found.directions[0].verdict == "agrees"
    assert found.bound is None


def test_shapes_of_trees_survive(tmp_path: Any) -> None:
    case = Trained()
    assert flat(unflat(case.minimum, case.shapes)).equal(case.minimum)
    assert isinstance(quick(case.problem(), Implicit(MINRES(terms=5), curvature=Exact())), hoptim.Audit)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_both_retrainings_see_the_same_batches(count: int) -> None:
    ridge = RIDGES["per_weight"]
    problem, method = ridge.problem(), Implicit(CG(terms=20, tolerance=1e-12))
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    train = problem.train_loss
    problem.train_loss = lambda m, h, b: train(m, h, None) * (1 + 0.5 * b)
    batches = [torch.tensor(float(i)) / count for i in range(count)]
    found = audit(problem, batches[0], torch.zeros(8), method, inner=inner, train_batches=batches, steps=50, directions=0)
    assert found.directions[0].noise < 1e-4 * abs(found.directions[0].measured)
    assert found.directions[0].verdict == "agrees"


def test_what_was_computed_before_an_audit_can_still_go_back() -> None:
    problem = Mean.problem()
    loss = problem.loss(None)
    assert audit(problem, None, torch.zeros(8), Implicit(CG()), steps=2, directions=0).bound is not None
    loss.backward()
    assert problem.model.w.grad is not None


def test_the_optimizer_itself_may_be_given_as_inner() -> None:
    problem = Mean.problem()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.1)
    whole = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[torch.zeros(3)])
    found = audit(problem, None, torch.zeros(8), Implicit(CG()), inner=whole, steps=5, directions=0)
    assert len(found.directions) == 1


def test_a_bound_is_given_for_the_gradient_only_and_damping_is_known_only_where_it_holds() -> None:
    parts = hoptim.CompositeLoss(
        lambda m, h, b: m.w.reshape(1),
        lambda z, h, b: (z - 4.0).square().sum() * h["d"],
        lambda m, h: -0.6 * m.w.square().sum(),
    )
    problem = hoptim.Problem(
        Mean(), nn.ParameterDict({"d": torch.tensor(0.5)}), parts, lambda m, h, b: (m.w - b).square().mean()
    )
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    damped = Implicit(CG(), curvature=GaussNewton(), damping=0.5)
    found = audit(problem, None, torch.zeros(4), damped, inner=inner, steps=2, directions=0)
    assert found.spectrum is not None
    assert found.spectrum.lowest == pytest.approx(1.0 - 1.2 + 0.5)  # the penalty curves downward: 0.5 is no bound
    assert found.bound is not None
    assert not found.bound.known
    update = Implicit(hoptim.GMRES(), condition=Update(), damping=0.5)
    assert audit(problem, None, torch.zeros(4), update, inner=inner, steps=2, directions=0).bound is None


def test_the_noise_of_retraining_is_that_of_other_random_numbers() -> None:
    problem = Mean.problem()
    problem.train_loss = lambda m, h, b: 0.5 * (m.w - h["d"] * (1 + 0.5 * torch.randn(()))).square()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    found = audit(problem, None, torch.zeros(8), Implicit(CG()), inner=inner, steps=60, directions=0)
    slopes = []
    for seed in (0, 1):  # w = d·m for a mean m of the steps' own numbers, so that dL_V/dd = d·m²
        torch.manual_seed(seed)
        m = 0.0
        for _ in range(60):
            m = (m + 1 + 0.5 * torch.randn(()).item()) / 2
        slopes.append(m**2)
    sign = 1 if found.directions[0].predicted > 0 else -1
    assert sign * found.directions[0].measured * 1.0 == pytest.approx(sum(slopes) / 2, rel=1e-5)
    assert found.directions[0].noise == pytest.approx(abs(slopes[0] - slopes[1]), rel=1e-5)
