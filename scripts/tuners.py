"""Compare hoptim with the tuners people use (Optuna, random search) and with good fixed values: test loss against budget.

    python scripts/tuners.py --root ~/data --budget 32     # run what scripts/tuners.json lacks; then tables and pictures
    python scripts/tuners.py --only fashion 100 --seeds 3  # only these data sets, numbers of hyperparameters or methods
    python scripts/tuners.py --saved                       # tables and pictures of scripts/tuners.json; nothing runs
    python scripts/tuners.py --choose                      # choose what the study keeps fixed, on seeds 100 and 101

A budget is a number of plain trainings of the same model, counted in training gradients or in processor seconds. All methods
begin at the same values, have the same examples, and return the model with the lowest validation loss. The data are
boston/boston.csv, text/moby_dick.txt, and Fashion-MNIST, which is downloaded. Optuna is the extra `tuners`:
pip install '.[tuners]' in a checkout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common.search import check_optuna
from common.tables import wide_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tuner_study.choose import choose
from tuner_study.costs import Meter, train
from tuner_study.curves import BUDGETS, Curves
from tuner_study.methods import FIXED, METHODS
from tuner_study.problems import COUNTS, SETS, Problem
from tuner_study.runs import Row, read, run, save

HERE = Path(__file__).parent
NAMES = (FIXED, *METHODS)


def wanted(only: Sequence[str], seeds: int) -> list[tuple[str, int, str, int]]:
    """The keys of the wanted rows, seed by seed.

    ``only`` has names of data sets, numbers of hyperparameters and methods; of a kind that has none in it, all are wanted.
    """

    def chosen(names: Sequence[str]) -> list[str]:
        return [name for name in names if name in only] or list(names)

    sets, counts, methods = chosen(list(SETS)), chosen([str(count) for count in COUNTS]), chosen(NAMES)
    return [(s, int(c), m, seed) for seed in range(seeds) for s in sets for c in counts for m in methods]


def studied(keys: Sequence[tuple[str, int, str, int]], budget: int, path: Path, root: Path, console: Console) -> list[Row]:
    """Run the rows that the file lacks or has with a smaller budget, write each into it, and return all of its rows."""
    rows = read(path)
    done = {row.key for row in rows if row.budget >= budget}
    missing = [key for key in keys if key not in done]
    if missing:
        first = Problem(missing[0][0], 1, 0, root)
        train(first, first.hparams(), first.train, Meter(first))  # so that no method pays for what torch loads at first
    bars = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *bars, console=console) as progress:
        task = progress.add_task("", total=len(missing))
        for name, count, method, seed in missing:
            progress.update(task, description=f"{SETS[name].title}, {count}, {method}, seed {seed}")
            new = run(Problem(name, count, seed, root), method, budget)
            rows = [row for row in rows if row.key != new.key] + [new]
            save(path, rows)
            progress.advance(task)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = [*SETS, *map(str, COUNTS), *NAMES]
    parser.add_argument("--only", nargs="+", choices=words, default=[], metavar="word", help=", ".join(words))
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, from 0; default 10")
    parser.add_argument("--budget", type=int, choices=BUDGETS[1:], default=16, help="in plain trainings; default 16")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder of the data sets; default data")
    parser.add_argument(
        "--out", type=Path, default=HERE / "tuners.json", help="the file of the rows; the pictures are written beside it"
    )
    parser.add_argument("--saved", action="store_true", help="run nothing: print and draw what the file has")
    parser.add_argument("--choose", action="store_true", help="choose the fixed values and the outer rate on other seeds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = wide_console()
    if options.choose:
        choose([name for name in SETS if not options.only or name in options.only], options.root)
        return
    keys = wanted(options.only, options.seeds)
    if not options.saved and {"optuna", "gp"} & {method for _, _, method, _ in keys}:
        check_optuna("--only random hoptim")
    rows = read(options.out) if options.saved else studied(keys, options.budget, options.out, options.root, console)
    if not rows:
        raise SystemExit(f"{options.out} has no rows yet: run this without --saved")
    from tuner_study import pictures, tables

    curves = Curves(rows)
    for table in tables.of(curves):
        if table.row_count:
            console.print(table)
    pictures.draw(curves, options.out.with_suffix(".png"))
    pictures.draw(curves, options.out.with_name(f"{options.out.stem}_seconds.png"), in_seconds=True)
    pictures.draw_by_budget(curves, options.out.with_name("by_budget.png"))


if __name__ == "__main__":
    main()
