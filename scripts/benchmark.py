"""Measure what a hypergradient costs in time and memory, beside a loop by hand and other libraries.

    python scripts/benchmark.py --quick
    python scripts/benchmark.py --only cost wrapper
    python scripts/benchmark.py --save

Times are CPU times of one thread, so that other programs on the machine have little influence. Calls that are compared run
in turn in one process (A B, B A, A B, ...); a figure is the median of the ratios within a round. Each row shows what has
changed since studies/benchmark/rows.json, which --save rewrites for the sections that ran, with the commit that they are of.
The other libraries are the extra "peers": pip install '.[peers]'.
"""

# ruff: noqa: E402 (the environment is set before torch is imported)
from __future__ import annotations

import os
import sys

# With glibc's default settings the same code varies by 15 % between processes, and takes twice as long for tensors above
# 32 MB. The allocator reads these variables when a process starts, so the script restarts itself with them.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_MMAP_MAX_": "0"}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in MALLOC.items()):
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})

import argparse
import inspect
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common.tables import wide_console
from rich.console import Console
from rich.table import Table
from studies.benchmark.loops import hypersteps, steps, trainings
from studies.benchmark.measure import Row
from studies.benchmark.peers import peers
from studies.benchmark.sections import compiled, cost, growth, imports, memory, size, unrolling, wrapper
from studies.benchmark.sides import sides
from studies.benchmark.small import folds, small

import hoptim

STORED = Path(__file__).parent / "studies" / "benchmark" / "rows.json"
CHANGED = 0.05  # smaller relative changes are not listed
SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "cost": cost,
    "compiled": compiled,
    "peers": peers,
    "sides": sides,
    "memory": memory,
    "unrolling": unrolling,
    "growth": growth,
    "size": size,
    "wrapper": wrapper,
    "hypersteps": hypersteps,
    "steps": steps,
    "trainings": trainings,
    "small": small,
    "folds": folds,
    "imports": imports,
}


def table(rows: list[Row], stored: list[dict[str, Any]], same_machine: bool, commit: str) -> Table:
    """The table of a section, whose last column shows what has changed since this commit."""
    shown = Table()
    labels = list(dict.fromkeys(label for row in rows for label in row.labels))
    columns = list(dict.fromkeys(column for row in rows for column in row.figures))
    for column in ("case", *labels):
        shown.add_column(column)
    for column in columns:
        shown.add_column(column, justify="right")
    shown.add_column(f"since {commit}")
    before = {(row["case"], *row["labels"].values()): row["figures"] for row in stored}
    for row in rows:
        changes = since(row, before.get((row.case, *row.labels.values())), same_machine)
        shown.add_row(row.case, *(row.labels.get(label, "") for label in labels), *(cell(row, c) for c in columns), changes)
    return shown


def cell(row: Row, column: str) -> str:
    """A figure with its target, if it has one: green if it meets the target, else red."""
    value = row.figures.get(column, "")
    if isinstance(value, str):
        return value
    text = f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    if column in row.at_most:
        target = row.at_most[column]
        return f"[green]{text} ≤ {target:g}[/]" if value <= target else f"[bold red]{text} > {target:g}[/]"
    if column in row.at_least:
        target = row.at_least[column]
        return f"[green]{text} ≥ {target:g}[/]" if value >= target else f"[bold red]{text} < {target:g}[/]"
    return text


def since(row: Row, before: dict[str, Any] | None, same_machine: bool) -> str:
    """All changes above five per cent, or else the largest change. Seconds are compared only on the same machine."""
    if before is None:
        return "new"
    changes = {}
    for column, value in row.figures.items():
        old = before.get(column)
        if isinstance(value, str) or not isinstance(old, (int, float)) or not (same_machine or not is_time(column)):
            continue
        changes[column] = (value - old) / abs(old) if old else (0.0 if value == old else float("inf"))
    large = [column for column in changes if abs(changes[column]) > CHANGED]
    if large:
        return "\n".join(f"[yellow]{column} {100 * changes[column]:+.0f} %[/]" for column in large)
    return f"{100 * max(changes.values(), key=abs):+.0f} %" if changes else ""


def is_time(column: str) -> bool:
    """Whether the column has seconds, which depend on the machine, and not ratios."""
    return column in ("s", "ns a weight", "wrapper, µs") or column.endswith((", ms", ", s"))


def machine() -> dict[str, Any]:
    """The machine and the versions that the figures are measured with, without the commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    facts = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {**facts, "python": platform.python_version(), "hoptim": hoptim.__version__}


def commit() -> str:
    """The commit that is measured; with a plus if hoptim/ or scripts/ has changes that are in no commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "hoptim", "scripts"))


def stored() -> dict[str, Any]:
    """The stored figures, by section."""
    return json.loads(STORED.read_text()) if STORED.is_file() else {}


def mixed(kept: dict[str, Any]) -> str:
    """What to say if the stored sections are of several commits, which cannot be compared; else nothing."""
    by_commit: dict[str, list[str]] = {}
    for name, section in kept.items():
        by_commit.setdefault(section.get("commit", "no commit"), []).append(name)
    told = "; ".join(f"{one}: {', '.join(names)}" for one, names in by_commit.items())
    return f"{STORED.name} is of several commits ({told}): run --save without --only" if len(by_commit) > 1 else ""


def run(name: str, rounds: int, facts: dict[str, Any], at: str, console: Console) -> dict[str, Any]:
    """Run a section, print its table, and return what --save stores."""
    torch.manual_seed(0)
    rows = SECTIONS[name](rounds)
    before = {"machine": {}, "rows": [], "commit": "stored"} | stored().get(name, {})
    console.print(f"[bold]{name}[/]: {inspect.getdoc(SECTIONS[name])}", highlight=False)
    console.print(table(rows, before["rows"], before["machine"] == facts, before["commit"]))
    rows_of = [{key: asdict(row)[key] for key in ("case", "labels", "figures")} for row in rows]
    return {"commit": at, "machine": facts, "rows": rows_of}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: a tenth of the time, noisier figures")
    parser.add_argument("--save", action="store_true", help="write the figures to studies/benchmark/rows.json")
    names = list(SECTIONS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("--quick is too noisy to --save: leave one of them out")
    at = commit()
    if options.save and at.endswith("+"):
        parser.error("--save stores the commit, and there are changes that are in none: commit them first")
    torch.set_num_threads(1)
    console, facts = wide_console(180), machine()
    console.print(", ".join(f"{key} {value}" for key, value in {"commit": at, **facts}.items()))
    for name in options.only:
        found = run(name, 3 if options.quick else 15, facts, at, console)
        if options.save:  # after each section, so that an interrupted run keeps what it has
            STORED.write_text(json.dumps({**stored(), name: found}, indent=1, ensure_ascii=False) + "\n")
    if words := mixed(stored()):
        console.print(f"[bold red]{words}[/]")


if __name__ == "__main__":
    main()
