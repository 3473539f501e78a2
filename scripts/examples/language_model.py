"""Seven regularisers of an LSTM: fixed, searched at random, searched by Optuna, and learned; with a table and a picture.

    python scripts/examples/language_model.py --root data/text        # run what runs/language.json lacks, then the table
    python scripts/examples/language_model.py --saved                 # the table of scripts/language.json; nothing runs
    python scripts/examples/language_model.py --save                  # run all, write that file and scripts/language.png

The training is conf/experiment/paper/language.yaml. Both searches begin at the values that learning starts from, and go on
for five trainings. Every way stops early: its figures are those of the model with the lowest validation perplexity so far.
Time is that of the training steps with their hypersteps. The unit for the cost of learning is a training at the speed of its
own steps before the first hyperstep. Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the modules of scripts/ are found
from common.means import mean_and_error
from common.records import five_digits, read_records, write_records
from common.search import check_optuna, study_from, tpe_sampler
from common.tables import markdown
from tasks.language import PENALTIES, RATES
from tasks.run import Run
from tasks.schema import composed
from tasks.task import measure

HERE = Path(__file__).parents[1]
SAVED = HERE / "language.json"
BUDGET = 5  # trainings of a search
# lowest value, highest value, and whether it is drawn on a log scale
RANGES = {**dict.fromkeys(RATES, (0.02, 0.8, False)), **dict.fromkeys(PENALTIES, (0.01, 10.0, True))}


@dataclass(frozen=True)
class Row:
    """The state of one way after some training steps; ``seconds`` and ``trainings`` count from its beginning."""

    way: str
    seed: int
    trial: int
    step: int
    seconds: float
    trainings: float
    val: float
    test: float


def config(root: str, seed: int, *overrides: str) -> DictConfig:
    """The experiment's config."""
    return composed("paper/language", root, seed, *overrides)


def training(cfg: DictConfig) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Train; after each row of figures, yield the number of steps so far, the row's CPU seconds, and the perplexities."""
    run = Run.of(cfg)
    parts = {name: part for name, part in run.parts.items() if name != "train"}
    for row in range(run.outer_steps):
        begun = time.process_time()
        run.advance()
        seconds = time.process_time() - begun
        yield (row + 1) * cfg.inner_steps, seconds, measure(run.task, run.problem.model, run.problem.hparams, parts)


def learned(cfg: DictConfig, way: str) -> Iterator[Row]:
    """The rows of one training, in which the hyperparameters move or, with ``learn=false``, stay."""
    rows, total = [], cfg.outer_steps * cfg.inner_steps
    for step, seconds, found in training(cfg):
        rows.append((step, seconds, found))
    # not the first row, which also checks the losses, nor the last row of the warm-up, which ends with a hyperstep
    first = [seconds for step, seconds, _ in rows[1:] if step < cfg.warmup or not cfg.learn]
    plain, spent = statistics.mean(first) / cfg.inner_steps * total, 0.0
    for step, seconds, found in rows:
        spent += seconds
        trainings = spent / plain if cfg.learn else step / total
        yield Row(way, cfg.seed, 0, step, spent, trainings, found["val_perplexity"], found["test_perplexity"])


Report = Callable[[float], bool]  # takes a validation loss and says whether to stop the trial
Trial = tuple[Mapping[str, float] | None, Report, Callable[[float, bool], None]]  # the last takes the trial's best loss


def searched(cfg: DictConfig, way: str, trials: Callable[[int], Iterator[Trial]]) -> Iterator[Row]:
    """The rows of trainings with fixed hyperparameters, until the budget is spent."""
    total = cfg.outer_steps * cfg.inner_steps
    spent, steps = 0.0, 0
    for number, (values, stop, tell) in enumerate(trials(cfg.seed)):
        own = OmegaConf.merge(cfg, {"learn": False, "task": {"start": dict(values or {})}})
        best = math.inf
        for step, seconds, found in training(own):
            spent, best = spent + seconds, min(best, found["val_loss"])
            at = (steps + step) / total
            yield Row(way, cfg.seed, number, step, spent, at, found["val_perplexity"], found["test_perplexity"])
            if (stopped := stop(found["val_loss"])) or at >= BUDGET:
                break
        steps += step
        tell(best, stopped)
        if steps >= BUDGET * total:
            return


