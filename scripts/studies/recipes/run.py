"""Compare the recipes' experiments with the plain trainings beside them.

    python scripts/studies/recipes/run.py runs/recipes

It reads runs such as those of ``python scripts/train.py -m experiment=recipes/gate,recipes/dropout 'seed=range(10,13)'``.
For each experiment it prints the test loss of the last model (the retrained one, if there is one), the baseline with the
lowest test loss, the difference between the two paired by seed, both accuracies, the test losses of the other baselines, and
the cost in plain trainings. It draws recipes.png: the ratio of the learned test loss to each baseline's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error, standard_error
from common.records import read_json_lines
from common.tables import markdown


class Final(NamedTuple):
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
    return Final(*(result[f"{'retrained_' * again}test_{figure}"] for figure in ("loss", "accuracy")), cost)


def read(root: Path) -> dict[str, dict[str, Finals]]:
    """All last models, by experiment, label and seed. The label of the run itself is ``learned``; it comes last."""
    found: dict[str, dict[str, Finals]] = defaultdict(dict)
    for path in sorted(root.rglob("result.json"), key=lambda path: (path.parent.parent.name != "baselines", path)):
        folder, label = path.parent, "learned"
        if folder.parent.name == "baselines":
            label, folder = folder.name, folder.parent.parent
        if folder.name.startswith("seed=") and (last := final(path.parent)):
            experiment = folder.parent.relative_to(root).as_posix().removeprefix("recipes/")
            found[experiment].setdefault(label, {})[int(folder.name[5:])] = last
    return {name: rows for name, rows in found.items() if "learned" in rows}


def paired(learned: Finals, other: Finals) -> tuple[list[float], list[float]]:
    """The differences of the test losses and the logarithms of their ratios, for each seed that both have."""
    pairs = [(learned[seed].loss, other[seed].loss) for seed in sorted(learned.keys() & other.keys())]
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

    bars = [(name, label, rows) for name, rows in found.items() for label in rows if label != "learned"]
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.23 * len(bars)), layout="constrained")
    for place, (_, label, rows) in enumerate(bars):
        logs, fill = paired(rows["learned"], rows[label])[1], "C0" if label == best_of(rows) else "white"
        ends = [math.exp(mean(logs) + sign * standard_error(logs)) for sign in (-1, 1)]
        axis.plot(ends, [place] * 2, color="C0", linewidth=3, alpha=0.4)
        axis.plot([math.exp(mean(logs))], [place], "o", color="C0", markersize=5, markerfacecolor=fill)
    axis.set_yticks(range(len(bars)), [f"{name}:  {label}" for name, label, _ in bars])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="test loss, learned over baseline (left of 1: learned is better; filled: the best)")
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axis.minorticks_off()
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
