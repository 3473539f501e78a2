"""Pictures of what recipes have learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.pictures import plt, save, show_image
from torch import Tensor


def distilled(task: Any, recipe: Any, path: Path) -> Path:
    """The learned examples, if they are images: a column for each class."""
    x, y = recipe.examples()
    rows = -(-len(y) // task.classes)
    return _grid(x.detach(), [f"{label}" for label in y.tolist()], rows, path) if x.ndim == 4 else path


def changed(task: Any, recipe: Any, path: Path) -> Path:
    """Ten images as they are, and three random changes of each, as the training sees them."""
    x = task.x[task.parts["train"][:10]]
    change = recipe.augment if hasattr(recipe, "augment") else recipe
    with torch.no_grad():
        images = torch.cat([x, *(change(x) for _ in range(3))])
    return _grid(images, ["as it is"] * 10 + ["changed"] * 30, 4, path)


def gates(task: Any, recipe: Any, path: Path) -> Path:
    """The value of each gate."""
    values = recipe.values(training=False).detach().cpu()
    figure, axis = plt.subplots(figsize=(1.5 + 0.25 * len(values), 3), layout="constrained")
    axis.bar(range(len(values)), values)
    axis.set(xlabel="feature", ylabel="gate", ylim=(0, 1))
    return save(figure, path)


def _grid(images: Tensor, titles: list[str], rows: int, path: Path) -> Path:
    """Images in rows, each with its title."""
    across = len(images) // rows
    figure, axes = plt.subplots(rows, across, figsize=(across, 1.2 * rows), squeeze=False, layout="constrained")
    for axis, image, title in zip(axes.flat, images.cpu(), titles, strict=True):
        show_image(axis, image)
        axis.set_title(title, fontsize=8)
    return save(figure, path)


OF_RECIPES: dict[str, Callable[[Any, Any, Path], Path]] = {
    "distilled_data": distilled, "augmentation": changed, "augmentation_net": changed, "gate": gates,
}  # fmt: skip
