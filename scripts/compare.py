"""Compare the runs in a folder, in a table and a picture: ``python scripts/compare.py runs``."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.means import standard_error
from common.records import read_json_lines
from common.tables import wide_console
from hydra.experimental.callback import Callback
from rich.markup import escape
from rich.table import Table

FIGURES = ("train_loss", "val_loss", "test_loss", "test_accuracy", "retrained_test_loss", "retrained_test_accuracy")
BEST_OF = ": best of"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, read from its files."""

    group: str
    name: str
    seed: str
    result: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def cost(self) -> float:
        """The cost in plain trainings: all seconds over the seconds of the inner steps."""
        if self.rows and "trainings" in self.rows[-1]:  # a fit by folds measures its cost itself
            return float(self.rows[-1]["trainings"])
        inner = sum(row.get("inner_seconds", 0) for row in self.rows)
        return self.seconds / inner if inner else math.nan

    @property
    def steps(self) -> int | None:
        """How many inner steps it took; ``None`` if it did not finish."""
        return self.result.get("inner_steps") if self.result["status"] == "finished" else None

    @property
    def seconds(self) -> float:
        """The seconds that the training took, with its hypersteps."""
        return sum(row.get("inner_seconds", 0) + row.get("hyper_seconds", 0) for row in self.rows)


def read(root: Path) -> list[Run]:
    """Every run below ``root``, without the baselines beside each. Runs that differ only in the seed are a group."""
    folders = [path.parent for path in sorted(root.rglob("result.json"))]
    return [read_one(folder, root) for folder in folders if folder.parent.name != "baselines"]


def read_one(folder: Path, root: Path) -> Run:
    """The run in a folder at or below ``root``."""
    result, rows = json.loads((folder / "result.json").read_text()), read_json_lines(folder / "metrics.jsonl")
    inside = folder.name.startswith("seed=") and folder != root
    group = (folder.parent if inside else folder).relative_to(root).as_posix()
    return Run(group=group, name=result["name"], seed=str(result["seed"]), result=result, rows=rows)