def at_random(seed: int) -> Iterator[Trial]:
    """The starting values, then independent draws."""
    generator = np.random.default_rng(seed)
    yield None, lambda _: False, lambda *_: None
    while True:
        values = {name: _stretched(generator.uniform(), *found) for name, found in RANGES.items()}
        yield values, lambda _: False, lambda *_: None


def _stretched(u: float, low: float, high: float, log: bool) -> float:
    return low * (high / low) ** u if log else low + u * (high - low)


def by_optuna(seed: int) -> Iterator[Trial]:
    """The starting values, then what multivariate TPE suggests; the median pruner stops trials."""
    import optuna

    start = {name: float(value) for name, value in config("", seed).task.start.items()}
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=3)
    study = study_from(start, tpe_sampler(seed, n_startup_trials=4), pruner)
    while True:
        trial = study.ask()
        values = {name: trial.suggest_float(name, low, high, log=log) for name, (low, high, log) in RANGES.items()}
        seen: list[float] = []

        def stop(loss: float, trial: Any = trial, seen: list[float] = seen) -> bool:
            trial.report(loss, len(seen))
            seen.append(loss)
            return bool(trial.should_prune())

        def tell(best: float, stopped: bool, trial: Any = trial) -> None:
            study.tell(trial, None if stopped else best, optuna.trial.TrialState.PRUNED if stopped else None)

        yield values, stop, tell


def way_of(name: str, root: str, seed: int) -> Iterator[Row]:
    """The rows of one way."""
    if name in ("random search", "Optuna"):
        return searched(config(root, seed), name, at_random if name == "random search" else by_optuna)
    overrides = {
        "fixed": ["learn=false"],
        "fixed, Merity et al.": ["learn=false", *_published(config(root, seed))],
        "learned, 7": [],
        "learned, per unit": ["task.per=unit"],
    }[name]
    return learned(config(root, seed, *overrides), name)


def _published(cfg: DictConfig) -> list[str]:
    start = cfg.baselines["fixed, Merity et al."].task.start
    return [f"task.start.{name}={value}" for name, value in start.items()]


PAPER = {
    "fixed": "75.72, 71.91",
    "random search": "84.81, 81.46",
    "Optuna": "72.13, 69.29 (Bayesian optimization)",
    "learned, 7": "69.22, 66.40",
    "learned, per unit": "68.18, 66.14",
}
WAYS = ("fixed", "fixed, Merity et al.", "random search", "Optuna", "learned, 7", "learned, per unit")


def studied(path: Path, root: str, seeds: Sequence[int], ways: Sequence[str]) -> list[Row]:
    """Run what the file lacks; it is written after each way."""
    rows = read(path) if path.is_file() else []
    done = {(row.way, row.seed) for row in rows}
    if "Optuna" in ways:
        check_optuna("--ways without Optuna")
    for seed in seeds:
        for way in ways:
            if (way, seed) not in done:
                rows += way_of(way, root, seed)
                write(path, rows)
                print(f"seed {seed}, {way}: {rows[-1].seconds:.0f} s, {rows[-1].trainings:.1f} trainings", flush=True)
    return [row for row in rows if row.way in ways and row.seed in seeds]


