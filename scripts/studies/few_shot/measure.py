"""Do hoptim and the libraries of peers.py return the same meta-gradients as loops by hand, and what does one cost in each?

    python scripts/studies/few_shot/measure.py              # both
    python scripts/studies/few_shot/measure.py --rounds 0   # the answers alone
    python scripts/studies/few_shot/measure.py --saved      # the costs of the page, which nothing is run for

Answers are compared in float64. Errors are relative, over all weights; where there should be none, one of more than 1e-10
ends the run (1e-6 for the slope found by differences of L). Times are CPU seconds of one thread, in float32: the median over
rounds of calls made in turn. Peaks are of the tensors that a call creates.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.records import read_records, write_records
from common.tables import markdown
from studies.benchmark.measure import in_turn, peak
from studies.few_shot.peers import IMAML as IMAML_OF_PEERS
from studies.few_shot.peers import MAML as MAML_OF_PEERS
from studies.few_shot.peers import META_SGD as META_SGD_OF_PEERS
from studies.few_shot.peers import (
    Batch,
    Grads,
    Loss,
    Mean,
    flat,
    functional,
    higher_maml,
    plain_imaml,
    plain_maml,
    tasks,
    torchopt_imaml,
    torchopt_maml_vmap,
)
from studies.few_shot.with_hoptim import hoptim_imaml, hoptim_maml, hoptim_meta_sgd

MAML = {**MAML_OF_PEERS, "hoptim": hoptim_maml}
IMAML = {**IMAML_OF_PEERS, "hoptim": hoptim_imaml}
META_SGD = {**META_SGD_OF_PEERS, "hoptim": hoptim_meta_sgd}

AGREES = 1e-10


@dataclass(frozen=True)
class Case:
    """A model, a loss, and a batch of tasks."""

    model: nn.Module
    loss: Loss
    support: Batch
    query: Batch
    lr: float

    def call(self, way: Callable[..., Any], **options: Any) -> Any:
        return way(self.model, self.loss, self.support, self.query, **{"lr": self.lr, **options})


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def classes(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sinusoids(count: int, shots: int, activation: type[nn.Module] = nn.ReLU) -> Case:
    """Sine waves of random amplitude and phase, and the net 1-40-40-1 of MAML's paper."""
    torch.manual_seed(0)
    amplitude, phase = 0.1 + 4.9 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
    support, query = (10 * torch.rand(count, shots, 1) - 5 for _ in range(2))
    layers = [nn.Linear(1, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 1)]
    known, asked = ((x, amplitude * torch.sin(x + phase)) for x in (support, query))
    return Case(nn.Sequential(*layers), squared, known, asked, 0.01)


