"""The sections on what hoptim costs. Each is a function from the number of rounds to the rows of its table."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import PROBLEMS, Case, difference, make, make_case, mlp, plain, train_loss, training, validation
from studies.benchmark.measure import Calls, Row, in_turn, peak, ratio
from torch._inductor import config as inductor
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

import hoptim

TERMS = (0, 5, 20)
STEPS = (5, 20, 100, 1000)


def neumann(case: Case, terms: int) -> tuple[hoptim.Implicit, hoptim.Implicit, Any]:
    """Neumann on the exact Hessian with a step size that it chooses, with that step size given, and the first solution."""
    chosen = hoptim.Implicit(hoptim.Neumann(terms=terms), curvature=hoptim.Exact())
    first = case.implicit(chosen).solution
    given = hoptim.Neumann(terms=terms, step_size=first.step_size)
    return chosen, hoptim.Implicit(given, curvature=hoptim.Exact()), first


def answers_differ(case: Case, method: hoptim.Implicit, terms: int, step: float) -> float:
    """The relative distance of hoptim's answer to that of the loop by hand, with the same dropout masks."""
    ours = list(case.implicit(method).grads.values())
    return difference(ours, case.by_hand(terms, step), f"{case.name}, hoptim and the loop by hand")


def cost(rounds: int) -> list[Row]:
    """The cost of a hypergradient in training gradients. "By hand": the same terms, step size and answer in plain torch."""
    rows = []
    for case in (*(make(name) for name in PROBLEMS), make("784 MLP", "layer")):
        for terms in TERMS:
            chosen, given, first = neumann(case, terms)
            error = answers_differ(case, given, terms, first.step_size)
            calls: Calls = {
                "gradient": case.gradient,
                "step given": lambda case=case, m=given: case.implicit(m),
                "by hand": lambda case=case, k=terms, a=first.step_size: case.by_hand(k, a),
                "step chosen": lambda case=case, m=chosen, s=first.state: case.implicit(m, s),
                "first": lambda case=case, m=chosen: case.implicit(m),
            }
            times = in_turn(calls, rounds)
            figures: dict[str, float | str] = {"difference": f"{error:.0e}", "gradient, ms": 1e3 * median(times["gradient"])}
            figures |= {name: ratio(times, name, "gradient") for name in list(calls)[1:]}
            figures["over by hand"] = ratio(times, "step given", "by hand")
            rows.append(Row(case.name, {"K": str(terms)}, figures, {"over by hand": 1.02} if terms == 20 else {}))
    return rows


COMPILED = {"Iris MLP": 0.5, "784 MLP": 0.8, "small CNN": 0.75, "logistic": 0.95, "transformer": 0.65}


def compiled(rounds: int) -> list[Row]:
    """Compiled over eager curvatures, K = 20, step size given. "First": wall-clock seconds of the call that compiles."""
    rows = []
    for kind in (hoptim.Exact, hoptim.GaussNewton):
        try:
            fast = kind(compile=True)
        except TypeError as error:
            rows.append(Row("all", {"curvature": kind.__name__}, {"left out": f"{type(error).__name__}: {error}"}))
            continue
        for name, goal in COMPILED.items():
            case = make(name).composite()
            step = case.implicit(hoptim.Implicit(hoptim.Neumann(terms=0), curvature=kind())).solution.step_size
            methods = {c: hoptim.Implicit(hoptim.Neumann(terms=20, step_size=step), curvature=c) for c in (kind(), fast)}
            eager, quick = methods.values()
            begun = time.perf_counter()
            with inductor.patch(force_disable_caches=True):  # otherwise an earlier run's result would be read from disk
                case.implicit(quick)
            first = time.perf_counter() - begun
            error = apart(case.in_float64(), quick, eager)
            calls: Calls = {"eager": partial(case.implicit, eager), "quick": partial(case.implicit, quick)}
            times = in_turn(calls, rounds)
            figures = {"difference": f"{error:.0e}", "first, s": first, "over eager": ratio(times, "quick", "eager")}
            rows.append(Row(case.name, {"curvature": kind.__name__}, figures, {"over eager": goal}))
    return rows


def apart(case: Case, *methods: hoptim.Implicit) -> float:
    """The relative distance of two methods' answers, in float64, since in float32 rounding may flip a ReLU near zero."""
    found = [list(case.implicit(method).grads.values()) for method in methods]
    return difference(*found, f"{case.name}, compiled and eager", at_most=1e-8)


