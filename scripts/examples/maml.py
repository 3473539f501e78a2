"""Where should a training begin that sees ten points? MAML's sinusoids, in half a minute.

    python scripts/examples/maml.py --out maml.png

Each task is a sinusoid of its own height and phase. The learned weights fit a new one in a few gradient steps on ten of its
points. Beside them: weights that were trained on all sinusoids together, which know only their mean, and random ones. It
prints the test losses on sinusoids that nothing was chosen on, and draws one of them.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import hoptim

SHOTS, RATE = 10, 0.01


def sinusoids(count):
    """So many tasks: points to train on, and points to judge by."""
    height, phase = 0.1 + 4.9 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
    x = 10 * torch.rand(count, 2 * SHOTS, 1) - 5
    y = height * (x - phase).sin()
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def network():
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def loss(model, hparams, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def setting(model):
    """The problem of a model whose weights at the start are learned, and the optimizer of a task."""
    problem = hoptim.Problem(model, hoptim.recipes.Initialization(model), loss)
    return problem, torch.optim.SGD(model.parameters(), lr=RATE)


def learned(steps):
    """Weights from which one gradient step goes far."""
    problem, inner = setting(network())
    outer, maml = problem.hparams.optimizer(), hoptim.PerTask(steps=1)
    for step in range(steps):
        train, val = sinusoids(25)
        result = hoptim.hypergradient(problem, train, val, maml, inner=inner)
        if result.solution.status.ok:  # else a training has diverged, and nothing moves
            hoptim.outer_step(problem, outer, result.grads)
        if (step + 1) % (steps // 5) == 0:
            print(f"meta-step {step + 1}: loss after one gradient step {result.val_loss:.2f}, {result.solution.status.name}")
    return problem, inner


def together(steps):
    """Weights that are trained on all sinusoids at once, by as many steps."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, None, sinusoids(25)[0]).backward()
        optimizer.step()
    return setting(model)


def test_losses(problem, inner, tasks):
    """The mean loss on new tasks after 0, 1, 5 and 10 gradient steps."""
    train, (x, y) = tasks
    problem.hparams.write(problem.model)
    found = {0: [problem.model] * len(x)}
    found |= {steps: hoptim.PerTask(steps).adapt(problem, train, inner=inner) for steps in (1, 5, 10)}
    with torch.no_grad():
        return {
            steps: torch.stack([F.mse_loss(model(a), b) for model, a, b in zip(models, x, y, strict=True)]).mean().item()
            for steps, models in found.items()
        }


def counted(steps):
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def draw(ways, out):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    x, (height, phase) = torch.linspace(-5, 5, 200)[:, None], (3.5, 1.0)
    points = torch.rand(SHOTS, 1) * 5  # in the right half alone
    task = points[None], height * (points[None] - phase).sin()
    figure, axes = plt.subplots(1, len(ways), figsize=(12, 3), sharey=True, layout="constrained")
    for axis, (name, (problem, inner)) in zip(axes, ways.items(), strict=True):
        axis.plot(x, height * (x - phase).sin(), color="0.7", linewidth=3, label="the sinusoid")
        axis.plot(points, task[1][0], "k^", label="points seen")
        problem.hparams.write(problem.model)
        for steps, style in ((0, ":"), (1, "--"), (10, "-")):
            model = hoptim.PerTask(steps).adapt(problem, task, inner=inner)[0] if steps else problem.model
            axis.plot(x, model(x).detach(), style, color="C0", label=f"after {counted(steps)}")
        axis.set(title=name, xlabel="x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("maml.png"), help="the picture; default: maml.png")
    parser.add_argument("--steps", type=int, default=2000, help="meta-steps; default: 2000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways = {"learned": learned(options.steps), "trained together": together(options.steps), "random": setting(network())}
    tasks = sinusoids(200)
    for name, way in ways.items():
        found = test_losses(*way, tasks)
        print(f"{name}: " + ", ".join(f"after {counted(steps)} {value:.2f}" for steps, value in found.items()))
    draw(ways, options.out)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
