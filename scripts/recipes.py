"""Compares the recipes' experiments with the plain trainings beside them: ``python scripts/recipes.py runs/recipes``.

It reads what ``python scripts/train.py -m experiment=recipes/gate,recipes/dropout seed=range(10,13)`` and the like have
written. For each experiment and each of its baselines it prints the test loss and accuracy of the last model (the retrained
one, where there is one), the difference of the learned one to it, paired by seed, and the cost in plain trainings. It draws
recipes.png: how the learned one compares with each baseline, in per cent of the test loss. A star is at the best baseline.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare import mean_error, pair


@dataclass(frozen=True, kw_only=True)
class Final:
    """The last model of a run."""

    loss: float
    accuracy: float
    cost: float


Finals = dict[int, Final]  # by seed


def final(folder: Path) -> Final | None:
    """What the files of a finished run say of its last model; ``None`` for a run that failed."""
    result = json.loads((folder / "result.json").read_text())
    if result["status"] != "finished":
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    again = "retrained_test_loss" in result
    inner, hyper = (sum(row.get(f"{kind}_seconds", 0.0) for row in rows) for kind in ("inner", "hyper"))
    cost = rows[-1].get("trainings") or 1 + again + hyper / inner
    loss, accuracy = (result[f"{'retrained_' if again else ''}test_{figure}"] for figure in ("loss", "accuracy"))
    return Final(loss=loss, accuracy=accuracy, cost=cost)


def read(root: Path) -> dict[str, dict[str, Finals]]:
    """By experiment, by label, by seed; the learned ones have the label ``learned``, and are the last."""
    found: dict[str, dict[str, Finals]] = defaultdict(dict)
    for path in sorted(root.rglob("result.json"), key=lambda path: (path.parent.parent.name != "baselines", path)):
        folder, label = path.parent, "learned"
        if folder.parent.name == "baselines":
            label, folder = folder.name, folder.parent.parent
        if not folder.name.startswith("seed="):
            continue
        experiment, seed = folder.parent.relative_to(root).as_posix().removeprefix("recipes/"), int(folder.name[5:])
        if last := final(path.parent):
            found[experiment].setdefault(label, {})[seed] = last
    return {name: rows for name, rows in found.items() if "learned" in rows}


def paired(learned: Finals, other: Finals) -> tuple[list[float], list[float]]:
    """On each seed that both have: the difference of the test losses, and the logarithm of their ratio."""
    seeds = sorted(learned.keys() & other.keys())
    pairs = [(learned[seed].loss, other[seed].loss) for seed in seeds]
    return [a - b for a, b in pairs], [math.log(a / b) for a, b in pairs]


def lines(name: str, rows: Mapping[str, Finals]) -> list[list[str]]:
    """The cells of the table for one experiment; the baseline with the lowest mean loss has a star."""
    losses = {label: mean_error([one.loss for one in row.values()]) for label, row in rows.items()}
    best = min((label for label in rows if label != "learned"), key=lambda label: losses[label][0], default="")
    cells = []
    for label, row in rows.items():
        less = paired(rows["learned"], row)[0]
        wins = f"({sum(d < 0 for d in less)} of {len(less)})"
        ahead = "" if label == "learned" else f"{pair(mean_error(less), '{:+.3f}')} {wins}"
        accuracy, cost = (mean_error([getattr(one, figure) for one in row.values()])[0] for figure in ("accuracy", "cost"))
        star = " *" if label == best else ""
        cells.append([name, label + star, pair(losses[label], "{:.3f}"), ahead, f"{accuracy:.3f}", f"{cost:.1f}"])
        name = ""
    return cells


def draw(found: Mapping[str, Mapping[str, Finals]], path: Path) -> None:
    """A row of points for each experiment: the learned one's test loss against each baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (name, label, mean_error(paired(rows["learned"], row)[1]))
        for name, rows in found.items()
        for label, row in rows.items()
        if label != "learned"
    ]
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.24 * len(bars)), layout="constrained")
    for place, (_, _, (mean, error)) in enumerate(bars):
        ends = [100 * math.expm1(mean + sign * (error or 0.0)) for sign in (-1, 1)]
        axis.plot(ends, [place, place], color="C0", linewidth=3, alpha=0.4)
        axis.plot([100 * math.expm1(mean)], [place], "o", color="C0", markersize=5)
    names = [name if i == 0 or bars[i - 1][0] != name else "" for i, (name, _, _) in enumerate(bars)]
    labels = [f"{name}:  {bar[1]}" if name else bar[1] for name, bar in zip(names, bars, strict=True)]
    axis.set_yticks(range(len(bars)), labels)
    for place, name in enumerate(names):
        if name and place:
            axis.axhline(place - 0.5, color="0.85", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="test loss of the learned one against this baseline, % (left: learned is better)")
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(table: Sequence[Sequence[Any]]) -> None:
    """Print it as Markdown."""
    print("| experiment | | test loss | learned minus it | accuracy | cost |\n|---|---|---|---|---|---|")
    for cells in table:
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="a folder of runs; default: runs")
    root = parser.parse_args().root
    found = read(root)
    if not found:
        raise SystemExit(f"no finished experiment below {root}: run scripts/train.py experiment=recipes/dropout first")
    show([cells for name, rows in found.items() for cells in lines(name, rows)])
    if any(len(rows) > 1 for rows in found.values()):
        draw(found, root / "recipes.png")
        print(f"wrote {root / 'recipes.png'}")


if __name__ == "__main__":
    main()
