"""Run one of the public scripts, changed or not, and report what hoptim did in it.

    python scripts/studies/public/run.py [--every N] [--warmup N] [--rate R] [--inert] [--seed N] SCRIPT [ARGUMENTS]

At the end it prints a digest of the trained weights, and for a changed script how its hypersteps ended, how far the
hyperparameters moved, and what a hyperstep cost in training steps. `--every` and `--warmup` replace the script's own values,
so that a short run has hypersteps; with `--rate` the outer optimizer is a plain Adam of this rate, without levels. With
`--inert` there are no hypersteps and the penalty is zero: the digest is then that of the original. `--seed` is for a script
that sets none itself. SCRIPT finds the modules beside it, as with `python SCRIPT`.
"""

import argparse
import atexit
import functools
import hashlib
import runpy
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import hoptim


class Watch:
    """Notes when the script's own optimizer steps, and the record of each hyperstep."""

    def __init__(self):
        self.trained, self.times, self.records = None, [], []

    def stepped(self, optimizer, args, kwargs):
        """Called after every step of every optimizer; the first one that steps is the script's own."""
        if self.trained is None:
            self.trained = optimizer
        if optimizer is self.trained:
            self.times.append(time.perf_counter())

    def digest(self):
        weights = [w for group in self.trained.param_groups for w in group["params"]]
        whole = b"".join(w.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for w in weights)
        return f"{hashlib.sha256(whole).hexdigest()[:16]} of {len(weights)} tensors after {len(self.times)} steps"

    def report(self):
        """What is printed at the end of the run."""
        if self.trained is None:
            return "no optimizer took a step"
        lines = [f"weights {self.digest()}"]
        if self.records:
            first, last = self.records[0].hyperparameters, self.records[-1].hyperparameters
            factors = [(last[name] / first[name]).flatten() for name in first]
            statuses = Counter(f"{one.status.name}{'' if one.moved else ' (not moved)'}" for one in self.records)
            between = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]  # the median has no hyperstep in it
            cost = statistics.median(one.seconds for one in self.records) / statistics.median(between)
            lines.append(f"{len(self.records)} hypersteps: {dict(statuses)}")
            lines.append(
                f"from the first to the last, decays went by {torch.cat(factors).min():.3g} to "
                f"{torch.cat(factors).max():.3g}"
            )
            lines.append(f"a hyperstep costs {cost:.1f} training steps of {statistics.median(between):.3f} s")
        return "\n".join(f"run.py: {line}" for line in lines)


def prepared(watch, options):
    """Change hoptim before the script imports it: other settings, and a hook that watches."""
    made = hoptim.BilevelOptimizer

    class Watched(made):
        def __init__(self, *args, hooks=(), **settings):
            settings.update({"every": options.every} if options.every else {})
            settings.update({"warmup": options.warmup} if options.warmup is not None else {})
            settings.update({"every": None} if options.inert else {})
            super().__init__(*args, hooks=(*hooks, watch.records.append), **settings)

    hoptim.BilevelOptimizer = Watched
    if options.rate:
        decay = hoptim.recipes.WeightDecay
        decay.optimizer = functools.partialmethod(decay.optimizer, options.rate)
    if options.inert:
        hoptim.recipes.WeightDecay.penalty = lambda *_: torch.zeros(())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--inert", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    watch = Watch()
    register_optimizer_step_post_hook(watch.stepped)
    prepared(watch, options)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    atexit.register(lambda: print(watch.report(), flush=True))
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = str(Path(options.script).resolve().parent)
    runpy.run_path(options.script, run_name="__main__")
