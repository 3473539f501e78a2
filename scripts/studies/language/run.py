"""Seven regularisers of an LSTM: fixed, searched at random, searched by Optuna, and learned; with a table and a picture.

    python scripts/studies/language/run.py --data data       # run what runs/language lacks, then the table and the picture
    python scripts/studies/language/run.py --saved           # the table of the page; nothing runs

The training is conf/experiment/paper/language.yaml, on the text in the folder `text` of the data. Both searches begin at the
values that learning starts from, and go on for five trainings. Every way stops early: its figures are those of the model
with the lowest validation perplexity so far. Time is that of the training steps with their hypersteps. The unit of the cost
of learning is a training at the speed of its own steps before the first hyperstep. Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.search import check_optuna, study_from, tpe_sampler
from common.study import Row, Study, differences
from common.tables import markdown
from tasks.language import PENALTIES, RATES
from tasks.run import Run
from tasks.schema import composed
from tasks.task import measure

BUDGET = 5  # trainings of a search
# lowest value, highest value, and whether it is drawn on a log scale
RANGES = {**dict.fromkeys(RATES, (0.02, 0.8, False)), **dict.fromkeys(PENALTIES, (0.01, 10.0, True))}
PAPER = {
    "fixed": "75.72, 71.91",
    "fixed, Merity et al.": "",
    "random search": "84.81, 81.46",
    "Optuna": "72.13, 69.29 (Bayesian optimization)",
    "learned, 7": "69.22, 66.40",
    "learned, per unit": "68.18, 66.14",
}


def training(cfg: DictConfig) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Train; after each row of figures, yield the number of steps so far, the row's CPU seconds, and the perplexities."""
    run = Run.of(cfg)
    parts = {name: part for name, part in run.parts.items() if name != "train"}
    for row in range(run.outer_steps):
        begun = time.process_time()
        run.advance()
        seconds = time.process_time() - begun
        yield (row + 1) * cfg.inner_steps, seconds, measure(run.task, run.problem.model, run.problem.hparams, parts)


def row_of(trial: int, step: int, seconds: float, trainings: float, found: Mapping[str, float]) -> Row:
    """The state after some training steps; ``seconds`` and ``trainings`` count from the beginning of a way."""
    losses = {"val": found["val_perplexity"], "test": found["test_perplexity"]}
    return {"trial": trial, "step": step, "seconds": seconds, "trainings": trainings, **losses}


def learned(cfg: DictConfig) -> Iterator[Row]:
    """The rows of one training, in which the hyperparameters move or, with ``learn=false``, stay."""
    rows, total, spent = list(training(cfg)), cfg.outer_steps * cfg.inner_steps, 0.0
    # not the first row, which also checks the losses, nor the last row of the warm-up, which ends with a hyperstep
    first = [seconds for step, seconds, _ in rows[1:] if step < cfg.warmup or not cfg.learn]
    plain = mean(first) / cfg.inner_steps * total
    for step, seconds, found in rows:
        spent += seconds
        yield row_of(0, step, spent, spent / plain if cfg.learn else step / total, found)


Report = Callable[[float], bool]  # takes a validation loss and says whether to stop the trial
Trial = tuple[Mapping[str, float] | None, Report, Callable[[float, bool], None]]  # the last takes the trial's best loss


def searched(cfg: DictConfig, trials: Iterator[Trial]) -> Iterator[Row]:
    """The rows of trainings with fixed hyperparameters, until the budget is spent."""
    total, spent, steps = cfg.outer_steps * cfg.inner_steps, 0.0, 0
    for number, (values, stop, tell) in enumerate(trials):
        own = OmegaConf.merge(cfg, {"learn": False, "task": {"start": dict(values or {})}})
        best = math.inf
        for step, seconds, found in training(own):
            spent, best = spent + seconds, min(best, found["val_loss"])
            at = (steps + step) / total
            yield row_of(number, step, spent, at, found)
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
        u = {name: generator.uniform() for name in RANGES}
        values = {n: a * (b / a) ** u[n] if log else a + u[n] * (b - a) for n, (a, b, log) in RANGES.items()}
        yield values, lambda _: False, lambda *_: None


