"""What hoptim costs: time and memory of a hypergradient, growth with the hyperparameters, overhead of the wrapper.

    python scripts/benchmark.py --quick
    python scripts/benchmark.py --only cost wrapper --json runs/benchmark.json

Times are CPU time of one thread, so that other programs on the machine disturb little. What is compared is run in turn,
A B, B A, A B, ..., in one process, and a figure is the median of the ratios within a round.
"""

# ruff: noqa: E402 (the environment is set before torch is imported)
from __future__ import annotations

import os
import sys

# glibc's allocator makes the same code vary by 15 % between processes: fixed here, by beginning again with these set.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in MALLOC.items()):
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})

import argparse
import copy
import gc
import json
import platform
import subprocess
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hoptim

TERMS = (0, 5, 20)
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One line of a section's table: figures by column, and the most that a column may be."""

    case: str
    figures: dict[str, float | str]
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A problem with its batches."""

    name: str
    problem: hoptim.Problem
    batch: tuple[Tensor, Tensor]
    val_batch: tuple[Tensor, Tensor]

    def gradient(self) -> tuple[Tensor, ...]:
        """One training gradient: the unit of every time and every peak here."""
        return torch.autograd.grad(self.problem.loss(self.batch), list(self.problem.weights().values()))

    def implicit(self, method: hoptim.Implicit, state: Any = None) -> hoptim.Hypergradient:
        """By hoptim; an answer that failed would be cheap for the wrong reason."""
        result = method(self.problem, self.batch, self.val_batch, state)
        if not result.solution.status.ok:
            raise RuntimeError(f"{self.name}: {result.solution.status.name}: {result.solution.detail}")
        return result

    def by_hand(self, terms: int, step: float) -> list[Tensor]:
        """The same hypergradient as one would write it for one experiment: no checks, no norms, no status."""
        model, hparams = self.problem.model, self.problem.hparams
        weights, leaves = list(model.parameters()), list(hparams.parameters())
        val_loss = self.problem.val_loss(model, hparams, self.val_batch)
        found = torch.autograd.grad(val_loss, [*weights, *leaves], allow_unused=True)
        g, direct = list(found[: len(weights)]), found[len(weights) :]
        model.train()
        loss = self.problem.train_loss(model, hparams, self.batch)
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        x = [value.clone() for value in g]
        for _ in range(terms):
            product = torch.autograd.grad(gradient, weights, g, retain_graph=True)
            torch._foreach_add_(g, product, alpha=-step)
            torch._foreach_add_(x, g)
        mixed = torch.autograd.grad(gradient, leaves, x)
        return [-step * m if d is None else d - step * m for d, m in zip(direct, mixed, strict=True)]


def network(name: str) -> tuple[nn.Module, int, tuple[int, ...], int]:
    """A model with its batch size, its input shape and its number of classes."""
    if name == "Iris MLP":
        layers = [nn.Linear(4, 128, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128, bias=False), nn.ReLU()]
        return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(128, 3, bias=False)), 60, (4,), 3
    if name == "784 MLP":
        layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        return nn.Sequential(*layers), 128, (784,), 10
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 10)), 64, (1, 28, 28), 10


def make(name: str, each: str = "weight") -> Case:
    """Classification of noisy clusters; a decay, kept positive by exp, for each weight or each layer."""
    model, size, shape, classes = network(name)
    labels = torch.arange(size) % classes
    inputs = torch.randn(size, *shape) + torch.randn(classes, *shape)[labels]
    values = {n: torch.full_like(p if each == "weight" else p.mean(), 1e-3) for n, p in model.named_parameters()}
    hparams = hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive))
    problem = hoptim.Problem(model, hparams, penalised, validation)
    case = Case(f"{name}, decay a {each}", problem, (inputs, labels), (inputs + 0.5 * torch.randn_like(inputs), labels))
    step = training(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), problem.loss, case.batch)
    for _ in range(100):  # away from the first weights, as a hyperstep would be
        step()
    model.zero_grad()
    return case


def training(optimizer: torch.optim.Optimizer, loss: Callable[[Any], Tensor], batch: Any) -> Callable[[], None]:
    """One step as a function of nothing."""

    def step() -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    return step


def penalised(model: Any, hparams: Any, batch: Any) -> Tensor:
    penalty = sum((hparams[name] * weight.square()).sum() for name, weight in model.named_parameters())
    return cross_entropy(model(batch[0]), batch[1]) + 0.5 * penalty


def validation(model: Any, _: Any, batch: Any) -> Tensor:
    model.eval()
    return cross_entropy(model(batch[0]), batch[1])


def in_turn(calls: Calls, rounds: int, at_least: float = 0.02) -> dict[str, list[float]]:
    """CPU seconds a call in each round; each call is repeated until a sample takes ``at_least`` seconds."""
    repeats = {}
    for name, call in calls.items():
        call()  # warm
        repeats[name] = max(1, round(at_least / max(_seconds(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(_seconds(calls[name], repeats[name]))
    return times


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    begun = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begun) / repeats


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


class Held(TorchDispatchMode):
    """Bytes of the tensor storages alive that were made inside, now and at most; each operator is seen, backward's too.

    Exact and repeatable, unlike resident memory. Scratch space inside an operator is not seen, nor are Python's objects.
    """

    now = most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in before:
                before.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return outputs

    def _freed(self, size: int) -> None:
        self.now -= size


def peak(call: Callable[[], Any]) -> tuple[float, float]:
    """The peak of ``call`` in MB, and what is left when its result is dropped and the garbage collector has not run."""
    with Held():  # what is imported or cached at first use is not the call's
        call()
    gc.collect()
    gc.disable()
    with Held() as held:
        call()
    gc.enable()
    return held.most / 1e6, held.now / 1e6


def cost(rounds: int) -> list[Row]:
    """A hypergradient in training gradients; hand-written: the same terms and step in plain torch."""
    rows = []
    for case in (make("Iris MLP"), make("784 MLP"), make("784 MLP", "layer"), make("small CNN")):
        for terms in TERMS:
            chosen = hoptim.Implicit(hoptim.Neumann(terms=terms))
            first = case.implicit(chosen).solution
            given = hoptim.Implicit(hoptim.Neumann(terms=terms, step_size=first.step_size))
            calls: Calls = {
                "gradient": case.gradient,
                "given step": lambda case=case, m=given: case.implicit(m),
                "hand-written": lambda case=case, k=terms, a=first.step_size: case.by_hand(k, a),
                "chosen, steady": lambda case=case, m=chosen, s=first.state: case.implicit(m, s),
                "chosen, first": lambda case=case, m=chosen: case.implicit(m),
            }
            error = difference(case, given, terms, first.step_size)
            times = in_turn(calls, rounds)
            figures: dict[str, float | str] = {"K": str(terms), "gradient, ms": 1e3 * median(times["gradient"])}
            figures |= {name: ratio(times, name, "gradient") for name in list(calls)[1:]}
            figures |= {"hoptim / hand": ratio(times, "given step", "hand-written"), "error": f"{error:.0e}"}
            reach = {"given step": 27.0, "chosen, steady": 30.0} if case.name.startswith("784") else {}
            rows.append(Row(case.name, figures, {**reach, "hoptim / hand": 1.05} if terms == 20 else {}))
    return rows


def difference(case: Case, method: hoptim.Implicit, terms: int, step: float) -> float:
    """Relative distance of the two answers, under the same dropout masks; at most 1e-4, or their times mean nothing."""
    torch.manual_seed(1)
    ours = torch.cat([value.flatten() for value in case.implicit(method).grads.values()])
    torch.manual_seed(1)
    theirs = torch.cat([value.flatten() for value in case.by_hand(terms, step)])
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < 1e-4:
        raise RuntimeError(f"{case.name}: hoptim and the hand-written loop differ by {error:.2g}")
    return error


def memory(_: int) -> list[Row]:
    """Peak of the tensors that a call makes, in MB, every storage counted; left: still held after it, until a collection."""
    case, rows = make("784 MLP"), []
    unit, _ = peak(case.gradient)
    for terms in TERMS:
        chosen = hoptim.Implicit(hoptim.Neumann(terms=terms))
        first = case.implicit(chosen).solution
        given = hoptim.Implicit(hoptim.Neumann(terms=terms, step_size=first.step_size))
        ours, left = peak(lambda m=given: case.implicit(m))
        hand, _ = peak(lambda k=terms, a=first.step_size: case.by_hand(k, a))
        steady, _ = peak(lambda m=chosen, s=first.state: case.implicit(m, s))
        figures = {"K": str(terms), "gradient": unit, "given step": ours, "chosen, steady": steady, "hand-written": hand}
        ratios = {"given / gradient": ours / unit, "hoptim / hand": ours / hand, "left": left}
        rows.append(Row(case.name, {**figures, **ratios}, {"left": 0.0}))
    return rows


def growth(rounds: int) -> list[Row]:
    """n example weights, of which a batch gathers 128: the time should not grow with n (K = 20, given step)."""

    def weighted(model: Any, hparams: Any, batch: Any) -> Tensor:
        weight = hparams["example"]
        chosen = weight[torch.arange(len(batch[1])) % len(weight)]
        return (chosen * cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

    base, calls = make("784 MLP"), {}
    for n in (1, 10**2, 10**4, 10**6):
        hparams = hoptim.HyperParameters({"example": torch.ones(n)}, {"example": constraints.nonnegative})
        problem = hoptim.Problem(base.problem.model, hparams, weighted, validation)
        case = Case("784 MLP", problem, base.batch, base.val_batch)
        method = hoptim.Implicit(hoptim.Neumann(terms=20, step_size=0.01))
        calls[f"{n:,}"] = lambda case=case, method=method: case.implicit(method)
    times = in_turn(calls, rounds)
    figures = [{"n": n, "ms": 1e3 * median(times[n]), "over n = 1": ratio(times, n, "1")} for n in calls]
    return [Row("784 MLP", row, {"over n = 1": 1.1}) for row in figures]


def wrapper(rounds: int) -> list[Row]:
    """A step of BilevelOptimizer(every=None) over the bare inner optimizer's, in %, on the same model and state.

    "same loss": the bare loop reads HyperParameters too; "constants": it holds their natural values as plain tensors.
    """
    rows = []
    for each in ("layer", "weight"):
        for kind, options in ((torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}), (torch.optim.Adam, {"lr": 1e-4})):
            case = make("784 MLP", each)
            model, problem, batch = case.problem.model, case.problem, case.batch
            inner, outer = kind(model.parameters(), **options), torch.optim.Adam(problem.hparams.parameters())
            wrapped = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[case.val_batch], every=None)
            still = copy.deepcopy(problem.hparams).requires_grad_(False)
            constants = {name: still[name] for name in still}
            calls: Calls = {
                "wrapped": training(wrapped, wrapped.loss, batch),
                "same loss": training(inner, lambda batch, m=model, h=still: penalised(m, h, batch), batch),
                "constants": training(inner, lambda batch, m=model, h=constants: penalised(m, h, batch), batch),
            }
            times = in_turn(calls, 8 * rounds)
            figures: dict[str, float | str] = {"inner": kind.__name__, "step, ms": 1e3 * median(times["same loss"])}
            figures |= {f"% over {bare}": 100 * (ratio(times, "wrapped", bare) - 1) for bare in ("same loss", "constants")}
            rows.append(Row(case.name, figures, {"% over same loss": 2.0}))
    return rows


def imports(rounds: int) -> list[Row]:
    """What `import hoptim` adds to `import torch`: percent of torch's own seconds, the median over fresh processes."""
    code = (
        "from time import perf_counter as t; a = t(); import torch; b = t(); import hoptim; print(100 * (t() - b) / (b - a))"
    )
    found = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(rounds)]
    return [Row("import hoptim", {"% over import torch": median(found)}, {"% over import torch": 5.0})]


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "cost": cost,
    "memory": memory,
    "growth": growth,
    "wrapper": wrapper,
    "imports": imports,
}