def read(path: Path) -> list[Row]:
    return [Row(**record) for record in read_records(path)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows with five digits."""
    write_records(path, five_digits(map(asdict, rows)), torch=torch.__version__)


Figure = Callable[[Row], float]


def best_until(rows: Sequence[Row], time_of: Figure, limit: float) -> Row | None:
    """The row with the lowest validation perplexity up to this time."""
    return min((row for row in rows if time_of(row) <= limit), key=lambda row: row.val, default=None)


def runs_of(rows: Sequence[Row], way: str) -> dict[int, list[Row]]:
    """The rows of one way, for each seed that any way has."""
    return {seed: [r for r in rows if (r.way, r.seed) == (way, seed)] for seed in sorted({row.seed for row in rows})}


def table(rows: Sequence[Row]) -> str:
    """A line for each way: perplexities, cost, and the test perplexity that it has reached at the cost of learning."""
    own = {way: by_seed for way in WAYS if all((by_seed := runs_of(rows, way)).values())}
    limits = {seed: runs[-1].trainings for seed, runs in own.get("learned, 7", {}).items()}
    reference = {seed: min(runs, key=lambda row: row.val).test for seed, runs in own.get("learned, 7", {}).items()}
    heads = [
        "",
        "paper: validation, test",
        "validation",
        "test",
        "test, minus learned 7",
        "at its cost",
        "trainings",
        "CPU s",
    ]
    lines = []
    for way, by_seed in own.items():
        ends = {seed: min(runs, key=lambda row: row.val) for seed, runs in by_seed.items()}
        equal = [best_until(runs, lambda row: row.trainings, limits.get(s, math.inf)) for s, runs in by_seed.items()]
        values = [[getattr(row, part) for row in ends.values()] for part in ("val", "test")]
        values.append([row.test - reference[seed] for seed, row in ends.items() if seed in reference])
        values.append([row.test for row in equal if row is not None])
        trainings = f"{statistics.mean(runs[-1].trainings for runs in by_seed.values()):.1f}"
        seconds = f"{statistics.mean(runs[-1].seconds for runs in by_seed.values()):.0f}"
        lines.append([way, PAPER.get(way, ""), *(mean_and_error(one, ".1f") for one in values), trainings, seconds])
    return markdown(heads, lines)


def curve(runs: Sequence[Sequence[Row]], clock: Figure, figure: Figure) -> tuple[Any, Any]:
    """Times, and a figure of the best model so far, averaged over the runs."""
    times = np.geomspace(max(clock(run[0]) for run in runs), max(clock(run[-1]) for run in runs), 300)
    found = [[figure(best) for t in times if (best := best_until(run, clock, t + 1e-9))] for run in runs]
    return times, np.mean(found, axis=0)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The perplexity of the best model so far, mean over seeds: validation against trainings, test against CPU seconds."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row", sharex="col", layout="constrained")
    clocks = (("trainings", "plain trainings", (0.5, 1, 2, 5)), ("seconds", "CPU seconds", (2, 5, 10, 20, 50)))
    for across, (clock, title, ticks) in enumerate(clocks):
        for down, part in enumerate(("val", "test")):
            axis = axes[down][across]
            for colour, way in enumerate(WAYS):
                runs = list(runs_of(rows, way).values())
                if all(runs):
                    times, mean = curve(runs, attrgetter(clock), attrgetter(part))
                    axis.plot(times, mean, color=f"C{colour}", label=way)
                    axis.plot(times[-1], mean[-1], "o", color=f"C{colour}")
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.set_xlim(left=min(line.get_xdata()[-1] for line in axis.lines) / 4)
            axis.set_ylim(top=axis.get_ylim()[0] + 0.5 * (axis.get_ylim()[1] - axis.get_ylim()[0]))
            if not across:
                axis.set_ylabel(f"{'validation' if part == 'val' else 'test'} perplexity")
        axes[1][across].set_xlabel(title)
    axes[0][1].legend(frameon=False)
    save(figure, path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/text", help="the folder of train.txt, valid.txt and test.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/language.json"), help="the file of the rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--saved", action="store_true", help="run nothing: print the table of scripts/language.json")
    parser.add_argument("--save", action="store_true", help="write scripts/language.json and scripts/language.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read(SAVED) if options.saved else studied(options.out, options.root, options.seeds, options.ways)
    print(table(rows))
    if not options.saved:
        draw(rows, options.out.with_suffix(".png"))
    if options.save:
        write(SAVED, rows)
        draw(rows, HERE / "language.png")


if __name__ == "__main__":
    main()
