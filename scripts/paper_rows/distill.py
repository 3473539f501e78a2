"""Section 5.2: one learned image a class."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from paper_rows import Found, Row, Table

SETS = {"mnist": ("MNIST", "7,840"), "cifar10": ("CIFAR-10", "30,720")}


def draw(found: Found, folder: Path) -> None:
    """The learned images of each data set, each on a scale of its own, of which grey is zero."""
    learned = {label: runs[0] for label, runs in found.items() if "learned" in label}
    if not learned:
        return
    figure, axes = plt.subplots(len(learned), 10, figsize=(10, 1.15 * len(learned)), squeeze=False, layout="constrained")
    for down, (label, run) in enumerate(learned.items()):
        path = folder / run.group / f"seed={run.seed}" / "hyperparameters.safetensors"
        for axis, image in zip(axes[down], load_file(path)["distilled_data.input"], strict=True):
            shown = (image / image.abs().max() / 2 + 0.5).movedim(0, -1)
            axis.imshow(shown.expand(*shown.shape[:2], 3))
            axis.set(xticks=[], yticks=[])
        axes[down][0].set_ylabel(label.partition(",")[0])
    figure.savefig(folder / "paper_distill.png", dpi=66)
    plt.close(figure)


def rows(data: str, name: str, pixels: str) -> list[Row]:
    """The learned images, and the two plain trainings beside them; the unit of cost is the training on all."""
    run = f"paper_distill/**/task.data={data}/seed=*"
    everything, few = (f"{run}/baselines/{label}" for label in ("all_real_images", "one_real_image_a_class"))
    return [
        Row(
            label=f"{name}, one learned image a class ({pixels} pixels)", paper="images", runs=run,
            figures=["retrained_test_accuracy"], plain=everything,
        ),
        Row(label=f"{name}, one real image a class", paper="", runs=few, plain=everything),
        Row(label=f"{name}, 49,000 real images", paper="", runs=everything, plain=everything),
    ]  # fmt: skip


TABLE = Table(
    title="Distillation: logistic regression, trained on one image a class",
    columns={"test accuracy": "test_accuracy"},
    rows=[row for data, (name, pixels) in SETS.items() for row in rows(data, name, pixels)],
    draw=draw,
)
