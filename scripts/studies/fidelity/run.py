"""How accurate is each hypergradient, and what does it cost? Measured on problems whose true hypergradient is known.

    python scripts/studies/fidelity/run.py --problems ridge iris-relu --seeds 2
    python scripts/studies/fidelity/run.py --methods "CG, GN*" "MINRES*" --data ~/data
    python scripts/studies/fidelity/run.py --learning --seeds 5         # how well each method learns
    python scripts/studies/fidelity/run.py --saved                      # the tables of the page; nothing runs

The true hypergradient is a closed form (ridge), or is differentiated through every step of the training, in float64. Each
method then runs in float32 on the trained weights, with the state that it would have from the last hyperstep. Its cost is
its time over that of a training gradient, measured just before and after; on a busy machine it is noisy. The out folder
keeps the trained problems, which are not trained again, the rows of all runs, and their medians over seeds, summary.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.records import read_records, write_records
from common.study import Row, kept
from common.tables import markdown
from studies.fidelity import measure
from studies.fidelity.learning import learned
from studies.fidelity.methods import METHODS
from studies.fidelity.problems import PROBLEMS

LEARNING = [
    "MINRES, GN, 5", "MINRES, exact, 5", "Neumann, exact, 20", "CG, exact, 7", "CG to 0.03, GN, +0.01, 20", "Identity, 0",
]  # fmt: skip
BUDGETS = (12.0, 25.0, 60.0)
SEEDS = {"ridge": 4, "logistic": 4, "digits-mlp": 4, "cnn": 3}  # 8 for the others, which vary more


def studied(methods: Sequence[str], options: Any) -> list[Row]:
    """Run every method on every problem and seed."""
    cases: dict[tuple[str, int], measure.Case] = {}

    def run(job: Row) -> Iterator[Row]:
        problem, seed = where = job["problem"], job["seed"]
        if where not in cases:
            spec = PROBLEMS[problem]
            found = measure.kept(problem, spec, seed, options.data, options.out / "truth")
            cases.clear()  # one at a time
            cases[where] = measure.Case(spec, seed, options.data, found)
        yield cases[where].measured(METHODS[job["method"]])

    places = [(p, seed) for p in options.problems for seed in range(options.seeds or SEEDS.get(p, 8))]
    jobs = (
        {"problem": p, "method": method, "seed": seed}
        for p, seed in places
        for method in methods
        if not (p == "ridge" and METHODS[method].factored)  # which is no classifier
    )
    return kept(options.out / "rows.json", jobs, run)


def summed_up(rows: Iterable[Row]) -> list[Row]:
    """For each problem and method: medians over seeds, quartiles, the worst seed, how many failed."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["problem"], row["method"]].append(row)
    found = []
    for (problem, method), group in groups.items():
        cosines = [row["cosine"] for row in group]
        low, middle, high = np.percentile(cosines, (25, 50, 75)).tolist()
        figures = {"cosine": middle, "low": low, "high": high, "worst": min(cosines)}
        figures |= {key: median(row[key] for row in group) for key in ("length", "cost", "products")}
        figures |= {"failed": sum(not row["ok"] for row in group), "seeds": len(group)}
        found.append({"problem": problem, "method": method} | {key: round(value, 3) for key, value in figures.items()})
    return found


def ranked(records: Sequence[Row], budget: float, curvature: str | None) -> list[list[str]]:
    """The ten methods with the highest mean over problems of the median cosine, of those that ran on every problem.

    A method is within the budget if the median over problems of its median cost is.
    """
    problems, found = {one["problem"] for one in records}, []
    for method in dict.fromkeys(one["method"] for one in records):
        own = [one for one in records if one["method"] == method]
        cost = median(one["cost"] for one in own)
        if len(own) == len(problems) and cost <= budget and curvature in (None, METHODS[method].curvature):
            worst = min(own, key=lambda one: one["cosine"])
            failed = sum(one["failed"] for one in own) / sum(one["seeds"] for one in own)
            figures = [f"{mean(one['cosine'] for one in own):.3f}", f"{median(one['cosine'] for one in own):.3f}"]
            figures += [f"{worst['cosine']:.2f} {worst['problem']}", f"{min(one['worst'] for one in own):.2f}"]
            found.append([method, *figures, f"{max(one['length'] for one in own):.3g}", f"{failed:.1%}", f"{cost:.1f}"])
    return sorted(found, key=lambda line: -float(line[1]))[:10]