def by_optuna(seed: int, start: Mapping[str, float]) -> Iterator[Trial]:
    """The starting values, then what multivariate TPE suggests; the median pruner stops trials."""
    import optuna

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


def run(root: Path, way: str, seed: int, *overrides: str) -> Iterator[Row]:
    """The rows of one way."""
    cfg = composed("paper/language", str(root / "text"), seed, *overrides)
    if way == "random search":
        return searched(cfg, at_random(seed))
    if way == "Optuna":
        return searched(cfg, by_optuna(seed, {name: float(value) for name, value in cfg.task.start.items()}))
    if way == "learned, per unit":
        cfg = OmegaConf.merge(cfg, {"task": {"per": "unit"}})
    if way.startswith("fixed"):
        start = cfg.baselines[way].task.start if "Merity" in way else {}
        cfg = OmegaConf.merge(cfg, {"learn": False, "task": {"start": start}})
    return learned(cfg)


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    if "Optuna" in options.ways:
        check_optuna("--ways without Optuna")
    yield from ({"way": way, "seed": seed} for seed in options.seeds for way in options.ways)


def best_until(rows: Sequence[Row], clock: str, limit: float) -> Row | None:
    """The row with the lowest validation perplexity up to this time."""
    return min((row for row in rows if row[clock] <= limit), key=lambda row: row["val"], default=None)


def runs_of(rows: Sequence[Row], way: str) -> dict[int, list[Row]]:
    """The rows of one way, by seed."""
    own = [row for row in rows if row["way"] == way]
    return {seed: [row for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})}


def show(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each way: perplexities, cost, and the test perplexity that it has reached at the cost of learning."""
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
    learning, lines = runs_of(rows, "learned, 7"), []
    reference = {seed: best_until(runs, "step", math.inf)["test"] for seed, runs in learning.items()}
    for way, words in PAPER.items():
        if by_seed := runs_of(rows, way):
            ends = {seed: best_until(runs, "step", math.inf) for seed, runs in by_seed.items()}
            limits = {seed: learning[seed][-1]["trainings"] if seed in learning else math.inf for seed in by_seed}
            equal = [best_until(runs, "trainings", limits[seed]) for seed, runs in by_seed.items()]
            less = differences({seed: end["test"] for seed, end in ends.items()}, reference)
            values = [[end[part] for end in ends.values()] for part in ("val", "test")]
            cells = [mean_and_error(one, ".1f") for one in (*values, less, [row["test"] for row in equal if row])]
            trainings, seconds = (mean(runs[-1][key] for runs in by_seed.values()) for key in ("trainings", "seconds"))
            lines.append([way, words, *cells, f"{trainings:.1f}", f"{seconds:.0f}"])
    yield markdown(heads, lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The perplexity of the best model so far, mean over seeds: validation and test, against trainings and CPU seconds."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row", sharex="col", layout="constrained")
    clocks = (("trainings", "plain trainings", (0.5, 1, 2, 5)), ("seconds", "CPU seconds", (2, 5, 10, 20, 50)))
    for across, (clock, title, ticks) in enumerate(clocks):
        for down, part in enumerate(("val", "test")):
            axis = axes[down][across]
            for way in PAPER:
                if runs := list(runs_of(rows, way).values()):
                    times = np.geomspace(max(run[0][clock] for run in runs), max(run[-1][clock] for run in runs), 300)
                    found = [[best_until(run, clock, t + 1e-9)[part] for t in times] for run in runs]
                    axis.plot(times, np.mean(found, axis=0), label=way)
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            if not across:
                axis.set_ylabel(f"{'validation' if part == 'val' else 'test'} perplexity")
        axes[1][across].set_xlabel(title)
    axes[0][1].legend(frameon=False)
    save(figure, folder / "language.png", dpi=90)


if __name__ == "__main__":
    Study(
        file=__file__, seeds=(0, 1, 2), jobs=jobs, run=run, show=show, draw=draw,
        more={"ways": {"nargs": "+", "choices": list(PAPER), "default": list(PAPER), "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
