"""What do hypergradients of sharded models cost, and what do they learn?

    python scripts/studies/sharded/run.py --data ~/data    # run what runs/sharded lacks, then tables and pictures
    python scripts/studies/sharded/run.py --saved          # the tables of the page; nothing runs

The part "cost" measures a GPT by measure.py, on up to four ranks; "mixture" trains one by mixture.py, on two. Each rank is a
process with gloo, started by torchrun. Rows have one figure each: ``name``, ``value``, and ``at``, which is a step of the
training or the bytes of a message.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.study import Row, Study
from common.tables import markdown

TRAINING = {"steps": 120, "warmup": 20, "every": 10}
PLAIN: dict[str, Any] = {"layers": 8, "rows": 1, "length": 64, "curvature": "exact", "repeats": 2}
CASES: dict[str, dict[str, Any]] = {
    "2 layers, 64 tokens": {**PLAIN, "layers": 2},
    "8 layers, 64 tokens": PLAIN,
    "8 layers, 256 tokens": {**PLAIN, "rows": 2, "length": 128, "repeats": 1},
    "8 layers, 64 tokens, Gauss-Newton": {**PLAIN, "curvature": "Gauss-Newton"},
}
COSTS = [
    ("2 layers, 64 tokens", 4),
    *(("8 layers, 64 tokens", ranks) for ranks in (4, 2, 1)),
    ("8 layers, 64 tokens, Gauss-Newton", 2),
    *(("8 layers, 256 tokens", ranks) for ranks in (4, 1)),
]
KINDS = ("gather", "scatter", "reduce")
ACTS = ("step", "hypergradient")
CORES = 2  # of the machine that measured
RETURNS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory goes back, so peaks are real


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """The measurements, on one seed, then both trainings on each seed."""
    for case, ranks in COSTS if "cost" in options.parts else ():
        yield {"part": "cost", "case": case, "ranks": ranks, "seed": 0}
    for seed in options.seeds if "mixture" in options.parts else ():
        yield from ({"part": "mixture", "case": way, "ranks": 2, "seed": seed} for way in ("uniform", "learned"))


def run(root: Path, part: str, case: str, ranks: int, seed: int) -> list[dict[str, Any]]:
    """The figures that a program of this folder finds on so many ranks."""
    program, given, more = "measure.py", {**CASES.get(case, {}), "seed": seed}, RETURNS
    if part == "mixture":
        program, given, more = "mixture.py", {"root": str(root.resolve()), "way": case, "seed": seed, **TRAINING}, {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "told.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words = [*torchrun, str(Path(__file__).resolve().parent / program), json.dumps(given), str(out)]
        subprocess.run(words, check=True, env={**os.environ, **more, "OMP_NUM_THREADS": "1"})
        found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def figures(rows: Sequence[Row], part: str) -> dict[tuple[str, int], dict[str, float]]:
    """The last figure of each name, by case and ranks."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault((row["case"], row["ranks"]), {})[row["name"]] = row["value"]
    return found


@dataclass(frozen=True)
class Link:
    """A collective takes ``latency`` + bytes of the whole tensor × ``per_byte``, in seconds."""

    latency: float
    per_byte: float


def links(rows: Sequence[Row], ranks: int) -> dict[str, Link]:
    """The latency and time a byte of each collective, by least squares of relative errors over all jobs on so many ranks."""
    found = {}
    for kind in KINDS:
        points = [
            (row["at"], row["value"])
            for row in rows
            if row["part"] == "cost" and row["ranks"] == ranks and row["name"] == f"{kind} seconds"
        ]
        size, seconds = torch.tensor(points, dtype=torch.float64).T
        fit = torch.linalg.lstsq(torch.stack([1 / seconds, size / seconds], 1), torch.ones(len(points), 1).double())
        found[kind] = Link(*fit.solution.flatten().tolist())
    return found