def show(records: Sequence[Row]) -> None:
    """The best methods of each problem, and within each budget over all problems."""
    for problem in dict.fromkeys(one["problem"] for one in records):
        own = sorted((one for one in records if one["problem"] == problem), key=lambda one: -one["cosine"])[:12]
        columns = ("cosine", "low", "high", "worst", "length", "cost", "products", "failed", "seeds")
        lines = [[one["method"], *(f"{one[column]:g}" for column in columns)] for one in own]
        print(markdown([PROBLEMS[problem].title, *columns], lines), end="\n\n")
    for budget in BUDGETS:
        for curvature in (None, "exact"):
            title = f"at most {budget:g} gradients, {curvature or 'any'} curvature"
            columns = ("mean cosine", "median", "worst problem", "worst seed", "longest", "failed", "cost")
            print(markdown([title, *columns], ranked(records, budget, curvature)), end="\n\n")


def draw(records: Sequence[Row], path: Path) -> None:
    """Cosine against cost: a panel for each problem, a curve for each family, a point for each number of terms.

    Points are medians over seeds, bands quartiles. Lines are solid on the exact curvature and dashed on Gauss-Newton.
    """
    from common.pictures import plt, save

    problems = list(dict.fromkeys(one["problem"] for one in records))
    columns = min(4, len(problems))
    lines = math.ceil(len(problems) / columns)
    size = (1.5 + 4.2 * columns, 1 + 3.5 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    drawn = sorted((one for one in records if METHODS[one["method"]].shown), key=lambda one: METHODS[one["method"]].terms)
    solvers = list(dict.fromkeys(METHODS[one["method"]].family.split(", ")[0] for one in drawn))
    colours = dict(zip(solvers, plt.get_cmap("tab10").colors * 3, strict=False))
    for axis, problem in zip(axes.flat, problems, strict=False):
        own = [one for one in drawn if one["problem"] == problem]
        for family in dict.fromkeys(METHODS[one["method"]].family for one in own):
            points = [one for one in own if METHODS[one["method"]].family == family]
            x, y, low, high = (np.array([one[key] for one in points]) for key in ("cost", "cosine", "low", "high"))
            style = {"marker": "*" if len(points) == 1 else "o", "markersize": 4, "linewidth": 1.3}
            dashes, colour = "--" if ", GN" in family else "-", colours[family.split(", ")[0]]
            axis.plot(x, y, color=colour, linestyle=dashes, label=family, **style)
            axis.fill_between(x, low, high, color=colour, alpha=0.07, linewidth=0)
        axis.set(xscale="log", xlabel="cost in training gradients", ylabel="cosine to the truth")
        axis.set_title(PROBLEMS[problem].title, fontsize=10)
        axis.set_ylim(top=1.02)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(problems) :]:
        axis.set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    save(figure, path, dpi=85)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    methods = [m for m in METHODS if any(fnmatchcase(m, pattern) for pattern in options.methods or ["*"])]
    if not methods:
        raise SystemExit(f"no method's name matches any of {options.methods}: the names are\n" + "\n".join(METHODS))
    if options.saved:
        show(read_records(Path(__file__).with_name("summary.json")))
        return
    if options.learning:
        names = methods if options.methods else LEARNING
        ways = {"without": None} | {name: METHODS[name] for name in names}
        lines = [learned(name, entry, options.seeds or 3) for name, entry in ways.items()]
        print(markdown(["", "test loss", "accuracy", "longest over median length", "skipped", "CPU seconds"], lines))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if records := summed_up(studied(methods, options)):
        show(records)
        draw(records, options.out / "fidelity.png")
    write_records(options.out / "summary.json", records, torch=torch.__version__)
    print(f"-> {options.out}")


def _options() -> argparse.Namespace:
    names = list(PROBLEMS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--methods", nargs="+", metavar="PATTERN", help='such as "CG, GN*"; default: all')
    parser.add_argument("--learning", action="store_true", help="instead: let each method learn on digits with wrong labels")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many; default: 8 on Iris, 3 or 4 elsewhere")
    parser.add_argument("--saved", action="store_true", help="run nothing: print the tables of the page")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets; default: data")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="the folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
