"""One start for many tasks: sinusoids of which a few points are seen, and images of classes that nobody has seen before.

    python scripts/studies/few_shot/run.py --data data               # run what runs/few_shot lacks, then tables and pictures
    python scripts/studies/few_shot/run.py --sets sinusoids --ways MAML ANIL
    python scripts/studies/few_shot/run.py --saved                   # the tables of the page; nothing runs

Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.study import Row, Study
from studies.few_shot import classes, sinusoids

SETS: dict[str, Any] = {"sinusoids": sinusoids, "classes": classes}
# all rows of the file have the same columns
NOTHING: Row = {
    "seconds": None,
    "rate": None,
    "accuracy": None,
    "error": [],
    "of mean": [],
    "curves": [],
}  # columns of all rows


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """Each way with each seed and number of shots."""
    for name in options.sets:
        for seed in options.seeds:
            for shots in SETS[name].SHOTS:
                for way in SETS[name].WAYS:
                    if way in (options.ways or SETS[name].WAYS) and (way not in SETS[name].ONCE or seed == options.seeds[0]):
                        yield {"set": name, "way": way, "shots": shots, "seed": seed}


def run(root: Path, *, set: str, way: str, shots: int, seed: int) -> Iterator[dict[str, Any]]:
    """The figures of a way on new tasks, and its processor seconds."""
    yield NOTHING | SETS[set].run(root, way, shots, seed)


def of_set(rows: Sequence[Row]) -> Iterator[tuple[Any, list[Row]]]:
    """Each set of which there are rows, with its rows."""
    for name, module in SETS.items():
        if found := [row for row in rows if row["set"] == name]:
            yield module, found


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Squared errors of sinusoids, and shares of right answers."""
    for module, found in of_set(rows):
        yield from module.show(found)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The curves by gradient steps, one sinusoid, and the accuracies."""
    for module, found in of_set(rows):
        module.draw(found, folder)


if __name__ == "__main__":
    Study(
        file=__file__, seeds=(0, 1, 2), jobs=jobs, run=run, show=show, draw=draw,
        more={
            "sets": {"nargs": "+", "choices": list(SETS), "default": list(SETS), "help": "default: both"},
            "ways": {"nargs": "+", "help": "default: all"},
        },
    ).main(__doc__)  # fmt: skip
