"""matplotlib without a window, and what the pictures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["plt", "save", "show_image"]


def save(figure: Any, path: Path, dpi: int = 110) -> Path:
    """Write the figure to a file, close it, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path


def show_image(axis: Any, image: Any) -> None:
    """Show an image of shape (C, H, W), scaled by its largest absolute value, so that zero is grey."""
    shown = (image / image.abs().max().clamp(min=1e-12) / 2 + 0.5).movedim(0, -1)
    axis.imshow(shown.expand(*shown.shape[:2], 3) if shown.shape[2] == 1 else shown)
    axis.set(xticks=[], yticks=[])
