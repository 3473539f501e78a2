"""Section 5.1 of the paper: a decay for each weight overfits a small validation set."""

from __future__ import annotations

from pathlib import Path

from common.pictures import plt, save

from paper_rows import Found, Row, Table

MODELS = {
    "linear": {"mnist": "7,850", "cifar10": "30,730"},
    "wide": {"mnist": "623,290", "cifar10": "9,470,986"},
    "lenet": {"mnist": "247,960 in the paper, 61,706 here", "cifar10": "323,320 in the paper, 62,006 here"},
    "alexnet": {"cifar10": "23,272,266"},
    "resnet": {"cifar10": "0.66 M"},
}
NAMES = {"linear": "linear", "wide": "one hidden layer", "lenet": "LeNet", "alexnet": "AlexNet", "resnet": "ResNet-44"}
SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def draw(found: Found, folder: Path) -> None:
    """Accuracy on the 50 training and the 50 validation images over the hypersteps, a panel for each data set."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, SETS.values(), strict=True):
        own = {label: runs[0].rows for label, runs in found.items() if label.startswith(name)}
        for label, rows in own.items():
            steps, short = [row["outer_step"] for row in rows], label.removeprefix(f"{name}, ").partition(" (")[0]
            colour = f"C{list(NAMES.values()).index(short)}"
            axis.plot(steps, [row["val_accuracy"] for row in rows], color=colour, label=short)
            axis.plot(steps, [row["train_accuracy"] for row in rows], color=colour, linestyle=":", linewidth=1)
        axis.set(title=name, xlabel="hypersteps")
        axis.grid(alpha=0.25)
        if own:
            axis.legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("accuracy: validation, dotted train")
    save(figure, folder / "paper_overfit.png", dpi=90)


TABLE = Table(
    title="Overfitting 50 validation images, a decay for each weight",
    columns={"train": "train_accuracy", "validation": "val_accuracy", "test": "test_accuracy"},
    rows=[
        Row(
            label=f"{SETS[data]}, {NAMES[model]} ({weights[data]})",
            paper="100 %, 100 %",
            runs=f"paper_overfit_{data}/**/task/model_of={model}/seed=*",
        )
        for data in SETS
        for model, weights in MODELS.items()
        if data in weights
    ],
    form=".0%",
    draw=draw,
)