def predicted(rows: Sequence[Row], case: str, ranks: int, act: str) -> tuple[float, float]:
    """Seconds of computing, from one rank, and of messages, from their number and bytes and the links."""
    cost = figures(rows, "cost")
    own, link = cost[case, ranks], links(rows, ranks)
    messages = sum(
        own[f"{kind} messages of a {act}"] * link[kind].latency + own[f"{kind} bytes of a {act}"] * link[kind].per_byte
        for kind in KINDS
    )
    return cost[case, 1][f"seconds of a {act}"] * max(1, ranks / CORES), messages


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A model and machines on paper; every number is an assumption that the page names.

    Attributes:
        layers: blocks of the GPT.
        width: of the GPT; a block has 12 · width² weights of 4 bytes.
        tokens: of a step on each rank.
        flops: a second, on each rank.
        bandwidth: in bytes a second, of each rank.
        latency: in seconds, of one hop from a rank to another.
    """

    layers: int = 24
    width: int = 2048
    tokens: int = 8192
    flops: float = 200e12
    bandwidth: float = 40e9
    latency: float = 5e-6

    @property
    def weights(self) -> int:
        return 12 * self.layers * self.width**2

    def messages(self, rows: Sequence[Row], act: str, ranks: int, hops: float) -> float:
        """Seconds of all messages: number and bytes grow with the layers as they do from 2 to 8 here."""
        few, many = (figures(rows, "cost")[f"{layers} layers, 64 tokens", 4] for layers in (2, 8))
        seconds = 0.0
        for kind in KINDS:
            rounds = 2 if kind == "reduce" else 1  # an all-reduce scatters sums, and gathers them
            number, size = (f"{kind} {unit} of a {act}" for unit in ("messages", "bytes"))
            count = many[number] + (many[number] - few[number]) / 6 * (self.layers - 8)
            copies = (many[size] - few[size]) / (4 * (many["weights"] - few["weights"]))  # in whole models
            data = copies * 4 * self.weights * (ranks - 1) / ranks
            seconds += rounds * (count * hops * self.latency + data / self.bandwidth)
        return seconds

    def seconds(self, rows: Sequence[Row], ranks: int, hops: float) -> tuple[float, float]:
        """Of a step, whose messages and computing hide behind each other, and of a hypergradient, where they do not."""
        compute = 6 * self.weights * self.tokens / self.flops
        steps = figures(rows, "cost")["8 layers, 256 tokens", 1]["seconds in steps"]
        step = max(compute, self.messages(rows, "step", ranks, hops))
        return step, steps * compute + self.messages(rows, "hypergradient", ranks, hops)


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Memory and time; messages; links and what they predict; a cluster on paper; the mixture."""
    cost = figures(rows, "cost")
    if cost:
        yield from show_costs(cost)
        yield from show_model(rows, cost)
    trained = figures(rows, "mixture")
    if trained:
        names = ["validation", "test", "seconds of a step", "seconds of a step with a hyperstep"]  # the latter is 0 if none
        ways = [way for way in ("uniform", "learned") if (way, 2) in trained]
        yield markdown(["", *ways], [[name, *(f"{trained[way, 2][name]:.3f}" for way in ways)] for name in names])
        learned = [row for row in rows if row["part"] == "mixture" and row["case"] == "learned"]
        sources = list(dict.fromkeys(row["name"] for row in learned))[:4]
        by_step: dict[int, dict[str, float]] = {}
        for row in learned:
            if row["name"] in sources:
                by_step.setdefault(row["at"], {})[row["name"]] = row["value"]
        lines = [[str(step), *(f"{found[name]:.3f}" for name in sources)] for step, found in by_step.items()]
        yield markdown(["weights after step", *sources], [lines[0], lines[len(lines) // 2], lines[-1]] if lines else [])


def show_costs(cost: dict[tuple[str, int], dict[str, float]]) -> Iterator[str]:
    """What was measured of each case."""
    units = [
        "MB at rest", "MB of a step", "MB of a hypergradient", "MB in steps",
        "seconds of a step", "seconds of a hypergradient", "seconds in steps",
    ]  # fmt: skip
    lines = [
        [
            f"{case}, {ranks} rank{'s' * (ranks > 1)}",
            f"{found['weights'] * 4 / 2**20:.0f}",
            *(f"{found[name]:.0f}" for name in units[:3]),
            *(f"{found[name]:.1f}" for name in units[3:]),
        ]
        for (case, ranks), found in cost.items()
    ]
    yield markdown(["", "MB of whole weights", *units], lines)
    lines = [
        [
            f"{case}, {ranks} ranks: {act}",
            *(f"{found[f'{kind} messages of a {act}']}" for kind in (*KINDS, "other")),
            *(f"{found[f'{kind} bytes of a {act}'] / 4 / found['weights']:.2f}" for kind in KINDS),
        ]
        for (case, ranks), found in cost.items()
        for act in ACTS
        if ranks > 1 and case != "8 layers, 256 tokens"  # as with 64 tokens
    ]
    heads = ["messages", *KINDS, "other", *(f"{kind}, whole models" for kind in KINDS)]
    yield markdown(heads, lines)


def show_model(rows: Sequence[Row], cost: dict[tuple[str, int], dict[str, float]]) -> Iterator[str]:
    """The fitted links, what they predict, and a cluster on paper."""
    fits = {ranks: links(rows, ranks).values() for ranks in (2, 4)}
    lines = [
        [f"{ranks} ranks", *(f"{1e3 * link.latency:.2f} ms, {1e-6 / link.per_byte:.0f} MB/s" for link in fit)]
        for ranks, fit in fits.items()
    ]
    yield markdown(["latency and bandwidth", *KINDS], lines)
    lines = []
    for (case, ranks), found in cost.items():
        if ranks > 1 and (case, 1) in cost:
            shown = []
            for act in ACTS:
                compute, messages = predicted(rows, case, ranks, act)
                shown += [f"{compute:.1f} + {messages:.1f}", f"{found[f'seconds of a {act}']:.1f}"]
            lines.append([f"seconds: {case}, {ranks} ranks", *shown])
    yield markdown(["", "step: computing + messages", "measured", "hypergradient: computing + messages", "measured"], lines)
    lines = []
    for ranks in (8, 64, 256, 1000):
        shown = []
        for hops in (ranks - 1, math.log2(ranks)):
            step, hyper = Cluster().seconds(rows, ranks, hops)
            shown += [f"{step:.2f}", f"{hyper:.1f}", f"{hyper / step:.1f}", f"{math.ceil(20 * hyper / step)}"]
        lines.append([str(ranks), *shown])
    heads = [f"{how}: {what}" for how in ("ring", "tree") for what in ("step, s", "hypergradient, s", "in steps", "every")]
    yield markdown(["ranks on paper", *heads], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The weights over the hypersteps, and the losses of both ways."""
    from common.pictures import plt, save

    trained = [row for row in rows if row["part"] == "mixture"]
    if not trained:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    learned = [row for row in trained if row["case"] == "learned"]
    for name in list(dict.fromkeys(row["name"] for row in learned))[:4]:
        points = [(0, 0.25), *((row["at"], row["value"]) for row in learned if row["name"] == name)]
        left.plot(*zip(*points, strict=True), ".-", label=name)
    left.set(xlabel="training step", ylabel="weight of the source", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    for case in ("uniform", "learned"):
        points = [(row["at"], row["value"]) for row in trained if row["case"] == case and row["name"] == "test"]
        right.plot(*zip(*points, strict=True), "o-", label=case)
    right.set(xlabel="training step", ylabel="test loss, nats a byte")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.2)
    save(figure, folder / "mixture.png")


if __name__ == "__main__":
    parts = ["cost", "mixture"]
    Study(
        file=__file__, seeds=(0,), jobs=jobs, run=run, show=show, draw=draw,
        more={"parts": {"nargs": "+", "choices": parts, "default": parts, "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
