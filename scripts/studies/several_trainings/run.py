"""Optuna chooses width and batch size, and for each hoptim learns a decay for each weight over four trainings.

The data are digits, where 60 of the 200 labels to train on are drawn at random.

python scripts/studies/several_trainings/run.py                                 # needs pip install '.[tuners]'
python scripts/studies/several_trainings/run.py --storage sqlite:///digits.db   # kept: goes on if it exists
optuna-dashboard sqlite:///digits.db                                         # each trial with its four losses
"""

import argparse
import math

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import WeightDecay

EPOCHS = 150

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
x, (train, val, test) = x.float() / 16, (order[:200], order[200:400], order[400:])
y[train[:60]] = torch.randint(10, (60,), generator=torch.Generator().manual_seed(1))


def val_loss(model, hparams, batch):
    return F.cross_entropy(model(x[batch]), y[batch])


def train_loss(model, hparams, batch):
    return val_loss(model, hparams, batch) + hparams.penalty(model)


def trainings(width, size, start=1e-3, fall=0.85):
    """Yields the model, the loss and the decays of one training after the other, each with its decays held fixed."""

    def make():
        torch.manual_seed(0)  # the same start and order for all, so that their losses can be compared
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    hparams = WeightDecay(make(), per="weight", start=start)
    leaves, outer = list(hparams.parameters()), hparams.optimizer()
    for group in outer.param_groups:
        group["lr"] *= 9 if "pull" in group else 3  # its rates are for the many hypersteps of one training; here is one
    falling, losses = torch.optim.lr_scheduler.ExponentialLR(outer, fall), []
    while True:
        model, tried = make(), [leaf.detach().clone() for leaf in leaves]
        problem = hoptim.Problem(model, hparams, train_loss, val_loss)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[val], every=None)
        for _ in range(EPOCHS):
            for batch in train[torch.randperm(len(train))].split(size):
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()
        losses.append(val_loss(model, hparams, val).item())
        if losses[-1] == min(losses):
            best = tried
        yield model, losses[-1], math.exp(torch.cat([leaf.flatten() for leaf in tried]).mean())
        optimizer.hyperstep()
        falling.step()
        if not losses[-1] <= losses[0]:  # worse than the start, or diverged: half-way back to the best
            with torch.no_grad():
                for leaf, good, bad in zip(leaves, best, tried, strict=True):
                    leaf.copy_((good + bad) / 2)


def objective(trial):
    width = trial.suggest_int("width", 8, 256, log=True)
    size = trial.suggest_categorical("batch size", [20, 50, 100])
    lowest = math.inf
    for number, (model, loss, decay) in zip(range(4), trainings(width, size), strict=False):
        trial.report(loss, number)
        if loss < lowest:
            lowest = loss
            trial.set_user_attr("decay, geometric mean", decay)
            trial.set_user_attr("test loss", val_loss(model, None, test).item())  # only to be looked at
        if trial.should_prune():
            raise optuna.TrialPruned
    return lowest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", help="Optuna's storage; default: none is kept")
    parser.add_argument("--trials", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=None if options.storage else 0)  # one that goes on must not repeat itself
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    named = {"study_name": "digits", "storage": options.storage, "load_if_exists": True}
    study = optuna.create_study(sampler=sampler, pruner=pruner, **named)
    study.optimize(objective, n_trials=options.trials)
    for trial in study.trials:
        losses = ", ".join(f"{loss:.3f}" for loss in trial.intermediate_values.values())
        print(f"{trial.params}: validation losses {losses}; test loss {trial.user_attrs['test loss']:.3f}")
    print(f"best: {study.best_trial.params}, test loss {study.best_trial.user_attrs['test loss']:.3f}")


if __name__ == "__main__":
    main()