def grouped(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """The runs by group, each group of one length, and a sentence on each run that was left out for its length.

    The length is that of most runs of the group, the longest if two are as frequent. Runs that failed stay, to be counted.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    left = []
    for group, members in groups.items():
        counts = Counter(run.steps for run in members if run.steps is not None)
        most = max(counts, key=lambda steps: (counts[steps], steps), default=None)
        groups[group] = [run for run in members if run.steps in (None, most)]
        others = [run for run in members if run.steps not in (None, most)]
        left += [f"{group} seed {run.seed}: {run.steps:,} inner steps, the others of its row {most:,}" for run in others]
    return dict(groups), left


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean and standard error of each figure over the finished runs."""
    done = [run for run in runs if run.result["status"] == "finished"]
    entry: dict[str, Any] = {"runs": len(done), "failed": len(runs) - len(done)}
    if done:
        known = [figure for figure in FIGURES if all(figure in run.result for run in done)]
        entry |= {figure: mean_error([run.result[figure] for run in done]) for figure in known}
        entry["trainings"] = statistics.mean(run.cost for run in done)
        entry["moved"] = [sum(run.result[key] for run in done) for key in ("moved", "hypersteps")]
    return entry


def chosen(runs: Sequence[Run]) -> list[Run]:
    """The run with the lowest validation loss for each seed, which a search over these groups would choose."""
    by_seed = defaultdict(list)
    for run in runs:
        if run.result["status"] == "finished":
            by_seed[run.seed].append(run)
    return [min(candidates, key=lambda run: run.result["val_loss"]) for candidates in by_seed.values()]


def difference(runs: Sequence[Run], others: Sequence[Run]) -> tuple[float, float | None] | None:
    """Mean and standard error of the difference in test loss, over the seeds that finished in both."""
    losses = [{r.seed: r.result["test_loss"] for r in part if r.result["status"] == "finished"} for part in (runs, others)]
    common = losses[0].keys() & losses[1].keys()
    return mean_error([losses[0][seed] - losses[1][seed] for seed in sorted(common)]) if common else None


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error; ``None`` for the error of a single value, since JSON has no NaN."""
    return statistics.mean(values), standard_error(values) if len(values) > 1 else None


def compare(root: Path, against: str | None = None) -> dict[str, Any]:
    """Write ``compare.json``, ``compare.png`` and a picture of each search into ``root``; print the table and return it.

    ``against`` is the name of a row: each row then also shows how its test loss differs from that row's, seed by seed.
    """
    runs = read(root)
    if not runs:
        raise FileNotFoundError(f"no result.json below {root}: run a sweep first, such as scripts/train.py -m seed=0,1")
    groups, left = grouped(runs)
    searches = searches_of(groups)
    entries = {group: summary(members) for group, members in groups.items()}
    several = Counter(name for name, _ in searches)
    rows = set(groups)
    for (name, steps), found in searches.items():
        if len(found) > 1 and (best := chosen([run for group in found for run in groups[group]])):
            length = f" ({steps:,} steps)" if several[name] > 1 else ""
            label = f"{name}{length}{BEST_OF} {len(found)} by validation"
            entries[label], groups[label] = summary(best), best
            entries[label]["trainings"] *= len(found)
            rows = rows - set(found) | {label}
            file = f"compare_{name.replace('/', '_')}{f'_{steps}' if length else ''}.png"
            draw({group: groups[group] for group in found}, root / file)
    if against is not None:
        against = {short: label for label, short in differing(list(entries)).items()}.get(against, against)
        if against not in groups:
            raise ValueError(f"against={against!r} is not a row: the rows are {sorted(groups)}")
        for label, members in groups.items():
            entries[label]["less"] = difference(members, groups[against])
    (root / "compare.json").write_text(json.dumps(entries, indent=2) + "\n")
    draw({label: members for label, members in groups.items() if label in rows}, root / "compare.png")
    show(entries)
    show_failures(runs)
    for words in left:
        print(f"left out: {words}")
    return entries


def searches_of(groups: Mapping[str, Sequence[Run]]) -> dict[tuple[str, int | None], list[str]]:
    """The rows that a search chooses among: those of one name and one length. One that failed counts to its name."""
    lengths = {group: next((run.steps for run in runs if run.steps is not None), None) for group, runs in groups.items()}
    known = defaultdict(set)
    for group, runs in groups.items():
        known[runs[0].name] |= {lengths[group]} - {None}
    found = defaultdict(list)
    for group, runs in groups.items():
        name = runs[0].name
        found[name, max(known[name]) if lengths[group] is None and known[name] else lengths[group]].append(group)
    return found


def draw(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw the losses of all groups in one picture."""
    from tasks import plots

    curves = {
        label: [run.rows for run in runs if run.result["status"] == "finished" and "test_loss" in run.rows[-1]]
        for label, runs in groups.items()
    }  # a fit by folds has no test loss before its end
    if any(curves.values()):
        plots.compared({label: rows for label, rows in curves.items() if rows}, path)


def pair(figure: tuple[float, float | None] | None, form: str) -> str:
    """What :func:`mean_error` gives, as text; nothing for ``None``."""
    if figure is None:
        return ""
    mean, error = figure
    return form.format(mean) + ("" if error is None else f" ± {error:.3f}")


def differing(labels: Sequence[str]) -> dict[str, str]:
    """Short names: each label without the overrides that all of them have in common.

    >>> differing(["a/steps=4/lr=1", "a/steps=4/lr=2"])
    {'a/steps=4/lr=1': 'a/lr=1', 'a/steps=4/lr=2': 'a/lr=2'}
    """
    parts = {label: split_label(label) for label in labels if BEST_OF not in label}
    common = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    shared = {part for part in common if "=" in part}
    return {label: "/".join(part for part in split_label(label) if part not in shared) for label in labels}


def split_label(label: str) -> list[str]:
    """The parts of a label; the override of a config group, such as ``task/model_of=cnn``, stays in one piece.

    >>> split_label("try/hoptim/recipe=[gate]/task/model_of=cnn/lr=1")
    ['try', 'hoptim/recipe=[gate]', 'task/model_of=cnn', 'lr=1']
    """
    return re.split(r"(?<!/hoptim)(?<!/task)(?<!/hydra)/", label)


def show(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table."""
    paired = any(entry.get("less") for entry in entries.values())
    figures = [figure for figure in FIGURES if any(figure in entry for entry in entries.values())]
    columns = [*(figure.replace("_", " ") for figure in figures), "trainings", "moved", *(["paired difference"] * paired)]
    table = Table("runs of", "n", *columns, box=None)
    names = differing(list(entries))
    for label, entry in entries.items():
        count = f"{entry['runs']}" + (f" (+{entry['failed']} failed)" if entry["failed"] else "")
        cells = [pair(entry.get(figure), "{:.3f}") for figure in figures]
        moved = "/".join(map(str, entry["moved"])) if entry.get("moved", [0, 0])[1] else ""
        cells += [f"{entry['trainings']:.2f}" if "trainings" in entry else "", moved]
        cells += [pair(entry.get("less"), "{:+.3f}")] * paired
        table.add_row(escape(names[label]), count, *cells)
    wide_console(200).print(table)


def show_failures(runs: Sequence[Run]) -> None:
    """Print which runs failed, and why."""
    for run in runs:
        if run.result["status"] != "finished":
            print(f"failed: {run.group} seed {run.seed}: {run.result.get('error', 'no reason is known')}")


class CompareRuns(Callback):
    """A Hydra callback: compares the runs at the end of a sweep, and exits with status 1 if one of its jobs failed."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        self.begun = time.time()

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        root = Path(config.hydra.sweep.dir)
        compare(root)
        tables = [str(path) for path in (root / "compare.png", root / "compare.json") if self.is_new(path)]
        print(f"wrote {' and '.join(tables)}")
        print(f"a page with all curves: scripts/dashboard {root}")
        results = [path for path in root.rglob("result.json") if self.is_new(path)]
        if any(json.loads(path.read_text())["status"] == "failed" for path in results):
            sys.exit(1)

    def is_new(self, path: Path) -> bool:
        """Whether this sweep has written the file."""
        return path.exists() and path.stat().st_mtime >= self.begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="a folder of runs; default: runs")
    parser.add_argument(
        "--against", metavar="ROW", help="a row of the table: also show how each test loss differs from its, seed by seed"
    )
    options = parser.parse_args()
    if not options.root.is_dir():
        parser.error(f"{options.root} is no folder: give one that has runs in it, such as runs/study")
    try:
        compare(options.root, options.against)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
