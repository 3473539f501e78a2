"""Which defaults learn best? Settings are chosen on one half of twelve learning tasks and scored on the other half.

    python scripts/defaults.py --data ~/data                  # run what runs/defaults lacks, then print the tables
    python scripts/defaults.py --tasks iris cnn --settings "CG*" --more 0
    python scripts/defaults.py --saved                        # the tables of scripts/defaults.json; nothing runs
    python scripts/defaults.py --save                         # run all, write that file and scripts/defaults.png

Each setting changes one factor of the default. Each half chooses the best setting of each factor on three seeds, among those
that are on none of its tasks worse by more than 5 %; the combination of its choices runs too. The rates that were chosen for
each kind of constraint are compared with the default on fresh seeds. A figure is the change of the test loss in per cent,
against the default on the same seed: the mean over tasks, and its standard error. The rows of all runs are kept in the out
folder.
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
from common.records import five_digits, read_records, write_records, write_whole
from common.tables import wide_console
from learning_tasks import pictures, tables
from learning_tasks.scores import CHOSEN_ON, Results
from learning_tasks.settings import BY_CONSTRAINT, DEFAULT, LEVELS, SETTINGS, setting_of
from learning_tasks.tasks import TASKS
from learning_tasks.training import Row, references, run
from rich.console import Console

HERE = Path(__file__).parent


def studied(tasks: Sequence[str], settings: Sequence[str], seeds: Sequence[int], path: Path, root: Path) -> list[Row]:
    """Run what the file lacks, and return all of its rows. It is written after each task, so that a kill loses little."""
    rows = [Row(**row) for row in json.loads(path.read_text())] if path.is_file() else []
    done = {(row.task, row.setting, row.seed) for row in rows}
    for seed in seeds:
        for name in tasks:
            begun, count = time.perf_counter(), len(rows)
            wanted = [s for s in settings if setting_of(s).differs(TASKS[name])]
            wanted += references(TASKS[name]) if seed in CHOSEN_ON else []
            rows += [run(name, TASKS[name], one, seed, root) for one in wanted if (name, one, seed) not in done]
            if len(rows) > count:
                write_whole(path, json.dumps([asdict(row) for row in rows]))
                print(f"{name}, seed {seed}: {len(rows) - count} runs, {time.perf_counter() - begun:.1f} s", flush=True)
    return rows


def report(results: Results, console: Console) -> None:
    """Print all tables."""
    names = [name for name in SETTINGS if name not in (DEFAULT, BY_CONSTRAINT, LEVELS)]
    console.print(tables.of_settings(results, names, CHOSEN_ON))
    console.print(tables.held_out(results))
    console.print(tables.by_constraint(results))
    console.print(tables.of_rates(results))
    fresh = {seed for _, _, seed in results.rows} - set(CHOSEN_ON)
    console.print(tables.fresh(results, BY_CONSTRAINT, fresh))
    console.print(tables.of_levels(results))
    console.print(tables.of_tasks(results))


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with five digits, ordered by task."""
    return five_digits(map(asdict, sorted(rows, key=lambda row: (list(TASKS).index(row.task), row.setting, row.seed))))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets; default: data")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/defaults"), help="the folder of the rows; default: runs/defaults"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--settings", nargs="+", default=["*"], help="patterns of names; the default setting always runs")
    parser.add_argument("--more", type=int, default=3, help="how many fresh seeds for the rates by constraint; default: 3")
    parser.add_argument("--saved", action="store_true", help="run nothing: print the tables of scripts/defaults.json")
    parser.add_argument("--save", action="store_true", help="write scripts/defaults.json and scripts/defaults.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = wide_console()
    if options.saved:
        rows = [Row(**record) for record in read_records(HERE / "defaults.json")]
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        names = [n for n in SETTINGS if n == DEFAULT or any(fnmatchcase(n, pattern) for pattern in options.settings)]
        where = (options.out / "rows.json", options.data)
        rows = studied(options.tasks, names, CHOSEN_ON, *where)
        combinations = dict.fromkeys(Results(rows).combination(half) for half in "AB")
        rows = studied(options.tasks, list(combinations), CHOSEN_ON, *where)
        fresh = range(len(CHOSEN_ON), len(CHOSEN_ON) + options.more)
        rows = studied(options.tasks, [DEFAULT, BY_CONSTRAINT, LEVELS], fresh, *where)
    results = Results(rows)
    report(results, console)
    if options.save:
        write_records(HERE / "defaults.json", as_records(rows), torch=torch.__version__)
        pictures.draw(results, HERE / "defaults.png")


if __name__ == "__main__":
    main()
