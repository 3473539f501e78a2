"""The results of Lorraine, Vicol and Duvenaud 2019 beside hoptim's: ``python scripts/studies/paper/run.py runs``.

It reads the runs of ``experiment=paper/...`` in the folder, prints a Markdown table for each section of the paper, and draws
the pictures into the folder. README.md has the commands for the runs. The row of a missing run is empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.pictures import plt, save, show_image
from common.tables import markdown
from compare import Run, read_one
from safetensors.torch import load_file

SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
WEIGHTS = {  # by model and data set
    "linear": {"mnist": "7,850", "cifar10": "30,730"},
    "one hidden layer": {"mnist": "623,290", "cifar10": "9,470,986"},
    "LeNet": {"mnist": "247,960 in the paper, 61,706 here", "cifar10": "323,320 in the paper, 62,006 here"},
    "AlexNet": {"cifar10": "23,272,266"},
    "ResNet-44": {"cifar10": "0.66 M"},
}
MODELS = dict(zip(WEIGHTS, ("linear", "wide", "lenet", "alexnet", "resnet"), strict=True))
AUGMENTED = {"none": "92.6", "identity": "94.1", "neumann": "94.6", "unrolled": "94.7"}


class Row(NamedTuple):
    """One result: its label, the paper's figure, and patterns for the folders of its runs.

    ``plain`` is a pattern for the plain trainings whose seconds are the unit of cost; by default it is the runs' own steps.
    """

    label: str
    paper: str
    runs: str
    figures: Sequence[str]
    plain: str | None = None


def tables() -> dict[str, list[Row]]:
    """The rows of each section of the paper."""
    found: dict[str, list[Row]] = {"overfitting, a decay for each weight: train, validation, test": []}
    parts = ("train_accuracy", "val_accuracy", "test_accuracy")
    for data in SETS:
        for model, weights in WEIGHTS.items():
            if data in weights:
                runs = f"paper_overfit_{data}/**/task/model_of={MODELS[model]}/seed=*"
                row = Row(f"{SETS[data]}, {model} ({weights[data]})", "100 %, 100 %", runs, parts)
                found["overfitting, a decay for each weight: train, validation, test"].append(row)
    found["distillation: test accuracy"] = distilled = []
    for data, pixels in zip(SETS, ("7,840", "30,720"), strict=True):
        run = f"paper_distill/**/task.data={data}/seed=*"
        everything, few = (f"{run}/baselines/{label}" for label in ("all_real_images", "one_real_image_a_class"))
        own = ("retrained_test_accuracy",)
        distilled.append(Row(f"{SETS[data]}, one learned image a class ({pixels} pixels)", "images", run, own, everything))
        distilled.append(Row(f"{SETS[data]}, one real image a class", "", few, parts[2:], everything))
        distilled.append(Row(f"{SETS[data]}, 49,000 real images", "", everything, parts[2:], everything))
    runs, plain = "paper_augment/**/learned_by={}/**/seed=*", "paper_augment/**/learned_by=none/**/seed=*"
    found["an augmentation network, CIFAR-10: test accuracy"] = [
        Row(key, f"{accuracy} %", runs.format(key), parts[2:], plain) for key, accuracy in AUGMENTED.items()
    ]
    return found


def finished(root: Path, pattern: str) -> list[Run]:
    """The finished runs in the folders that match the pattern."""
    runs = [read_one(path.parent, root) for path in sorted(root.glob(f"{pattern}/result.json"))]
    return [run for run in runs if run.result["status"] == "finished"]


def cells(row: Row, root: Path) -> list[str]:
    """Label, the paper's figure, the figures here, hypersteps, cost in plain trainings, and seconds of one run."""
    if not (runs := finished(root, row.runs)):
        return [row.label, row.paper, "", "", "", ""]
    figures = ", ".join(mean_and_error([run.result[name] for run in runs], ".1%") for name in row.figures)
    hypersteps, taken = sorted({run.result["hypersteps"] for run in runs}), mean(run.seconds for run in runs)
    cost = mean(run.cost for run in runs)
    if row.plain is not None:
        plain = finished(root, row.plain)
        cost = taken / mean(run.seconds for run in plain) if plain else float("nan")
    return [row.label, row.paper, figures, ", ".join(map(str, hypersteps)), f"{cost:.2f}", f"{taken:.0f}"]


def draw_overfit(found: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Accuracy on the 50 training and the 50 validation images over the hypersteps, a panel for each data set."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, SETS.values(), strict=True):
        for label, runs in found.items():
            if label.startswith(name):
                steps, short = [row["outer_step"] for row in runs[0].rows], label.split(", ")[1].partition(" (")[0]
                colour = f"C{list(WEIGHTS).index(short)}"
                axis.plot(steps, [row["val_accuracy"] for row in runs[0].rows], color=colour, label=short)
                axis.plot(steps, [row["train_accuracy"] for row in runs[0].rows], color=colour, linestyle=":", linewidth=1)
        axis.set(title=name, xlabel="hypersteps")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("accuracy: validation, dotted train")
    save(figure, path, dpi=90)


def draw_distilled(learned: Sequence[Path], path: Path) -> None:
    """The learned images, a row for each data set."""
    figure, axes = plt.subplots(len(learned), 10, figsize=(10, 1.15 * len(learned)), squeeze=False, layout="constrained")
    for row, folder in zip(axes, learned, strict=True):
        images = load_file(folder / "hyperparameters.safetensors")["distilled_data.input"]
        for axis, image in zip(row, images, strict=True):
            show_image(axis, image)
    save(figure, path, dpi=66)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="a folder of runs; default: runs")
    root = parser.parse_args().root
    for title, rows in tables().items():
        head = [title, "paper", "here", "hypersteps", "trainings", "seconds"]
        print(markdown(head, [cells(row, root) for row in rows]), end="\n\n")
        found = {row.label: runs for row in rows if (runs := finished(root, row.runs))}
        if found and title.startswith("overfitting"):
            draw_overfit(found, root / "overfit.png")
        learned = [root / runs[0].group / f"seed={runs[0].seed}" for label, runs in found.items() if "learned" in label]
        if learned:
            draw_distilled(learned, root / "distill.png")


if __name__ == "__main__":
    main()
