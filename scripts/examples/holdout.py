"""How much data to hold out? Logistic regression on 1,000 images of MNIST, with one learned decay or one for each weight.

    python scripts/examples/holdout.py --root data          # run what runs/holdout lacks, then the table and the picture
    python scripts/examples/holdout.py --saved              # the table of scripts/holdout.json; nothing runs
    python scripts/examples/holdout.py --save               # run all, write that file and scripts/holdout.png

The training is conf/experiment/paper/holdout.yaml; its `retrain` is the last training on all 1,000 images. Beside it are
`CrossValidated` on the same 1,000, and trainings on all of them with fixed decays. Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the modules of scripts/ are found
from common.means import mean_and_error, standard_error
from common.records import five_digits, read_json_lines, write_whole
from common.tables import markdown
from tasks.folds import cross_validate
from tasks.schema import composed
from train import train

HERE = Path(__file__).parents[1]
SAVED = HERE / "holdout.json"
EVERYTHING = 1000
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
FIXED = (0.01, 0.03, 0.1)
KINDS = {"global": "one decay", "weight": "one a weight"}
START = "hoptim.recipe.weight_decay.start"
Jobs = dict[str, tuple[dict[str, Any], list[str]]]


def jobs(folds: Sequence[int]) -> Jobs:
    """The jobs by name: the place of each in the table, and its overrides."""
    found: Jobs = {}
    for per in KINDS:
        own = [f"hoptim.recipe.weight_decay.per={per}"]
        for share in SHARES:
            val = round(share * EVERYTHING)
            split = [f"task.val={val}", f"task.train={EVERYTHING - val}"]
            found[f"{per} {share}"] = {"per": per, "share": share}, [*own, *split]
        for count in folds:
            found[f"{per} folds {count}"] = {"per": per, "folds": count}, [*own, f"folds={count}"]
    for decay in FIXED:
        found[f"fixed {decay}"] = {"fixed": decay}, [f"{START}={decay}", "learn=false"]
    return found


def measured(root: str, seed: int, overrides: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a job; return its losses and accuracies, and its CPU seconds."""
    cfg = composed("paper/holdout", root, seed, *overrides)
    begun = time.process_time()
    (cross_validate if cfg.folds else train)(cfg, folder)
    seconds = time.process_time() - begun
    result = json.loads((folder / "result.json").read_text())
    names = ("test_loss", "test_accuracy", "val_loss", "retrained_test_loss", "retrained_test_accuracy")
    return {name: result[name] for name in names if name in result} | {"seconds": seconds, **_costs(folder)}


def _costs(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of the inner steps and of the hypersteps; nothing for a fit by folds."""
    rows = read_json_lines(folder / "metrics.jsonl")
    if "inner_seconds" not in rows[0]:
        return {}
    return {f"{kind}_seconds": sum(row[f"{kind}_seconds"] for row in rows) for kind in ("inner", "hyper")}


def studied(out: Path, root: str, seeds: Sequence[int], folds: Sequence[int]) -> list[dict[str, Any]]:
    """Run the jobs that the file of records lacks; it is written after each of them."""
    path = out / "records.json"
    out.mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text()) if path.is_file() else []
    done = {(record["job"], record["seed"]) for record in records}
    for seed in seeds:
        for name, (place, overrides) in jobs(folds).items():
            if (name, seed) not in done:
                found = measured(root, seed, overrides, out / name.replace(" ", "_") / f"seed={seed}")
                records.append({"job": name, "seed": seed, **place, **found})
                write(path, records)
    return records


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the records with five digits, one on each line."""
    write_whole(path, "[\n" + ",\n".join(map(json.dumps, five_digits(records))) + "\n]\n")


def figures(records: Sequence[dict[str, Any]], job: str, name: str) -> list[float]:
    """A figure of a job for each seed."""
    return [record[name] for record in records if record["job"] == job]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Test loss and accuracy of every job, without and with the last training, and the CPU seconds of the whole job."""
    heads = ["", "held out", "test loss", "accuracy", "retrained: test loss", "accuracy", "seconds"]
    lines = []
    for job in dict.fromkeys(record["job"] for record in records):
        place = next(record for record in records if record["job"] == job)
        label = KINDS.get(place.get("per", ""), f"fixed {place.get('fixed')}, all of it")
        first = [mean_and_error(figures(records, job, f"test_{name}")) for name in ("loss", "accuracy")]
        if "folds" in place:  # its last training is its only one
            cells = [f"{place['folds']} folds", "", "", *first]
        else:
            again = [mean_and_error(figures(records, job, f"retrained_test_{name}")) for name in ("loss", "accuracy")]
            cells = [f"{place['share']:.0%}", *first, *again] if "share" in place else ["", "", "", *again]
        lines.append([label, *cells, f"{statistics.mean(figures(records, job, 'seconds')):.1f}"])
    return markdown(heads, lines)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Test accuracy and loss against the share that is held out."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
        for number, (per, label) in enumerate(KINDS.items()):
            for prefix, style in (("", ":"), ("retrained_", "-")):
                points = [figures(records, f"{per} {share}", f"{prefix}test_{name}") for share in SHARES]
                mean, error = map(statistics.mean, points), map(standard_error, points)
                words = f"{label}{', retrained on all' if prefix else ''}"
                style = {"linestyle": style, "marker": "o", "markersize": 3}
                axis.errorbar(SHARES, list(mean), list(error), color=f"C{number}", label=words, **style)
            for job in dict.fromkeys(r["job"] for r in records if r["job"].startswith(f"{per} folds")):
                value, words = statistics.mean(figures(records, job, f"test_{name}")), f"{label}, {job.split()[-1]} folds"
                axis.axhline(value, color=f"C{number}", linestyle="--", linewidth=1, label=words)
        fixed = {d: statistics.mean(figures(records, f"fixed {d}", f"retrained_test_{name}")) for d in FIXED}
        best = (max if name == "accuracy" else min)(fixed, key=lambda decay: fixed[decay])
        axis.axhline(fixed[best], color="grey", linewidth=1, linestyle="-.", label=f"fixed {best} on all, the best of three")
        axis.set(xlabel="share that is held out", ylabel=f"test {name}", xticks=SHARES)
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=8)
    save(figure, path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="the folder of torchvision's data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/holdout"), help="the folder of the results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folds", nargs="+", type=int, default=[3], help="numbers of folds for CrossValidated")
    parser.add_argument("--saved", action="store_true", help="run nothing: print the table of scripts/holdout.json")
    parser.add_argument("--save", action="store_true", help="write scripts/holdout.json and scripts/holdout.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.saved:
        print(table(json.loads(SAVED.read_text())))
        return
    records = studied(options.out, options.root, options.seeds, options.folds)
    print(table(records))
    draw(records, options.out / "holdout.png")
    if options.save:
        write(SAVED, records)
        draw(records, HERE / "holdout.png")


if __name__ == "__main__":
    main()
