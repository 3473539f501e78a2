"""Other public libraries on the same problem, with the same terms and step. Answers are compared before they are timed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import PROBLEMS, Case, difference, make
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from studies.benchmark.sections import neumann
from torch import Tensor

import hoptim

TERMS, SHARE = 20, 0.2  # the step size is this share of 1 / ‖A‖, large enough to show a wrong product in the answer
Call = Callable[[], list[Any]]


def by_hoptim(case: Case, terms: int, step: float, *, compile: bool = False) -> Call:
    method = hoptim.Implicit(hoptim.Neumann(terms=terms, step_size=step), curvature=hoptim.Exact(compile=compile))
    return lambda: list(case.implicit(method).grads.values())


def by_betty(case: Case, terms: int, step: float) -> Call:
    """betty's backward pass of the upper problem alone, without the steps that its engine takes before and after."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return case.problem.val_loss(self.lower.module, self.module, batch)

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            self.module.train()
            return case.problem.train_loss(self.module, self.upper.module, batch)

    def part(kind: type, name: str, module: Any, batch: Any, **options: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=step)
        config = Config(retain_graph=True, **options)
        return kind(name=name, config=config, module=module, optimizer=optimizer, train_data_loader=[batch])

    upper = part(Upper, "upper", case.problem.hparams, case.val_batch)
    options = {"type": "neumann", "neumann_iterations": terms, "neumann_alpha": step}
    lower = part(Lower, "lower", case.problem.model, case.batch, **options)
    logging.disable(logging.INFO)
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    Engine(problems=[upper, lower], config=EngineConfig(strategy="cpu"), dependencies=dependencies)
    lower.cur_batch = case.batch

    def call() -> list[Tensor]:
        params = upper.trainable_parameters()
        with case.unfused():
            loss = upper.training_step_exec(case.val_batch)
            upper.backward(loss, params, upper.paths, create_graph=False, retain_graph=True, allow_unused=True)
        found = [p.grad for p in params]
        upper.zero_grad()
        return found

    return call


def by_torchopt(case: Case, terms: int, step: float) -> Call:
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_inv

    train, validate = case.function("train_loss"), case.function("val_loss")
    weights, leaves = tuple(case.problem.model.parameters()), tuple(case.problem.hparams.parameters())

    def optimality(weights: Any, leaves: Any) -> Any:
        return torch.func.grad(train)(weights, leaves)

    @custom_root(optimality, argnums=1, solve=solve_inv(ns=True, maxiter=terms, alpha=step))
    def solved(weights: Any, leaves: Any) -> Any:
        return weights

    def call() -> list[Tensor]:
        with case.unfused():
            return list(torch.autograd.grad(validate(solved(weights, leaves), leaves), leaves))

    return call


def by_higher(case: Case, terms: int, step: float) -> Call:
    """Unrolls the same number of steps from the current weights; it is compared with unrolling by hand."""
    import higher

    problem, leaves = case.problem, list(case.problem.hparams.parameters())
    sgd = torch.optim.SGD(problem.model.parameters(), lr=step)

    def call() -> list[Tensor]:
        with case.unfused(), higher.innerloop_ctx(problem.model, sgd) as (model, inner):
            for _ in range(terms):
                model.train()
                inner.step(problem.train_loss(model, problem.hparams, case.batch))
            return list(torch.autograd.grad(problem.val_loss(model, problem.hparams, case.val_batch), leaves))

    return call


LIBRARIES: dict[str, Callable[[Case, int, float], Call]] = {
    "hoptim": by_hoptim,
    "hoptim, compiled": partial(by_hoptim, compile=True),
    "betty-ml": by_betty,
    "torchopt": by_torchopt,
    "higher": by_higher,
}


def peers(rounds: int) -> list[Row]:
    """Hypergradients with K = 20 and a step size of 0.2 / ‖A‖, relative to the loop by hand; "higher" unrolls 20 steps."""
    rows = []
    for name in PROBLEMS:
        case = make(name, dropout=0.0)
        step = SHARE * neumann(case, 0)[2].step_size
        right, unrolled = case.by_hand(TERMS, step), case.unrolled(TERMS, step)
        calls: Calls = {"by hand": lambda c=case, a=step: c.by_hand(TERMS, a)}
        notes = {}
        for peer, build in LIBRARIES.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call = build(case, TERMS, step)
                    answer = call()
                at_most = 1e-3 if "compiled" in peer else 1e-4  # fused float32 may flip a ReLU near zero
                error = difference(answer, unrolled if peer == "higher" else right, peer, at_most)
                calls[peer], notes[peer] = call, f"{error:.0e}"
            except Exception as error:  # the error becomes the library's row
                notes[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = in_turn(calls, rounds)
        for peer, note in notes.items():
            label = {"library": f"{peer} {release(peer)}".strip()}
            if peer not in calls:
                rows.append(Row(case.name, label, {"answer": note}))
                continue
            figures: dict[str, float | str] = {"answer": note, "call, ms": 1e3 * median(times[peer])}
            figures["over by hand"] = ratio(times, peer, "by hand")
            rows.append(Row(case.name, label, figures, {"over by hand": 1.02} if peer == "hoptim" else {}))
    return rows


def release(peer: str) -> str:
    """The installed version of a library, or nothing."""
    try:
        return version(peer)
    except PackageNotFoundError:
        return ""
