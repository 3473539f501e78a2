"""Section 5.2 of the paper: one learned image for each class."""

from __future__ import annotations

from pathlib import Path

from common.pictures import plt, save, show_image
from safetensors.torch import load_file

from paper_rows import Found, Row, Table

SETS = {"mnist": ("MNIST", "7,840"), "cifar10": ("CIFAR-10", "30,720")}


def draw(found: Found, folder: Path) -> None:
    """The learned images, a row for each data set."""
    learned = {label: runs[0] for label, runs in found.items() if "learned" in label}
    if not learned:
        return
    figure, axes = plt.subplots(len(learned), 10, figsize=(10, 1.15 * len(learned)), squeeze=False, layout="constrained")
    for down, (label, run) in enumerate(learned.items()):
        path = folder / run.group / f"seed={run.seed}" / "hyperparameters.safetensors"
        for axis, image in zip(axes[down], load_file(path)["distilled_data.input"], strict=True):
            show_image(axis, image)
        axes[down][0].set_ylabel(label.partition(",")[0])
    save(figure, folder / "paper_distill.png", dpi=66)


def rows(data: str, name: str, pixels: str) -> list[Row]:
    """The learned images, and the two plain trainings beside them. The unit of cost is the training on all images."""
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
