"""What hoptim was good for in five public scripts, rewritten here for small data.

    python scripts/examples/outcomes.py DATA [mnist backbone wrong torchvision imagenet accelerate] [--seeds 5]

Two of the scripts are in this file: pytorch/examples mnist and Lightning's backbone classifier. Three are in retold.py:
torchvision's reference, pytorch/examples imagenet on two ranks, and Accelerate's nlp_example. Each seed draws 2,000 training
and 200 validation digits of MNIST, or garments of FashionMNIST, or 240 and 60 passages of text. Four runs share these data
and the first weights:

- joined: the script alone, trained on training and validation data together, the best simple use of the latter;
- training: the script alone, on the training data;
- stopped: the same, with the weights of the epoch that has the lowest validation loss (only the scripts in this file);
- hoptim: on the training data, with hyperparameters learned on the validation data every 10 steps, after a quarter of them.

DATA is a folder that torchvision.datasets.MNIST and FashionMNIST can read; accelerate needs `text/sotu.txt` in it, with an
address on each line, and the model in `minilm/`. `wrong` is the backbone classifier with 40 % of the training labels drawn
at random; it learns a weight for each training example instead of decays.
"""

import argparse
import contextlib
import copy
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributions import constraints
from torch.nn import functional as F
from torchvision.datasets import MNIST

import hoptim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the modules of scripts/ are found
from common.means import mean_and_error

TRAIN, VAL = 2000, 200
RETOLD = ("torchvision", "imagenet", "accelerate")
RANKS = 2  # processes of imagenet
ARMS = ("joined", "training", "stopped", "hoptim")


@dataclass(frozen=True)
class Case:
    """One script: its network, its optimizer, its schedule, and what is learned in it."""

    network: object
    optimizer: object
    batch_size: int
    epochs: int
    gamma: float = 1.0  # the learning rate is multiplied by it after each epoch
    mean: float = 0.0  # subtracted from the images, which are then divided by std
    std: float = 1.0
    wrong: float = 0.0  # the share of training labels that are drawn at random; above 0, example weights are learned


def convolutions():
    """The network of pytorch/examples mnist, a quarter as wide. It returns logits; the loss has the log_softmax."""
    first, second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
    seen = (first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten())
    return nn.Sequential(*seen, nn.Linear(2304, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))


def backbone():
    """Lightning's network, which has a ReLU behind its logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10), nn.ReLU())


def adam(weights):
    return torch.optim.Adam(weights, lr=1e-4)


CASES = {
    "mnist": Case(convolutions, torch.optim.Adadelta, 64, epochs=14, gamma=0.7, mean=0.1307, std=0.3081),
    "backbone": Case(backbone, adam, 32, epochs=50),
    "wrong": Case(backbone, adam, 32, epochs=50, wrong=0.4),
}


def draw(case, root):
    """Training digits (x, y, index), validation digits and test digits (x, y)."""
    sets = [MNIST(root, train=train) for train in (True, False)]
    (x, y), test = ((((one.data[:, None] / 255) - case.mean) / case.std, one.targets) for one in sets)
    order = torch.randperm(len(x))[: TRAIN + VAL]
    train, val = order[:TRAIN], order[TRAIN:]
    labels, wrong = y[train], torch.rand(TRAIN) < case.wrong
    labels[wrong] = torch.randint(10, (int(wrong.sum()),))
    return (x[train], labels, torch.arange(TRAIN)), (x[val], y[val]), test


def val_loss(model, hparams, batch):
    return F.cross_entropy(model.eval()(batch[0]), batch[1])


def decayed_loss(model, hparams, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) + hparams.penalty(model)


def weighted_loss(model, hparams, batch):
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (hparams["example_weight"][batch[2]] * losses).mean()


def drop_in(case, model, inner, val, steps):
    """The script's optimizer, with hoptim around it."""
    if case.wrong:
        start = {"example_weight": torch.full((TRAIN,), 0.5)}
        hparams, loss = hoptim.HyperParameters(start, {"example_weight": constraints.unit_interval}), weighted_loss
        outer = torch.optim.Adam(hparams.parameters(), lr=0.1)
    else:
        hparams, loss = hoptim.recipes.WeightDecay(model), decayed_loss
        outer = hparams.optimizer()
    problem = hoptim.Problem(model, hparams, loss, val_loss)
    return hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[val], every=10, warmup=steps // 4)


