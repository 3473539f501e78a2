"""How accurate is each hypergradient, and what does it cost? Measured on problems whose true hypergradient is known.

    python scripts/fidelity.py --problems ridge iris-relu --seeds 2
    python scripts/fidelity.py --methods "CG, GN*" "MINRES*" --data ~/data
    python scripts/fidelity.py --learning --seeds 5         # how well each method learns
    python scripts/fidelity.py --save                       # run all, write scripts/fidelity.json and two pictures

The true hypergradient is a closed form (ridge), or is differentiated through every step of the training, in float64. Each
method then runs in float32 on the trained weights, with the state that it would have from the last hyperstep. Its cost is
its CPU time over that of a training gradient, measured just before and after; on a busy machine it is noisy. The out folder
keeps the trained problems, which are not trained again, and the rows of all runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from common.records import read_records, write_records, write_whole
from common.tables import table, wide_console
from fidelity_problems import boston, pictures
from fidelity_problems.learning import learned
from fidelity_problems.measure import Case, Row, kept
from fidelity_problems.methods import METHODS
from fidelity_problems.problems import PROBLEMS
from fidelity_problems.ranking import Figures, differences, merged, ranked, summed_up
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
LEARNING = [
    "MINRES, GN, 5",
    "MINRES, exact, 5",
    "Neumann, exact, 20",
    "CG, exact, 7",
    "CG to 0.03, GN, +0.01, 20",
    "Identity, 0",
]
BUDGETS = (12.0, 25.0, 60.0)
PAPER = "boston"  # the paper's comparison, beside the problems
SEEDS = {"ridge": 4, "logistic": 4, "digits-mlp": 4, "cnn": 3, PAPER: 5}  # 8 for the others, which vary more


def seeds_of(problem: str, seeds: int | None) -> range:
    """The seeds to run: this many, or the problem's default number."""
    return range(seeds if seeds is not None else SEEDS.get(problem, 8))


def studied(problems: Sequence[str], methods: Sequence[str], options: Any, console: Console) -> list[Row]:
    """Run every method on every problem and seed. Rows of earlier runs stay; the file is written after each seed."""
    path = options.out / "rows.json"
    rows = [Row(**row) for row in json.loads(path.read_text())] if path.is_file() else []
    rows = [row for row in rows if row.method in METHODS and row.problem in PROBLEMS]
    for problem in problems:
        for seed in seeds_of(problem, options.seeds):
            begun = time.perf_counter()
            found = kept(problem, PROBLEMS[problem], seed, options.data, options.out / "truth")
            trained = time.perf_counter()
            case = Case(problem, PROBLEMS[problem], seed, options.data, found)
            new = [case.measured(METHODS[method], method, options.repeats) for method in methods]
            rows = merged(rows, new)
            write_whole(path, json.dumps([asdict(row) for row in rows]))
            ended = time.perf_counter()
            console.print(f"{problem}, seed {seed}: truth {trained - begun:.1f} s, methods {ended - trained:.1f} s")
    return sorted(rows, key=lambda row: (list(PROBLEMS).index(row.problem), list(METHODS).index(row.method), row.seed))


def paper(options: Any) -> Figures:
    """Make the paper's comparison on Boston housing over several splits: draw it and return its figures."""
    x, y = boston.read(options.data)
    runs = [boston.compared(boston.regression(x, y, seed)) for seed in seeds_of(PAPER, options.seeds)]
    pictures.approximations(runs, list(boston.APPROXIMATIONS), options.out / "fidelity_boston.png")
    return boston.summary(runs)


def by_problem(records: Sequence[Figures], problem: str, most: int) -> Table:
    """The table of a problem: its best methods, and the two baselines."""
    mine = sorted((one for one in records if one["problem"] == problem), key=lambda one: -one["cosine"])
    shown = mine[:most] + [one for one in mine[most:] if one["method"].startswith(("Identity", "Neumann 0.1"))]
    columns = ("cosine", "quartiles", "worst seed", "length", "cost", "products", "failed")
    found = table(f"{PROBLEMS[problem].title} ({mine[0]['seeds']} seeds)", "method", *columns)
    for one in shown:
        quartiles = f"{one['low']:.2f} to {one['high']:.2f}"
        figures = (f"{one['cosine']:.3f}", quartiles, f"{one['worst']:.2f}", f"{one['length']:.3g}", f"{one['cost']:.1f}")
        found.add_row(one["method"], *figures, f"{one['products']:g}", str(one["failed"] or ""))
    return found


