"""How much data to hold out? Logistic regression on 1,000 images of MNIST, with one learned decay or one for each weight.

    python scripts/studies/holdout/run.py --data data         # run what runs/holdout lacks, then the table and the picture
    python scripts/studies/holdout/run.py --saved             # the table of the page; nothing runs

The training is conf/experiment/paper/holdout.yaml; its `retrain` is the last training on all 1,000 images. Beside it are
`CrossValidated` on the same 1,000, and trainings on all of them with fixed decays. Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error, standard_error
from common.study import Row, Study, by_seed
from common.tables import markdown
from tasks.folds import cross_validate
from tasks.schema import composed
from train import train

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
KINDS = {"one decay": "global", "one a weight": "weight"}
FIXED = (0.01, 0.03, 0.1)
FIGURES = ("test_loss", "test_accuracy", "val_loss", "retrained_test_loss", "retrained_test_accuracy")
RECIPE = "hoptim.recipe.weight_decay"


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """What is learned, and what is held out: a share, or folds; nothing with a fixed decay."""
    held = [*(f"{share:.0%}" for share in SHARES), "3 folds"]
    cells = [*((way, part) for way in KINDS for part in held), *((f"fixed {decay}", "") for decay in FIXED)]
    yield from ({"way": way, "held": part, "seed": seed} for seed in options.seeds for way, part in cells)


def overrides(way: str, held: str) -> list[str]:
    """The options of scripts/train.py for a job."""
    if way not in KINDS:
        return [f"{RECIPE}.start={way.split()[1]}", "learn=false"]
    own = [f"{RECIPE}.per={KINDS[way]}"]
    if held.endswith("folds"):
        return [*own, f"folds={held.split()[0]}"]
    val = 10 * int(held.rstrip("%"))
    return [*own, f"task.val={val}", f"task.train={1000 - val}"]


def run(root: Path, way: str, held: str, seed: int) -> Iterator[Row]:
    """The losses and accuracies of a job, and its CPU seconds."""
    cfg = composed("paper/holdout", str(root), seed, *overrides(way, held))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        (cross_validate if cfg.folds else train)(cfg, Path(folder))
        seconds = time.process_time() - begun
        result = json.loads(Path(folder, "result.json").read_text())
    yield {name: result.get(name) for name in FIGURES} | {"seconds": seconds}


def figures(rows: Sequence[Row], way: str, held: str, name: str) -> list[float]:
    """A figure of a job for each seed. The last training of a fit over folds is its only one."""
    name = name.removeprefix("retrained_") if held.endswith("folds") else name
    return list(by_seed(rows, name, way=way, held=held).values())


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Test loss and accuracy of every job, without and with the last training, and the CPU seconds of the whole job."""
    lines = []
    for way, held in dict.fromkeys((row["way"], row["held"]) for row in rows):
        names = [f"{prefix}test_{name}" for prefix in ("", "retrained_") for name in ("loss", "accuracy")]
        cells = [mean_and_error(figures(rows, way, held, name)) for name in names]
        cells = cells if held.endswith("%") else ["", "", *cells[2:]]
        lines.append([way, held, *cells, f"{mean(figures(rows, way, held, 'seconds')):.1f}"])
    yield markdown(["", "held out", "test loss", "accuracy", "retrained: test loss", "accuracy", "seconds"], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Test accuracy and loss against the share that is held out."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
        for number, way in enumerate(KINDS):
            for prefix, style in (("", ":"), ("retrained_", "-")):
                points = [figures(rows, way, f"{share:.0%}", f"{prefix}test_{name}") for share in SHARES]
                label, errors = f"{way}{', retrained on all' * bool(prefix)}", list(map(standard_error, points))
                style = {"linestyle": style, "marker": "o", "markersize": 3, "color": f"C{number}"}
                axis.errorbar(SHARES, list(map(mean, points)), errors, label=label, **style)
            value = mean(figures(rows, way, "3 folds", f"test_{name}"))
            axis.axhline(value, color=f"C{number}", linestyle="--", linewidth=1, label=f"{way}, 3 folds")
        fixed = {decay: mean(figures(rows, f"fixed {decay}", "", f"retrained_test_{name}")) for decay in FIXED}
        best = (max if name == "accuracy" else min)(fixed, key=lambda decay: fixed[decay])
        axis.axhline(fixed[best], color="grey", linewidth=1, linestyle="-.", label=f"fixed {best} on all, the best of three")
        axis.set(xlabel="share that is held out", ylabel=f"test {name}", xticks=SHARES)
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=8)
    save(figure, folder / "holdout.png", dpi=90)


if __name__ == "__main__":
    Study(file=__file__, seeds=(0, 1), jobs=jobs, run=run, show=show, draw=draw).main(__doc__)