def run(case, arm, train, val, seed):
    """Train; return the model, the CPU seconds that it took, and the optimizer."""
    torch.manual_seed(seed)
    model = case.network()
    optimizer = inner = case.optimizer(model.parameters())
    if arm == "joined":
        train = (*(torch.cat(pair) for pair in zip(train, val, strict=False)), torch.arange(TRAIN + VAL))
    batches = list(zip(*(part.split(case.batch_size) for part in train), strict=True))
    if arm == "hoptim":
        optimizer = drop_in(case, model, inner, val, case.epochs * len(batches))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, case.gamma)
    begun, best = time.process_time(), (math.inf, {})
    for _ in range(case.epochs):
        for batch in batches:
            model.train()
            optimizer.zero_grad()
            loss = optimizer.loss(batch) if arm == "hoptim" else F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
        schedule.step()
        if arm == "stopped":
            with torch.no_grad():
                now = val_loss(model, None, val).item()
            if now < best[0]:
                best = now, copy.deepcopy(model.state_dict())
    if arm == "stopped":
        model.load_state_dict(best[1])
    return model, time.process_time() - begun, optimizer


@torch.no_grad()
def figures(model, test):
    """The test loss, and the test accuracy in per cent."""
    z = torch.cat([getattr(found := model.eval()(x), "logits", found) for x in test[0].split(500)])
    return F.cross_entropy(z, test[1]).item(), 100 * (z.argmax(1) == test[1]).float().mean().item()


def runs(name, root, seed):
    """For each arm with this seed: its name, its figures, its seconds, and hoptim's last record."""
    case = CASES[name]
    torch.manual_seed(1000 + seed)
    train, val, test = draw(case, root)
    for arm in ARMS:
        model, taken, optimizer = run(case, arm, train, val, seed)
        yield arm, figures(model, test), taken, optimizer.record if arm == "hoptim" else None


def retold_runs(name, root, seed):
    """The same for a script of retold.py."""
    import retold  # not at the top, since the other scripts need none of its frameworks

    torch.manual_seed(1000 + seed)
    if name == "accelerate":
        script, (train, val, test) = retold.Accelerated(root), retold.passages(root, 240, 60)
    else:
        script = retold.ImageNet() if name == "imagenet" else retold.Torchvision()
        train, val, test = retold.garments(root, TRAIN, VAL)
    for arm in ARMS:
        if arm == "stopped":
            continue
        torch.manual_seed(seed)
        given = tuple(map(torch.cat, zip(train, val, strict=True))) if arm == "joined" else train
        begun = time.process_time()
        model, optimizer = script.train(arm, given, val)
        taken = time.process_time() - begun
        yield arm, figures(model, test), taken, optimizer.record if arm == "hoptim" else None


def study(name, root, seeds):
    found, seconds = {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm, reached, taken, record in (retold_runs if name in RETOLD else runs)(name, root, seed):
            found[arm].append(reached)
            seconds[arm].append(taken)
            if record is None or name == "wrong":
                continue
            decays = torch.stack(list(record.hyperparameters.values()))
            print(" ", name, seed, f"decays from {decays.min():.1e} to {decays.max():.1e}", flush=True)
    others = [arm for arm in ARMS[:-1] if found[arm]]
    for column, what in enumerate(("test loss", "test accuracy, %")):
        by_arm = {arm: [row[column] for row in found[arm]] for arm in (*others, "hoptim")}
        print(name, what, *(f"{arm} {mean_and_error(values, '.4f')}" for arm, values in by_arm.items()), sep="  ")
        for other in others:
            ahead = [a - b for a, b in zip(by_arm["hoptim"], by_arm[other], strict=True)]
            print("   hoptim -", other, mean_and_error(ahead, ".4f"))
    ratios = [a / b for a, b in zip(seconds["hoptim"], seconds["training"], strict=True)]
    print(f"   cost in plain trainings {statistics.median(ratios):.2f}, of {statistics.median(seconds['training']):.1f} s")


def on_ranks(work, *arguments):
    """Call ``work(*arguments)`` in several processes on the CPU; only the first one prints."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_ranked, (f"{folder}/meeting", work, arguments), nprocs=RANKS)


def _ranked(rank, meeting, work, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    with contextlib.redirect_stdout(None) if rank else contextlib.nullcontext():
        work(*arguments)
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the folder of the data sets")
    parser.add_argument("cases", nargs="*", default=[*CASES, *RETOLD], help="the scripts; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: 5")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for one in options.cases:
        arguments = (one, options.data, options.seeds)
        on_ranks(study, *arguments) if one == "imagenet" else study(*arguments)
