"""Section 5.3 of the paper: a learned network that augments the images of CIFAR-10."""

from __future__ import annotations

from paper_rows import Row, Table

PAPER = {
    "none": ("without", "92.6"),
    "identity": ("identity", "94.1"),
    "neumann": ("3 Neumann terms", "94.6"),
    "unrolled": ("3 unrolled steps", "94.7"),
}

TABLE = Table(
    title="A learned augmentation network, CIFAR-10",
    columns={"test accuracy": "test_accuracy"},
    rows=[
        Row(
            label=label,
            paper=f"{accuracy} %",
            runs=f"paper_augment/**/learned_by={key}/**/seed=*",
            plain="paper_augment/**/learned_by=none/**/seed=*",
        )
        for key, (label, accuracy) in PAPER.items()
    ],
)