def winners(rows: Sequence[Row], budget: float, curvature: str | None, most: int = 10) -> Table:
    """The table of the best methods within a budget, over all problems."""
    title = f"at most {budget:g} gradients" + (f", {curvature} curvature only" if curvature else ", any curvature")
    columns = ("mean cosine", "5 to 95 %", "first", "median", "mean rank", "worst problem", "worst seed", "longest", "cost")
    found = table(title, "method", *columns, left=["worst problem"])
    for one in ranked(rows, budget, lambda m: curvature is None or METHODS[m].curvature == curvature)[:most]:
        found.add_row(
            one.method,
            f"{one.mean:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
            f"{one.first:.0%}",
            f"{one.median:.3f}",
            f"{one.rank:.1f}",
            f"{one.worst:.2f} {one.worst_problem}",
            f"{one.worst_seed:.2f}",
            f"{one.longest:.3g}" + (f", {one.failed:.1%} failed" if one.failed else ""),
            f"{one.cost:.1f}, at most {one.dearest:.1f}",
        )
    return found


def report(rows: Sequence[Row], records: Sequence[Figures], most: int, console: Console) -> None:
    """Print a table for each problem, and for each budget."""
    for problem in dict.fromkeys(row.problem for row in rows):
        console.print(by_problem(records, problem, most))
    for budget in BUDGETS:
        for curvature in (None, "exact"):
            console.print(winners(rows, budget, curvature))


def learning(methods: Sequence[str], seeds: int, console: Console) -> None:
    """Train without learning and with each method, and print the table."""
    columns = ("test loss", "accuracy", "longest / median length", "skipped", "CPU seconds")
    found = table(f"digits, 40 % wrong labels, {seeds} seeds", "method", *columns)
    chosen: list[tuple[str, Any]] = [("without", None), *((name, METHODS[name].method) for name in methods)]
    for name, method in chosen:
        one = learned(name, method, seeds)
        figures = (f"{one.loss:.3f}", f"{one.accuracy:.3f}", f"{one.uneven:.3g}", str(one.skipped), f"{one.seconds:.2f}")
        found.add_row(one.method, *figures)
    console.print(found)


def compare_with_saved(records: Sequence[Figures], path: Path, console: Console) -> None:
    """Print what has changed since the records were saved."""
    changed, torch_then = differences(records, read_records(path)), json.loads(path.read_text())["torch"]
    console.print(f"compared with {path.name} (torch {torch_then}): {len(changed)} of {len(records)} records changed")
    for one in changed[:20]:
        line = f"  {one['problem']}: {one['method']}: cosine {one['before']:.3f} before, {one['cosine']:.3f} now"
        console.print(line + (f", {one['failed']} failed" if one["failed"] else ""))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    console = wide_console()
    options.out.mkdir(parents=True, exist_ok=True)
    methods = [m for m in METHODS if not options.methods or any(fnmatchcase(m, pattern) for pattern in options.methods)]
    if not methods:
        raise SystemExit(f"no method's name matches any of {options.methods}: the names are\n" + "\n".join(METHODS))
    if options.learning:
        learning(methods if options.methods else LEARNING, options.seeds or 3, console)
        return
    rows = studied([p for p in options.problems if p != PAPER], methods, options, console)
    records = summed_up(rows)
    facts: dict[str, Any] = {"torch": torch.__version__}
    if PAPER in options.problems:
        facts[PAPER] = paper(options)
        for name, figures in facts[PAPER].items():
            console.print(f"Boston housing, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    if rows:
        report(rows, records, options.most, console)
        pictures.curves(records, options.out / "fidelity.png")
    saved = HERE / "fidelity.json"
    if saved.is_file():
        compare_with_saved(records, saved, console)
    write_records(options.out / "fidelity.json", records, **facts)
    if options.save:
        for name in ("fidelity.json", "fidelity.png", "fidelity_boston.png"):
            if (options.out / name).is_file():
                (HERE / name).write_bytes((options.out / name).read_bytes())
    console.print(f"written: {options.out}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [*PROBLEMS, PAPER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--methods", nargs="+", metavar="PATTERN", help='such as "CG, GN*"; default: all')
    parser.add_argument("--learning", action="store_true", help="instead: let each method learn on digits with wrong labels")
    parser.add_argument("--seeds", type=int, metavar="N", help="default: 8 on Iris, 3 to 5 elsewhere")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="timings of each method; default: %(default)s")
    parser.add_argument("--most", type=int, default=12, metavar="N", help="rows in a table; default: %(default)s")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="the folder of the data sets; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fidelity"), metavar="DIR", help="the folder of results; default: %(default)s"
    )
    parser.add_argument("--save", action="store_true", help="copy the records and the pictures to scripts/")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
