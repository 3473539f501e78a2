"""Compares the recipes' experiments with the plain trainings beside them: ``python scripts/recipes.py runs/recipes``.

It reads what ``python scripts/train.py -m experiment=recipes/gate,recipes/dropout 'seed=range(10,13)'`` and the like have
written. For each experiment it prints the test loss of the last model (the retrained one, where there is one), the baseline
with the lowest test loss, the difference to it, paired by seed, both accuracies, the test losses of the other baselines, and
the cost in plain trainings. It draws recipes.png: how many times each baseline's test loss the learned one's is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def best_of(rows: Mapping[str, Finals]) -> str:
    """The baseline with the lowest mean test loss, which is more than a user would know."""
    means = {label: mean_error([one.loss for one in row.values()])[0] for label, row in rows.items() if label != "learned"}
    return min(means, key=means.__getitem__, default="")


def line(name: str, rows: Mapping[str, Finals]) -> list[str]:
    """The cells of the table for one experiment: the learned one, the best baseline, and the loss of the others."""
    losses = {label: mean_error([one.loss for one in row.values()]) for label, row in rows.items()}
    learned, best = rows["learned"], best_of(rows)
    cost = mean_error([one.cost for one in learned.values()])[0]
    if not best:
        return [name, pair(losses["learned"], "{:.3f}"), "", "", "", "", f"{cost:.1f}"]
    less = paired(learned, rows[best])[0]
    ahead = f"{pair(mean_error(less), '{:+.3f}')} ({sum(d < 0 for d in less)} of {len(less)})"
    accuracies = [mean_error([one.accuracy for one in row.values()])[0] for row in (learned, rows[best])]
    others = [f"{label} {loss[0]:.3f}" for label, loss in losses.items() if label not in ("learned", best)]
    return [
        name, pair(losses["learned"], "{:.3f}"), f"{best} {losses[best][0]:.3f}", ahead,
        " and ".join(f"{accuracy:.3f}" for accuracy in accuracies), "; ".join(others), f"{cost:.1f}",
    ]  # fmt: skip


def draw(found: Mapping[str, Mapping[str, Finals]], path: Path) -> None:
    """A row for each baseline: how many times its test loss the learned one's is; filled for the best baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    bars = [
        (name, label, label == best_of(rows), mean_error(paired(rows["learned"], rows[label])[1]))
        for name, rows in found.items()
        for label in rows
        if label != "learned"
    ]
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.23 * len(bars)), layout="constrained")
    labels = []
    for place, (name, label, is_best, (mean, error)) in enumerate(bars):
        axis.plot(
            [math.exp(mean + sign * (error or 0.0)) for sign in (-1, 1)], [place] * 2, color="C0", linewidth=3, alpha=0.4
        )
        axis.plot([math.exp(mean)], [place], "o", color="C0", markersize=5, markerfacecolor="C0" if is_best else "white")
        is_first = not place or bars[place - 1][0] != name
        labels.append(f"{name}:  {label}" if is_first else label)
        if is_first and place:
            axis.axhline(place - 0.5, color="0.85", linewidth=0.8)
    axis.set_yticks(range(len(bars)), labels)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(
        xscale="log", xlabel="test loss, learned over baseline (left of 1: learned is better; filled: the best baseline)"
    )
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(table: Sequence[Sequence[str]]) -> None:
    """Print it as Markdown."""
    columns = ["", "learned", "best baseline", "learned minus it", "accuracies", "other baselines", "cost"]
    for cells in [columns, ["---"] * len(columns), *table]:
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="a folder of runs; default: runs")
    root = parser.parse_args().root
    found = read(root)
    if not found:
        raise SystemExit(f"no finished experiment below {root}: run scripts/train.py experiment=recipes/dropout first")
    show([line(name, rows) for name, rows in found.items()])
    if any(len(rows) > 1 for rows in found.values()):
        draw(found, root / "recipes.png")
        print(f"wrote {root / 'recipes.png'}")


if __name__ == "__main__":
    main()