def memory(_: int) -> list[Row]:
    """The peak of the tensors that a call creates, in MB. "Left": still held after it, until garbage collection."""
    rows = []
    for name in PROBLEMS:
        case = make(name)
        unit, _ = peak(case.gradient)
        for terms in TERMS:
            chosen, given, first = neumann(case, terms)
            ours, left = peak(lambda case=case, m=given: case.implicit(m))
            hand, _ = peak(lambda case=case, k=terms, a=first.step_size: case.by_hand(k, a))
            steady, _ = peak(lambda case=case, m=chosen, s=first.state: case.implicit(m, s))
            figures = {"gradient": unit, "step given": ours, "step chosen": steady, "by hand": hand}
            figures |= {"in gradients": ours / unit, "over by hand": ours / hand, "left": left}
            goals = {"left": 0.0, **({"over by hand": 1.1} if terms else {})}
            rows.append(Row(case.name, {"K": str(terms)}, figures, goals))
    return rows


def unrolling(_: int) -> list[Row]:
    """The peak in MB with K terms, which should not grow with K, and that of unrolling K + 1 steps by hand."""
    case, step, rows = make("784 MLP"), 0.01, []
    for steps in STEPS:
        method = hoptim.Implicit(hoptim.Neumann(terms=steps, step_size=step), curvature=hoptim.Exact())
        ours, _ = peak(lambda m=method: case.implicit(m))
        unrolled, _ = peak(lambda n=steps + 1: case.unrolled(n, step), warm=steps < 1000)
        first = float(rows[0].figures["hoptim"]) if rows else ours
        figures = {"hoptim": ours, "unrolled": unrolled, "over K = 5": ours / first}
        rows.append(Row(case.name, {"K": str(steps)}, figures, {"over K = 5": 1.01}))
    return rows


def growth(rounds: int) -> list[Row]:
    """The time with n hyperparameters on one model, which should not grow with n (K = 20, step size given).

    An MLP of 10⁷ weights with up to one decay for each of them, and an MLP of 270,000 weights with n example weights, 128
    of which are in a batch. There 10⁷ hyperparameters outnumber the weights, and writing their gradient takes a while.
    """
    model = mlp(784, 2790, 2790, 10)
    base = make_case("MLP", model, 128, (784,), 10, steps=3)
    counts = {"1": None, "one a tensor": "layer", "one a weight": "weight"}
    cases = {label: decays(base, each) for label, each in counts.items()}
    rows = _growing("MLP of 10⁷ weights, decays", cases, max(3, rounds // 5), 1e-3, {"over n = 1": 1.1})
    base = make("784 MLP")
    cases = {f"{n:,}": examples(base, n) for n in (1, 10**2, 10**4, 10**6, 10**7)}
    return rows + _growing("784 MLP, example weights", cases, rounds, 1e-2, {"over by hand": 1.05})


def _growing(name: str, cases: dict[str, Case], rounds: int, step: float, goals: dict[str, float]) -> list[Row]:
    method = hoptim.Implicit(hoptim.Neumann(terms=20, step_size=step), curvature=hoptim.Exact())
    calls: Calls = {label: partial(case.implicit, method) for label, case in cases.items()}
    calls |= {f"{label} by hand": partial(case.by_hand, 20, step) for label, case in cases.items()}
    times, rows = in_turn(calls, rounds), []
    for label, case in cases.items():
        n = f"{sum(leaf.numel() for leaf in case.problem.leaves().values()):,}"
        figures = {"call, ms": 1e3 * median(times[label]), "over by hand": ratio(times, label, f"{label} by hand")}
        first = ratio(times, f"{label} by hand", "1 by hand")
        figures |= {"over n = 1": ratio(times, label, "1"), "by hand, over n = 1": first}
        rows.append(Row(name, {"n": n}, figures, goals))
    return rows


def decays(base: Case, each: str | None) -> Case:
    """One decay for all weights, for each tensor, or for each weight."""
    shapes = {"all": torch.ones(())} if each is None else dict(base.problem.model.named_parameters())
    values = {name: torch.full_like(like if each == "weight" else torch.ones(()), 1e-3) for name, like in shapes.items()}

    def penalty(model: Any, hparams: Any) -> torch.Tensor:
        of = {name: hparams["all" if each is None else name] for name, _ in model.named_parameters()}
        return 0.5 * sum((of[name] * weight.square()).sum() for name, weight in model.named_parameters())

    hparams = hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive))
    loss = partial(train_loss, criterion=plain, penalty=penalty)
    return replace(base, problem=hoptim.Problem(base.problem.model, hparams, loss, validation))


