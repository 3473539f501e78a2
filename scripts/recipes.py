"""Compare the recipes' experiments with the plain trainings beside them: ``python scripts/recipes.py runs/recipes``.

It reads runs such as those of ``python scripts/train.py -m experiment=recipes/gate,recipes/dropout 'seed=range(10,13)'``.
For each experiment it prints the test loss of the last model (the retrained one, if there is one), the baseline with the
lowest test loss, the difference between the two paired by seed, both accuracies, the test losses of the other baselines, and
the cost in plain trainings. It draws recipes.png: the ratio of the learned test loss to each baseline's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common.means import mean_and_error, standard_error
from common.records import read_json_lines
from common.tables import markdown


@dataclass(frozen=True, kw_only=True)
class Final:
    """The last model of a run: its test loss and accuracy, and the run's cost in plain trainings."""

    loss: float
    accuracy: float
    cost: float


Finals = dict[int, Final]  # by seed


def final(folder: Path) -> Final | None:
    """The last model of a finished run, from the run's files; ``None`` if the run failed."""
    result = json.loads((folder / "result.json").read_text())
    if result["status"] != "finished":
        return None
    rows = read_json_lines(folder / "metrics.jsonl")
    again = "retrained_test_loss" in result
    inner, hyper = (sum(row.get(f"{kind}_seconds", 0.0) for row in rows) for kind in ("inner", "hyper"))
    cost = rows[-1].get("trainings") or 1 + again + hyper / inner
    loss, accuracy = (result[f"{'retrained_' if again else ''}test_{figure}"] for figure in ("loss", "accuracy"))
    return Final(loss=loss, accuracy=accuracy, cost=cost)


def read(root: Path) -> dict[str, dict[str, Finals]]:
    """All last models, by experiment, label and seed. The label of the run itself is ``learned``; it comes last."""
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
    """The differences of the test losses and the logarithms of their ratios, for each seed that both have."""
    seeds = sorted(learned.keys() & other.keys())
    pairs = [(learned[seed].loss, other[seed].loss) for seed in seeds]
    return [a - b for a, b in pairs], [math.log(a / b) for a, b in pairs]


def best_of(rows: Mapping[str, Finals]) -> str:
    """The baseline with the lowest mean test loss; a user would not know beforehand which one that is."""
    means = {label: mean(one.loss for one in row.values()) for label, row in rows.items() if label != "learned"}
    return min(means, key=means.__getitem__, default="")


def line(name: str, rows: Mapping[str, Finals]) -> list[str]:
    """The cells of the table for one experiment: the learned model, the best baseline, and the losses of the others."""
    losses = {label: mean(one.loss for one in row.values()) for label, row in rows.items()}
    learned, best = rows["learned"], best_of(rows)
    own = mean_and_error([one.loss for one in learned.values()])
    cost = f"{mean(one.cost for one in learned.values()):.1f}"
    if not best:
        return [name, own, "", "", "", "", cost]
    less = paired(learned, rows[best])[0]
    ahead = f"{mean_and_error(less, '+.3f')} ({sum(d < 0 for d in less)} of {len(less)})"
    accuracies = [f"{mean(one.accuracy for one in row.values()):.3f}" for row in (learned, rows[best])]
    others = [f"{label} {loss:.3f}" for label, loss in losses.items() if label not in ("learned", best)]
    return [name, own, f"{best} {losses[best]:.3f}", ahead, " and ".join(accuracies), "; ".join(others), cost]


def draw(found: Mapping[str, Mapping[str, Finals]], path: Path) -> None:
    """A row for each baseline: the learned test loss over the baseline's. The best baseline has a filled dot."""
    from common.pictures import plt, save
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    bars = [
        (name, label, label == best_of(rows), paired(rows["learned"], rows[label])[1])
        for name, rows in found.items()
        for label in rows
        if label != "learned"
    ]
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.23 * len(bars)), layout="constrained")
    labels = []
    for place, (name, label, is_best, logs) in enumerate(bars):
        middle, error = mean(logs), standard_error(logs)  # NaN for a single seed, which draws no line
        ends = [math.exp(middle + sign * error) for sign in (-1, 1)]
        axis.plot(ends, [place] * 2, color="C0", linewidth=3, alpha=0.4)
        axis.plot([math.exp(middle)], [place], "o", color="C0", markersize=5, markerfacecolor="C0" if is_best else "white")
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
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="a folder of runs; default: runs")
    root = parser.parse_args().root
    found = read(root)
    if not found:
        raise SystemExit(f"no finished experiment below {root}: run scripts/train.py experiment=recipes/dropout first")
    columns = ["", "learned", "best baseline", "learned minus it", "accuracies", "other baselines", "cost"]
    print(markdown(columns, [line(name, rows) for name, rows in found.items()]))
    if any(len(rows) > 1 for rows in found.values()):
        draw(found, root / "recipes.png")
        print(f"wrote {root / 'recipes.png'}")


if __name__ == "__main__":
    main()