def table(rows: list[Row]) -> Table:
    shown = Table()
    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    for column in ("case", *columns):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        shown.add_row(row.case, *(_cell(row.figures.get(column, ""), row.targets.get(column)) for column in columns))
    return shown


def _cell(value: float | str, target: float | None) -> str:
    if isinstance(value, str):
        return value
    text = f"{value:.2f}"
    return text if target is None else f"[green]{text}[/]" if value <= target else f"[bold red]{text} > {target:g}[/]"


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    facts = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {**facts, "python": platform.python_version(), "hoptim": hoptim.__version__, "malloc": MALLOC}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: half a minute, and noisier figures")
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmark.json"), metavar="PATH", help="default: %(default)s"
    )
    names = list(SECTIONS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, facts, found = Console(), machine(), {}
    console = console if console.is_terminal else Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items() if key != "malloc"))
    for name in options.only:
        torch.manual_seed(0)
        found[name] = SECTIONS[name](3 if options.quick else 15)
        console.print(f"[bold]{name}[/]: {SECTIONS[name].__doc__}".strip(), highlight=False)
        console.print(table(found[name]))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    sections = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    options.json.write_text(json.dumps({"machine": facts, "sections": sections}, indent=2) + "\n")
    console.print(f"written: {options.json}")


if __name__ == "__main__":
    main()