def images(count: int, ways: int, shots: int, queries: int, *, blocks: int, channels: int, size: int) -> Case:
    """Random images of ``ways`` classes, and blocks of convolution, BatchNorm in training mode, ReLU and pooling."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for number in range(blocks):
        layers += [nn.Conv2d(channels if number else 1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    features = channels * (size // 2**blocks) ** 2

    def draw(each: int) -> Batch:
        return torch.randn(count, ways * each, 1, size, size), torch.arange(ways).repeat(count, each)

    return Case(nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, ways)), classes, draw(shots), draw(queries), 0.1)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def tied() -> Case:
    torch.manual_seed(0)
    support, query = ((torch.randn(3, 4, 3), torch.randn(3, 4, 3)) for _ in range(2))
    return Case(Tied(), squared, support, query, 0.1)


def difference(found: Grads, right: Grads) -> float:
    apart, length = flat([found[name] - right[name] for name in right]), flat(list(right.values()))
    return float(apart.norm() / length.norm())


def by_differences(case: Case, steps: int, grads: Grads) -> float:
    """The relative error of the slope of L in a random direction, where L comes of trainings with ``torch.optim.SGD``."""
    direction = {name: torch.randn_like(w) for name, w in case.model.named_parameters()}

    def moved(distance: float) -> float:
        losses = []
        for train, test in tasks(case.support, case.query):
            model = deepcopy(case.model)
            with torch.no_grad():
                for name, w in model.named_parameters():
                    w.add_(direction[name], alpha=distance)
            sgd = torch.optim.SGD(model.parameters(), lr=case.lr)
            for _ in range(steps):
                sgd.zero_grad()
                case.loss(model, train).backward()
                sgd.step()
            losses.append(float(case.loss(model, test)))
        return mean(losses)

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    return abs(sum(float((grads[name] * v).sum()) for name, v in direction.items()) / slope - 1)


def dense_imaml(
    model: nn.Module, loss: Loss, support: Batch, query: Batch, *, steps: int, lr: float, strength: float
) -> Grads:
    """strength · (A + strength I)⁻¹ g with A as a matrix."""
    call, start, total = functional(model, loss), list(model.parameters()), Mean(support)
    for train, test in tasks(support, query):
        weights: list[Tensor] = [*start]
        for _ in range(steps):
            pull = [strength * (w - s).detach() for w, s in zip(weights, start, strict=True)]
            slope = torch.autograd.grad(call(weights, train), weights)
            weights = [(w - lr * (g + p)).detach().requires_grad_() for w, g, p in zip(weights, slope, pull, strict=True)]
        g = flat(torch.autograd.grad(call(weights, test), weights))
        slope_ = flat(torch.autograd.grad(call(weights, train), weights, create_graph=True))
        unit = torch.eye(len(g))
        A = torch.stack([flat(torch.autograd.grad(slope_, weights, row, retain_graph=True)) for row in unit])
        x = strength * torch.linalg.solve(A + strength * unit, g)
        total.put([part.view_as(w) for part, w in zip(x.split([w.numel() for w in start]), start, strict=True)])
    return total.by_name(model)


def adam_by_hand(
    model: nn.Module, loss: Loss, support: Batch, query: Batch, *, steps: int, lr: float, eps: float, late: bool
) -> Grads:
    """MAML through Adam. ``late``: eps is added after the correction of the second moment, as torch does, and not before."""
    call, start, total = functional(model, loss), list(model.parameters()), Mean(support)
    for train, test in tasks(support, query):
        weights: list[Tensor] = [*start]
        m = v = [torch.zeros_like(w) for w in weights]
        for t in range(1, steps + 1):
            grads = torch.autograd.grad(call(weights, train), weights, create_graph=True)
            m = [0.9 * a + 0.1 * g for a, g in zip(m, grads, strict=True)]
            v = [0.999 * b + 0.001 * g * g for b, g in zip(v, grads, strict=True)]
            root = (1 - 0.999**t) ** 0.5
            shift = eps * root if late else eps
            weights = [
                w - lr * root / (1 - 0.9**t) * a / ((b + (b == 0)).sqrt() * (b != 0) + shift)
                for w, a, b in zip(weights, m, v, strict=True)
            ]
        total.add(call(weights, test), start)
    return total.by_name(model)


def answers() -> str:
    """A table of the errors; it raises if one that should be nil is not."""
    small = {"blocks": 2, "channels": 8, "size": 8}
    cases = {
        "sinusoid, tanh": sinusoids(3, 10, nn.Tanh),
        "sinusoid, ReLU": sinusoids(3, 10),
        "convolutions, BatchNorm": images(3, 5, 1, 3, **small),
    }
    rows: list[list[str]] = []
    for name, case in cases.items():
        before = {key: value.clone() for key, value in case.model.state_dict().items()}
        tensors = [id(t) for t in (*case.model.parameters(), *case.model.buffers())]
        for steps in (1, 3):
            for options in ({}, {"at_once": True}, {"first_order": True}):
                right = case.call(plain_maml, steps=steps, **{**options, "at_once": False})
                ways = MAML_OF_PEERS if "at_once" in options else MAML
                found = {peer: difference(case.call(way, steps=steps, **options), right) for peer, way in ways.items()}
                rows += table(name, f"MAML, {steps} steps {' '.join(options)}".strip(), found, AGREES)
            for options in ({}, {"first_order": True}):
                right = case.call(plain_maml, steps=steps, **options)
                found = {"TorchOpt, vmap": difference(case.call(torchopt_maml_vmap, steps=steps, **options), right)}
                rows += table(name, f"MAML, {steps} steps {' '.join(options)}".strip(), found, AGREES)
            found = {"plain": by_differences(case, steps, case.call(plain_maml, steps=steps))}
            rows += table(name, f"MAML, {steps} steps, to differences of L", found, 1e-6)
            rows += table(name, f"Meta-SGD, {steps} steps", meta_sgd(case, steps=steps), AGREES)
            adam = {"steps": steps, "lr": None, "inner": lambda params: torch.optim.Adam(params, lr=0.01, eps=1e-4)}
            for late, limit in ((False, AGREES), (True, None)):
                right = case.call(adam_by_hand, steps=steps, lr=0.01, eps=1e-4, late=late)
                found = {"higher": difference(case.call(higher_maml, **adam), right)}
                words = "as in torch" if late else "eps before the correction"
                rows += table(name, f"MAML with Adam, {words}, {steps} steps", found, limit)
            found = {"hoptim": difference(case.call(hoptim_maml, **adam), right)}
            rows += table(name, f"MAML with Adam, {words}, {steps} steps", found, AGREES)
        implicit = {"steps": 5, "lr": 0.01, "strength": 20.0}
        dense = case.call(dense_imaml, **implicit)
        for terms in (1, 5, 60):
            right = case.call(plain_imaml, terms=terms, **implicit)
            found = {peer: difference(case.call(way, terms=terms, **implicit), right) for peer, way in IMAML.items()}
            rows += table(name, f"iMAML, {terms} terms", found, AGREES)
            for solver in ("solve_cg", "solve_normal_cg"):
                found = {"TorchOpt": difference(case.call(torchopt_imaml, terms=terms, solver=solver, **implicit), dense)}
                limit = AGREES if terms == 60 and solver == "solve_cg" else None
                rows += table(name, f"iMAML, {terms} terms, {solver}, to the dense solution", found, limit)
        if any(not torch.equal(value, before[key]) for key, value in case.model.state_dict().items()):
            raise AssertionError(f"{name}: weights or buffers of the model have changed")
        if tensors != [id(t) for t in (*case.model.parameters(), *case.model.buffers())]:
            raise AssertionError(f"{name}: the model has other tensors than before")
        if any(w.grad is not None for w in case.model.parameters()):
            raise AssertionError(f"{name}: a weight of the model has a .grad")
    case = tied()  # what the first step unties is wrong from the second on
    right = case.call(plain_maml, steps=2)
    for peer, way in MAML.items():
        limit = None if peer == "TorchOpt" else AGREES
        rows += table("tied weights", "MAML, 2 steps", {peer: difference(case.call(way, steps=2), right)}, limit)
    for peer, error in meta_sgd(case, steps=2).items():
        rows += table("tied weights", "Meta-SGD, 2 steps", {peer: error}, AGREES if peer == "hoptim" else None)
    return markdown(["case", "gradient", "library", "error"], rows)


def meta_sgd(case: Case, *, steps: int) -> dict[str, float]:
    """The larger of the errors of the two gradients, for random rates."""
    rates = {key: case.lr * torch.rand_like(w) for key, w in case.model.named_parameters()}
    found = {peer: way(case.model, rates, *case_parts(case), steps=steps) for peer, way in META_SGD.items()}
    plain = found.pop("plain autograd")
    return {peer: max(difference(*pair) for pair in zip(both, plain, strict=True)) for peer, both in found.items()}


def case_parts(case: Case) -> tuple[Loss, Batch, Batch]:
    return case.loss, case.support, case.query


def table(case: str, gradient: str, found: Mapping[str, float], limit: float | None) -> list[list[str]]:
    for peer, error in found.items():
        if limit is not None and not error < limit:
            raise AssertionError(f"{case}, {gradient}, {peer}: the error is {error:.1e}, more than {limit:.0e}")
    return [[case, gradient, peer, f"{error:.0e}"] for peer, error in found.items() if peer != "plain autograd"]


def costs(rounds: int) -> list[dict[str, Any]]:
    """CPU milliseconds and peaks of one meta-step."""
    waves, pictures = sinusoids(25, 10), images(4, 5, 1, 15, blocks=4, channels=32, size=28)
    small = images(4, 5, 1, 5, blocks=4, channels=8, size=28)
    rows: list[dict[str, Any]] = []
    for name, case, steps in (
        ("sinusoids", waves, 1),
        ("sinusoids", waves, 5),
        ("8 channels", small, 5),
        ("32 channels", pictures, 5),
    ):
        calls: dict[str, Callable[[], Any]] = {}
        for peer, way in MAML.items():
            calls[f"MAML | {peer}"] = partial(case.call, way, steps=steps)
            calls[f"first-order MAML | {peer}"] = partial(case.call, way, steps=steps, first_order=True)
        for words, first_order in (("MAML", False), ("first-order MAML", True)):
            calls[f"{words} | TorchOpt, vmap"] = partial(case.call, torchopt_maml_vmap, steps=steps, first_order=first_order)
        rates = {key: torch.full_like(w, case.lr) for key, w in case.model.named_parameters()}
        for peer, both in META_SGD.items():
            calls[f"Meta-SGD | {peer}"] = partial(both, case.model, rates, *case_parts(case), steps=steps)
        for peer, way in IMAML.items():
            calls[f"implicit MAML | {peer}"] = partial(case.call, way, steps=steps, lr=0.01, strength=20.0, terms=5)
        times = in_turn(calls, rounds)
        for label, call in calls.items():
            gradient, peer = label.split(" | ")
            figures = {"milliseconds": round(1e3 * median(times[label]), 2), "megabytes": round(peak(call)[0], 2)}
            rows.append({"case": name, "steps": steps, "gradient": gradient, "library": peer, **figures})
    for steps in (5, 20, 80):  # the memory of implicit MAML
        megabytes = peak(partial(waves.call, hoptim_imaml, steps=steps, lr=0.01, strength=20.0, terms=5))[0]
        row = {"case": "sinusoids", "steps": steps, "gradient": "memory of implicit MAML", "library": "hoptim"}
        rows.append({**row, "milliseconds": 0.0, "megabytes": round(megabytes, 2)})
    return rows


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each gradient and case, a column for each library: CPU milliseconds and peak megabytes."""
    libraries = ["plain autograd", "higher", "TorchOpt", "TorchOpt, vmap", "learn2learn", "hoptim"]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["milliseconds"]:
            key = row["gradient"], f"{row['case']}, {row['steps']} step{'s' * (row['steps'] > 1)}"
            lines.setdefault(key, {})[row["library"]] = f"{row['milliseconds']:.1f} · {row['megabytes']:.1f}"
    order = sorted(lines, key=lambda key: ("MAML", "first-order MAML", "implicit MAML", "Meta-SGD").index(key[0]))
    return markdown(["", "tasks", *libraries], [[*key, *(lines[key].get(name, "") for name in libraries)] for key in order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of the times; 0 leaves them out; default: 7")
    parser.add_argument("--saved", action="store_true", help="run nothing: print the table of the page")
    parser.add_argument("--out", type=Path, default=Path("runs/few_shot/costs.json"), help="the rows of the costs")
    given = parser.parse_args()
    if given.saved:
        print(shown(read_records(Path(__file__).parent / "costs.json")))
        return
    warnings.simplefilter("ignore")  # TorchOpt and learn2learn use names that torch has deprecated
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(answers(), flush=True)
    torch.set_default_dtype(torch.float32)
    if given.rounds:
        rows = costs(given.rounds)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_records(given.out, rows)
        print("", shown(rows), sep="\n")


if __name__ == "__main__":
    main()