def examples(base: Case, n: int) -> Case:
    """n example weights; a batch uses as many of them as it has examples."""

    def gathered(model: Any, hparams: Any, batch: Any) -> torch.Tensor:
        weight = hparams["example"]
        chosen = weight[torch.arange(len(batch[1])) % len(weight)]
        return (chosen * cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

    hparams = hoptim.HyperParameters({"example": torch.ones(n)}, {"example": constraints.nonnegative})
    return replace(base, problem=hoptim.Problem(base.problem.model, hparams, gathered, validation))


def size(rounds: int) -> list[Row]:
    """An MLP 784-h-h-10 with one decay for each weight, K = 5: gradients and bytes per weight should not grow with h."""
    rows = []
    for width in (256, 900, 2700, 4070):
        model = mlp(784, width, width, 10)
        weights = sum(p.numel() for p in model.parameters())
        case = make_case("MLP", model, 128, (784,), 10, steps=3)
        method = hoptim.Implicit(hoptim.Neumann(terms=5, step_size=1e-3), curvature=hoptim.Exact())
        held, _ = peak(lambda case=case, m=method: case.implicit(m), warm=False)
        calls: Calls = {
            "gradient": case.gradient,
            "ours": lambda case=case, m=method: case.implicit(m),
            "by hand": lambda case=case: case.by_hand(5, 1e-3),
        }
        times = in_turn(calls, max(3, rounds // 3))
        figures = {"in gradients": ratio(times, "ours", "gradient"), "over by hand": ratio(times, "ours", "by hand")}
        figures |= {"ns a weight": 1e9 * median(times["ours"]) / weights, "bytes a weight": 1e6 * held / weights, "MB": held}
        first = rows[0].figures if rows else figures
        figures["gradients over first"] = figures["in gradients"] / float(first["in gradients"])
        figures["bytes over first"] = figures["bytes a weight"] / float(first["bytes a weight"])
        goals = {"gradients over first": 1.1, "bytes over first": 1.1}
        rows.append(Row(case.name, {"weights": f"{weights:,}"}, figures, goals))
    return rows


def wrapper(rounds: int) -> list[Row]:
    """What BilevelOptimizer adds to a training step when no hyperstep is due, in % of a step without it.

    "Same loss": the plain loop reads HyperParameters too. "Constants": it reads their values from plain tensors.
    """
    rows = []
    for each in ("layer", "weight"):
        for kind, options in ((torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}), (torch.optim.Adam, {"lr": 1e-4})):
            case = make("784 MLP", each)
            model, problem, batch = case.problem.model, case.problem, case.batch
            inner, outer = kind(model.parameters(), **options), torch.optim.Adam(problem.hparams.parameters())
            wrapped = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[case.val_batch], every=10**9)
            still = copy.deepcopy(problem.hparams).requires_grad_(False)
            constants = {name: still[name] for name in still}
            calls: Calls = {
                "wrapped": training(wrapped, wrapped.loss, batch),
                "same loss": training(inner, lambda batch, m=model, p=problem, h=still: p.train_loss(m, h, batch), batch),
                "constants": training(
                    inner, lambda batch, m=model, p=problem, h=constants: p.train_loss(m, h, batch), batch
                ),
            }
            times = in_turn(calls, 8 * rounds)
            figures: dict[str, float | str] = {"step, ms": 1e3 * median(times["same loss"])}
            figures |= {f"% over {bare}": 100 * (ratio(times, "wrapped", bare) - 1) for bare in ("same loss", "constants")}
            rows.append(Row(case.name, {"inner": kind.__name__}, figures, {"% over same loss": 2.0}))
    return rows


def imports(rounds: int) -> list[Row]:
    """What `import hoptim` adds to `import torch`, in % of torch's own time: the median over fresh processes."""
    code = (
        "from time import perf_counter as t; a = t(); import torch; b = t(); import hoptim; print(100 * (t() - b) / (b - a))"
    )
    found = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(rounds)]
    return [Row("import hoptim", {}, {"% over import torch": median(found)}, {"% over import torch": 20.0})]
